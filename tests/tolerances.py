"""What sparse_kl must return for a problem, and how wrong it may be.

Errors are counted in roundings; u = 2^-24 is half an ulp of fp32, relative. An fp32 kernel computes
exp(x - m) with an error of (3 |x - m| + 2) u: the subtraction, the constant log2(e) and their
product each cost one rounding of the argument, the polynomial two of the result. The normaliser
carries the polynomial's two again, plus its summation: n additions per lane, whose roundings add up
like a random walk, 2 sqrt(n) u. The weights, the scale and two products round once each:
(3 |x - m| + 8 + 2 sqrt(n)) u in all for an entry of the softmax. No constant comes from a measured
result; where plain torch's own error is the yardstick, both are compared with float64.
"""

import torch
from helpers import IGNORE, U32, Problem, dense_losses, dense_probs

from mdkernels import SparseTargets

F64 = 1e-12  # fp64 against fp64: 2^12 roundings, for sums over V

# Roundings of a result to the output dtype, and what is lost at most below its normal range (bf16
# and fp32 hardware may flush subnormals, fp16 hardware does not).
ROUNDING = {
    torch.float64: (2.0**-53, 2.0**-1022),
    torch.float32: (2.0**-24, 2.0**-126),
    torch.bfloat16: (2.0**-8, 2.0**-126),
    torch.float16: (2.0**-11, 2.0**-25),
}


def same_nonfinite(ours, exact, what: str) -> torch.Tensor:
    """Infinities and NaN must sit where the exact result has them; returns the finite mask."""
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{what}: finite elsewhere than the reference"
    same = (ours == exact) | (ours.isnan() & exact.isnan())
    assert bool(same[~finite].all()), f"{what}: {ours[~finite]} instead of {exact[~finite]}"
    return finite


def check_rows(what: str, ours, exact, plain, magnitude) -> None:
    """(N,) losses: within 1.5 times the worst row of plain torch, plus 8 roundings of the terms
    that were added up (`magnitude`, (N,))."""
    wide = plain.dtype == torch.float64
    assert ours.dtype == (torch.float64 if wide else torch.float32)
    fits = exact.to(ours.dtype).isfinite() | ~exact.isfinite()  # fp32 may not hold a mean of -3e38
    ours, plain = ours.detach().cpu().double(), plain.double()
    finite = same_nonfinite(ours.where(fits, exact), exact, what) & fits
    if not bool(finite.any()):
        return
    error = (ours - exact).abs()[finite]
    allowed = (F64 if wide else 8 * U32) * (magnitude + exact.abs())[finite]
    if not wide:
        allowed += 1.5 * (plain - exact).abs()[finite].nan_to_num(0.0, posinf=0.0).max()
    worst = int((error - allowed).argmax())
    assert bool((error <= allowed).all()), (
        f"{what}: error {error[worst]:.3g}, allowed {allowed[worst]:.3g} "
        f"(ours {ours[finite][worst]:.9g}, exact {exact[finite][worst]:.9g})"
    )


