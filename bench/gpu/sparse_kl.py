"""sparse_kl on a device: loss and gradient through autograd, and how they depend on the targets."""

import functools
from collections.abc import Iterator

import baselines
import torch
from cases import BASELINE, SUBJECT, Provider, WrongResult, compiled, nbytes, require
from sources import Head
from sparse_kl import BASELINE_LIMITS, KL_WEIGHT, LIMITS
from torch import Tensor

import mdkernels
from mdkernels import SparseTargets

from . import floors, peers
from .case import GpuCase, Plan, blocks, random_logits
from .device import Device

SHAPES = {"full": ((8192, 50257), (8192, 151936)), "smoke": ((9, 1001),)}
K = {"full": 64, "smoke": 8}
MOST = {"full": 1024, "smoke": 64}
# Steps between the ids of a row: coprime with every vocabulary here, so a row's ids are distinct.
STEPS = (7919, 10007, 15013, 20011, 25013, 30011, 35023, 40009)


def uniform_lengths(rows: int, k: int) -> Tensor:
    return torch.full((rows,), k)


def ragged_lengths(rows: int, k: int, most: int) -> Tensor:
    """Lognormal in [1, most), adding up to rows * k."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.empty(rows).log_normal_(3.6, 1.05, generator=generator)
    lengths = (lengths * k / 64).long().clamp(1, most - 1)
    lengths[0], lengths[-1] = most - 1, 1
    order = torch.randperm(rows - 2, generator=generator) + 1  # the two above stay
    while missing := rows * k - int(lengths.sum()):
        step = 1 if missing > 0 else -1
        room = order[((lengths + step).clamp(1, most - 1) == lengths + step)[order]]
        lengths[room[: abs(missing)]] += step
    return lengths


def make_targets(lengths: Tensor, vocab: int, device: str) -> tuple[SparseTargets, Tensor]:
    """Distinct scattered ids, exponential weights, and labels that are the first target in half of
    the rows."""
    generator = torch.Generator().manual_seed(2)
    rows = len(lengths)
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    first = torch.randint(0, vocab, (rows,), generator=generator)
    step = torch.tensor(STEPS)[torch.randint(0, len(STEPS), (rows,), generator=generator)]
    row = torch.repeat_interleave(torch.arange(rows), lengths)
    place = torch.arange(len(row)) - offsets[row]
    ids = (first[row] + place * step[row]) % vocab
    weights = torch.empty(len(row), dtype=torch.float64).exponential_(generator=generator)
    mass = torch.zeros(rows, dtype=torch.float64).index_add_(0, row, weights)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::2] = first[::2]
    targets = SparseTargets(offsets, ids.int(), (weights / mass[row]).float())
    return targets.to(device), labels.to(device)


class Truth:
    """Loss and gradient times N in float64, by blocks of rows, straight from the definition."""

    def __init__(self, pristine: Tensor, targets: SparseTargets, labels: Tensor, kl_weight: float):
        self.pristine, self.targets, self.labels = pristine, targets, labels
        self.kl_weight = kl_weight

    def block(self, part: slice) -> tuple[float, Tensor]:
        logq = self.pristine[part].double().log_softmax(1)
        targets, labels = self.targets.rows(part.start, part.stop), self.labels[part]
        row, ids, p = targets.row_ids(), targets.token_ids.long(), targets.probs.double()
        kl = (torch.xlogy(p, p) - p * logq[row, ids]).sum()
        ce = -logq.gather(1, labels[:, None]).sum()
        w = self.kl_weight
        mass = torch.zeros(len(labels), dtype=p.dtype, device=p.device).index_add_(0, row, p)
        grad = logq.exp_().mul_((w * mass + (1 - w))[:, None])
        grad.index_put_((row, ids), -w * p, accumulate=True)
        gold = torch.full((len(labels), 1), w - 1, dtype=p.dtype, device=p.device)
        return float(w * kl + (1 - w) * ce), grad.scatter_add_(1, labels[:, None], gold)

    def errors(self, loss: float, grad: Tensor) -> dict[str, float]:
        total, absolute, relative = 0.0, 0.0, 0.0
        rows, vocab = self.pristine.shape
        for part in blocks(rows, vocab):
            part_loss, wanted = self.block(part)
            total += part_loss
            error = grad[part].to(torch.float64, copy=True).mul_(rows).sub_(wanted).abs_()
            if not bool(error.isfinite().all()):
                raise WrongResult("the gradient holds NaN or infinities")
            absolute = max(absolute, float(error.max()))
            relative = max(relative, float(error.div_(wanted.abs_().add_(1e-4)).max()))
        exact = total / rows
        return {
            "loss_relative": abs(loss - exact) / abs(exact),
            "grad_absolute": absolute,
            "grad_relative": relative,
        }


def _ours(backend: str, targets, labels, inplace: bool):
    def loss(logits):
        return mdkernels.sparse_kl(
            logits, targets, labels, kl_weight=KL_WEIGHT, inplace=inplace, backend=backend
        ).loss

    return loss


def _provider(name: str, head: Head, loss, role: str) -> Provider:
    return Provider(name, head.step(loss), role, head.refresh, repeatable=False)


def _checker(head: Head, losses: dict, truths: dict, dtype: str):
    def check(provider: Provider) -> dict[str, float]:
        loss, grad = head.loss_and_grad(losses[provider.name])
        found = truths[provider.name].errors(loss, grad)
        limits = LIMITS if provider.role == SUBJECT else BASELINE_LIMITS
        return require(provider.name, found, limits[dtype])

    return check


def plans(suite: str, device: Device) -> Iterator[Plan]:
    for rows, vocab in SHAPES[suite]:
        for dtype in ("bf16", "fp32") if (rows, vocab) == SHAPES[suite][0] else ("bf16",):
            build = functools.partial(_loss_case, suite, device, rows, vocab, dtype)
            yield Plan("sparse_kl", "loss", {"N": rows, "V": vocab}, dtype, build)
        build = functools.partial(_targets_case, suite, device, rows, vocab)
        yield Plan("sparse_kl", "targets", {"N": rows, "V": vocab}, "bf16", build)


def _loss_case(suite: str, device: Device, rows: int, vocab: int, dtype: str) -> GpuCase:
    head = Head(random_logits(rows, vocab, dtype, 3, device.type))
    targets, labels = make_targets(uniform_lengths(rows, K[suite]), vocab, device.type)
    row_ids, token_ids = targets.row_ids(), targets.token_ids.long()
    sparse = {"row_ids": row_ids, "token_ids": token_ids, "probs": targets.probs}
    sparse |= {"labels": labels, "kl_weight": KL_WEIGHT}
    mass = torch.zeros(rows, device=device.type).index_add_(0, row_ids, targets.probs)

    def official(logits):
        built = baselines.dense_target(targets, row_ids, vocab)
        return baselines.official_loss(logits, built, labels, KL_WEIGHT)

    host: list[Tensor] = []

    def official_h2d(logits):
        if not host:  # pinned, as a data loader leaves it
            dense = baselines.dense_target(targets, row_ids, vocab)
            host.append(torch.empty(dense.shape, pin_memory=device.type == "cuda").copy_(dense))
        dense = host[0].to(device.type, non_blocking=True, copy=True)
        return baselines.official_loss(logits, dense, labels, KL_WEIGHT)

    losses, truths = {}, {}
    for backend in device.backends("sparse_kl"):
        losses[f"{backend}_inplace"] = _ours(backend, targets, labels, True)
        losses[f"{backend}_fresh"] = _ours(backend, targets, labels, False)
    mine = set(losses)
    losses["sparse_eager"] = functools.partial(baselines.sparse_loss, **sparse)
    if suite == "full":
        losses["sparse_compiled"] = functools.partial(compiled(baselines.sparse_loss), **sparse)
    losses["torch_function"] = functools.partial(baselines.function_loss, mass=mass, **sparse)
    losses["official"] = official
    losses["official_h2d"] = official_h2d
    truth = Truth(head.pristine, targets, labels, KL_WEIGHT)
    truths = dict.fromkeys(losses, truth)
    for name, loss in peers.cross_entropies().items():  # half of the work: CE without the KL
        losses[name] = functools.partial(loss, labels=labels)
        truths[name] = Truth(head.pristine, targets, labels, 0.0)
    providers = [
        _provider(name, head, loss, SUBJECT if name in mine else BASELINE)
        for name, loss in losses.items()
    ]
    providers.append(floors.copy(device, head.pristine, head.buffer))
    size = nbytes(head.buffer)
    return GpuCase(
        op="sparse_kl",
        kind="loss",
        shape={"N": rows, "V": vocab},
        dtype=dtype,
        providers=providers,
        check=_checker(head, losses, truths, dtype),
        bytes_moved=2 * size,
        floor="a device-to-device copy of the logits",
        outputs=lambda provider: 0 if provider.name.endswith("_inplace") else size,
        seconds=8.0,
        notes={"targets_per_row": targets.nnz / rows},
    )


def _targets_case(suite: str, device: Device, rows: int, vocab: int) -> GpuCase:
    """One backend with itself: few targets, many, and as many as uniform but ragged."""
    head = Head(random_logits(rows, vocab, "bf16", 3, device.type))
    k, most = K[suite], MOST[suite]
    lengths = {
        "k1": uniform_lengths(rows, 1),
        "k64": uniform_lengths(rows, k),
        "ragged64": ragged_lengths(rows, k, most),
        "k1024": uniform_lengths(rows, most),
    }
    losses, truths = {}, {}
    for name, chosen in lengths.items():
        targets, labels = make_targets(chosen, vocab, device.type)
        truth = Truth(head.pristine, targets, labels, KL_WEIGHT)
        for backend in device.backends("sparse_kl"):
            losses[f"{backend}_{name}"] = _ours(backend, targets, labels, True)
            truths[f"{backend}_{name}"] = truth
    providers = [_provider(name, head, loss, SUBJECT) for name, loss in losses.items()]
    providers.append(floors.copy(device, head.pristine, head.buffer))
    return GpuCase(
        op="sparse_kl",
        kind="targets",
        shape={"N": rows, "V": vocab},
        dtype="bf16",
        providers=providers,
        check=_checker(head, losses, truths, "bf16"),
        bytes_moved=2 * nbytes(head.buffer),
        floor="a device-to-device copy of the logits",
        seconds=3.0,
        notes={"targets_per_row_k1024": most},
    )
