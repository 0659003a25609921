"""The loops over chunks of rows: matrix products by torch, between them the kernels of sparse_kl
(`kernels`, the module that `dispatch` chose), which overwrite the logits."""

import torch
from torch import Tensor

from .. import checks
from ..linear import Layer
from ..sparse_kl.reduction import wide_dtype
from .weight_gradient import WeightGradient


def forward(
    kernels, hidden, weight, bias, row_offsets, token_ids, probs, labels, ignore_index,
    chunk_rows, dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kl and ce per row."""
    _check_values(weight, row_offsets, token_ids, labels, ignore_index)
    layer = Layer(hidden, weight, bias, chunk_rows, dtype)
    kl, ce = _per_row(hidden), _per_row(hidden)
    for rows, _, logits in layer.chunks():
        part = _window(rows, row_offsets, token_ids, probs, labels)
        kl[rows], ce[rows], _ = kernels.forward(logits, *part, ignore_index)
    return kl, ce


def gradient(
    kernels, hidden, weight, bias, row_offsets, token_ids, probs, labels, ignore_index,
    kl_coef, ce_coef, hidden_grad, weight_grad, bias_grad, chunk_rows, dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """kl and ce per row, and the gradients of ``(kl_coef * kl + ce_coef * ce).sum()`` that are
    asked for, empty tensors for the others."""
    _check_values(weight, row_offsets, token_ids, labels, ignore_index)
    grad_dtype = parameter_grad_dtype(weight, dtype)
    # The fp32 sum of 16-bit products is larger than the gradient that it becomes.
    extra = max(4 - grad_dtype.itemsize, 0) * weight.numel() if weight_grad else 0
    layer = Layer(hidden, weight, bias, chunk_rows, dtype, extra)
    kl, ce = _per_row(hidden), _per_row(hidden)
    dhidden = hidden.new_empty(hidden.shape if hidden_grad else 0)
    dbias = hidden.new_zeros(layer.vocab if bias_grad else 0, dtype=wide_dtype(hidden))
    if weight_grad:
        dweight = WeightGradient(kernels, layer.weight, grad_dtype, layer.num_chunks)
    for rows, states, logits in layer.chunks():
        part = _window(rows, row_offsets, token_ids, probs, labels)
        coefs = kl_coef[rows], ce_coef[rows]
        kl[rows], ce[rows] = kernels.forward_backward_(logits, *part, ignore_index, *coefs)
        dlogits = logits
        if hidden_grad:
            if hidden.dtype == dtype:
                torch.mm(dlogits, layer.weight, out=dhidden[rows])
            else:
                dhidden[rows] = torch.mm(dlogits, layer.weight)
        if weight_grad:
            dweight.add(dlogits, states)
        if bias_grad:
            dbias += dlogits.sum(0, dtype=dbias.dtype)
        del logits, dlogits  # the buffer is free before `finish` allocates
    total = dweight.finish() if weight_grad else weight.new_empty(0)
    if bias_grad:
        dbias = dbias.to(parameter_grad_dtype(bias, dtype))
    return kl, ce, dhidden, total, dbias


def parameter_grad_dtype(parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """fp16 gradients stay fp32 until the upstream gradient, a loss scale, has multiplied them."""
    return torch.float32 if dtype == torch.float16 else parameter.dtype


def _check_values(weight, row_offsets, token_ids, labels, ignore_index) -> None:
    """Before the first matrix product, and with the row's number in the whole batch. On a GPU this
    would wait for the device: there the kernels make a bad row NaN."""
    if row_offsets.device.type == "cpu":
        vocab = len(weight)
        fault = checks.find_fault(row_offsets, token_ids, vocab, labels, ignore_index)
        checks.raise_fault(fault, vocab)


def _per_row(hidden: Tensor) -> Tensor:
    return hidden.new_empty(len(hidden), dtype=wide_dtype(hidden))


def _window(rows: slice, row_offsets, token_ids, probs, labels) -> tuple:
    """The targets and labels of some rows. The kernels of a GPU take offsets that start anywhere;
    those of a CPU check that they start at 0, and reading two offsets is free there."""
    offsets = row_offsets[rows.start : rows.stop + 1]
    if offsets.device.type == "cpu":
        first, last = int(offsets[0]), int(offsets[-1])
        offsets, token_ids, probs = offsets - first, token_ids[first:last], probs[first:last]
    return offsets, token_ids, probs, None if labels is None else labels[rows]
