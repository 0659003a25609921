"""knn_targets in eager torch: the specification, fp64 arithmetic."""

import torch
from torch import Tensor

from .faults import raise_fault


def forward(
    distances, neighbor_ids, values, temperature, exclude_ids
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_values = len(distances), len(values)
    ids = neighbor_ids.long()
    _refuse("neighbor_id", (ids < -1) | (ids >= num_values), ids, num_values)
    counts = ids >= 0
    if exclude_ids is not None:
        counts &= ids != exclude_ids[:, None]
    _refuse("distance", counts & ~(distances > -torch.inf), ids, num_values)
    counts &= distances < torch.inf

    d = distances.double().where(counts, torch.inf)
    nearest = d.amin(1, keepdim=True) if d.shape[1] else d.sum(1, keepdim=True)
    weights = ((nearest - d) / temperature).exp().where(counts, 0.0)
    tokens = values[ids.clamp(min=0)].long() if num_values else ids
    _refuse("value", (ids >= 0) & ((tokens < 0) | (tokens >= 1 << 31)), tokens, num_values)

    # unique sorts by row, then by token; the two stable sorts keep tokens ascending among equals.
    rows, places = weights.nonzero(as_tuple=True)
    keys, inverse = torch.unique(rows << 31 | tokens[rows, places], return_inverse=True)
    shares = (weights / weights.sum(1, keepdim=True))[rows, places]
    probs = shares.new_zeros(len(keys)).index_add_(0, inverse, shares)
    probs = probs.float()
    keys, probs = (t[probs >= torch.finfo(torch.float32).tiny] for t in (keys, probs))
    order = probs.argsort(descending=True, stable=True)
    order = order[(keys[order] >> 31).argsort(stable=True)]
    keys, probs = keys[order], probs[order]

    offsets = torch.zeros(num_rows + 1, dtype=torch.int64, device=distances.device)
    torch.cumsum(torch.bincount(keys >> 31, minlength=num_rows), 0, out=offsets[1:])
    return offsets, (keys & 0x7FFFFFFF).int(), probs


def _refuse(what: str, bad: Tensor, shown: Tensor, num_values: int) -> None:
    """Raise for the first place where `bad` is true, showing the entry of `shown` there."""
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise_fault((what, row, int(shown[row, column])), num_values)
