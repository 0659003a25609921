"""What mix_sample has to draw, in float64 and Python integers, sharing no code with the package."""

import numpy as np
import torch

M0, M1, W0, W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)
# Decisions closer than this (relative) may fall either way in fp32.
AMBIGUOUS = 1e-5


def philox(counter, key):
    """Philox4x32-10 of one block, on Python integers; checked against published vectors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = M0 * c0, M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + W0) & 0xFFFFFFFF, (k1 + W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def philox_array(counter, key):
    """The same on uint64 arrays that broadcast."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (np.asarray(k, np.uint64) for k in key)
    shift = np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(M0) * c0, np.uint64(M1) * c2
        c0, c1 = (p1 >> shift) ^ c1 ^ k0, p1 & LOW
        c2, c3 = (p0 >> shift) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + np.uint64(W0)) & LOW, (k1 + np.uint64(W1)) & LOW
    return c0, c1, c2, c3


def words(seeds, offsets, stream, width):
    """(N, width): word `token % 4` of block (token // 4, stream, offset) under key seed."""
    seeds = np.asarray(seeds, np.int64).astype(np.uint64)[:, None]
    offsets = np.asarray(offsets, np.int64).astype(np.uint64)[:, None]
    shift = np.uint64(32)
    blocks = np.arange((width + 3) // 4, dtype=np.uint64)[None]
    counter = (blocks, np.uint64(stream), offsets & LOW, offsets >> shift)
    parts = np.broadcast_arrays(*philox_array(counter, (seeds & LOW, seeds >> shift)))
    return np.stack(parts, 2).reshape(len(seeds), -1)[:, :width]


def exponentials(seeds, offsets, width, stream=0):
    high, low = (words(seeds, offsets, s, width).astype(float) for s in (stream, stream + 1))
    return -np.log1p(-(high + (low + 0.5) / 2**32) / 2**32)


def processed(p, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """(q, clear): what mixture probabilities (N, V) become, proportional to the probabilities that
    are drawn from, and which rows leave no doubt about what is kept."""
    rows, width = p.shape
    with np.errstate(divide="ignore"):
        q = np.exp((np.log(p) - np.log(p.max(1, keepdims=True))) / temperature)
    clear = np.ones(rows, bool)
    if 0 < top_k < width:
        ranked = -np.sort(-q, 1)
        kth, following = ranked[:, top_k - 1], ranked[:, top_k]
        clear &= (following < kth * (1 - AMBIGUOUS)) | (following == kth)
        q = np.where(q < kth[:, None], 0, q)
    if top_p < 1:
        order = np.argsort(-q, 1, kind="stable")
        ranked = np.take_along_axis(q, order, 1) / q.sum(1, keepdims=True)
        before = np.cumsum(ranked, 1) - ranked
        drop = before >= top_p
        drop[:, 0] = False
        clear &= (np.abs(before - top_p) > AMBIGUOUS).all(1)
        last = np.where(drop, np.inf, ranked).min(1)  # a tie with it is decided by id
        first = np.where(drop, ranked, 0).max(1)
        clear &= (first < last * (1 - AMBIGUOUS)) | (first == last)
        dropped = np.zeros_like(drop)
        np.put_along_axis(dropped, order, drop, 1)
        q = np.where(dropped, 0, q)
    if min_p > 0:
        clear &= (np.abs(q / min_p - 1) > AMBIGUOUS).all(1)
        q = np.where(q < min_p, 0, q)
    return q, clear


def draw(p, seeds, offsets, **filters):
    """(tokens, clear): what mixture probabilities (N, V) give, and which rows leave no doubt."""
    q, clear = processed(p, **filters)
    width = p.shape[1]
    with np.errstate(divide="ignore"):
        clocks = exponentials(seeds, offsets, width) / q
    ranked = np.sort(clocks, 1)
    if width > 1:
        clear &= ranked[:, 1] > ranked[:, 0] * (1 + AMBIGUOUS)
    return torch.from_numpy(clocks.argmin(1)), torch.from_numpy(clear)


def g_test(counts, p):
    """p-value of the likelihood-ratio test; cells of few expected draws are pooled."""
    order = np.argsort(-p)
    counts, expected = counts[order].astype(float), p[order] * counts.sum()
    solid = int((expected >= 5).sum())
    cells = np.append(counts[:solid], counts[solid:].sum())
    wanted = np.append(expected[:solid], expected[solid:].sum())
    if wanted[-1] < 5:  # not even the pool is large enough: it joins the last cell
        cells, wanted = (np.append(x[:-2], x[-2] + x[-1]) for x in (cells, wanted))
    seen = cells > 0
    g = 2 * (cells[seen] * np.log(cells[seen] / wanted[seen])).sum()
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(g / 2, dtype=torch.float64)))
