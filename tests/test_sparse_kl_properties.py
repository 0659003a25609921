"""What must hold for any input of sparse_kl, drawn by hypothesis, and its invariances.

Bounds: an fp32 loss is right to 8 roundings of what was added up (tolerances.py); two of them may
differ by twice that. Gradients likewise, per unit of weight."""

import pytest
import torch
from helpers import U32, csr, make_logits, on, problem, ragged_targets, threads
from hypothesis import given, settings
from hypothesis import strategies as st

from mdkernels import SparseTargets, sparse_kl

OP = "sparse_kl"

draws = settings(max_examples=30)
seeds = st.integers(0, 2**31)
vocabs = st.integers(1, 140)


def step(variant, logits, targets, labels, **options):
    """(loss, kl, ce, gradient) per row, on the CPU in float64."""
    z = logits.to(variant.device, copy=True).requires_grad_()
    options = {"reduction": "none", "kl_weight": 0.4, **options}
    out = sparse_kl(
        z, targets.to(variant.device), labels.to(variant.device), backend=variant.backend, **options
    )
    out.loss.sum().backward()
    return [t.detach().cpu().double() for t in (*out, z.grad)]


def close(a, b, scale, roundings=16.0):
    assert (a - b).abs().max() <= roundings * U32 * scale


def draw_problem(seed, vocab, rows=4, spread=4.0):
    logits = spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return logits, *ragged_targets(logits, seed)


@draws
@given(seed=seeds, vocab=vocabs)
def test_kl_is_never_negative_for_a_distribution(variant, seed, vocab):
    draw = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(4, vocab, generator=draw)
    # As near as it gets to KL 0: the model's own distribution, one fp32 rounding away.
    targets = SparseTargets.from_dense(logits.softmax(1))
    labels = torch.zeros(4, dtype=torch.int64)
    _, kl, _, _ = step(variant, logits, targets, labels)
    entropy = torch.special.entr(logits.double().softmax(1)).sum(1)
    assert (kl >= -16 * U32 * (1 + entropy)).all()
    assert (kl <= 16 * U32 * (1 + entropy)).all()


@draws
@given(seed=seeds, vocab=vocabs, shift=st.sampled_from([-1e4, -37.5, 3.0, 1024.0, 1e4]))
def test_shift_of_the_logits_changes_nothing(variant, seed, vocab, shift):
    logits, targets, labels = draw_problem(seed, vocab)
    logits = (logits * 64).round() / 64  # so that the shifted logits are exact in fp32
    plain = step(variant, logits, targets, labels)
    moved = step(variant, logits + shift, targets, labels)
    for a, b in zip(plain, moved, strict=True):
        close(a, b, 1 + a.abs().max())


@draws
@given(seed=seeds, vocab=vocabs)
def test_order_of_entries_does_not_matter(variant, seed, vocab):
    logits, targets, labels = draw_problem(seed, vocab)
    draw = torch.Generator().manual_seed(seed)
    rows = targets.row_ids().double()
    order = (rows + torch.rand(len(rows), generator=draw, dtype=torch.float64)).argsort()
    shuffled = SparseTargets(targets.row_offsets, targets.token_ids[order], targets.probs[order])
    repeats = int(targets.row_offsets.diff().max())
    for a, b in zip(
        step(variant, logits, targets, labels), step(variant, logits, shuffled, labels), strict=True
    ):
        close(a, b, 1 + a.abs().max(), 16 + repeats)


@draws
@given(seed=seeds, vocab=vocabs, pieces=st.integers(2, 5))
def test_split_entries_count_as_one(variant, seed, vocab, pieces):
    logits, targets, labels = draw_problem(seed, vocab)
    merged = SparseTargets.from_dense(targets.to_dense(vocab).float())
    split = SparseTargets(
        merged.row_offsets * pieces,
        merged.token_ids.repeat_interleave(pieces),
        (merged.probs / pieces).repeat_interleave(pieces),
    )
    for a, b in zip(
        step(variant, logits, merged, labels), step(variant, logits, split, labels), strict=True
    ):
        close(a, b, 1 + a.abs().max(), 16 + 2 * pieces)


