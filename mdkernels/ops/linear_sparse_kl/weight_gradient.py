"""The gradient of the weight, summed over chunks of rows in fp32."""

import functools

import torch
from torch import Tensor

from .. import native

# So much of a product at a time: in a cache when it is added to the sum, and enough work between
# two waits of the threads for each other, which counts where other processes take their turns.
PRODUCT_BYTES = 8 << 20


class WeightGradient:
    """sum over `chunks` of dlogits.T @ hidden, both in `weight.dtype`, as (V, D) in `dtype`.

    A sum in 16 bits would be rounded once per chunk at its own size. Here a chunk is rounded at
    most at the size of the chunk, so the error does not grow with the number of chunks.

    On a CPU the fp32 sum of a bf16 gradient is kept as two halves (`kernels.add_product_`): the
    upper ones are in the gradient itself, only the lower ones are memory beside it.
    """

    def __init__(self, kernels, weight: Tensor, dtype: torch.dtype, chunks: int):
        self.weight, self.dtype, self.chunks, self.added = weight, dtype, chunks, 0
        narrow = weight.dtype in (torch.bfloat16, torch.float16)
        # One product is its own sum: fp32 inside the product, rounded once.
        self.direct = not narrow or (chunks == 1 and dtype == weight.dtype)
        self.halves = None
        if not self.direct and weight.dtype == dtype == torch.bfloat16:
            self.halves = getattr(kernels, "add_product_", None)
        sum_dtype = dtype if self.direct or self.halves else torch.float32
        self.total = native.empty_huge(weight, weight.shape, sum_dtype)
        self.low = self.product = None
        self.product_rows = max(PRODUCT_BYTES // (weight.shape[1] * weight.itemsize), 64)

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        first, left = self.added == 0, dlogits.t()
        self.added += 1
        if self.direct and not first:
            self.total.addmm_(left, hidden)
        elif first and self.total.dtype == hidden.dtype:
            torch.mm(left, hidden, out=self.total)
        elif self.total.device.type == "cuda" and first:
            torch.mm(left, hidden, out_dtype=self.total.dtype, out=self.total)
        elif self.total.device.type == "cuda" and _adds_wide(hidden.dtype, hidden.device):
            torch.addmm(self.total, left, hidden, out_dtype=self.total.dtype, out=self.total)
        else:
            self._add_products(left, hidden)

    def _add_products(self, left: Tensor, hidden: Tensor) -> None:
        """Where torch adds no product of 16-bit matrices to fp32 ones. A CPU has the products in
        16 bits only."""
        wide = {"out_dtype": torch.float32} if hidden.device.type == "cuda" else {}
        if self.product is None:
            shape = min(self.product_rows, len(self.total)), hidden.shape[1]
            self.product = hidden.new_empty(shape, dtype=wide.get("out_dtype"))
        low_known, last = self.low is not None, self.added == self.chunks
        if self.halves and not low_known and not last:
            self.low = native.empty_huge(self.total, self.total.shape, torch.int16)
        for start in range(0, len(self.total), self.product_rows):
            part = slice(start, start + self.product_rows)
            total = self.total[part]
            product = self.product[: len(total)]
            torch.mm(left[part], hidden, **wide, out=product)
            if self.halves:
                low = None if self.low is None else self.low[part]
                self.halves(total, low, product, low_known=low_known, last=last)
            elif self.added == 1:
                total.copy_(product)
            else:
                total.add_(product)

    def finish(self) -> Tensor:
        """The sum. Call it once."""
        if self.added == 0:
            return self.total.zero_().to(self.dtype)
        self.low = self.product = None
        return self.total.to(self.dtype)


@functools.cache
def _adds_wide(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch.addmm takes fp32 beside 16-bit factors: older ones want one dtype of all."""
    total = torch.zeros(16, 16, device=device)
    factor = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except torch.OutOfMemoryError:
        raise  # says nothing about dtypes, and the answer is kept
    except RuntimeError:
        return False
    return True
