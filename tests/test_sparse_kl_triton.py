"""What only the Triton kernels of sparse_kl have: rows cut into vectors, tiles and edges, lists of
targets that do not fit in registers, repeated ids found in three ways, values that a GPU cannot
refuse, a scale that is read on the device. Runs under the interpreter and on a GPU."""

import pytest
import torch
from buffers import Frame
from helpers import IGNORE, Problem, csr, make_logits, problem, variants
from tolerances import Expected

OP = "sparse_kl"
TRITON = [v for v in variants(OP) if v.backend == "triton"]
if not TRITON:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from mdkernels.ops.sparse_kl import triton_kernels as kernels  # noqa: E402
from mdkernels.ops.sparse_kl.triton_table import Launch  # noqa: E402

pytestmark = pytest.mark.interpreted
(VARIANT,) = TRITON
DEVICE = VARIANT.device
DTYPES = [d for d in VARIANT.dtypes() if d != torch.bfloat16 or DEVICE == "cuda"]
COEFS = 0.3, 0.7


@pytest.fixture
def small(monkeypatch):
    """Tiles of 1 kB and at most 64 targets in registers, of which 16 are few."""
    monkeypatch.setattr(kernels, "launch", lambda *_: Launch(1024, 4, 64, few=16, step=256))


def steps(p: Problem, logits=None):
    """(name, kl, ce, grad) of the two ways to get there. `logits`: a view of guarded memory."""
    z = p.logits.to(DEVICE) if logits is None else logits
    t = p.targets.to(DEVICE)
    labels = None if p.labels is None else p.labels.to(DEVICE)
    sparse = (t.row_offsets, t.token_ids, t.probs, labels, IGNORE)
    coefs = [torch.full((len(z),), c, device=DEVICE) for c in COEFS]
    kl, ce, lse = kernels.forward(z, *sparse)
    yield "fresh", kl, ce, kernels.backward(z, *sparse, lse, *coefs)
    kl, ce = kernels.forward_backward_(z, *sparse, *coefs)
    yield "inplace", kl, ce, z


def check(p: Problem, logits=None):
    expected = Expected(p, *COEFS)
    for _, kl, ce, grad in steps(p, logits):
        expected.check_losses(type("Out", (), {"kl": kl, "ce": ce}))
        expected.check_grad(grad, VARIANT)


def corners(vocab, dtype, rows=9):
    """Targets and labels at both ends of a row and in its middle."""
    first, middle, last = 0, vocab // 2, vocab - 1
    p = Problem(make_logits("peaked", rows, vocab, dtype), None, None)
    p.targets = csr([([first, middle, last], [0.5, 0.2, 0.3]), ([last], [1.0]), ([], [])] * 3)
    p.labels = torch.tensor([first, middle, last, last, IGNORE, first, middle, last, last])
    return p


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 9, 33, 1029])
def test_every_alignment_of_a_row(small, dtype, vocab, poisoned_memory):
    """Odd strides put the rows at every place in their 16 bytes; 1029 needs several tiles."""
    p = corners(vocab, dtype)
    frame = Frame(p.logits, DEVICE)
    check(p, frame.view)
    frame.check_guards()


def rows_of_targets(vocab, counts, repeats):
    """Descending ids, so that no order rules repeats out; with `repeats` the ends are equal."""
    entries = []
    for count in counts:
        ids = torch.arange(vocab - 1, vocab - 1 - count, -1)
        if repeats and count > 1:
            ids[-1] = ids[0]
        entries.append((ids, torch.linspace(0.1, 1.0, count) / max(count, 1)))
    return csr(entries)


@pytest.mark.parametrize("repeats", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("labels", [False, True], ids=["no_labels", "labels"])
def test_lists_of_every_length(small, repeats, labels, poisoned_memory):
    """Few targets, many, and more than the registers hold; a label among them or next to them."""
    counts = [0, 1, 2, 16, 17, 64, 65, 200]
    p = Problem(make_logits("peaked", 8, 301, torch.float32), None, None)
    p.targets = rows_of_targets(301, counts, repeats)
    if labels:
        p.labels = torch.tensor([0, 300, 300, 3, 300, 299, 300, 150])
        check(p)
        return
    expected = Expected(p, COEFS[0], 0.0)
    for _, kl, _, grad in steps(p):
        expected.check_losses(type("Out", (), {"kl": kl, "ce": torch.zeros_like(kl)}))
        expected.check_grad(grad, VARIANT)


def test_repeats_found_by_sorting(monkeypatch):
    """The forward of rows with more than a few targets; on every other test the interpreter, which
    takes seconds to sort, compares them instead."""
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "launch", lambda *_: Launch(1024, 4, 32, few=4))
    p = Problem(make_logits("peaked", 2, 67, torch.float32), None, torch.tensor([66, 1]))
    ids = torch.arange(60, 30, -1)
    twice = ids.clone()
    twice[29] = twice[3]
    p.targets = csr([(twice, torch.full((30,), 0.03)), (ids, torch.full((30,), 0.03))])
    check(p)