@draws
@given(seed=seeds, vocab=vocabs, kl_weight=st.floats(0, 1))
def test_loss_is_linear_in_kl_weight(variant, seed, vocab, kl_weight):
    logits, targets, labels = draw_problem(seed, vocab)
    kl_only = step(variant, logits, targets, labels, kl_weight=1.0)
    ce_only = step(variant, logits, targets, labels, kl_weight=0.0)
    mixed = step(variant, logits, targets, labels, kl_weight=kl_weight)
    for at in (0, 3):  # loss and gradient
        expected = kl_weight * kl_only[at] + (1 - kl_weight) * ce_only[at]
        close(mixed[at], expected, 4 + kl_only[at].abs().max() + ce_only[at].abs().max())


@draws
@given(seed=seeds, vocab=vocabs)
def test_gradient_of_a_row_sums_to_zero_for_mass_one(variant, seed, vocab):
    logits, targets, labels = draw_problem(seed, vocab)
    mass = torch.zeros(4).index_add_(0, targets.row_ids(), targets.probs)
    p = targets.probs / mass[targets.row_ids()]
    targets = SparseTargets(targets.row_offsets, targets.token_ids, p)
    labels = labels.where(targets.row_offsets.diff() > 0, -100)  # mass 0 is not mass 1
    *_, grad = step(variant, logits, targets, labels)
    close(grad.sum(1), torch.zeros(4), 2.0, 16 + len(p))


@draws
@given(seed=seeds, vocab=vocabs)
def test_one_hot_target_is_cross_entropy(variant, seed, vocab):
    draw = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(4, vocab, generator=draw)
    labels = torch.randint(vocab, (4,), generator=draw)
    targets = csr([([int(label)], [1.0]) for label in labels])
    _, kl, ce, grad = step(variant, logits, targets, labels)
    close(kl, ce, 1 + ce.max())
    exact = logits.double().softmax(1)
    exact[torch.arange(4), labels] -= 1
    close(grad, exact, 4.0)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_rows_do_not_know_each_other(variant, dtype, inplace):
    """A row alone, in a batch, in another order, on one thread or three: the same bits. The
    CUDA kernel adds up 16-byte blocks of memory: there, for rows that begin alike in theirs."""
    vocab = 5008 if variant.backend == "cuda" else 5003
    p = problem("peaked", 13, vocab, dtype)
    logits, targets, labels = on(p, variant)

    def run(rows, count):
        z = logits[rows].clone().requires_grad_()
        with threads(count):
            out = sparse_kl(
                z * 1, targets.select(rows), labels[rows], reduction="none", inplace=inplace,
                backend=variant.backend,
            )  # fmt: skip
            out.loss.backward(torch.ones_like(out.loss))
        return out.loss.detach(), z.grad

    everything = torch.arange(13, device=logits.device)
    loss, grad = run(everything, 1)
    for rows in (everything, everything.flip(0), everything[5:6], everything[3:11]):
        for count in (1, 2, 3):
            other = run(rows, count)
            assert torch.equal(other[0], loss[rows])
            assert torch.equal(other[1], grad[rows])


def test_same_input_same_bits(variant, dtype):
    p = problem("peaked", 8, 5003, dtype)
    logits, targets, labels = on(p, variant)
    results = []
    with threads(2):
        for _ in range(10):
            z = logits.clone().requires_grad_()
            out = sparse_kl(z, targets, labels, backend=variant.backend)
            out.loss.backward()
            results.append((out.loss.detach(), z.grad))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@pytest.mark.interpreted
def test_padded_and_dense_targets_are_the_same_targets(variant):
    logits = make_logits("peaked", 6, 97, torch.float32)
    top, ids = logits.roll(3, 1).softmax(1).topk(7)
    top[2, 4:] = 0.0
    dense = torch.zeros(6, 97).scatter_(1, ids, top)
    labels = torch.arange(6)
    padded = step(variant, logits, SparseTargets.from_padded(ids, top), labels)
    from_dense = step(variant, logits, SparseTargets.from_dense(dense), labels)
    for a, b in zip(padded, from_dense, strict=True):
        close(a, b, 1 + a.abs().max())
