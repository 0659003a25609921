"""The module that is trained: trunk, LM head and loss in one forward.

DDP and FSDP2 wrap it whole, so that the head's weight, tied to the embedding or not, is used inside
the forward of the module that owns it: there FSDP2 has gathered it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import masking_utils

from .batches import Batch
from .models import lm_head
from .ops.linear_sparse_kl import linear_sparse_kl
from .ops.sparse_kl import SparseKLOutput
from .ops.sparse_targets import SparseTargets


class MemoryLoss(nn.Module):
    """`forward(batch)` is the mean loss of the batch's scored rows, a `SparseKLOutput` in nats.

    Equivalent, with p the batch's targets, to

        logits = model(batch.input_ids).logits.flatten(0, 1)[batch.scored]
        sparse_kl(logits, p, batch.labels, kl_weight=kl_weight)

    but only scored positions reach the LM head, a chunk of rows at a time (paper eqs. 4-6).

    Args:
        model: a Hugging Face causal LM with a linear head.
        kl_weight: the paper's beta, in [0, 1].
        autocast: dtype of the arithmetic; None: that of the weights.
        compile: torch.compile the trunk.
    """

    def __init__(
        self, model, *, kl_weight: float, autocast: torch.dtype | None = None, compile: bool = False
    ):
        super().__init__()
        self.model, self.kl_weight, self.autocast = model, kl_weight, autocast
        trunk = model.base_model
        # In a tuple: registered as a submodule, the trunk would have its parameters twice.
        self._trunk = (torch.compile(trunk, dynamic=False) if compile else trunk,)

    def forward(self, batch: Batch) -> SparseKLOutput:
        device = batch.input_ids.device
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            with one_text_per_window():
                outputs = self._trunk[0](input_ids=batch.input_ids, use_cache=False)
            hidden = batch.select(outputs.last_hidden_state)
            targets = batch.targets
            if targets is None:
                targets = SparseTargets.empty(len(batch.labels), device=device)
            head = lm_head(self.model)
            return linear_sparse_kl(
                hidden,
                head.weight,
                targets,
                batch.labels,
                bias=head.bias,
                kl_weight=self.kl_weight,
            )


def _not_packed(position_ids) -> None:
    """In place of `masking_utils.find_packed_sequence_indices`: None means one text per row."""


@contextmanager
def one_text_per_window() -> Iterator[None]:
    """Within the context transformers does not search the positions of a batch for several texts
    packed into a row: reading what it finds waits for the device in every forward."""
    name = "find_packed_sequence_indices"
    search = getattr(masking_utils, name, None)
    if search is None:  # another transformers; a test notices if it waits
        yield
        return
    setattr(masking_utils, name, _not_packed)
    try:
        yield
    finally:
        setattr(masking_utils, name, search)
