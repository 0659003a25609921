"""What the GPU backends share: workspace, the one wait for the size of the outputs, faults."""

import math

import torch

from ..checks import storage_covers
from .faults import raise_row_fault


def forward(merge, write, distances, neighbor_ids, values, temperature, exclude_ids):
    """`merge` leaves the tokens of each row as sortable keys in a workspace, and their number, -1
    for a row with a fault; `write` unpacks them to their final places."""
    for name, tensor in (
        ("distances", distances),
        ("neighbor_ids", neighbor_ids),
        ("values", values),
    ):
        storage_covers(name, tensor)
    rows, neighbors = distances.shape
    row_offsets = distances.new_empty(rows + 1, dtype=torch.int64)
    if rows == 0 or neighbors == 0:
        empty = distances.new_empty(0)
        return row_offsets.zero_(), empty.to(torch.int32), empty
    exclude_ids = None if exclude_ids is None else exclude_ids.contiguous()
    keys, counts = workspace(distances)
    scale = math.log2(math.e) / temperature
    merge(distances, neighbor_ids, values, scale, exclude_ids, keys, counts)
    row_offsets[:1].zero_()
    torch.cumsum(counts, 0, out=row_offsets[1:])
    # The only wait: the outputs cannot be allocated before their size is known.
    nnz, least, most = torch.stack((row_offsets[-1], *counts.aminmax())).tolist()
    if least < 0:
        raise_row_fault(counts, distances, neighbor_ids, values, exclude_ids)
    token_ids = distances.new_empty(nnz, dtype=torch.int32)
    probs = distances.new_empty(nnz)
    if nnz > 0:
        write(keys, row_offsets, token_ids, probs, most)
    return row_offsets, token_ids, probs


def workspace(distances):
    """(keys, counts), uninitialised."""
    keys = distances.new_empty(distances.shape, dtype=torch.int64)
    return keys, distances.new_empty(len(distances), dtype=torch.int64)
