"""A dynamic cache that does not copy itself at every token."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that keeps room behind its keys and values and writes new ones there.

    `keys` and `values` are views of what is filled; those from before a crop may be written over.
    transformers replaces them freely (reorder, select, crop): the room is given up whenever they
    are no longer its beginning.
    """

    ROOM = 64  # tokens at least; doubled when full

    def __init__(self):
        super().__init__()
        self.rooms: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(self, which: int, old: Tensor, new: Tensor) -> Tensor:
        length = old.shape[-2] if old.numel() else 0
        total = length + new.shape[-2]
        room = self.rooms[which]
        fits = room is not None and total <= room.shape[-2] and room.shape[:2] == new.shape[:2]
        if not fits or (length and old.data_ptr() != room.data_ptr()):
            size = max(self.ROOM, total + total // 2)
            room = self.rooms[which] = new.new_empty((*new.shape[:2], size, new.shape[-1]))
            if length:
                room[..., :length, :] = old
        room[..., length:total, :] = new
        return room[..., :total, :]

    def reset(self) -> None:
        self.rooms = [None, None]
        super().reset()


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty `DynamicCache(config=config)` with growing layers; sliding windows stay as they
    are."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    return cache
