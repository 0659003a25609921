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
    rows, places = weights.nonzero(as_tuple=True)
    tokens = values[ids[rows, places]].long()
    _refuse("value", (tokens < 0) | (tokens >= 1 << 31), tokens, num_values, rows)

    # unique sorts by row, then by token; the two stable sorts keep tokens ascending among equals.
    keys, inverse = torch.unique(rows << 31 | tokens, return_inverse=True)
    probs = weights.new_zeros(len(keys)).index_add_(
        0, inverse, (weights / weights.sum(1, True))[rows, places]
    )
    probs = probs.float()
    keys, probs = (t[probs >= torch.finfo(torch.float32).tiny] for t in (keys, probs))
    order = probs.argsort(descending=True, stable=True)
    order = order[(keys[order] >> 31).argsort(stable=True)]
    keys, probs = keys[order], probs[order]

    offsets = torch.zeros(num_rows + 1, dtype=torch.int64, device=distances.device)
    torch.cumsum(torch.bincount(keys >> 31, minlength=num_rows), 0, out=offsets[1:])
    return offsets, (keys & 0x7FFFFFFF).int(), probs


def _refuse(what: str, bad: Tensor, shown: Tensor, num_values: int, rows: Tensor | None = None):
    """Raise for the first place where `bad` is true, showing the entry of `shown` there."""
    if bool(bad.any()):
        where = bad.nonzero()[0]
        row = where[0] if rows is None else rows[where[0]]
        raise_fault((what, int(row), int(shown[tuple(where)])), num_values)
