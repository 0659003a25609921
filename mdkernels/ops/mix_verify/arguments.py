"""What the backends of mix_verify share: the draft as one of the models, and the errors."""

import torch
from torch import Tensor

from ..logit_mix.arguments import raise_row_fault


def with_draft(
    memory_logits, row_weights, weights, memory_temperature, draft_memory, draft_temperature
) -> tuple[list[Tensor], Tensor | None, list[float], list[float], int]:
    """(memories, row weights, weights, their temperatures, draft): the draft's number among the
    models. It is the memory itself if that is mixed at the draft's temperature, else a further
    one of weight 0."""
    temperatures = [memory_temperature] * len(memory_logits)
    if draft_temperature == memory_temperature:
        return memory_logits, row_weights, weights, temperatures, 1 + draft_memory
    memories = [*memory_logits, memory_logits[draft_memory]]
    temperatures.append(draft_temperature)
    if row_weights is None:
        return memories, None, [*weights, 0.0], temperatures, len(memories)
    none = row_weights.new_zeros(row_weights.shape[0], 1)
    return memories, torch.cat([row_weights, none], 1), weights, temperatures, len(memories)


def find_draft_fault(draft_ids: Tensor, draft_lengths: Tensor, width: int):
    """What the native kernel checks, for the reference backend on CPU tensors."""
    if draft_ids.device.type != "cpu":
        return None
    most = draft_ids.shape[1]
    bad = (draft_lengths < 0) | (draft_lengths > most)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        return "draft_length", row, int(draft_lengths[row])
    drafted = draft_lengths.new_tensor(range(most)) < draft_lengths[:, None]
    bad = drafted & ((draft_ids < 0) | (draft_ids >= width))
    if bool(bad.any()):
        return ("draft_id", *bad.nonzero()[0].tolist())
    return None


def raise_fault(fault, row_weights: Tensor | None, draft_ids: Tensor, width: int) -> None:
    """Turn a fault (what, row, value), or None, into a ValueError."""
    if fault is None:
        return
    what, row, value = fault
    places = draft_ids.shape[1] + 1
    if what.startswith("mix_weight"):  # found in the table that repeats a row for its places
        raise_row_fault((what, row // places, value), row_weights[::places])
    message = {
        "draft_length": (
            f"draft_lengths: row {row} has {value}, expected a number in [0, {places - 1}]"
        ),
        "draft_id": f"draft_ids: row {row} has an id outside [0, {width}) at place {value}",
        "undefined": (
            f"base_logits, memory_logits: row {row} at place {value} holds NaN, +inf or nothing "
            "but -inf, so there is no distribution to draw from"
        ),
    }
    if what == "draft_id":
        message[what] += f": {int(draft_ids[row, value])}; is the tokenizer that of the logits?"
    raise ValueError(message[what])
