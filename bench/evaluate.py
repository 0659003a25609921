"""The mixture's NLL on a batch of windows: the authors' joint evaluation against ours.

A batch is `--windows` windows of 1024 tokens of which 512 are scored, V = 50257; hidden states are
those of GPT-2 XL and GPT-2 in width. Two starting points, equal for both sides: the logits of both
models at all positions, and their last hidden states, which adds the LM heads (theirs on all
positions, ours on the scored ones). The trunks are left out: they are the same. From hidden states
the heads' products are most of the time on both sides, which leaves less to save.

Their chain is rebuilt from a description: shifted contiguous copies of both models' logits, two
log-softmaxes, two additions of a log weight and a logaddexp, each over all N positions and the
whole vocabulary, to pick one number a row. These are seven full-size operators; an audit of the
released script counts twelve or thirteen, so what is left out is to the advantage of the baseline.

The mix-weight curve costs ours one such pass, and the chain one evaluation for each of 20 weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import end_to_end
import machine
import torch
import torch.nn.functional as F
from cases import WrongResult
from torch import Tensor

from mdkernels import linear_token_logprobs, token_logprobs
from mdkernels.mix_weight import fit_mix_weight, mixture_logprobs, weight_curve

FULL = {"length": 1024, "scored": 512, "vocab": 50257, "widths": (1600, 768)}
SMOKE = {"length": 64, "scored": 32, "vocab": 1009, "widths": (32, 16)}
IGNORED = -100
MIX_WEIGHT = 0.55
WEIGHTS = [(i + 0.5) / 20 for i in range(20)]


def official_chain(base: Tensor, memory: Tensor, labels: Tensor, weight: float) -> list[Tensor]:
    """Mean NLL of base, memory and mixture. Logits (B, T, V), labels (B, T) unshifted, fp32 out."""
    vocab = base.shape[-1]
    shifted = [logits[:, :-1].contiguous().view(-1, vocab) for logits in (base, memory)]
    targets = labels[:, 1:].contiguous().view(-1)
    base, memory = (F.log_softmax(logits.float(), dim=-1) for logits in shifted)
    mixed = torch.logaddexp(base + math.log(1 - weight), memory + math.log(weight))
    return [F.nll_loss(rows, targets, ignore_index=IGNORED) for rows in (base, memory, mixed)]


class Batch:
    """Random hidden states, heads and their logits; logits about as peaked as a language model's.

    `targets` are the labels of the rows that positions predict: labels shifted by one, the last
    position of a window predicting nothing.
    """

    def __init__(self, setting: dict, windows: int, device: str, dtype: torch.dtype):
        draw = torch.Generator().manual_seed(0)
        length, vocab = setting["length"], setting["vocab"]
        labels = torch.randint(0, vocab, (windows, length), generator=draw)
        labels[:, : length - setting["scored"]] = IGNORED
        self.hidden, self.heads, self.logits = [], [], []
        for width in setting["widths"]:
            hidden = torch.randn(windows, length, width, generator=draw)
            head = torch.randn(vocab, width, generator=draw) * (3.0 / width**0.5)
            self.hidden.append(hidden.to(device, dtype))
            self.heads.append(head.to(device, dtype))
            self.logits.append(F.linear(self.hidden[-1], self.heads[-1]))
        self.labels = labels.to(device)
        ends = self.labels.new_full((windows, 1), IGNORED)
        self.targets = torch.cat([self.labels[:, 1:], ends], dim=1).view(-1)
        self.scored = (self.targets != IGNORED).nonzero().squeeze(1)
        self.scored_targets = self.targets[self.scored]
        everything = torch.randint(0, vocab, (windows * length,), generator=draw)
        self.all_targets = everything.to(device)

    def official_from_logits(self, weight: float = MIX_WEIGHT) -> list[Tensor]:
        return official_chain(*self.logits, self.labels, weight)

    def official_from_hidden(self) -> list[Tensor]:
        logits = [F.linear(*pair) for pair in zip(self.hidden, self.heads, strict=True)]
        return official_chain(*logits, self.labels, MIX_WEIGHT)

    def gold_from_logits(self, targets: Tensor | None = None) -> list[Tensor]:
        """Of base and memory: (N,) with 0 where nothing is scored."""
        targets = self.targets if targets is None else targets
        return [token_logprobs(logits.flatten(0, 1), targets) for logits in self.logits]

    def gold_from_hidden(self) -> list[Tensor]:
        """Of base and memory: (n,) of the scored rows."""
        return [
            linear_token_logprobs(hidden.flatten(0, 1)[self.scored], head, self.scored_targets)
            for hidden, head in zip(self.hidden, self.heads, strict=True)
        ]

    def nll(self, gold: list[Tensor], count: int | None = None) -> list[Tensor]:
        """As `official_chain`. Rows without a label have log-probs 0, and so has their mixture."""
        count = len(self.scored) if count is None else count
        mixed = mixture_logprobs(gold[0], gold[1:], [MIX_WEIGHT])
        return [-rows.sum(dtype=torch.float64) / count for rows in (*gold, mixed)]

    def ours_from_logits(self) -> list[Tensor]:
        return self.nll(self.gold_from_logits())

    def ours_from_hidden(self) -> list[Tensor]:
        return self.nll(self.gold_from_hidden())

    def ours_all_rows(self) -> list[Tensor]:
        return self.nll(self.gold_from_logits(self.all_targets), len(self.all_targets))

    def official_curve(self) -> list[float]:
        return [float(self.official_from_logits(weight)[2]) for weight in WEIGHTS]

    def ours_curve(self) -> tuple[list[float], float]:
        """NLL at the same weights, and the best weight: all from one pass."""
        base, memory = (rows[self.scored].cpu() for rows in self.gold_from_logits())
        # Points 1, 3, ..., 39 of 41 are WEIGHTS.
        curve = weight_curve(base, [memory], points=2 * len(WEIGHTS) + 1)
        return [nats for _, nats in curve[1::2]], fit_mix_weight(base, [memory]).weights[0]


def check(batch: Batch) -> dict[str, float]:
    """Largest differences, in nats, of what is going to be timed."""
    official = batch.official_from_logits()
    pairs = {"from logits": (official, batch.ours_from_logits())}
    pairs["from hidden states"] = (batch.official_from_hidden(), batch.ours_from_hidden())
    pairs["curve"] = (batch.official_curve(), batch.ours_curve()[0])
    found = {}
    for name, (theirs, ours) in pairs.items():
        found[name] = max(abs(float(a) - float(b)) for a, b in zip(theirs, ours, strict=True))
        # A product of other rows rounds bf16 logits otherwise; of fp32 ones 1e-4 would be much.
        limit = 1e-4 if batch.logits[0].dtype == torch.float32 else 2e-2
        if not found[name] < limit:
            raise WrongResult(f"{name}: NLLs differ by {found[name]:.3g} nats, more than {limit}")
    return found


def peak(call: Callable[[], object], device: str) -> int | None:
    """Bytes that one call needs above its inputs, results included."""
    if device == "cpu":
        return machine.peak_increment(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@torch.inference_mode()
def main() -> None:
    parser = end_to_end.parser(__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=1, help="windows per batch; theirs: 16")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the inputs")
    args = parser.parse_args()
    setting = dict(SMOKE if args.smoke else FULL)
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    batch = Batch(setting, args.windows, args.device, dtype)
    differences = check(batch)
    calls = {
        "official, from logits": batch.official_from_logits,
        "ours, from logits": batch.ours_from_logits,
        "ours, from logits, all scored": batch.ours_all_rows,
        "official, from hidden states": batch.official_from_hidden,
        "ours, from hidden states": batch.ours_from_hidden,
        "ours, 20 weights": batch.ours_curve,
    }
    peaks = {name: peak(call, args.device) for name, call in calls.items()}
    sampler = end_to_end.Sampler(args.device)
    sampler.run(calls, args.rounds or (2 if args.smoke else 5))
    sampler.run({"official, 20 weights": batch.official_curve}, 1)  # as long as all of the above
    starts = ("from logits", "from hidden states", "20 weights")
    pairs = [(f"official, {start}", f"ours, {start}") for start in starts]
    pairs.append(("official, from logits", "ours, from logits, all scored"))
    ratios = {f"{over} / {under}": sampler.ratio(over, under) for over, under in pairs}
    ms = sampler.ms()
    passes = ms["ours, 20 weights"]["median"] / ms["ours, from logits"]["median"]
    goals = [end_to_end.goal("the curve costs about one pass (< 1.5)", passes, passes < 1.5)]
    for start in ("from logits", "from hidden states"):
        speedup = ratios[f"official, {start} / ours, {start}"]["median"]
        goals.append(end_to_end.goal(f"mix NLL {start} 8x the chain", speedup, speedup >= 8.0))
        share = _share(peaks, start)
        if share is not None:
            name = f"memory {start} 1/50 of the chain's"
            goals.append(end_to_end.goal(name, share, share <= 1 / 50))
    end_to_end.write(
        args,
        "evaluate",
        setting=setting | {"windows": args.windows, "dtype": args.dtype},
        ms=ms,
        ratios=ratios,
        figures={"peak_increment_bytes": peaks, "differences_in_nats": differences},
        goals=goals,
    )


def _share(peaks: dict[str, int | None], start: str) -> float | None:
    ours, official = peaks[f"ours, {start}"], peaks[f"official, {start}"]
    return None if ours is None or not official else ours / official


if __name__ == "__main__":
    main()
