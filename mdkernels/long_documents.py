"""Token ids of a document that is too long to be encoded at once.

The tokenizers library holds about 100 bytes for every character that it encodes, 50 GB for a file
of 500 MB that is one document. Such a document is encoded in overlapping windows, which are joined
where both have the same tokens.

What a token is depends on the text around it, to the ends of the word or run of spaces that the
tokenizer does not split. Tokens that two windows share over half of their overlap, a quarter of it
away from the ends of either, are those of the whole document unless such a stretch is thousands of
characters long and looks the same from both sides. Unigram models have no such bound: ties between
segmentations are broken by the rounding of scores summed up from the start, so theirs are encoded
whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import Unigram

WINDOW = 1 << 19
"""Characters that are encoded at once. Documents up to twice as long are encoded whole."""
OVERLAP = 8192
"""Characters that two windows share."""
_WIDER = (0, 1, 4, 16)  # overlaps by which a window may begin earlier until it agrees with the last
_AGREEMENT = 32  # tokens at least that must be the same in both windows
_AT_ONCE = 8  # windows that the library encodes in parallel


class _Window:
    """The tokens of text[start : start + length], and where in the text each begins and ends."""

    def __init__(self, encoding, start: int, length: int):
        self.start, self.stop = start, start + length
        self.ids = np.array(encoding.ids, np.uint32)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2) + start
        self.begins, self.ends = spans[:, 0], spans[:, 1]

    def first(self, place: int) -> int:
        """The first token that begins at `place` or behind it."""
        return int(np.searchsorted(self.begins, place))

    def tokens(self, begin: int, end: int) -> np.ndarray:
        part = slice(begin, end)
        return np.stack([self.ids[part].astype(np.int64), self.begins[part], self.ends[part]])


def can_split(backend: Tokenizer) -> bool:
    return not isinstance(backend.model, Unigram)


def encode_long(backend: Tokenizer, text: str) -> np.ndarray:
    """uint32 ids, those of `backend.encode(text, add_special_tokens=False)`; see above.

    Where windows do not agree at all, as on one character repeated for pages, the whole text is
    encoded at once. `backend` must be one that `can_split`.
    """
    pieces, left, begin = [], None, 0
    for right in _windows(backend, text):
        if left is not None:
            joined = _join(backend, text, left, right)
            if joined is None:
                return np.array(backend.encode(text, add_special_tokens=False).ids, np.uint32)
            end, right, next_begin = joined
            pieces.append(left.ids[begin:end])
            begin = next_begin
        left = right
    return np.concatenate([*pieces, left.ids[begin:]])


def _windows(backend: Tokenizer, text: str) -> Iterator[_Window]:
    starts = range(0, max(1, len(text) - OVERLAP), WINDOW - OVERLAP)
    for first in range(0, len(starts), _AT_ONCE):
        some = starts[first : first + _AT_ONCE]
        cut = [text[start : start + WINDOW] for start in some]
        encodings = backend.encode_batch(cut, add_special_tokens=False)
        for start, part, encoding in zip(some, cut, encodings, strict=True):
            yield _Window(encoding, start, len(part))


def _join(
    backend: Tokenizer, text: str, left: _Window, right: _Window
) -> tuple[int, _Window, int] | None:
    """(tokens of `left` before the joint, `right`, its tokens before it); `right` begins earlier
    if need be. None: they agree nowhere."""
    for wider in _WIDER:
        if wider:
            start = right.start - wider * OVERLAP
            if start <= left.start + OVERLAP:  # where `left` itself may have been joined
                return None
            part = text[start : right.stop]
            encoding = backend.encode(part, add_special_tokens=False)
            candidate = _Window(encoding, start, len(part))
        else:
            candidate = right
        shared = left.stop - candidate.start
        places = [candidate.start + shared * quarters // 4 for quarters in (1, 2, 3)]
        i, j = ([w.first(place) for place in places] for w in (left, candidate))
        same = left.tokens(i[0], i[2])
        if same.shape[1] >= _AGREEMENT and np.array_equal(same, candidate.tokens(j[0], j[2])):
            return i[1], candidate, j[1]
    return None
