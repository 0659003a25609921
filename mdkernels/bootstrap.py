"""How far a mean over tokens depends on the text it was measured on: the percentile bootstrap.

Tokens of one text share context, so what is resampled are its documents, or blocks of neighbouring
tokens where there are too few of them. It covers the choice of test text, not the training seed.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

# With fewer, the quantiles are those of a handful of numbers.
MIN_UNITS = 20
# Drawn indices that are held at a time.
_SLAB = 1 << 22


def block_starts(rows: int, block: int = 4096) -> np.ndarray:
    """(units,) first row of each block; of rows / 20 rows each where that is less than `block`."""
    return np.arange(0, rows, max(1, min(block, rows // MIN_UNITS)))


def document_starts(document_offsets: np.ndarray, rows: int) -> np.ndarray:
    """(units,) first row of each document of a corpus: the one that predicts its first token."""
    starts = np.maximum(np.asarray(document_offsets[:-1]) - 1, 0)
    return np.unique(starts[starts < rows])


def mean_intervals(
    values: np.ndarray,
    starts: np.ndarray,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> np.ndarray:
    """(K, 2) low and high ends of the interval of each row mean of `values` (K, R).

    Units [starts[i], starts[i + 1]) of the R columns are drawn with replacement, as many as there
    are; all K means of a draw are of the same units. A mean is that of the drawn tokens, so units
    weigh as much as they are long.
    """
    units = len(starts)
    sums = np.add.reduceat(values, starts, axis=1)
    sizes = np.diff(np.append(starts, values.shape[1]))
    rng = np.random.default_rng(seed)
    means = np.empty((len(values), draws))
    slab = max(1, _SLAB // units)
    for first in range(0, draws, slab):
        drawn = rng.integers(0, units, (min(slab, draws - first), units), dtype=np.int32)
        tokens = sizes[drawn].sum(axis=1)
        for row, total in zip(means, sums, strict=True):
            row[first : first + len(drawn)] = total[drawn].sum(axis=1) / tokens
    with np.errstate(invalid="ignore"):  # between infinite means: NaN
        return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=1).T


def paired_interval(
    difference: Tensor,
    *,
    block: int = 4096,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(mean, low, high) of a per-token difference of two runs, by blocks of `block` tokens."""
    values = difference.double().numpy()
    if values.size == 0:
        raise ValueError("difference: no token to compare")
    starts = block_starts(values.size, block)
    options = {"draws": draws, "level": level, "seed": seed}
    low, high = mean_intervals(values[None], starts, **options)[0]
    return float(values.mean()), float(low), float(high)
