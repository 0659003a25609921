"""How many tokens to draft: what emits the most tokens in the least time, as things stand."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

MOST = 16
# Acceptance before anything was seen, and how many tested tokens that is worth. High, as only who
# drafts learns.
_PRIOR = 0.9, 4.0
# Of the evidence, per pass: text changes, and so does what is accepted. Slower while nothing is
# drafted, where fading evidence means to try again.
_DECAY, _IDLE_DECAY = 0.95, 0.99


def pass_cost(tokens: int, device: str, dtype: torch.dtype) -> float:
    """Time of a pass over so many tokens of all rows, in times of a pass over one.

    A GPU, and a CPU with bf16 instructions in bf16, is bound by reading the weights. In fp32,
    torch's CPU GEMM (MKL) rearranges the weights once more than one token is multiplied. The CPU
    figures were measured with GPT-2 medium on two Zen 4 cores: 5 tokens cost 1.2 (bf16) and 3.0
    (fp32), 17 cost 1.5 and 3.7.
    """
    if device != "cpu":
        return 1.0 + (tokens - 1) / 256
    if dtype == torch.bfloat16:
        return 1.0 + 0.035 * (tokens - 1)
    return 1.0 + min(0.7 * (tokens - 1), 2.0 + 0.045 * (tokens - 1))


class DraftLength:
    """A count of drafted tokens per pass, fixed or following the acceptance.

    With acceptance a and G drafted tokens a pass emits (1 - a^(G + 1)) / (1 - a) tokens and costs
    one pass of the base and G + 1 of the memory. The costs are bytes of weights, not times, so that
    the same request with the same seed always drafts alike.
    """

    def __init__(self, wanted, draft: PreTrainedModel, others: list[PreTrainedModel], rows: int):
        self.rows = rows
        self.fixed = None if wanted == "auto" else int(wanted)
        self.ratio = weight_bytes(draft) / sum(map(weight_bytes, others))
        self.on = draft.device.type, draft.dtype
        self.accepted, self.tested = 0.0, 0.0

    @property
    def acceptance(self) -> float:
        share, weight = _PRIOR
        return (self.accepted + share * weight) / (self.tested + weight)

    def next_most(self, most: int) -> int:
        """What `next` can return at most."""
        return min(MOST if self.fixed is None else self.fixed, most)

    def next(self, most: int) -> int:
        """At most `most`: what is left to decode."""
        if self.fixed is not None:
            return min(self.fixed, most)
        lengths = range(min(MOST, most) + 1)
        return max(lengths, key=lambda drafted: self.rate(drafted))

    def rate(self, drafted: int) -> float:
        """Tokens per row in the time of a base pass over one token."""
        a = self.acceptance
        tokens = sum(a**i for i in range(drafted + 1))
        base = pass_cost(self.rows * (drafted + 1), *self.on)
        return tokens / (base + self.ratio * (drafted + 1) * pass_cost(self.rows, *self.on))

    def learn(self, tested: int, accepted: int) -> None:
        """Counts of one pass, over all rows."""
        decay = _DECAY if tested else _IDLE_DECAY
        self.tested = decay * self.tested + tested
        self.accepted = decay * self.accepted + accepted


def weight_bytes(model: PreTrainedModel) -> int:
    """What decoding one token reads: all weights but an input embedding that is not the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    skipped = None if head is None or head.weight is embedding.weight else embedding.weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not skipped)
