"""linear_sparse_kl: LM head and loss, forward and backward, from hidden states to the gradients of
hidden states and weight. The floor is the three matrix products alone."""

import functools
from collections.abc import Iterator

import baselines
import torch
import torch.nn.functional as F
from cases import (
    BASELINE,
    DTYPES,
    FLOOR,
    SUBJECT,
    Case,
    Goal,
    Provider,
    compiled,
    nbytes,
    random_targets,
    require,
)
from torch import Tensor

import mdkernels

KL_WEIGHT = 0.5
SHAPES = {"full": ((2048, 768, 50257),), "smoke": ((9, 16, 1001),)}
LINEAR_CE_ROWS = 512  # rows at a time of F.linear_cross_entropy
GOALS = [
    ("official", 5.0),
    ("sparse_eager", 3.0),
    ("sparse_compiled", 1.7),
    ("linear_cross_entropy", 3.0),
    (FLOOR, 1.15),
]
# Logits and products are rounded to bf16 by all of them: gradients relative to their norm.
LIMITS = {"hidden_relative": 8e-3, "weight_relative": 8e-3}
# A logit of 3 standard deviations is rounded by up to 0.02 nats, independently in every row; a
# cross-entropy sees one of them a row, the loss averages over some 64 of them as well. torch's own
# operator sums chunks and returns its loss in bf16, which has steps of 0.06 between 8 and 16.
LOSS_NATS, CE_NATS, CE_STEP = 0.02, 0.1, 0.0625


