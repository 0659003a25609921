"""Build the torch-free native extensions with CMake and place every .so in the package.

Environment: MDK_CUDA=AUTO|ON|OFF, MDK_CUDA_ARCHS, MDK_OPENMP=ON|OFF, MDK_SANITIZE=1, MAX_JOBS,
CUDACXX, CUDA_HOME.
The build imports neither torch nor CUDA Python packages, so one wheel serves every torch.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "mdkernels"
# What CMake reads in the first configuration of a stage only.
SETTINGS = (
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "CUDAFLAGS",
    "CUDAHOSTCXX",
    "MDK_CUDA_ARCHS",
    "MDK_OPENMP",
)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX")]
    candidates += [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


def cuda_mode() -> str:
    mode = os.environ.get("MDK_CUDA", "AUTO").upper()
    if mode not in ("AUTO", "ON", "OFF"):
        raise ValueError(f"MDK_CUDA is {mode!r}; expected AUTO, ON or OFF")
    return mode


class CMakeBuild(build_ext):
    """Builds all targets into one stage directory, then copies every .so.

    Copying all files (instead of only the declared extension) is what makes editable installs
    complete: setuptools would otherwise carry over the named extension alone.
    """

    def run(self) -> None:
        # Fixed and outside pip's throw-away build_temp, so that a second build is incremental.
        sanitize = os.environ.get("MDK_SANITIZE", "") not in ("", "0")
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.stage = ROOT / "build" / f"cmake-{tag}{'-sanitize' if sanitize else ''}"
        mode, nvcc = cuda_mode(), find_nvcc()
        has_cuda_sources = any((ROOT / "csrc" / "cuda").glob("*.cu"))
        want_cuda = mode != "OFF" and nvcc is not None and has_cuda_sources
        if mode == "ON" and not want_cuda:
            missing = (
                "no nvcc was found" if nvcc is None else "this source tree has no CUDA kernels"
            )
            raise RuntimeError(f"MDK_CUDA=ON, but {missing}; set CUDACXX or CUDA_HOME, or AUTO")
        note = "built" if want_cuda else f"not built (MDK_CUDA={mode}, nvcc={nvcc or 'not found'})"
        try:
            self.configure(want_cuda, nvcc, sanitize)
            self.cmake_build("cpu_all", *(["cuda_all"] if want_cuda else []))
        except subprocess.CalledProcessError:
            if not want_cuda or mode == "ON":
                raise
            print("warning: the CUDA part did not build; continuing with the CPU part only")
            note = "failed to build (MDK_CUDA=AUTO; rebuild with MDK_CUDA=ON to see the error)"
            shutil.rmtree(self.stage, ignore_errors=True)
            self.configure(False, None, sanitize)
            self.cmake_build("cpu_all")
            want_cuda = False
        self.place(want_cuda, note)

    def configure(self, cuda: bool, nvcc: str | None, sanitize: bool) -> None:
        import pybind11

        ninja = shutil.which("ninja")
        # An isolated build has pybind11, cmake and ninja in a place of its own each time. They are
        # named on every call, so that the stage can stay.
        settings = [os.environ.get(name) for name in SETTINGS]
        key = f"{ROOT}|{sys.executable}|{nvcc if cuda else None}|{ninja is None}|{settings}"
        stamp = self.stage / "mdk-stage-key"
        if self.stage.exists() and (not stamp.exists() or stamp.read_text() != key):
            shutil.rmtree(self.stage)
        self.stage.mkdir(parents=True, exist_ok=True)
        stamp.write_text(key)
        command = ["cmake", "-S", str(ROOT), "-B", str(self.stage), "-DCMAKE_BUILD_TYPE=Release"]
        if ninja:
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        command += [
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMDK_BUILD_CUDA={'ON' if cuda else 'OFF'}",
            f"-DMDK_SANITIZE={'ON' if sanitize else 'OFF'}",
            f"-DMDK_OPENMP={os.environ.get('MDK_OPENMP', 'ON')}",
        ]
        if cuda:
            command += [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
            if archs := os.environ.get("MDK_CUDA_ARCHS"):
                command += [f"-DMDK_CUDA_ARCHS={archs}"]
        subprocess.run(command, check=True)

    def cmake_build(self, *targets: str) -> None:
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 2)
        command = ["cmake", "--build", str(self.stage), "--target", *targets, "-j", jobs]
        subprocess.run(command, check=True)

    def place(self, cuda: bool, note: str) -> None:
        if self.inplace:
            package_dir = self.get_finalized_command("build_py").get_package_dir(PACKAGE)
            destination = ROOT / package_dir
        else:
            destination = Path(self.build_lib) / PACKAGE
        destination.mkdir(parents=True, exist_ok=True)
        for stale in destination.glob("_c*.so"):
            stale.unlink()
        self.placed = []
        for name in ["_cpu"] + (["_cuda"] if cuda else []):
            (built,) = (self.stage / "lib").glob(f"{name}.*so")
            shutil.copy2(built, destination / built.name)
            self.placed.append(str(destination / built.name))
        info = destination / "_build_info.py"
        info.write_text(
            f'"""Written by setup.py."""\n\nCUDA = {note!r}\nPYTHON = {sys.version.split()[0]!r}\n'
        )
        self.placed.append(str(info))

    def get_outputs(self):
        return self.placed

    def get_output_mapping(self):
        return {}


setup(
    ext_modules=[Extension(f"{PACKAGE}._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
