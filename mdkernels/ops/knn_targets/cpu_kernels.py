"""Launcher of the C++ kernel csrc/cpu/knn_targets.inl. Inputs are neither copied nor converted."""

import math

import torch
from torch import Tensor

from .. import native
from ..checks import storage_covers
from .faults import raise_fault

DTYPES = (torch.float32,)


def forward(
    distances, neighbor_ids, values, temperature, exclude_ids
) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (
        ("distances", distances),
        ("neighbor_ids", neighbor_ids),
        ("values", values),
    ):
        storage_covers(name, tensor)
    num_rows, num_neighbors = distances.shape
    exclude_ids = None if exclude_ids is None else exclude_ids.contiguous()
    result = native.load("_cpu").module.knn_targets(
        distances.data_ptr(),
        distances.stride(0),
        neighbor_ids.data_ptr(),
        neighbor_ids.stride(0),
        neighbor_ids.dtype == torch.int32,
        values.data_ptr(),
        len(values),
        values.dtype == torch.int32,
        native.address(exclude_ids),
        num_rows,
        num_neighbors,
        math.log2(math.e) / temperature,
        torch.get_num_threads(),
    )
    if isinstance(result, tuple):
        raise_fault(result, len(values))
    row_offsets = distances.new_empty(num_rows + 1, dtype=torch.int64)
    token_ids = distances.new_empty(result.nnz, dtype=torch.int32)
    probs = distances.new_empty(result.nnz)
    result.copy_to(row_offsets.data_ptr(), token_ids.data_ptr(), probs.data_ptr())
    return row_offsets, token_ids, probs
