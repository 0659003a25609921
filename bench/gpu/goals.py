"""What the kernels have to show on a GPU, as data. The tables print every line of it, measured or
not, so that a goal cannot disappear with a case that was not run.

Times are compared within one run, on one device, round by round. "of the roof": the measured copy
or read bandwidth of the same device, in the same rounds, over the same number of bytes.
"""

from dataclasses import dataclass, field

from cases import FLOOR

AT_LEAST, AT_MOST = "at least", "at most"
OURS = ("cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Target:
    """`subject` is the mode of ours ("" where an op has one), `baseline` a provider, FLOOR, or,
    with a leading +, another mode of the same backend. AT_LEAST bounds baseline time over subject
    time, AT_MOST subject time over baseline time; other units bound a value of the row."""

    identity: str
    text: str
    op: str
    kind: str
    shape: dict = field(hash=False)
    subject: str
    baseline: str
    relation: str
    factor: float
    unit: str = "time"
    regimes: tuple[str, ...] = ("stream",)

    def is_subject(self, provider: str) -> bool:
        backend, _, mode = provider.partition("_")
        return backend in OURS and mode == self.subject

    def baseline_of(self, provider: str) -> str:
        if self.baseline.startswith("+"):
            return f"{provider.partition('_')[0]}_{self.baseline[1:]}"
        return self.baseline

    def value(self, row: dict) -> float | None:
        """Of a unit other than time."""
        if self.unit == "launches":
            return row["launches"]
        if row["peak_increment_bytes"] is None:
            return None
        return max(0, row["peak_increment_bytes"] - row["output_bytes"]) / 1e6


BIG = ({"N": 8192, "V": 50257}, {"N": 8192, "V": 151936})


def _loss(shape: dict) -> list[Target]:
    what = f"sparse_kl in place, {shape['N']} x {shape['V']}"

    def goal(name, text, subject, baseline, relation, factor, unit="time"):
        identity = f"sparse_kl {name} {shape['V']}"
        kind = "loss" if subject == "inplace" else "targets"
        common = (identity, f"{what}: {text}", "sparse_kl", kind, shape)
        return Target(*common, subject, baseline, relation, factor, unit)

    return [
        goal("roof", "of the copy roof", "inplace", FLOOR, AT_LEAST, 0.85),
        goal("eager", "sparse eager", "inplace", "sparse_eager", AT_LEAST, 12),
        goal("compile", "torch.compile", "inplace", "sparse_compiled", AT_LEAST, 3.5),
        goal("official", "official dense loss", "inplace", "official", AT_LEAST, 20),
        goal("h2d", "official with host-to-device copy", "inplace", "official_h2d", AT_LEAST, 80),
        goal("memory", "memory beyond outputs", "inplace", "", AT_MOST, 1.0, "MB"),
        goal("k1024", "1024 targets a row over 1", "k1024", "+k1", AT_MOST, 1.10),
        goal("ragged", "ragged over uniform targets", "ragged64", "+k64", AT_MOST, 1.05),
    ]


def _linear(shape: dict) -> list[Target]:
    what = "linear_sparse_kl, " + " x ".join(map(str, shape.values()))

    def goal(name, text, baseline, relation, factor, unit="time"):
        identity = f"linear_sparse_kl {name} {shape['V']}"
        common = (identity, f"{what}: {text}", "linear_sparse_kl", "layer", shape)
        return Target(*common, "", baseline, relation, factor, unit)

    return [
        goal("eager", "eager linear and sparse loss", "sparse_eager", AT_LEAST, 2.2),
        goal("matmul", "of the three matrix products", FLOOR, AT_LEAST, 0.60),
        goal("memory", "memory beyond gradients", "", AT_MOST, 320.0, "MB"),
    ]


def _read(op: str, kind: str, what: str, baseline: str) -> list[Target]:
    shape, at = {"N": 4096, "V": 151936}, "4096 x 151936"
    odd = {"N": 4096, "V": 50257}
    return [
        Target(f"{op} roof", f"{what}, {at}: of the read roof", op, kind, shape, "", FLOOR,
               AT_LEAST, 0.90),
        Target(f"{op} eager", f"{what}, {at}: eager", op, kind, shape, "", baseline, AT_LEAST, 10),
        Target(f"{op} odd", f"{what}, 4096 rows: V=50257 over V=50304", op, "alignment", odd,
               "", "+v50304", AT_MOST, 1.10),
    ]  # fmt: skip


def _decode(batch: int, factor: float) -> list[Target]:
    what = f"mix_sample, B={batch}, no filter"
    shape, both = {"B": batch, "top_k": 0}, ("stream", "graph")
    common = ("mix_sample", "decode", shape, "")
    return [
        Target(f"decode B={batch}", f"{what}: eager chain", *common, "eager", AT_LEAST, factor,
               regimes=both),
        Target(f"launches B={batch}", f"{what}: launches", *common, "", AT_MOST, 1, "launches"),
    ]  # fmt: skip


TARGETS: tuple[Target, ...] = (
    *_loss(BIG[0]),
    *_loss(BIG[1]),
    *_linear({"N": 8192, "D": 768, "V": 50257}),
    *_linear({"N": 8192, "D": 896, "V": 151936}),
    *_read("token_logprobs", "gold", "token_logprobs", "eager"),
    *_read("mix_sample", "gold", "mixture log-probabilities of given tokens", "eager"),
    *_decode(1, 5),
    *_decode(64, 3),
    Target("knn", "knn_targets, 16384 x 1024: official loops", "knn_targets", "targets",
           {"N": 16384, "K": 1024}, "", "official_one_shot", AT_LEAST, 100),
)  # fmt: skip


def of_case(op: str, kind: str, shape: dict, regime: str, suite: str) -> list[Target]:
    """The targets that a case can answer. In the smoke suite its shape does not count: the shapes
    are tiny and the verdicts mean nothing, but the code runs."""
    found = [t for t in TARGETS if t.op == op and t.kind == kind and regime in t.regimes]
    return [t for t in found if suite == "smoke" or t.shape.items() <= shape.items()]
