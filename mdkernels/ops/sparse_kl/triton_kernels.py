"""Launchers of the Triton kernels in triton_programs.py. Nothing here copies or converts logits, or
waits for the device."""

import torch
from torch import Tensor

from .. import checks
from ..triton_rows import INTERPRETED, launching, vector
from . import triton_programs
from .reduction import loss_grad_through
from .triton_table import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = 1024  # of the scaling kernel: enough to fill any device, few enough to launch at once


def forward(logits, row_offsets, token_ids, probs, labels, ignore_index, op="sparse_kl"):
    sparse = _prepare(logits, row_offsets, token_ids, probs, labels, ignore_index)
    # Separate tensors: the outputs of a registered operator must not share storage.
    kl, ce = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    lse = logits.new_empty(logits.shape[0], dtype=torch.float64)
    _run(
        triton_programs.forward_rows,
        logits,
        logits,
        logits.stride(0),
        logits.shape[1],
        *sparse,
        kl,
        ce,
        lse,
        op=op,
    )
    return kl, ce, lse


def backward(
    logits,
    row_offsets,
    token_ids,
    probs,
    labels,
    ignore_index,
    lse,
    kl_coef,
    ce_coef,
    op="sparse_kl",
) -> Tensor:
    sparse = _prepare(logits, row_offsets, token_ids, probs, labels, ignore_index)
    grad = logits.new_empty(logits.shape)
    rows = (logits, logits.stride(0), grad, grad.stride(0), logits.shape[1])
    coefs = (kl_coef, kl_coef.stride(0), ce_coef, ce_coef.stride(0))
    apart = logits.data_ptr() - grad.data_ptr()
    steps = (logits.stride(0) - grad.stride(0)) * logits.element_size()
    same = apart % 16 == 0 and (steps % 16 == 0 or logits.shape[0] == 1)
    _run(triton_programs.backward_rows, logits, *rows, *sparse, lse, *coefs, op=op, SAME=same)
    return grad


def forward_backward_(
    logits, row_offsets, token_ids, probs, labels, ignore_index, kl_coef, ce_coef
) -> tuple[Tensor, Tensor]:
    sparse = _prepare(logits, row_offsets, token_ids, probs, labels, ignore_index)
    kl, ce = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    coefs = (kl_coef, kl_coef.stride(0), ce_coef, ce_coef.stride(0))
    rows = (logits, logits.stride(0), logits.shape[1])
    _run(triton_programs.forward_backward_rows, logits, *rows, *sparse, *coefs, kl, ce)
    return kl, ce


def loss_grad_(logits, *arguments):
    return loss_grad_through(forward_backward_, logits, *arguments)


def scale_(grad: Tensor, factor: Tensor) -> None:
    checks.storage_covers("grad", grad)
    rows, vocab = grad.shape
    if rows == 0:
        return
    parameters = launch(vocab, grad.element_size())
    with launching("sparse_kl", grad):
        triton_programs.scale_rows[(min(rows, PROGRAMS),)](
            grad,
            grad.stride(0),
            rows,
            vocab,
            factor,
            factor.stride(0) if factor.ndim else 0,
            LANES=parameters.block // 16,
            VEC=vector(grad.dtype),
            num_warps=parameters.warps,
            maxnreg=parameters.registers,
            enable_fp_fusion=True,
        )


def _prepare(logits, row_offsets, token_ids, probs, labels, ignore_index) -> tuple:
    """The sparse arguments as the kernels take them. Looking at their values would mean waiting for
    the device: the kernels answer a bad one with NaN, under the interpreter too."""
    checks.loss_storages(logits, row_offsets, token_ids, probs, labels)
    nnz = 0 if token_ids is None else token_ids.shape[0]
    if probs is not None and probs.dtype == torch.float64:
        probs = probs.float()
    label_stride = 0 if labels is None else labels.stride(0)
    return row_offsets, token_ids, probs, nnz, labels, label_stride, ignore_index


def _run(kernel, logits, *arguments, op="sparse_kl", **constants) -> None:
    rows, vocab = logits.shape
    if rows == 0:
        return
    parameters = launch(vocab, logits.element_size())
    # A sort, which the forward has no way around, takes the interpreter three seconds.
    few = (
        parameters.entries
        if INTERPRETED and kernel is triton_programs.forward_rows
        else parameters.few
    )
    with launching(op, logits):
        kernel[(rows,)](
            *arguments,
            **constants,
            LANES=parameters.block // 16,
            VEC=vector(logits.dtype),
            K=parameters.entries,
            FEW=few,
            STEP=parameters.step,
            num_warps=parameters.warps,
            maxnreg=parameters.registers,
            enable_fp_fusion=True,
        )
