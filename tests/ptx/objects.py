"""Builds what is translated from PTX (translate.py).

    python tests/ptx/objects.py       # the CUDA extension; prints its path

The extension is linked from the objects of the package's own build, host code and launches
included, but with runtime.cpp in the place of the CUDA runtime. Objects are kept by content.
"""

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cuda_resources
from translate import translate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHIM = HERE.parent / "cuda_shim"
STAGE = ROOT / "build" / "ptx"
CXX = os.environ.get("CXX", "c++")
# No contraction: a product and a sum are one instruction only where PTX says fma.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-march=native", "-ffp-contract=off", "-w"]
NEEDED = (HERE / "launch.cpp", SHIM / "fibers.cpp")  # beside the kernels
HEADERS = sorted([*HERE.glob("*.h"), *SHIM.glob("*.h")])


def run(*command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def compiled(source: str, compiler: tuple = (CXX, *FLAGS)) -> Path:
    """The object of C++ source. Processes may build the same one."""
    parts = [source, *compiler, *(header.read_text() for header in HEADERS)]
    out = STAGE / f"{hashlib.sha256(''.join(parts).encode()).hexdigest()[:24]}.o"
    if not out.exists():
        STAGE.mkdir(parents=True, exist_ok=True)
        mine = out.with_suffix(f".{os.getpid()}.o")
        text = mine.with_suffix(".cpp")
        text.write_text(source)
        run(*compiler, f"-I{SHIM}", f"-I{HERE}", "-c", text, "-o", mine)
        mine.rename(out)
        text.unlink()
    return out


def linked(ptx: str) -> Path:
    """A library of the kernels in a text of PTX, which exports ptx_launch."""
    objects = [compiled(translate(ptx)), *(compiled(file.read_text()) for file in NEEDED)]
    out = objects[0].with_suffix(".so")
    if not out.exists():
        mine = out.with_suffix(f".{os.getpid()}.so")
        run(CXX, "-shared", *objects, "-o", mine)
        mine.rename(out)
    return out


def translated(kernels: Path) -> list[Path]:
    """The objects of the PTX in an object of nvcc."""
    text = run(cuda_resources.tool("cuobjdump"), "-ptx", kernels)
    modules = re.split(r"^Fatbin .* code:$", text, flags=re.M)
    return [compiled(translate(m[m.index(".version") :])) for m in modules if ".version" in m]


def extension() -> Path:
    stages = ROOT.glob(f"build/cmake-*-{sys.implementation.cache_tag}")
    objects = sorted(o for s in stages for o in s.glob("CMakeFiles/*cuda*.dir/csrc/cuda/*.o"))
    if not objects:
        sys.exit("no objects of the CUDA extension under build/: pip install -e . with nvcc")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = list(pool.map(translated, [o for o in objects if ".cu." in o.name]))
        rest = list(pool.map(compiled, [file.read_text() for file in NEEDED]))
    runtime = (HERE / "runtime.cpp").read_text()  # nvcc knows where its headers are
    rest.append(compiled(runtime, ("nvcc", "-std=c++20", "-O1", "-Xcompiler", "-fPIC")))
    out = STAGE / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    run(CXX, "-shared", "-o", out, *objects, *rest, *(o for part in parts for o in part))
    return out


if __name__ == "__main__":
    print(extension())
