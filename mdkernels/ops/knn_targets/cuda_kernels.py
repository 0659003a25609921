"""Launcher of csrc/cuda/knn_targets.cu. Inputs are neither copied nor converted."""

import torch

from .. import native
from . import packing

DTYPES = (torch.float32,)
LACKS = {"over_4096": "it takes at most 4096 neighbours a row"}


def forward(distances, neighbor_ids, values, temperature, exclude_ids):
    return packing.forward(_merge, _pack, distances, neighbor_ids, values, temperature, exclude_ids)


def _merge(distances, neighbor_ids, values, scale, exclude_ids, keys, counts) -> None:
    native.load("_cuda").module.knn_targets_merge(
        *native.stream(distances),
        distances.data_ptr(),
        distances.stride(0),
        neighbor_ids.data_ptr(),
        neighbor_ids.stride(0),
        neighbor_ids.dtype == torch.int32,
        values.data_ptr(),
        len(values),
        values.dtype == torch.int32,
        native.address(exclude_ids),
        *distances.shape,
        scale,
        keys.data_ptr(),
        counts.data_ptr(),
    )


def _pack(keys, row_offsets, token_ids, probs, most) -> None:
    native.load("_cuda").module.knn_targets_pack(
        *native.stream(keys),
        keys.data_ptr(),
        *keys.shape,
        row_offsets.data_ptr(),
        token_ids.data_ptr(),
        probs.data_ptr(),
    )
