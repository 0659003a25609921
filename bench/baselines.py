"""What the kernels are compared with, all in plain torch.

`official_*` follow the method's published code; where the notes say so they leave something out
that would only make it slower. The others are what one would write today, from simple to careful.
All use fp32 arithmetic whatever the dtype of the logits, as the kernels do.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mdkernels import SparseTargets

# --- sparse_kl ------------------------------------------------------------------------------------


def dense_target(targets: SparseTargets, row_ids: Tensor, vocab: int) -> Tensor:
    """(N, V) fp32. The official collate writes it with one indexed assignment per row in a Python
    loop; a single scatter is faster, so the official loss gets that."""
    dense = torch.zeros(targets.num_rows, vocab, device=targets.device)
    dense[row_ids, targets.token_ids.long()] = targets.probs
    return dense


def dense_target_by_rows(targets: SparseTargets, vocab: int) -> Tensor:
    """The official collate proper: one row of a zeroed matrix at a time."""
    dense = torch.zeros(targets.num_rows, vocab)
    bounds = targets.row_offsets.tolist()
    for row in range(targets.num_rows):
        ids = targets.token_ids[bounds[row] : bounds[row + 1]].long()
        dense[row][ids] = targets.probs[bounds[row] : bounds[row + 1]]
    return dense


def official_loss(logits: Tensor, dense: Tensor, labels: Tensor, kl_weight: float) -> Tensor:
    """F.kl_div against the dense target plus CrossEntropyLoss: two softmaxes. Left out: shifting
    and masking copies, renormalisation of the target, two asserts over (N, V), logging."""
    logits = logits.float()  # what mixed-precision training hands the official loss
    kl = F.kl_div(F.log_softmax(logits, dim=-1), dense, reduction="batchmean")
    return kl_weight * kl + (1 - kl_weight) * F.cross_entropy(logits, labels)


def sparse_loss(logits, row_ids, token_ids, probs, labels, kl_weight: float) -> Tensor:
    """One log_softmax and two gathers: the dense target is never built."""
    logprobs = logits.float().log_softmax(dim=-1)
    kl = (probs * (probs.log() - logprobs[row_ids, token_ids])).sum() / logits.shape[0]
    ce = -logprobs.gather(1, labels[:, None]).mean()
    return kl_weight * kl + (1 - kl_weight) * ce


class _FusedInTorch(torch.autograd.Function):
    """The kernel's algorithm in torch ops: the gradient is made in the forward, from one softmax
    that is then changed in place. The best that plain torch does here."""

    @staticmethod
    def forward(ctx, logits, row_ids, token_ids, probs, mass, labels, kl_weight):
        rows = logits.shape[0]
        grad = torch.softmax(logits, dim=-1, dtype=torch.float32)
        top, where = grad.max(dim=-1)
        lse = logits.gather(1, where[:, None]).squeeze(1).float() - top.log()
        target_logits = logits[row_ids, token_ids].float()
        kl = (probs * (probs.log() - target_logits + lse[row_ids])).sum() / rows
        ce = (lse - logits.gather(1, labels[:, None]).squeeze(1).float()).mean()
        grad *= ((kl_weight * mass + (1 - kl_weight)) / rows)[:, None]
        grad.index_put_((row_ids, token_ids), probs * (-kl_weight / rows), accumulate=True)
        step = grad.new_full((rows, 1), (kl_weight - 1) / rows)
        grad.scatter_add_(1, labels[:, None], step)
        ctx.save_for_backward(grad.to(logits.dtype))
        return kl_weight * kl + (1 - kl_weight) * ce

    @staticmethod
    def backward(ctx, dloss):
        (grad,) = ctx.saved_tensors
        if float(dloss) != 1.0:
            grad = grad * dloss
        return grad, None, None, None, None, None, None


def function_loss(logits, row_ids, token_ids, probs, mass, labels, kl_weight) -> Tensor:
    return _FusedInTorch.apply(logits, row_ids, token_ids, probs, mass, labels, kl_weight)


# --- token_logprobs -------------------------------------------------------------------------------


def gather_minus_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(1, labels[:, None]).squeeze(1) - logits.logsumexp(dim=-1)


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(dim=-1).gather(1, labels[:, None]).squeeze(1)


# --- logit_mix, mix_argmax, mix_sample, mix_verify ------------------------------------------------


def mix(base: Tensor, memory: Tensor, mix_weight: float, temperature: float) -> Tensor:
    """As in the official decoder, in fp32."""
    base = F.log_softmax(base.float(), dim=-1)
    memory = F.log_softmax(memory.float() / temperature, dim=-1)
    return torch.logaddexp(base + math.log(1 - mix_weight), memory + math.log(mix_weight))


def mix_argmax(base: Tensor, memory: Tensor, mix_weight: float, temperature: float) -> Tensor:
    return mix(base, memory, mix_weight, temperature).argmax(dim=-1)


def mix_argmax_probs(base: Tensor, memory: Tensor, mix_weight: float, temperature: float) -> Tensor:
    """In probability space: no logarithm, two thirds of the temporaries."""
    base = F.softmax(base.float(), dim=-1)
    memory = F.softmax(memory.float() / temperature, dim=-1)
    return torch.lerp(base, memory, mix_weight).argmax(dim=-1)


def filter_logprobs(logprobs: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """What Hugging Face's warpers do: top-k, then top-p by a sort, then min-p; -inf elsewhere."""
    if top_k:
        least = logprobs.topk(top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, -math.inf)
    if top_p < 1.0:
        ordered, order = logprobs.sort(dim=-1)
        drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[:, -1] = False
        logprobs = logprobs.masked_fill(drop.scatter(1, order, drop), -math.inf)
    if min_p > 0.0:
        probs = logprobs.softmax(dim=-1)
        logprobs = logprobs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -math.inf)
    return logprobs


