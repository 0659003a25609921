"""The gradient of the weight, summed over chunks of rows in fp32."""

import functools

import torch
from torch import Tensor

from .. import native

# Of the vocabulary. PRODUCT_ROWS: so much of a 16-bit product is added to the sum while it is in
# cache. BLOCK_ROWS: of the sum, which is freed block by block.
PRODUCT_ROWS = 2048
BLOCK_ROWS = 6 * PRODUCT_ROWS


class WeightGradient:
    """sum over chunks of dlogits.T @ hidden, both in `weight.dtype`, as (V, D) in `dtype`.

    A sum in 16 bits would be rounded once per chunk at its own size. Here a chunk is rounded at
    most at the size of the chunk, so the error does not grow with the number of chunks.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, chunks: int):
        self.weight, self.dtype, self.empty = weight, dtype, True
        self.narrow = weight.dtype in (torch.bfloat16, torch.float16)
        # One product is its own sum: fp32 inside the product, rounded once.
        self.direct = not self.narrow or (chunks == 1 and dtype == weight.dtype)
        sum_dtype = dtype if self.direct else torch.float32
        vocab, width = weight.shape
        if sum_dtype == dtype:
            self.blocks = [native.empty_huge(weight, weight.shape, dtype)]
        else:
            step = BLOCK_ROWS if weight.device.type == "cpu" else vocab
            self.blocks = [
                native.scratch(weight, (min(step, vocab - start), width), sum_dtype)
                for start in range(0, vocab, step)
            ]
        self.product = None

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        start = 0
        for block in self.blocks:
            stop = start + len(block)
            self._add(block, dlogits[:, start:stop].t(), hidden)
            start = stop
        self.empty = False

    def _add(self, total: Tensor, left: Tensor, hidden: Tensor) -> None:
        if self.direct:
            if self.empty:
                torch.mm(left, hidden, out=total)
            else:
                total.addmm_(left, hidden)
        elif total.device.type == "cuda" and self.empty:
            torch.mm(left, hidden, out_dtype=total.dtype, out=total)
        elif total.device.type == "cuda" and _adds_wide(left.dtype, left.device):
            torch.addmm(total, left, hidden, out_dtype=total.dtype, out=total)
        else:
            self._add_products(total, left, hidden)

    def _add_products(self, total: Tensor, left: Tensor, hidden: Tensor) -> None:
        """Where torch adds no product of 16-bit matrices to fp32 ones. A CPU has the products in
        16 bits only."""
        wide = {"out_dtype": total.dtype} if total.device.type == "cuda" else {}
        if self.product is None:
            shape = min(PRODUCT_ROWS, len(total)), hidden.shape[1]
            self.product = hidden.new_empty(shape, dtype=wide.get("out_dtype"))
        for start in range(0, len(total), PRODUCT_ROWS):
            part = total[start : start + PRODUCT_ROWS]
            product = self.product[: len(part)]
            torch.mm(left[start : start + PRODUCT_ROWS], hidden, **wide, out=product)
            if self.empty:
                part.copy_(product)
            else:
                part.add_(product)

    def finish(self) -> Tensor:
        """The sum. Call it once."""
        blocks, self.blocks, self.product = self.blocks, [], None
        if self.empty:
            return self.weight.new_zeros(self.weight.shape, dtype=self.dtype)
        if blocks[0].dtype == self.dtype:
            return blocks[0]
        result = native.empty_huge(self.weight, self.weight.shape, self.dtype)
        stop = len(result)
        while blocks:
            block = blocks.pop()
            result[stop - len(block) : stop] = block
            stop -= len(block)
        return result


@functools.cache
def _adds_wide(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch.addmm takes fp32 beside 16-bit factors: older ones want one dtype of all."""
    total = torch.zeros(16, 16, device=device)
    factor = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True
