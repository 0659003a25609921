"""Harvesting docstrings: what is found, what counts as a near-duplicate, how files are split."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mdkernels.demo import docstrings as parser
from mdkernels.demo import harvest as stage
from mdkernels.demo.harvest import File

LONG = "Return the product of both arguments, computed in the precision of the wider one of them. "
SOURCE = f'''
"""Module text. {LONG}"""

class A:
    """Class text. {LONG}"""

    def short(self):
        """Too short."""

    async def method(self):
        r"""Method text. {LONG}
            indented by four
        """
        if self:
            def nested():
                """Nested text. {LONG}"""

text = """{LONG} is an expression, not documentation {LONG}"""

match text:
    case str():
        def branch():
            """Branch text. {LONG}"""
'''


def words(prefix: str, count: int) -> str:
    return " ".join(f"{prefix}{i}" for i in range(count))


def test_docstrings_of_every_kind_in_source_order():
    found = parser.docstrings(SOURCE.encode())
    assert [text.split()[0] for text in found] == ["Module", "Class", "Method", "Nested", "Branch"]
    assert found[2].endswith("\nindented by four")  # cleaned of the indentation of its block


def test_a_lone_surrogate_cannot_break_the_output_file():
    source = f'"""Escapes: \\ud800. {LONG}"""'
    (text,) = parser.docstrings(source.encode())
    assert "?" in text
    text.encode("utf-8")


@pytest.fixture
def tree(tmp_path):
    """Three packages; one file cannot be parsed, one has nothing, one lies in a test folder."""
    files = {
        "general/a.py": SOURCE,
        "general/broken.py": f'def f(:\n    """{LONG}"""',
        "general/binary.py": b'"""\xff\xfe"""',
        "general/plain.py": "x = 1\n",
        "general/tests/test_a.py": f'"""Of a test. {words("t", 60)}"""',
        "other/b.py": f'"""Other. {words("o", 60)}"""',
        "domain/__init__.py": f'"""Copied. {LONG}"""\n',
        "domain/sub/c.py": f'"""Own. {words("c", 60)}"""',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        (path.parent / "__init__.py").touch()
    return tmp_path


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_parse_files_keeps_order_and_survives_bad_files(tree, processes):
    paths = stage.source_files(tree / "general") + stage.source_files(tree / "other")
    found = parser.parse_files(paths, processes)
    assert [path.name for path in found] == ["a.py", "b.py"]
    assert len(found[tree / "general/a.py"]) == 5
    assert not any("tests" in path.parts[-2:] for path in paths)


def test_harvest_of_a_tree(tree, monkeypatch):
    monkeypatch.syspath_prepend(str(tree))
    found = stage.harvest(("general", "other"), "domain", processes=2)
    assert {file.name for file in found.general} == {"general/a.py", "other/b.py"}
    # Within a.py all texts are variations of one; the domain's copy of it is dropped as well.
    assert found.dropped == {"general": 4, "domain": 1}
    assert [f.name for files in found.splits.values() for f in files] == ["domain/sub/c.py"]
    assert "domain" not in sys.modules  # read, never imported
    again = stage.harvest(("general", "other"), "domain", processes=1)
    assert again == found


def test_harvest_names_a_missing_package():
    with pytest.raises(ValueError, match="package 'not_a_package' is not installed"):
        stage.harvest(("not_a_package",), "torch")


def test_near_duplicates_by_share_of_known_ngrams():
    seen: set[int] = set()
    first = File("p/a.py", (words("a", 40),))
    half_known = File("p/b.py", (words("a", 23) + " " + words("b", 17),))  # 16 of 33 known
    mostly_known = File("p/c.py", (words("a", 26) + " " + words("c", 14),))  # 19 of 33 known
    kept, dropped = stage.drop_near_duplicates([first, half_known, mostly_known], seen)
    assert [file.name for file in kept] == ["p/a.py", "p/b.py"]
    assert dropped == 1
    kept, dropped = stage.drop_near_duplicates([first], seen)  # `seen` carries over
    assert kept == []
    assert dropped == 1


def test_a_text_shorter_than_an_ngram_is_one_ngram():
    seen: set[int] = set()
    twice = File("p/a.py", ("only five words in here", "only five words in here"))
    kept, dropped = stage.drop_near_duplicates([twice], seen)
    assert kept == [File("p/a.py", ("only five words in here",))]
    assert dropped == 1


def test_split_is_by_file_stable_and_covers_everything():
    files = [File(f"p/{i}.py", (words(f"w{i}_", 20),)) for i in range(2000)]
    splits = stage.split_files(files)
    names = [file.name for split in stage.SPLITS for file in splits[split]]
    assert sorted(names) == sorted(file.name for file in files)
    assert 0.07 < len(splits["valid"]) / 2000 < 0.11
    assert 0.09 < len(splits["test"]) / 2000 < 0.13
    # A file keeps its split when others come and go.
    fewer = stage.split_files(files[::2])
    for split in stage.SPLITS:
        assert set(fewer[split]) <= set(splits[split])


def test_a_file_that_would_dominate_a_score_goes_to_train():
    files = [File(f"p/{i}.py", (words("w", 20),)) for i in range(100)]
    held_out = stage.split_files(files)["test"][0]
    large = File(held_out.name, (words("w", 2000),))
    splits = stage.split_files([large if f.name == held_out.name else f for f in files])
    assert large in splits["train"]


def test_a_prefix_of_the_shuffle_is_no_alphabetical_slice():
    files = [File(f"p/{i:04}.py", ("text",)) for i in range(1000)]
    prefix = {file.name for file in stage.shuffled(files)[:200]}
    first_half = sum(name < "p/0500.py" for name in prefix)
    assert 60 < first_half < 140


def test_the_parser_runs_without_the_package():
    """It is started as a script; an import of torch there would cost more than the parsing."""
    code = (
        f"import runpy, sys; runpy.run_path({parser.__file__!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)
    assert Path(parser.__file__).name == "docstrings.py"


def test_ctrl_c_ends_the_workers_without_a_word(tmp_path):
    """A terminal sends Ctrl-C to the whole group; the worker reads a file that never ends."""
    source = tmp_path / "endless.py"
    os.mkfifo(source)
    code = (
        "from pathlib import Path\n"
        "from mdkernels.demo.docstrings import parse_files\n"
        f"try: parse_files([Path({str(source)!r})])\n"
        "except KeyboardInterrupt: print('stopped')\n"
    )
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", code]
    # open() returns once the worker has opened the file too.
    with subprocess.Popen(command, **pipes, start_new_session=True) as process, open(source, "wb"):
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == (b"stopped\n", b"", 0)
