"""From search results to sparse kNN distributions over the vocabulary. Derivation: README.md."""

import torch
from torch import Tensor

from .. import checks, dispatch
from ..sparse_targets import SparseTargets

# exp((nearest - distance) / temperature) runs in fp32: outside, the factor would not be finite.
TEMPERATURE_RANGE = (1e-30, 1e30)


def _fake_forward(distances, neighbor_ids, values, temperature, exclude_ids, backend):
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        distances.new_empty(distances.shape[0] + 1, dtype=torch.int64),
        distances.new_empty(nnz, dtype=torch.int32),
        distances.new_empty(nnz, dtype=torch.float32),
    )


def _need(distances, *args) -> str | None:
    """A GPU kernel sorts a row in one block, which bounds its length."""
    neighbors = distances.shape[1]
    return "over_4096" if neighbors > 4096 else "over_1024" if neighbors > 1024 else None


_forward = dispatch.define(
    "knn_targets",
    "forward",
    "(Tensor distances, Tensor neighbor_ids, Tensor values, float temperature,"
    " Tensor? exclude_ids, str backend) -> (Tensor row_offsets, Tensor token_ids, Tensor probs)",
    _fake_forward,
    need=_need,
)


def knn_targets(
    distances: Tensor,
    neighbor_ids: Tensor,
    values: Tensor,
    *,
    temperature: float,
    exclude_ids: Tensor | None = None,
    backend: str = "auto",
) -> SparseTargets:
    """The kNN distribution of each row (arXiv 2508.09874, eq. 2), without an (N, V) tensor.

    Equivalent to, with the (N, V) matrix that is never built here::

        counts = (neighbor_ids >= 0) & (neighbor_ids != exclude_ids[:, None])
        weights = torch.where(counts, -distances / temperature, -inf).softmax(1)
        dense = torch.zeros(N, V).scatter_add(1, values[neighbor_ids], weights)
        SparseTargets.from_dense(dense)       # then each row sorted by descending probability

    Args:
        distances: (N, K) fp32 squared L2 distances, in any order; unit stride within a row, any row
            stride. +inf is a weight of 0. A small negative distance, which searches that expand
            the square produce, is taken as it is. Not differentiated.
        neighbor_ids: (N, K) int64 or int32 positions in `values`, strided likewise; -1 means not
            found: that place is skipped, whatever its distance. An id that occurs twice in a row
            counts twice.
        values: (R,) int32 or int64, contiguous: the next token of each datastore entry, in
            [0, 2**31). Only the values that some neighbour points to are read.
        temperature: divides the distances; within [1e-30, 1e30].
        exclude_ids: (N,) int64, the datastore entry of each row itself, which is left out wherever
            it ranks (the official code drops the first neighbour instead, whatever it is). -1, or
            an id that is not among the neighbours, leaves nothing out.
        backend: "auto", "cpu", "triton", "cuda" or "reference"; see `mdkernels.backends`.

    Returns:
        SparseTargets with N rows: distinct token ids, sorted by descending probability and within
        equal probabilities by ascending id; fp32 probabilities whose exact sum was 1 before
        rounding. A token whose probability is below the smallest normal fp32 number (1.2e-38) is
        left out. A row without a neighbour at a finite distance is empty.

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or temperature outside the above; a
            neighbour id outside [-1, R), a distance that is NaN or -inf, a token id outside
            [0, 2**31), each with its row.
        BackendUnavailable: the named backend cannot run here.
    """
    _check(distances, neighbor_ids, values)
    temperature = checks.number("temperature", temperature)
    low, high = TEMPERATURE_RANGE
    if not low <= temperature <= high:
        raise ValueError(
            f"temperature: expected a number in [{low:g}, {high:g}], got {temperature}; it divides "
            "squared distances, so a good start is their typical size"
        )
    if exclude_ids is not None:
        rows = distances.shape[0]
        checks.integer_vector("exclude_ids", exclude_ids, rows, distances.device, of="distances")
    return SparseTargets(
        *_forward(distances.detach(), neighbor_ids, values, temperature, exclude_ids, backend)
    )


def _check(distances, neighbor_ids, values) -> None:
    checks.plain_tensor("distances", distances)
    checks.plain_tensor("neighbor_ids", neighbor_ids)
    checks.plain_tensor("values", values)
    if distances.ndim != 2:
        raise ValueError(
            f"distances: expected shape (rows, neighbors), got {tuple(distances.shape)}"
        )
    if distances.dtype != torch.float32:
        raise TypeError(
            f"distances: expected float32, got {distances.dtype}; convert with .float()"
        )
    if neighbor_ids.shape != distances.shape:
        raise ValueError(
            f"neighbor_ids: expected the shape of distances, {tuple(distances.shape)}, got "
            f"{tuple(neighbor_ids.shape)}"
        )
    if values.ndim != 1 or not values.is_contiguous():
        raise ValueError(
            f"values: expected a contiguous vector, got shape {tuple(values.shape)} with strides "
            f"{values.stride()}"
        )
    for name, tensor in (("neighbor_ids", neighbor_ids), ("values", values)):
        if tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64 or int32, got {tensor.dtype}")
        if tensor.device != distances.device:
            raise ValueError(
                f"{name}: on {tensor.device}, distances on {distances.device}; use .to()"
            )
    for name, tensor in (("distances", distances), ("neighbor_ids", neighbor_ids)):
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(
                f"{name}: rows must be contiguous (stride 1 within a row), got strides "
                f"{tensor.stride()}; call .contiguous()"
            )
