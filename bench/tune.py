"""Launch parameters side by side on this GPU: `python bench/tune.py --ops sparse_kl`.

Every candidate is checked against float64, then all are timed in interleaved rounds beside the
roof, and printed from the fastest. Changes and writes nothing: what is better here goes by hand
into the launchers (cuda_kernels.py, triton_table.py, triton_common.py and the .cu files).
"""

import argparse
import contextlib
import importlib
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import results
from cases import FLOOR, SUBJECT, Provider
from gpu import timing
from gpu.case import GpuCase
from gpu.device import Device, choose, require

AS_IT_IS = "as it is"


@dataclass
class Knob:
    """`attribute` of a module of mdkernels.ops that a launcher reads at every call; its `values`
    by the name that the table shows. A dict is updated in place, since others hold it too."""

    module: str
    attribute: str
    values: dict[str, Any]

    @contextlib.contextmanager
    def turned(self, value: Any) -> Iterator[None]:
        module = importlib.import_module(f"mdkernels.ops.{self.module}")
        before = getattr(module, self.attribute)
        if isinstance(before, dict):
            kept = dict(before)
            before.update(value)
        else:
            setattr(module, self.attribute, value)
        try:
            yield
        finally:
            if isinstance(before, dict):
                before.update(kept)
            else:
                setattr(module, self.attribute, before)


def _grid(*choices: tuple, names: str) -> dict[str, tuple]:
    return {
        ", ".join(f"{value} {name}" for value, name in zip(values, names.split(), strict=True)): (
            values
        )
        for values in itertools.product(*choices)
    }


def _chunked(values: dict[str, tuple]) -> dict[str, tuple]:
    return {name: (*value, 0) for name, value in values.items()}  # 0: the longest that fits


def _triton_rows() -> dict[str, tuple]:
    from mdkernels.ops.sparse_kl.triton_table import Launch

    return {
        f"{block} KB, {warps} warps": ((1 << 62, Launch(block << 10, warps)),)
        for block, warps in itertools.product((16, 32, 64), (8, 16, 32))
    }


def knobs(op: str, backend: str) -> Knob | None:
    """What can be turned, or None."""
    rows = _grid((128, 256, 512, 1024), (1, 2, 4, 8), names="threads blocks")
    if (op, backend) == ("sparse_kl", "cuda"):
        return Knob("sparse_kl.cuda_kernels", "LAUNCH", _chunked(rows))
    if (op, backend) == ("token_logprobs", "cuda"):
        return Knob("token_logprobs.cuda_kernels", "LAUNCH", rows)
    if (op, backend) == ("sparse_kl", "triton"):
        return Knob("sparse_kl.triton_table", "TABLE", _triton_rows())
    if backend == "cuda" and op.startswith(("logit_mix", "mix_")):
        shapes = _grid((128, 192, 256, 320), (1, 2, 4, 8), names="threads blocks")
        return Knob("logit_mix.cuda_kernels", "LAUNCH", shapes)
    if backend == "triton" and op.startswith(("logit_mix", "mix_")):
        warps = {f"{count} warps": {"num_warps": count} for count in (1, 2, 4, 8)}
        return Knob("logit_mix.triton_common", "LAUNCH", warps)
    return None


def _turned(knob: Knob, value: Any, function: Callable) -> Callable:
    def call():
        with knob.turned(value):
            return function()

    return call


def samplers(case: GpuCase, device: Device, suite: str) -> Iterator[timing._Sampler]:
    """The roof and every candidate of ours that is right, each checked as it will be timed."""
    budget = timing.BUDGETS[suite]
    for provider in case.providers:
        if provider.role == FLOOR:
            provider.call()
            yield timing._Sampler(provider, provider.call, device, budget)
        if provider.role != SUBJECT:
            continue
        yield from _candidates(case, provider, device, budget)


def _candidates(case: GpuCase, provider: Provider, device: Device, budget) -> Iterator:
    backend = provider.name.partition("_")[0]
    knob = knobs(case.op, backend)
    named = {AS_IT_IS: (provider.call, lambda: case.check(provider))}
    for name, value in (knob.values if knob else {}).items():
        call = _turned(knob, value, provider.call)
        named[name] = call, _turned(knob, value, lambda: case.check(provider))
    for name, (call, check) in named.items():
        title = f"{provider.name}: {name}"
        try:
            check()
            device.synchronize()
            yield timing._Sampler(replace(provider, name=title), call, device, budget)
        except (RuntimeError, ValueError, AssertionError) as error:  # a launch the device cannot do
            print(f"  left out {title}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
        device.release()


def table(case: GpuCase, measured: list) -> str:
    floor = [s for s in measured if s.provider.role == FLOOR]
    lines = [f"{case.key}: ms, share of the roof"]
    for sampler in sorted(measured, key=lambda s: statistics.median(s.seconds)):
        ratio = timing._ratio(floor[0], sampler)["median"] if floor else float("nan")
        median = statistics.median(sampler.seconds) * 1e3
        lines.append(f"  {median:10.4f} {ratio:7.1%}  {sampler.provider.name}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--ops", nargs="+", choices=results.OPS, required=True, metavar="OP")
    parser.add_argument("--cases", default="", metavar="TEXT", help="cases with this text only")
    parser.add_argument("--suite", choices=("smoke", "full"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: smoke only")
    args = parser.parse_args()
    if (args.device == "cpu") != (args.suite == "smoke"):
        parser.error("--device cpu is a stand-in for --suite smoke, which needs it")
    require(args.device)
    device = choose(args.device)
    for op in args.ops:
        for plan in importlib.import_module(f"gpu.{op}").plans(args.suite, device):
            if args.cases not in plan.key:
                continue
            case = plan.build()
            measured = list(samplers(case, device, args.suite))
            timing._rounds(measured, timing.BUDGETS[args.suite], 3 * case.seconds)
            print(table(case, measured), flush=True)
            del case, measured
            device.release()


if __name__ == "__main__":
    main()