class Layer:
    """Hidden states and an LM head whose logits are about randn * 3, with targets and labels."""

    def __init__(self, rows: int, width: int, vocab: int, dtype: str, device: str = "cpu"):
        generator = torch.Generator(device).manual_seed(5)

        def normal(*shape, scale):
            values = torch.randn(shape, generator=generator, device=device) * scale
            return values.to(DTYPES[dtype]).requires_grad_()

        self.hidden = normal(rows, width, scale=1.0)
        self.weight = normal(vocab, width, scale=3.0 / width**0.5)
        targets, labels = random_targets(rows, vocab, seed=1)
        self.targets, self.labels = targets.to(device), labels.to(device)
        self.sparse = {"row_ids": self.targets.row_ids(), "labels": self.labels}
        self.sparse |= {"token_ids": self.targets.token_ids.long(), "probs": self.targets.probs}
        self.sparse |= {"kl_weight": KL_WEIGHT}
        self._expected: tuple | None = None

    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.weight)

    def ours(self, backend: str = "auto") -> Tensor:
        return mdkernels.linear_sparse_kl(
            *(self.hidden, self.weight, self.targets, self.labels),
            kl_weight=KL_WEIGHT,
            backend=backend,
        ).loss

    def official(self) -> Tensor:
        dense = baselines.dense_target(self.targets, self.sparse["row_ids"], len(self.weight))
        return baselines.official_loss(self.logits(), dense, self.labels, KL_WEIGHT)

    def sparse_eager(self) -> Tensor:
        return baselines.sparse_loss(self.logits(), **self.sparse)

    def sparse_compiled(self):
        def function(hidden, weight, **sparse):
            return baselines.sparse_loss(F.linear(hidden, weight), **sparse)

        function = compiled(function)
        return lambda: function(self.hidden, self.weight, **self.sparse)

    def linear_cross_entropy(self) -> Tensor:
        """Half of the loss, by torch's own chunked operator."""
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=LINEAR_CE_ROWS, chunking_method=None
        )
        return F.linear_cross_entropy(self.hidden, self.weight, self.labels, options=options)

    def products(self):
        """The three matrix products on given tensors, into given tensors."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        logits = hidden @ weight.t()
        dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

        def run():
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, weight, out=dhidden)
            torch.mm(logits.t(), hidden, out=dweight)

        return run

    def step(self, function):
        """Forward and backward; the gradients are dropped when the next call begins."""

        def call():
            self.hidden.grad = self.weight.grad = None
            loss = function()
            loss.backward()
            return loss.detach()

        return call

    def expected(self) -> tuple[float, float, Tensor, Tensor]:
        """Loss, cross-entropy alone, and the loss's gradients: float64, in blocks of rows."""
        if self._expected is not None:
            return self._expected
        hidden, weight = self.hidden.detach().double(), self.weight.detach().double()
        rows, vocab = len(hidden), len(weight)
        loss, ce = 0.0, 0.0
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, rows, 256):
            part = slice(start, min(start + 256, rows))
            z = hidden[part] @ weight.t()
            logq = z - z.logsumexp(1, keepdim=True)
            p = self.targets.rows(part.start, part.stop).to_dense(vocab).double()
            gold = F.one_hot(self.labels[part], vocab).double()
            ce += float(-(gold * logq).sum()) / rows
            loss += float(KL_WEIGHT * (torch.special.xlogy(p, p) - p * logq).sum()) / rows
            mass = KL_WEIGHT * p.sum(1, keepdim=True) + (1 - KL_WEIGHT)
            grad = (mass * logq.exp() - KL_WEIGHT * p - (1 - KL_WEIGHT) * gold) / rows
            dhidden[part] = grad @ weight
            dweight += grad.t() @ hidden[part]
        self._expected = loss + (1 - KL_WEIGHT) * ce, ce, dhidden, dweight
        return self._expected

    def errors(self, name: str, step) -> dict[str, float]:
        """Of one call of `step`, against `expected`; raises WrongResult."""
        loss, ce, dhidden, dweight = self.expected()
        row = len(dhidden) ** -0.5
        if name == "linear_cross_entropy":
            found = {"loss_absolute": abs(float(step()) - ce)}
            return require(name, found, {"loss_absolute": CE_NATS * row + CE_STEP})
        found = {"loss_absolute": abs(float(step()) - loss)}
        for key, got, wanted in (
            ("hidden_relative", self.hidden.grad, dhidden),
            ("weight_relative", self.weight.grad, dweight),
        ):
            found[key] = float((got.double() - wanted).norm() / wanted.norm())
        return require(name, found, LIMITS | {"loss_absolute": LOSS_NATS * row})

    def bytes_moved(self) -> int:
        """Inputs read and gradients written."""
        return 2 * nbytes(self.hidden, self.weight)


def cases(suite: str) -> Iterator[Case]:
    for rows, width, vocab in SHAPES[suite]:
        yield case(suite, rows, width, vocab)


def case(suite: str, rows: int, width: int, vocab: int) -> Case:
    layer = Layer(rows, width, vocab, "bf16")
    functions = {
        "mdkernels": layer.ours,
        "official": layer.official,
        "sparse_eager": layer.sparse_eager,
        "linear_cross_entropy": layer.linear_cross_entropy,
    }
    if suite == "full":
        functions["sparse_compiled"] = layer.sparse_compiled()
    steps = {name: layer.step(function) for name, function in functions.items()}
    providers = [
        Provider(name, step, SUBJECT if name == "mdkernels" else BASELINE)
        for name, step in steps.items()
    ]
    providers.append(Provider("floor", layer.products(), FLOOR))
    goals = [Goal("mdkernels", name, {"stock": factor}) for name, factor in GOALS]
    return Case(
        op="linear_sparse_kl",
        shape={"N": rows, "D": width, "V": vocab},
        dtype="bf16",
        providers=providers,
        check=functools.partial(_check, layer, steps),
        bytes_moved=layer.bytes_moved(),
        floor="the three matrix products alone",
        goals=goals if suite == "full" else [],
        notes={"targets_per_row": layer.targets.nnz / rows},
    )


def _check(layer: Layer, steps: dict) -> dict:
    return {name: layer.errors(name, step) for name, step in steps.items()}