class Expected:
    """The exact kl, ce and gradient of sum(kl_coef * kl + ce_coef * ce) for a problem, what plain
    torch makes of them, and the arithmetic bounds. Coefficients: a number or one per row."""

    def __init__(self, p: Problem, kl_coef, ce_coef, ignore: int = IGNORE):
        self.dtype = p.logits.dtype
        self.wide = self.dtype == torch.float64
        self.exact = dense_losses(p, torch.float64, kl_coef, ce_coef, ignore)
        self.plain = self.exact
        if not self.wide:
            self.plain = dense_losses(p, torch.float32, kl_coef, ce_coef, ignore)

        z = p.logits.detach().cpu().double()
        rows, self.vocab = z.shape
        probs = dense_probs(p.targets, self.vocab)
        labels = torch.full((rows,), ignore) if p.labels is None else p.labels.cpu()
        live = (labels != ignore) | (p.labels is None)
        kl_coef, ce_coef = (
            (torch.as_tensor(c, dtype=torch.float64).expand(rows).abs() * live)[:, None]
            for c in (kl_coef, ce_coef)
        )
        onehot = torch.zeros_like(z)
        gold = labels.where(labels != ignore, 0)[:, None]
        onehot.scatter_(1, gold, (labels != ignore).double()[:, None])
        # exp(-1e4) is 0, and so far from infinity the products below stay finite
        distance = (z - z.logsumexp(1, keepdim=True)).abs().clamp(max=1e4).nan_to_num(0.0)
        self.weight = kl_coef * probs.sum(1, keepdim=True) + ce_coef
        self.softmax = self.weight * (-distance).exp()
        self.softmax_roundings = self.softmax * (3 * distance + 8)
        # merging n entries of an id costs n - 1 roundings
        self.sparse_roundings = kl_coef * probs * (4 + _repeats(p.targets, self.vocab))
        self.sparse_roundings += 4 * ce_coef * onehot
        # sum_j p_j (1 + |log p_j|): what the terms of one KL row weigh
        self.kl_magnitude = torch.where(probs > 0, probs * (1 + probs.log().abs()), 0.0).sum(1)

    def check_losses(self, out) -> None:
        check_rows("kl", out.kl, self.exact.kl, self.plain.kl, self.kl_magnitude)
        check_rows("ce", out.ce, self.exact.ce, self.plain.ce, torch.ones_like(self.exact.ce))

    def check_grad(self, ours, variant, rescaled_by: float = 0.0) -> None:
        """Every entry of dz within the roundings of its own two terms, and the largest error within
        1.5 times plain torch's plus two ulps.

        An in-place gradient is rounded in the forward, multiplied by the upstream gradient (at most
        `rescaled_by`) in the backward, and rounded again.
        """
        ours, grad = ours.detach().cpu(), self.exact.grad
        assert ours.dtype == self.dtype
        assert ours.shape == grad.shape
        if ours.numel() == 0:
            return
        u, tiny = ROUNDING[ours.dtype]
        unit = 64 * u if self.wide else U32
        overflow = grad.to(ours.dtype).isinf() & grad.isfinite()
        finite = same_nonfinite(ours.double().masked_fill(overflow, 0.0), grad, "grad") & ~overflow

        summation = 2 * variant.additions(self.vocab) ** 0.5
        arithmetic = unit * (
            self.softmax_roundings + summation * self.softmax + self.sparse_roundings
        )
        passes, tiny = 1 + (rescaled_by > 0), tiny * (1 + rescaled_by)
        allowed = arithmetic + passes * u * (grad.abs() + arithmetic) + tiny
        error = (ours.double() - grad).abs()
        excess = (error - allowed).masked_fill(~finite, -torch.inf)
        row, column = divmod(int(excess.argmax()), self.vocab)
        assert float(excess[row, column]) <= 0, (
            f"grad: error {error[row, column]:.3g}, allowed {allowed[row, column]:.3g} at row "
            f"{row}, id {column} (ours {ours[row, column]:.9g}, exact {grad[row, column]:.9g})"
        )
        if self.wide or variant.backend == "reference":
            return  # the reference is plain torch
        plain = self.plain.grad.to(ours.dtype).double()
        worst = float(error.masked_fill(~finite, 0.0).max())
        torchs = float((plain - grad).abs().masked_fill(~finite | plain.isinf(), 0.0).max())
        assert worst <= passes * (1.5 * torchs + 4 * unit * self.weight.max()) + tiny, (
            f"grad: largest error {worst:.3g}, plain torch {torchs:.3g}"
        )


def _repeats(targets: SparseTargets, vocab: int) -> torch.Tensor:
    """(N, V): how many entries beyond the first name this id."""
    ones = SparseTargets(targets.row_offsets, targets.token_ids, torch.ones_like(targets.probs))
    return (dense_probs(ones, vocab) - 1).clamp(min=0)
