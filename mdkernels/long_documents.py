"""Token ids of a document that is too long to be encoded at once.

The tokenizers library holds about 100 bytes for every character that it encodes, 50 GB for a file
of 500 MB that is one document. Such a document is encoded in overlapping windows, which are joined
where both have the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

WINDOW = 1 << 19
"""Characters that are encoded at once. Documents up to twice as long are encoded whole."""
OVERLAP = 8192
"""Characters that two windows share."""
_AGREEMENT = 16  # tokens on either side of a joint that must be the same in both windows
_JOINTS = (8, 6, 10, 4, 12, 2, 14)  # where to try it, in sixteenths of the overlap
_AT_ONCE = 8  # windows that the library encodes in parallel


class _Window:
    """The tokens of text[start:], and where in the text each begins and ends."""

    def __init__(self, encoding, start: int):
        self.ids = np.array(encoding.ids, np.uint32)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2) + start
        self.begins, self.ends = spans[:, 0], spans[:, 1]

    def tokens(self, begin: int, end: int) -> tuple[bytes, ...]:
        part = slice(begin, end)
        return tuple(x[part].tobytes() for x in (self.ids, self.begins, self.ends))


def encode_long(backend: Tokenizer, text: str) -> np.ndarray:
    """uint32 ids, those of `backend.encode(text, add_special_tokens=False)`.

    Tokens that two windows have in common far from the ends of both do not depend on where a window
    was cut. Text in which there are none, such as a single character repeated for pages, is encoded
    at once.
    """
    pieces, left, begin = [], None, 0
    for window in _windows(backend, text):
        if left is not None:
            joint = _joint(left, window)
            if joint is None:
                return np.array(backend.encode(text, add_special_tokens=False).ids, np.uint32)
            end, next_begin = joint
            pieces.append(left.ids[begin:end])
            begin = next_begin
        left = window
    return np.concatenate([*pieces, left.ids[begin:]])


def _windows(backend: Tokenizer, text: str) -> Iterator[_Window]:
    starts = range(0, max(1, len(text) - OVERLAP), WINDOW - OVERLAP)
    for first in range(0, len(starts), _AT_ONCE):
        some = starts[first : first + _AT_ONCE]
        cut = [text[start : start + WINDOW] for start in some]
        for start, encoding in zip(
            some, backend.encode_batch(cut, add_special_tokens=False), strict=True
        ):
            yield _Window(encoding, start)


def _joint(left: _Window, right: _Window) -> tuple[int, int] | None:
    """(tokens of `left` before a joint, tokens of `right` before it), or None."""
    if not len(left.ids) or not len(right.ids):
        return None
    begin, end = int(right.begins[0]), int(left.ends[-1])
    for sixteenths in _JOINTS:
        place = begin + (end - begin) * sixteenths // 16
        i, j = (int(np.searchsorted(w.begins, place)) for w in (left, right))
        if min(i, j) < _AGREEMENT:
            continue
        around = left.tokens(i - _AGREEMENT, i + _AGREEMENT)
        if len(around[0]) == 8 * _AGREEMENT and around == right.tokens(
            j - _AGREEMENT, j + _AGREEMENT
        ):
            return i, j
    return None