def mix_sample(base, memory, mix_weight, memory_temperature, temperature, top_k, top_p, min_p):
    logprobs = mix(base, memory, mix_weight, memory_temperature) / temperature
    probs = filter_logprobs(logprobs, top_k, top_p, min_p).softmax(dim=-1)
    return torch.multinomial(probs, 1).squeeze(1)


def mix_verify(
    base, memory, mix_weight, ids, memory_temperature, temperature, top_k, top_p, min_p
) -> tuple[Tensor, Tensor]:
    """(accepted, next tokens) as Hugging Face's assisted generation does it: both distributions of
    all places, one ratio per drafted token, a draw from the residual or from the last place."""
    _, places, vocab = base.shape
    scores = mix(base, memory, mix_weight, memory_temperature) / temperature
    v = filter_logprobs(scores.flatten(0, 1), top_k, top_p, min_p).softmax(-1).view(base.shape)
    q = F.softmax(memory.float() / (memory_temperature * temperature), dim=-1)
    gold = ids[..., None]
    ratio = (v[:, :-1].gather(2, gold) / q[:, :-1].gather(2, gold))[..., 0]
    accepted = (torch.rand_like(ratio) < ratio).long().cumprod(1).sum(1)
    at = accepted[:, None, None].expand(-1, 1, vocab)
    v, q = (x.gather(1, at)[:, 0] for x in (v, q))
    rest = torch.where((accepted < places - 1)[:, None], (v - q).clamp(min=0.0), v)
    return accepted, torch.multinomial(rest, 1)[:, 0]


def mix_sample_race(base, memory, mix_weight, memory_temperature, temperature, top_k, top_p, min_p):
    """The same with a race of exponential clocks instead of torch.multinomial, which waits for the
    device to report a bad row: the way to sample inside a CUDA graph."""
    logprobs = mix(base, memory, mix_weight, memory_temperature) / temperature
    probs = filter_logprobs(logprobs, top_k, top_p, min_p).softmax(dim=-1)
    return (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1)


def mix_gather(base, memory, mix_weight: float, temperature: float, tokens: Tensor) -> Tensor:
    """(N, 3): the given tokens' log-probabilities under the mixture, the base and the memory."""
    tokens = tokens[:, None]
    base = F.log_softmax(base.float(), dim=-1).gather(1, tokens)
    memory = F.log_softmax(memory.float() / temperature, dim=-1).gather(1, tokens)
    gold = torch.logaddexp(base + math.log(1 - mix_weight), memory + math.log(mix_weight))
    return torch.cat([gold, base, memory], dim=1)


# --- knn_targets ----------------------------------------------------------------------------------


def official_knn(distances, neighbor_ids, values, temperature: float, vocab: int) -> list:
    """The dense scatter of all rows, then a Python loop that takes each row apart again. Drops
    neighbour 0 as "self". Left out: the padding and unpadding loops around the file format."""
    distances, neighbor_ids = distances[:, 1:], neighbor_ids[:, 1:]
    weights = F.softmax(-distances / temperature, dim=-1)
    tokens = values[neighbor_ids]
    dense = weights.new_zeros(len(tokens), vocab).scatter_add(-1, tokens, weights)
    dense = F.normalize(dense, p=1, dim=-1)
    rows = []
    for row in range(len(dense)):
        ids = torch.nonzero(dense[row] > 0.0).squeeze(-1)
        probs = dense[row][ids]
        order = torch.argsort(probs, descending=True)
        rows.append((ids[order], probs[order].to(torch.float16)))
    return rows


def official_knn_batches(distances, neighbor_ids, values, temperature, vocab, size: int) -> list:
    """As the official script calls it: `size` rows at a time."""
    rows = []
    for start in range(0, len(distances), size):
        part = slice(start, start + size)
        rows += official_knn(distances[part], neighbor_ids[part], values, temperature, vocab)
    return rows


def sorted_knn(distances, neighbor_ids, values, temperature, exclude_ids) -> SparseTargets:
    """Vectorised: sort the tokens within rows, sum the runs, sort the sums. Nothing dense."""
    absent = (neighbor_ids == exclude_ids[:, None]) | (neighbor_ids < 0)
    weights = F.softmax((-distances / temperature).masked_fill(absent, -math.inf), dim=-1)
    tokens, order = values[neighbor_ids.clamp(min=0)].sort(dim=-1)
    weights = weights.gather(1, order)
    starts = torch.ones_like(tokens, dtype=torch.bool)
    torch.ne(tokens[:, 1:], tokens[:, :-1], out=starts[:, 1:])
    starts = starts.view(-1)
    run = starts.cumsum(0) - 1
    first = starts.nonzero().squeeze(1)
    sums = weights.new_zeros(len(first)).index_add_(0, run, weights.view(-1))
    rows = first // tokens.shape[1]
    ids = tokens.view(-1)[first]
    kept = sums > 0
    rows, ids, sums = rows[kept], ids[kept], sums[kept]
    # One key per entry, ascending by row and then descending by probability.
    order = (rows.double() * 2 - sums.double()).argsort()
    offsets = rows.new_zeros(len(distances) + 1)
    torch.cumsum(torch.bincount(rows, minlength=len(distances)), 0, out=offsets[1:])
    return SparseTargets(offsets, ids[order].int(), sums[order])
