"""Where a training loss gets its logits from, without the cost of a model."""

import torch
from torch import Tensor


class _Head(torch.autograd.Function):
    """Presents a buffer as the output of an LM head, and hands the gradient that arrives to
    `received` instead of multiplying it with weights."""

    @staticmethod
    def forward(ctx, parameter, buffer, received):
        ctx.received = received
        return buffer.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.received(grad)
        return torch.zeros(()), None, None


class Head:
    """Logits as a loss meets them in training: a non-leaf tensor that was written a moment ago.

    `refresh` copies the pristine values in, row by row from the first to the last, and is not
    timed. It stands for the head's matrix product: as after one, the last rows are in cache (less
    than with a real head, for the copy reads as much as it writes) and the first are in memory.
    Every provider gets the same refresh before every sample, whether it overwrites logits or not.
    """

    def __init__(self, pristine: Tensor):
        self.pristine = pristine
        self.buffer = torch.empty_like(pristine)
        self._parameter = torch.zeros((), requires_grad=True)
        self.grad: Tensor | None = None
        self.keep = False
        self.refresh()

    def refresh(self) -> None:
        self.buffer.copy_(self.pristine)

    def logits(self) -> Tensor:
        return _Head.apply(self._parameter, self.buffer, self._receive)

    def _receive(self, grad: Tensor) -> None:
        if self.keep:
            self.grad = grad.detach()
        self._parameter.grad = None

    def loss_and_grad(self, loss_function) -> tuple[float, Tensor]:
        """For checks: loss_function(logits) and the gradient that reaches the head."""
        self.refresh()
        self.keep = True
        loss = loss_function(self.logits())
        loss.backward()
        self.keep = False
        grad, self.grad = self.grad, None
        return float(loss.detach()), grad

    def step(self, loss_function):
        """A callable that runs forward and backward and drops the gradient."""
        return lambda: loss_function(self.logits()).backward()
