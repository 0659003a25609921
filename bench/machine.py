"""The machine: its description, who else is using it, and how much memory a call needs."""

import ctypes
import datetime
import gc
import glob
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

import mdkernels
from mdkernels.ops import native

REPOSITORY = Path(__file__).resolve().parents[1]


class OtherLoad:
    """CPU time that disturbs this process: what other processes ran, plus what the threads of this
    one waited for a CPU. From /proc/*/task/*/schedstat; None where the kernel has no schedstats.

    A hypervisor's steal time is invisible. A process that lives shorter than REFRESH seconds may be
    missed, but is then seen as waiting time where it displaces one of our threads.
    """

    REFRESH = 0.5

    def __init__(self):
        self.files: dict[str, int] = {}
        self.last: dict[str, tuple[int, int]] = {}
        self.listed = float("-inf")
        self.available = os.path.exists("/proc/self/schedstat")
        self.own = f"/proc/{os.getpid()}/"

    def _list(self) -> None:
        if time.monotonic() - self.listed < self.REFRESH:
            return
        current = set(glob.glob("/proc/[0-9]*/task/*/schedstat"))
        for path in self.files.keys() - current:
            os.close(self.files.pop(path))
        for path in current - self.files.keys():
            try:
                self.files[path] = os.open(path, os.O_RDONLY)
            except OSError:  # it ended between the listing and here
                continue
        self.listed = time.monotonic()

    def _read(self) -> dict[str, int]:
        """Disturbing nanoseconds so far, per thread."""
        total = {}
        for path, file in self.files.items():
            try:
                fields = os.pread(file, 64, 0).split()
            except ProcessLookupError:
                continue
            total[path] = int(fields[1] if path.startswith(self.own) else fields[0])
        return total

    def mark(self) -> tuple[float, dict[str, int]] | None:
        if not self.available:
            return None
        self._list()
        return time.perf_counter(), self._read()

    def share_since(self, mark) -> float | None:
        """Disturbing CPU time since `mark`, as a share of one CPU."""
        if mark is None:
            return None
        start, before = mark
        wall = time.perf_counter() - start
        after = self._read()
        busy = sum(after[path] - before[path] for path in after.keys() & before.keys())
        return busy / 1e9 / wall

    def close(self) -> None:
        for file in self.files.values():
            os.close(file)
        self.files.clear()


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE).group(1)) * 1024


def peak_increment(call, prepare=None) -> int | None:
    """How far one call raises resident memory above what is resident before it, in bytes.

    Free heap memory is first given back to the system, so that a reused block counts like a fresh
    one. None where /proc/self/clear_refs cannot be written (some sandboxes).
    """
    if prepare is not None:
        prepare()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def cpu() -> dict:
    """Vendor, family, model name and instruction set flags of the first processor."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields


def device_name() -> str:
    """Such as amd-epyc-zen5-2core: the folder of this kind of machine under results/."""
    info = cpu()
    name = re.sub(r"\(.*?\)|CPU|Processor|@.*", "", info.get("model name", platform.machine()))
    family = (info.get("vendor_id"), info.get("cpu family"))
    wide = "avx512f" in info.get("flags", "").split()
    zen = {"23": "zen2", "25": "zen4" if wide else "zen3", "26": "zen5"}
    kind = zen.get(family[1], "") if family[0] == "AuthenticAMD" else ""
    words = re.findall(r"[a-z0-9]+", f"{name} {kind}".lower())
    return "-".join([*words, f"{len(os.sched_getaffinity(0))}core"])


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")


def version(package: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def sources() -> str:
    """A digest of everything that decides over a result; unlike the commit it needs no git, and it
    tells one state of uncommitted work from the next."""
    digest = hashlib.sha256()
    for pattern in ("mdkernels/**/*.py", "csrc/**/*.*", "bench/**/*.py", "CMakeLists.txt"):
        for path in sorted(REPOSITORY.glob(pattern)):
            if path.name != "_build_info.py":  # written by the build
                digest.update(path.relative_to(REPOSITORY).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit, with "+" when the tree differs from it; "unknown" outside a git checkout."""
    try:
        git = ["git", "-C", str(REPOSITORY)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode != 0:
            return "unknown"
        # Sources only: rewriting the results must not make the next op's results look dirty.
        paths = ["mdkernels", "csrc", "CMakeLists.txt", "setup.py", ":!bench/results", "bench"]
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *paths], capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown"
    return head.stdout.strip()[:12] + ("+" if changed.stdout.strip() else "")


def _setting(path: str) -> str | None:
    """The bracketed choice of a file such as /sys/kernel/mm/transparent_hugepage/enabled."""
    if not os.path.exists(path):
        return None
    text = Path(path).read_text().strip()
    chosen = re.search(r"\[(.+?)\]", text)
    return chosen.group(1) if chosen else text


def environment(regime: str, settings: dict[str, str]) -> dict:
    """What a figure depends on, for the results file."""
    info = cpu()
    extension = native.load("_cpu")
    huge = "/sys/kernel/mm/transparent_hugepage"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": now(),
        "commit": commit(),
        "mdkernels": mdkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release().split("-")[0],
        "libc": " ".join(platform.libc_ver()),
        "cpu": info.get("model name", platform.machine()),
        "cpu_family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages / 2**30, 1),
        "threads": torch.get_num_threads(),
        "isa": extension.module.isa() if extension.module else None,
        "regime": regime,
        "regime_settings": settings,
        "transparent_hugepage": _setting(f"{huge}/enabled"),
        "transparent_hugepage_defrag": _setting(f"{huge}/defrag"),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "load_detection": os.path.exists("/proc/self/schedstat"),
    }
