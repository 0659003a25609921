"""Exact nearest neighbours in plain torch: blocked distances, then the few candidates of each row.

    ||q - k||^2 = ||q||^2 + (||k||^2 - 2 q.k)

One GEMM gives the bracket for a block of queries and a block of keys; ||q||^2 is added at the end.
The distances of a block are read three more times and never sorted: the minima of groups of
columns bound the K-th smallest from above (K groups hold K elements no larger than their K-th
minimum), a comparison with that bound leaves 1.1 K to 1.4 K candidates, and only those reach topk.
65536 x 65536 keys of width 256 with K=1024 take 25 core-seconds on Zen 5 (GEMM 11, selection 14);
topk on whole rows alone would take 30, and torch.mm instead of oneDNN 25.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_KEY_ROWS = 1 << 16
# One (queries, keys) buffer of distances; with one block of keys in fp32 it is what a search holds.
_BUFFER_BYTES = {"cpu": 64 << 20}
_DEVICE_BUFFER_BYTES = 1 << 30
# oneDNN allocates its output; glibc reuses allocations below 32 MB, larger ones are page-faulted.
_TILE_BYTES = 8 << 20
_MAX_GROUP = 32


@torch.inference_mode()
def exact_search(
    queries: Tensor,
    keys: np.ndarray | Tensor,
    num_neighbors: int,
    *,
    center: Tensor | None = None,
    in_order: bool = True,
) -> tuple[Tensor, Tensor]:
    """The `num_neighbors` keys nearest to each query, by squared L2 distance.

    Equivalent to `torch.cdist(queries, keys).square().topk(num_neighbors, largest=False)`.

    Args:
        queries: (n, D) fp32, finite. The search runs on their device.
        keys: (R, D) fp16 or fp32, finite; an array (a memory map) or a tensor on any device. It is
            read once per call, in blocks, so memory does not grow with R, and calls want many
            queries.
        center: (D,) fp32, subtracted from both sides. Distances stay the same and their rounding
            error, about 1e-6 of ||q - center||^2, becomes that of the spread of the keys.
        in_order: sort each row by distance; False saves the sort and leaves rows in any order.

    Returns:
        distances (n, num_neighbors) fp32, >= 0, and ids (n, num_neighbors) int64. Where R is
        smaller the rest is +inf and -1. Among equal distances the order, and at rank num_neighbors
        the choice, is unspecified.

    A matrix precision that the caller lowered (`torch.set_float32_matmul_precision`) applies.
    """
    _check(queries, keys, num_neighbors)
    device, (num_rows, dim) = queries.device, keys.shape
    offset = torch.zeros(dim, device=device) if center is None else center.to(device)
    queries = queries - offset
    factors = -2 * queries
    distances = torch.full((len(queries), num_neighbors), torch.inf, device=device)
    ids = torch.full(distances.shape, -1, dtype=torch.int64, device=device)
    key_rows = min(num_rows, max(_KEY_ROWS, 8 * num_neighbors))
    buffer_bytes = _BUFFER_BYTES.get(device.type, _DEVICE_BUFFER_BYTES)
    query_rows = max(1, min(len(queries), buffer_bytes // (4 * key_rows)))
    buffer = torch.empty(query_rows * key_rows, device=device)
    for first in range(0, num_rows, key_rows):
        block = _block(keys, first, first + key_rows, device).sub_(offset)
        norms = torch.linalg.vector_norm(block, dim=1).square_()
        for start in range(0, len(queries), query_rows):
            rows = slice(start, min(start + query_rows, len(queries)))
            scores = buffer[: (rows.stop - start) * len(block)].view(-1, len(block))
            _scores(factors[rows], block, norms, scores)
            best, best_ids = distances[rows], ids[rows]
            bound = best.amax(1, keepdim=True) if first else None
            found, found_ids = _candidates(scores, num_neighbors, bound, first)
            if first:
                found = torch.cat([best, found], 1)
                found_ids = torch.cat([best_ids, found_ids], 1)
            width = min(num_neighbors, found.shape[1])
            nearest, order = found.topk(width, 1, largest=False, sorted=False)
            best[:, :width] = nearest
            best_ids[:, :width] = found_ids.gather(1, order)
    distances += queries.square().sum(1, keepdim=True)
    distances.clamp_(min=0)
    if in_order:
        distances, order = distances.sort(1)
        ids = ids.gather(1, order)
    return distances, ids


def _block(keys: np.ndarray | Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """A copy that may be written to, in fp32. It is widened where it arrives: torch would do so on
    the host, and move twice the bytes."""
    part = keys[start:stop]
    mapped = isinstance(part, np.ndarray)
    if mapped:
        part = torch.from_numpy(np.array(part))  # a copy: maps are read-only
    moved = part.to(device)
    return moved.to(torch.float32, copy=moved is part and not mapped)


def _scores(factors: Tensor, keys: Tensor, norms: Tensor, out: Tensor) -> None:
    """out = factors @ keys.T + norms."""
    linear = _onednn_linear() if factors.device.type == "cpu" else None
    if linear is None:
        torch.addmm(norms, factors, keys.T, out=out)
        return
    width = max(256, _TILE_BYTES // (4 * len(factors)))
    for start in range(0, len(keys), width):
        tile = slice(start, start + width)
        out[:, tile] = linear(factors, keys[tile], norms[tile], "none", [], "")


@functools.cache
def _onednn_linear() -> Callable[..., Tensor] | None:
    """oneDNN's fp32 linear, or None where this torch has none.

    torch.mm takes MKL's fp32 GEMM, which leaves AVX-512 unused on AMD: 95 GFLOP/s on a Zen 5 core
    against 225. The operator is the one torch.compile emits; it is probed, not assumed.
    """
    eye = torch.eye(2)
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        works = torch.equal(linear(eye, eye, torch.ones(2), "none", [], ""), eye + 1)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return linear if works else None


def _candidates(
    scores: Tensor, count: int, bound: Tensor | None, first: int
) -> tuple[Tensor, Tensor]:
    """(B, C) scores and ids that include the `count` smallest columns no larger than `bound`.

    Ids are column + `first`; places a row does not need hold +inf and -1.
    """
    rows, width = scores.shape
    if bound is None:
        groups = width
        while groups % 2 == 0 and groups // 2 >= 2 * count and width // groups < _MAX_GROUP:
            groups //= 2
        if groups == width or scores.device.type != "cpu":
            found, columns = scores.topk(min(count, width), 1, largest=False, sorted=False)
            return found, columns + first
        # Strided, not adjacent columns: neighbours in a text are alike and would share a group.
        minima = scores.unflatten(1, (width // groups, groups)).amin(1)
        bound = minima.kthvalue(count, 1, keepdim=True).values
    # Flat indices throughout: two-dimensional nonzero and indexing cost twice as much.
    flat = (scores <= bound).view(-1).nonzero().view(-1)
    row = flat.div(width, rounding_mode="floor")
    per_row = row.bincount(minlength=rows)
    longest = int(per_row.max())
    start = per_row.cumsum(0) - per_row
    place = torch.arange(len(flat), device=flat.device) + (row * longest - start[row])
    found = scores.new_full((rows * longest,), torch.inf)
    found[place] = scores.reshape(-1)[flat]
    ids = torch.full((rows * longest,), -1, device=flat.device)
    ids[place] = flat - row * width + first
    return found.view(rows, longest), ids.view(rows, longest)


def _check(queries: Tensor, keys: np.ndarray | Tensor, num_neighbors: int) -> None:
    if queries.dtype != torch.float32 or queries.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries: expected float32 (n, {keys.shape[1]}), got {queries.dtype} "
            f"{tuple(queries.shape)}"
        )
    if not torch.isfinite(queries).all():
        raise ValueError("queries: hold a NaN or infinity; a distance to it means nothing")
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors: must be at least 1, got {num_neighbors}")