def test_bfloat16(small):
    """The interpreter truncates what is stored as bf16: one ulp instead of half an ulp. Loads and
    losses are exact."""
    p = corners(301, torch.bfloat16)
    expected = Expected(p, *COEFS)
    for _, kl, ce, grad in steps(p):
        expected.check_losses(type("Out", (), {"kl": kl, "ce": ce}))
        if DEVICE == "cuda":
            expected.check_grad(grad, VARIANT)
            continue
        exact = expected.exact.grad
        error = (grad.double() - exact).abs()
        assert bool((error <= 2.0**-7 * exact.abs() + 2.0**-22).all())


def bad_problem():
    """Rows 1, 3 and 5 are wrong; row 6 is as wrong, but ignored."""
    p = problem("normal", 8, 40, torch.float32)
    p.targets = csr([([3, 4], [0.5, 0.5])] * 8)
    p.labels = torch.tensor([1, 40, 2, 3, 4, 2**32 + 5, IGNORE, 39])
    ids = p.targets.token_ids.clone()
    ids[7], ids[13] = -1, 40
    return p, ids


def test_bad_values_poison_their_row(small):
    p, ids = bad_problem()
    good = [0, 2, 4, 7]
    expected = Expected(
        Problem(p.logits[good], csr([([3, 4], [0.5, 0.5])] * 4), p.labels[good]), *COEFS
    )
    t = p.targets
    for inplace in (False, True):
        frame = Frame(p.logits, DEVICE)
        z = frame.view
        args = (t.row_offsets, ids, t.probs, p.labels)
        sparse = (*(a.to(DEVICE) for a in args), IGNORE)
        coefs = [torch.full((8,), c, device=DEVICE) for c in COEFS]
        if inplace:
            kl, ce = kernels.forward_backward_(z, *sparse, *coefs)
            grad = z
        else:
            kl, ce, lse = kernels.forward(z, *sparse)
            grad = kernels.backward(z, *sparse, lse, *coefs)
        frame.check_guards()
        for row in (1, 3, 5):
            assert kl[row].isnan()
            assert ce[row].isnan()
            assert grad[row].isnan().all()
        assert not torch.stack([kl[6], ce[6], grad[6].abs().max()]).any()
        expected.check_losses(type("Out", (), {"kl": kl[good], "ce": ce[good]}))
        expected.check_grad(grad[good], VARIANT)


@pytest.mark.parametrize(
    ("offsets", "bad"), [([0, 2, 1, 4], [1]), ([-5, 2, 2, 9], [0, 2]), ([2**62, 2, 4, 4], [0])]
)
def test_bad_offsets_poison_their_rows(small, offsets, bad):
    z = make_logits("normal", 3, 40, torch.float32).to(DEVICE)
    ids = torch.arange(4, dtype=torch.int32, device=DEVICE)
    sparse = (torch.tensor(offsets, device=DEVICE), ids, torch.full((4,), 0.25, device=DEVICE))
    ones = torch.ones(3, device=DEVICE)
    kl, _ = kernels.forward_backward_(z, *sparse, None, IGNORE, ones, ones)
    assert kl.isnan().nonzero().flatten().tolist() == bad
    assert z.isnan().all(1).nonzero().flatten().tolist() == bad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(small, dtype):
    before = make_logits("normal", 5, 301, dtype)
    by_row = torch.tensor([1.0, -0.5, 3.0, 0.0, 1.0])
    for factor in (torch.tensor(1.0), torch.tensor(0.3), by_row):
        frame = Frame(before, DEVICE)
        kernels.scale_(frame.view, factor.to(DEVICE))
        frame.check_guards()
        exact = before.float() * (factor[:, None] if factor.ndim else factor)
        assert torch.equal(frame.view.cpu(), exact.to(dtype))


def test_scale_by_one_touches_nothing(small):
    """A signalling NaN survives only where nothing is computed."""
    payload = torch.full((2, 33), 0x7FA01234, dtype=torch.int32, device=DEVICE)
    kernels.scale_(payload.view(torch.float32), torch.tensor(1.0, device=DEVICE))
    assert bool((payload == 0x7FA01234).all())


def test_a_failing_launch_names_the_operator(monkeypatch):
    monkeypatch.setattr(kernels, "launch", lambda *_: Launch(100, 4))
    z = torch.zeros(1, 33, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"sparse_kl \(backend 'triton'\): .*compile or launch"):
        kernels.forward(z, None, None, None, torch.tensor([0], device=DEVICE), IGNORE)
