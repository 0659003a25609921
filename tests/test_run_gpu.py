"""The runner of the GPU tests counts; no crash and no hang costs another file its result."""

import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).with_name("run_gpu.py")
FILES = {
    "test_good.py": "def test_a(): pass\ndef test_b(): pass\n",
    "test_bad.py": "import pytest\ndef test_a(): assert 0\ndef test_b(): pytest.skip('why')\n",
    "test_crash.py": "import os\ndef test_a(): os.abort()\n",
    "test_hang.py": "import time\ndef test_a(): time.sleep(99)\n",
    "test_none.py": "import pytest\n@pytest.mark.skipif(True, reason='x')\ndef test_a(): pass\n",
}


def run(folder: Path, *names: str, seconds: int = 90) -> subprocess.CompletedProcess:
    for name in names:
        (folder / name).write_text(FILES[name])
    command = [sys.executable, str(RUNNER), "--marker", "not gpu", "--jobs", "1"]
    command += ["--seconds", str(seconds), "--out", str(folder / "out")]
    paths = [str(folder / name) for name in names]
    return subprocess.run([*command, *paths], capture_output=True, text=True, timeout=100)


def test_counts_and_names_what_has_no_result(tmp_path):
    done = run(tmp_path, "test_good.py", "test_bad.py", "test_crash.py")
    assert "3 GPU tests ran: 2 passed, 1 failed; 1 skipped" in done.stdout
    assert "the process ended with status -6" in done.stdout
    assert "without a result: test_crash.py" in done.stdout
    assert "assert 0" in done.stdout
    assert done.returncode == 1


def test_ends_a_process_that_hangs(tmp_path):
    done = run(tmp_path, "test_hang.py", seconds=5)
    assert "no end after 5 s" in done.stdout
    assert "without a result: test_hang.py" in done.stdout
    assert done.returncode == 1


def test_succeeds_only_if_something_ran(tmp_path):
    assert run(tmp_path, "test_good.py").returncode == 0
    done = run(tmp_path, "test_none.py")
    assert "0 GPU tests ran" in done.stdout
    assert done.returncode == 1
