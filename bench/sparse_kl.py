"""sparse_kl: loss and gradient through the public API and autograd, in place and into a fresh
tensor, against the official dense loss and three ways to write the sparse one in torch."""

import functools
from collections.abc import Iterator

import baselines
import floors
import torch
from cases import (
    BASELINE,
    FLOOR,
    PART,
    SUBJECT,
    Case,
    Goal,
    Provider,
    WrongResult,
    compiled,
    nbytes,
    random_logits,
    random_targets,
    require,
)
from sources import Head
from torch import Tensor

import mdkernels

KL_WEIGHT = 0.5
SHAPES = {"full": ((256, 151936), (512, 50257)), "smoke": ((9, 1001),)}

# Factors by which the in-place kernel must beat a baseline, or may exceed the floor. The goals for
# an allocator with huge pages hold whether or not it also caches.
GOALS = {
    "fp32": [
        ("official", {"stock": 45, "huge": 20, "tuned": 20}),
        ("sparse_eager", {"stock": 15, "huge": 6, "tuned": 6}),
        (FLOOR, {"stock": 2.0, "huge": 2.0, "tuned": 2.0}),
    ],
    "bf16": [
        ("official", {"stock": 100, "huge": 45, "tuned": 45}),
        ("sparse_eager", {"stock": 42, "huge": 17, "tuned": 17}),
        (FLOOR, {"stock": 2.6, "huge": 2.6, "tuned": 2.6}),
    ],
}
# Of the gradient times N. Absolute: entries near 1, where half a bf16 step is 0.002. Relative to
# |entry| + 1e-4: so that a wrong entry shows among probabilities of 1e-6, too.
LIMITS = {
    "fp32": {"loss_relative": 1e-5, "grad_absolute": 2e-5, "grad_relative": 5e-3},
    "bf16": {"loss_relative": 1e-5, "grad_absolute": 4e-3, "grad_relative": 5e-3},
}
# torch's fp32 log_softmax adds a row up in fp32: its normaliser is off by 4e-5 at V=151936 on an
# AVX2 processor, and so is every gradient entry of a baseline, relative to itself.
BASELINE_LIMITS = {dtype: limits | {"loss_relative": 1e-4} for dtype, limits in LIMITS.items()}
BASELINE_LIMITS["fp32"]["grad_absolute"] = 1e-4


def expected(logits: Tensor, targets, labels) -> tuple[float, Tensor]:
    """Loss and gradient times N in float64, straight from the dense definition, in row blocks."""
    rows, vocab = logits.shape
    grads, total = [], 0.0
    for start in range(0, rows, 64):
        stop = min(start + 64, rows)
        z = logits[start:stop].double()
        p = targets.rows(start, stop).to_dense(vocab).double()
        gold = torch.nn.functional.one_hot(labels[start:stop], vocab)
        logq = z - z.logsumexp(1, keepdim=True)
        kl = torch.special.xlogy(p, p).sum() - (p * logq).sum()
        ce = -(gold * logq).sum()
        total += float(KL_WEIGHT * kl + (1 - KL_WEIGHT) * ce)
        mass = KL_WEIGHT * p.sum(1, keepdim=True) + (1 - KL_WEIGHT)
        grads.append(mass * logq.exp() - KL_WEIGHT * p - (1 - KL_WEIGHT) * gold)
    return total / rows, torch.cat(grads)


def losses(targets, labels, vocab: int, suite: str) -> dict:
    """Every provider as a function of the logits that returns the loss."""
    row_ids, token_ids = targets.row_ids(), targets.token_ids.long()
    sparse = {"row_ids": row_ids, "token_ids": token_ids, "probs": targets.probs}
    sparse |= {"labels": labels, "kl_weight": KL_WEIGHT}
    mass = torch.zeros(targets.num_rows).index_add_(0, row_ids, targets.probs)
    dense = baselines.dense_target(targets, row_ids, vocab)

    def ours(logits, inplace):
        return mdkernels.sparse_kl(
            logits, targets, labels, kl_weight=KL_WEIGHT, inplace=inplace
        ).loss

    def official(logits):
        built = baselines.dense_target(targets, row_ids, vocab)
        return baselines.official_loss(logits, built, labels, KL_WEIGHT)

    functions = {
        "mdkernels_inplace": functools.partial(ours, inplace=True),
        "mdkernels_fresh": functools.partial(ours, inplace=False),
        "official": official,
        "official_given_target": lambda z: baselines.official_loss(z, dense, labels, KL_WEIGHT),
        "sparse_eager": functools.partial(baselines.sparse_loss, **sparse),
        "torch_function": functools.partial(baselines.function_loss, mass=mass, **sparse),
    }
    if suite == "full":
        functions["sparse_compiled"] = functools.partial(compiled(baselines.sparse_loss), **sparse)
    return functions


def cases(suite: str) -> Iterator[Case]:
    for rows, vocab in SHAPES[suite]:
        targets, labels = random_targets(rows, vocab, seed=1)
        for dtype in ("fp32", "bf16"):
            yield case(suite, rows, vocab, dtype, targets, labels)


def case(suite, rows, vocab, dtype, targets, labels) -> Case:
    head = Head(random_logits(rows, vocab, dtype, seed=2))
    functions = losses(targets, labels, vocab, suite)

    def check():
        loss, grad = expected(head.pristine, targets, labels)
        errors = {}
        for name, function in functions.items():
            got_loss, got_grad = head.loss_and_grad(function)
            error = (got_grad.double() * rows - grad).abs()
            relative = error / (grad.abs() + 1e-4)
            found = {
                "loss_relative": abs(got_loss - loss) / abs(loss),
                "grad_absolute": float(error.max()),
                "grad_relative": float(relative.max()),
            }
            try:
                limits = LIMITS if name.startswith("mdkernels") else BASELINE_LIMITS
                errors[name] = require(name, found, limits[dtype])
            except WrongResult as wrong:
                row, token = divmod(int(relative.argmax()), vocab)
                count = int((relative > LIMITS[dtype]["grad_relative"]).sum())
                raise WrongResult(
                    f"{wrong}; {count} gradient entries are off, the worst at row {row}, token "
                    f"{token}: {float(got_grad[row, token]) * rows:.6g}, expected "
                    f"{float(grad[row, token]):.6g}"
                ) from wrong
            del got_grad, error, relative
        return errors

    providers = [
        Provider(
            name,
            head.step(function),
            SUBJECT if name.startswith("mdkernels") else BASELINE,
            head.refresh,
            repeatable=False,
        )
        for name, function in functions.items()
    ]
    collate = functools.partial(baselines.dense_target_by_rows, targets, vocab)
    providers.append(Provider("official_collate", collate, PART, repeatable=False))
    providers.append(floors.inplace(head.buffer, head.refresh))
    goals = [Goal("mdkernels_inplace", name, factor) for name, factor in GOALS[dtype]]
    return Case(
        op="sparse_kl",
        shape={"N": rows, "V": vocab},
        dtype=dtype,
        providers=providers,
        check=check,
        bytes_moved=2 * nbytes(head.buffer),
        floor="logits read and written in place",
        goals=goals if suite == "full" else [],
        notes={"targets_per_row": targets.nnz / rows},
    )
