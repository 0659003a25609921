"""Logits in hostile memory: an odd offset into the storage, rows further apart than they are wide,
NaN in every byte around them, and a check that nobody wrote there."""

import torch

GAP, OFFSET, TAIL = 5, 3, 67


class Frame:
    """`view` holds `values`; all other elements of `flat` are NaN."""

    def __init__(self, values: torch.Tensor, device="cpu"):
        rows, vocab = values.shape
        stride = vocab + GAP
        self.flat = torch.full(
            (OFFSET + rows * stride + TAIL,), torch.nan, dtype=values.dtype, device=device
        )
        # set_ rather than slicing: autograd must not see a view of a leaf.
        self.view = self.flat.new_empty(0)
        self.view.set_(self.flat.untyped_storage(), OFFSET, (rows, vocab), (stride, 1))
        self.view.copy_(values)
        self.written_at_start = self.view.clone()

    def check_guards(self) -> None:
        around = self.flat.clone()
        rows, vocab = self.view.shape
        inner = around.as_strided((rows, vocab), (vocab + GAP, 1), OFFSET)
        inner.fill_(torch.nan)
        untouched = torch.full_like(around, torch.nan)
        assert torch.equal(bits(around), bits(untouched)), "wrote outside the rows"

    def check_unmodified(self) -> None:
        assert torch.equal(bits(self.view.contiguous()), bits(self.written_at_start))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


class Produce(torch.autograd.Function):
    """An intermediate result whose memory is the frame and whose gradient reaches `leaf`."""

    @staticmethod
    def forward(ctx, leaf, frame):
        return frame.view

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(memory_format=torch.contiguous_format), None
