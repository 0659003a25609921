"""The device that is measured: clock, cold caches, graphs, peak memory, launches, environment.

`StandIn` gives a CPU the same interface, without graphs and counters, so that every line of the
harness but these classes runs where there is no GPU. Its times mean nothing.
"""

import abc
import gc
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable

import machine
import torch

import mdkernels
from mdkernels.ops import dispatch

GRAPH_WARMUPS = 3
HOST_CYCLES = 2_000_000  # of the device: about a millisecond, longer than queueing one call takes


class Device(abc.ABC):
    """What both kinds share, and what each has to do in its own way."""

    type = ""
    regimes: tuple[str, ...] = ()

    def environment(self) -> dict:
        return {
            "date": machine.now(),
            "commit": machine.commit(),
            "sources": machine.sources(),
            "mdkernels": mdkernels.__version__,
            "torch": torch.__version__,
            "triton": machine.version("triton"),
            "python": platform.python_version(),
            "cpu": machine.cpu().get("model name", platform.machine()),
            "cores": len(os.sched_getaffinity(0)),
            **self.description(),
        }

    def backends(self, op: str) -> list[str]:
        """Our backends of `op` that run on this device, fastest first as dispatch orders them."""
        order = dispatch.PRIORITY.get(self.type, dispatch.FALLBACK)
        rows = {row.backend for row in mdkernels.backends() if row.op == op and row.available}
        found = [name for name in order if name in rows and name != "reference"]
        return found or ["reference"]

    @abc.abstractmethod
    def peak(self, call: Callable, prepare: Callable | None) -> int | None:
        """How far one call raises allocated memory; None where that cannot be read."""

    @abc.abstractmethod
    def description(self) -> dict:
        """What identifies the device in the results."""


class Cuda(Device):
    """Times are those of CUDA events; caches are cold before every sample."""

    type = "cuda"
    regimes = ("stream", "graph")

    def __init__(self):
        self.properties = torch.cuda.get_device_properties(0)
        # Twice the L2, so that nothing of the last sample stays in it.
        self.flusher = torch.empty(2 * self._l2_bytes(), dtype=torch.uint8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def _l2_bytes(self) -> int:
        return max(getattr(self.properties, "L2_cache_size", 0), 32 << 20)

    @property
    def name(self) -> str:
        words = re.findall(r"[a-z0-9]+", self.properties.name.lower())
        return "-".join(words if words[:1] == ["nvidia"] else ["nvidia", *words])

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def alive(self) -> bool:
        """Whether the context survived the last error; an illegal access ends it for good."""
        try:
            torch.cuda.synchronize()
            return bool(torch.ones(1, device="cuda").item() == 1.0)
        except Exception:  # whatever it is, this process has lost its device
            return False

    def seconds(self, call: Callable, times: int, prepare: Callable | None) -> float:
        """Of one of `times` calls. The device is kept busy while the host queues the first kernels,
        so that a single call is timed without its launch latency. Many short calls are not: they
        come as fast as the host can launch them, which is what the `graph` regime takes away."""
        if prepare is not None:
            prepare()
        self.flusher.fill_(1)
        torch.cuda._sleep(HOST_CYCLES)
        self.start.record()
        for _ in range(times):
            call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3 / times

    def graph(self, call: Callable) -> Callable:
        """A replay of `call` as one CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARMUPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay():
            graph.replay()
            return kept  # its memory belongs to the graph

        return replay

    def peak(self, call, prepare) -> int:
        """How far one call raises allocated memory above what is allocated before it."""
        if prepare is not None:
            prepare()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call) -> int:
        """Kernels, copies and fills that one call puts on the device."""
        from torch.profiler import ProfilerActivity, profile

        call()
        torch.cuda.synchronize()
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities) as recorded:
            call()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == on_device for event in recorded.events())

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def description(self) -> dict:
        fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"
        free, total = torch.cuda.mem_get_info()
        return {
            "gpu": self.properties.name,
            "capability": f"{self.properties.major}.{self.properties.minor}",
            "multiprocessors": self.properties.multi_processor_count,
            "l2_mb": round(self._l2_bytes() / 2**20),
            "memory_gb": round(total / 2**30, 1),
            "memory_free_gb": round(free / 2**30, 1),
            "cuda": torch.version.cuda,
            "nvidia_smi": dict(zip(fields.split(","), _nvidia_smi(fields), strict=False)),
        }


def _nvidia_smi(fields: str) -> list[str]:
    """Read only; [] where the tool is missing or refuses."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [field.strip() for field in done.stdout.strip().split(",")] if not done.returncode else []
    )


class StandIn(Device):
    """A CPU in the place of the GPU."""

    type = "cpu"
    regimes = ("stream",)
    name = "cpu-stand-in"

    def synchronize(self) -> None:
        pass

    def alive(self) -> bool:
        return True

    def seconds(self, call, times: int, prepare) -> float:
        if prepare is not None:
            prepare()
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    def peak(self, call, prepare) -> None:
        return None

    def launches(self, call) -> None:
        return None

    def release(self) -> None:
        pass

    def description(self) -> dict:
        return {"gpu": "none: a CPU stands in", "capability": "", "cuda": torch.version.cuda}


def choose(kind: str) -> Device:
    """Of `--device`: "cuda", or "cpu" for the stand-in."""
    require(kind)
    return StandIn() if kind == "cpu" else Cuda()


def require(kind: str) -> None:
    """Exit with a message if there is no such device. Does not open it."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda: no CUDA device is visible to torch "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda or 'none: a CPU build'})"
        )
