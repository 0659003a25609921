"""The Triton kernels of sparse_kl: one program per row. Algorithm, bytes and hazards: README.md."""

import triton
import triton.language as tl

from ..triton_rows import (
    LOG2E,
    edge_columns,
    log_of_sum,
    max_and_sum,
    split_row,
    tile_columns,
)
from .triton_device import (
    correct,
    correct_label,
    descends,
    entries,
    id_mass,
    kl_terms,
    label_of,
    marks_repeat,
    pairs_repeat,
    range_of,
    sort_repeats,
    write_softmax,
)

# One compilation per dtype and line of the table: a training step must not stop to compile because
# its number of targets is a multiple of 16. Alignment is established in the kernels.
row_kernel = triton.jit(
    do_not_specialize=(
        "logits_stride", "grad_stride", "vocab", "rows", "nnz", "ignore_index",
        "labels_stride", "kl_stride", "ce_stride", "factor_stride",
    ),
    do_not_specialize_on_alignment=(
        "logits", "grad", "row_offsets", "ids", "probs", "labels",
        "kl", "ce", "lse", "kl_coef", "ce_coef", "factor",
    ),
)  # fmt: skip


@row_kernel
def forward_rows(
    logits, logits_stride, vocab, row_offsets, ids, probs, nnz, labels, labels_stride, ignore_index,
    kl, ce, lse,
    LANES: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, FEW: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * logits_stride
    label, live, bad_label = label_of(labels, row, labels_stride, ignore_index, vocab)
    begin, end, poison = range_of(row_offsets, row, nnz, live)
    poison = tl.maximum(poison, bad_label)

    head, body = split_row(x, vocab, VEC)
    column, on_edge = edge_columns(head, body, vocab, VEC)
    readable_edge = on_edge & (column < tl.where(live > 0, vocab, 0))
    edge = tl.load(x + column, mask=readable_edge, other=-float("inf")).to(tl.float32)
    readable = tl.multiple_of(tl.where(live > 0, body, 0), VEC)
    xb = tl.multiple_of(x + head, 16)
    highest, s = max_and_sum(xb, readable, edge, LANES, VEC)
    log_s = log_of_sum(s)

    loss = tl.zeros((), tl.float32)
    if row_offsets is not None:
        token, prob, usable, bad = entries(ids, probs, begin, end, vocab, K)
        repeats = 0
        if end - begin > K:
            repeats = descends(ids, begin, end, K)
        elif end - begin > FEW:
            repeats = sort_repeats(token, usable, K)
        elif end - begin > 1:
            repeats = pairs_repeat(ids, begin, end, FEW)
        for first in range(begin, end, K):
            token, prob, usable, bad = entries(ids, probs, first, end, vocab, K)
            poison = tl.maximum(poison, tl.max(bad.to(tl.int32), 0))
            z = tl.load(x + token, mask=usable, other=0.0).to(tl.float32)
            mass = id_mass(token, prob, ids, probs, begin, end, repeats, K, STEP)
            loss += kl_terms(prob, mass, z, usable, highest, log_s.to(tl.float32))
    gold = tl.load(x + label, mask=label >= 0, other=0.0).to(tl.float32)
    cross = tl.where(label >= 0, log_s - (gold - highest).to(tl.float64), 0.0).to(tl.float32)
    nan = float("nan")
    tl.store(kl + row, tl.where(poison > 0, nan, tl.where(live > 0, loss, 0.0)))
    tl.store(ce + row, tl.where(poison > 0, nan, cross))
    tl.store(lse + row, tl.where(live > 0, highest.to(tl.float64) + log_s, 0.0))


@triton.jit
def find_repeats(
    g, token, usable, ids, begin, end, K: tl.constexpr, FEW: tl.constexpr
):  # fmt: skip
    repeats = 0
    if end - begin > K:
        repeats = descends(ids, begin, end, K)
    elif end - begin > FEW:
        repeats = marks_repeat(g, token, usable, K)
    elif end - begin > 1:
        repeats = pairs_repeat(ids, begin, end, FEW)
    return repeats


@row_kernel
def backward_rows(
    logits, logits_stride, grad, grad_stride, vocab,
    row_offsets, ids, probs, nnz, labels, labels_stride, ignore_index,
    lse, kl_coef, kl_stride, ce_coef, ce_stride,
    LANES: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, FEW: tl.constexpr, STEP: tl.constexpr,
    SAME: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * logits_stride
    g = grad + row * grad_stride
    label, live, bad_label = label_of(labels, row, labels_stride, ignore_index, vocab)
    begin, end, poison = range_of(row_offsets, row, nnz, live)
    poison = tl.maximum(poison, bad_label)
    a = tl.load(kl_coef + row * kl_stride).to(tl.float32)
    c = tl.load(ce_coef + row * ce_stride).to(tl.float32)
    c = tl.where(label >= 0, c, 0.0)

    head, body = split_row(x, vocab, VEC)
    column, on_edge = edge_columns(head, body, vocab, VEC)
    readable_edge = on_edge & (column < tl.where(live > 0, vocab, 0))
    edge = tl.load(x + column, mask=readable_edge, other=-float("inf")).to(tl.float32)
    readable = tl.multiple_of(tl.where(live > 0, body, 0), VEC)
    xb = tl.multiple_of(x + head, 16)
    gb = g + head
    if SAME:  # both rows at the same place in their 16 bytes
        gb = tl.multiple_of(gb, 16)

    known = tl.load(lse + row)
    highest = known.to(tl.float32)
    inverse = tl.exp2((highest.to(tl.float64) - known).to(tl.float32) * LOG2E)
    # Beyond 1e8 (a row of the lowest finite logits) lse = max + log s has lost its second term.
    if not (tl.abs(known) < 1e8):
        highest, s = max_and_sum(xb, readable, edge, LANES, VEC)
        inverse = tl.div_rn(tl.full((), 1.0, tl.float32), s)

    total = tl.zeros((), tl.float32)
    gold_mass = tl.zeros((), tl.float32)
    if row_offsets is not None:
        for first in range(begin, end, K):
            token, prob, usable, bad = entries(ids, probs, first, end, vocab, K)
            poison = tl.maximum(poison, tl.max(bad.to(tl.int32), 0))
            total += tl.sum(prob, 0)
            gold_mass += tl.sum(tl.where(token == label, prob, 0.0), 0)
    scale = tl.where(live > 0, (a * total + c) * inverse, 0.0)
    scale = tl.where(poison > 0, float("nan"), scale)
    scale = tl.where(tl.abs(scale) < float("inf"), scale, float("nan"))

    write_softmax(xb, gb, readable, body, highest, scale, LANES, VEC)
    dense = scale * tl.exp2((edge - highest) * LOG2E)
    tl.store(g + column, dense.to(g.dtype.element_ty), mask=on_edge)
    tl.debug_barrier()  # the corrections below go where other threads have just stored
    if row_offsets is not None:
        token, prob, usable, bad = entries(ids, probs, begin, end, vocab, K)
        repeats = find_repeats(g, token, usable, ids, begin, end, K, FEW)
        for first in range(begin, end, K):
            token, prob, usable, bad = entries(ids, probs, first, end, vocab, K)
            z = tl.load(x + token, mask=usable, other=0.0).to(tl.float32)
            mass = id_mass(token, prob, ids, probs, begin, end, repeats, K, STEP)
            correct(g, token, mass, z, usable, label, highest, scale, a)
    gold = tl.load(x + label, mask=label >= 0, other=0.0).to(tl.float32)
    correct_label(g, label, gold_mass, gold, highest, scale, a, c)


@row_kernel
def forward_backward_rows(
    logits, logits_stride, vocab,
    row_offsets, ids, probs, nnz, labels, labels_stride, ignore_index,
    kl_coef, kl_stride, ce_coef, ce_stride, kl, ce,
    LANES: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, FEW: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * logits_stride
    label, live, bad_label = label_of(labels, row, labels_stride, ignore_index, vocab)
    begin, end, poison = range_of(row_offsets, row, nnz, live)
    poison = tl.maximum(poison, bad_label)

    # What is needed of the logits besides the softmax is fetched before it is overwritten.
    head, body = split_row(x, vocab, VEC)
    column, on_edge = edge_columns(head, body, vocab, VEC)
    readable_edge = on_edge & (column < tl.where(live > 0, vocab, 0))
    edge = tl.load(x + column, mask=readable_edge, other=-float("inf")).to(tl.float32)
    gold = tl.load(x + label, mask=label >= 0, other=0.0).to(tl.float32)
    total = tl.zeros((), tl.float32)
    gold_mass = tl.zeros((), tl.float32)
    if row_offsets is not None:
        token, prob, usable, bad = entries(ids, probs, begin, end, vocab, K)
        z = tl.load(x + token, mask=usable, other=0.0).to(tl.float32)

    readable = tl.multiple_of(tl.where(live > 0, body, 0), VEC)
    xb = tl.multiple_of(x + head, 16)
    highest, s = max_and_sum(xb, readable, edge, LANES, VEC)
    log_s = log_of_sum(s)

    loss = tl.zeros((), tl.float32)
    repeats = 0
    if row_offsets is not None:
        poison = tl.maximum(poison, tl.max(bad.to(tl.int32), 0))
        total = tl.sum(prob, 0)
        gold_mass = tl.sum(tl.where(token == label, prob, 0.0), 0)
        if end - begin > K:
            repeats = descends(ids, begin, end, K)
            for first in range(begin + K, end, K):
                more, p, ok, wrong = entries(ids, probs, first, end, vocab, K)
                poison = tl.maximum(poison, tl.max(wrong.to(tl.int32), 0))
                total += tl.sum(p, 0)
                gold_mass += tl.sum(tl.where(more == label, p, 0.0), 0)
            for first in range(begin, end, K):
                more, p, ok, wrong = entries(ids, probs, first, end, vocab, K)
                at = tl.load(x + more, mask=ok, other=0.0).to(tl.float32)
                of = id_mass(more, p, ids, probs, begin, end, repeats, K, STEP)
                loss += kl_terms(p, of, at, ok, highest, log_s.to(tl.float32))
    a = tl.load(kl_coef + row * kl_stride).to(tl.float32)
    c = tl.load(ce_coef + row * ce_stride).to(tl.float32)
    c = tl.where(label >= 0, c, 0.0)
    scale = tl.where(live > 0, tl.div_rn(a * total + c, s), 0.0)
    scale = tl.where(poison > 0, float("nan"), scale)
    scale = tl.where(tl.abs(scale) < float("inf"), scale, float("nan"))

    tl.debug_barrier()  # no store before every thread has its logits
    if end - begin > K:
        _write_long(
            x, xb, head, body, column, on_edge, edge, ids, probs, begin, end, repeats, label,
            highest, scale, a, vocab, LANES // 4, VEC, K, STEP,
        )  # fmt: skip
    else:
        write_softmax(xb, xb, readable, body, highest, scale, LANES, VEC)
        dense = scale * tl.exp2((edge - highest) * LOG2E)
        tl.store(x + column, dense.to(x.dtype.element_ty), mask=on_edge)
        tl.debug_barrier()  # what follows goes where other threads have just stored
        if row_offsets is not None:
            repeats = find_repeats(x, token, usable, ids, begin, end, K, FEW)
            mass = id_mass(token, prob, ids, probs, begin, end, repeats, K, STEP)
            loss = kl_terms(prob, mass, z, usable, highest, log_s.to(tl.float32))
            correct(x, token, mass, z, usable, label, highest, scale, a)
    correct_label(x, label, gold_mass, gold, highest, scale, a, c)
    cross = tl.where(label >= 0, log_s - (gold - highest).to(tl.float64), 0.0).to(tl.float32)
    tl.store(kl + row, tl.where(poison > 0, float("nan"), tl.where(live > 0, loss, 0.0)))
    tl.store(ce + row, tl.where(poison > 0, float("nan"), cross))


@triton.jit
def _write_long(
    x, xb, head, body, column, on_edge, edge, ids, probs, begin, end, repeats, label,
    highest, scale, a, vocab,
    LANES: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The in-place gradient of a row with more than K targets: tile by tile, each target taking its
    logit from the registers of the tile it falls into."""
    at = tl.arange(0, LANES * VEC)
    for start in range(0, body, LANES * VEC):
        tile = tl.load(xb + start + at, mask=start + at < body, other=0.0).to(tl.float32)
        dense = scale * tl.exp2((tile - highest) * LOG2E)
        tl.store(xb + start + at, dense.to(x.dtype.element_ty), mask=start + at < body)
        tl.debug_barrier()
        for first in range(begin, end, K):
            token, prob, usable, _ = entries(ids, probs, first, end, vocab, K)
            local = token - head - start
            here = usable & (local >= 0) & (local < LANES * VEC) & (token < head + body)
            z = tl.gather(tile, tl.where(here, local, 0), 0)
            mass = id_mass(token, prob, ids, probs, begin, end, repeats, K, STEP)
            correct(x, token, mass, z, here, label, highest, scale, a)
    dense = scale * tl.exp2((edge - highest) * LOG2E)
    tl.store(x + column, dense.to(x.dtype.element_ty), mask=on_edge)
    tl.debug_barrier()
    for first in range(begin, end, K):
        token, prob, usable, _ = entries(ids, probs, first, end, vocab, K)
        here = usable & ((token < head) | (token >= head + body))
        lane = tl.where(token < head, token, token - head - body + VEC)
        z = tl.gather(edge, tl.where(here, lane, 0), 0)
        mass = id_mass(token, prob, ids, probs, begin, end, repeats, K, STEP)
        correct(x, token, mass, z, here, label, highest, scale, a)


@row_kernel
def scale_rows(
    grad, grad_stride, rows, vocab, factor, factor_stride,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """grad *= factor. The factor is read here, not on the host, which would have to wait for it; it
    is almost always 1 (the loss is the root of the graph), and then nothing is read or written."""
    columns = tile_columns(LANES, VEC)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        by = tl.load(factor + row * factor_stride).to(tl.float32)
        if by != 1.0:
            g = grad + row * grad_stride
            head, body = split_row(g, vocab, VEC)
            column, on_edge = edge_columns(head, body, vocab, VEC)
            edge = tl.load(g + column, mask=on_edge, other=0.0).to(tl.float32) * by
            gb = tl.multiple_of(g + head, 16)
            for start in range(0, body, LANES * VEC):
                at = start + columns
                value = tl.load(gb + at, mask=at < body, other=0.0).to(tl.float32) * by
                tl.store(gb + at, value.to(grad.dtype.element_ty), mask=at < body)
            tl.store(g + column, edge.to(grad.dtype.element_ty), mask=on_edge)
