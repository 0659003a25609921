"""How many tokens to draft: what emits the most tokens in the least time, as things stand."""

from __future__ import annotations

from transformers import PreTrainedModel

MOST = 16
_PRIOR = 0.7, 4.0  # acceptance before anything was seen, and how many tested tokens it is worth
_DECAY = 0.95  # of the evidence, per pass: text changes, and so does what is accepted
# What a base pass costs more for each further token, as a share of a pass over one token. Measured
# on two Zen 4 cores, where it is arithmetic; a GPU is bound by memory far beyond this many tokens.
PASS_SLOPE = {"cpu": 0.1, "cuda": 0.01}


class DraftLength:
    """A count of drafted tokens per pass, fixed or following the acceptance.

    With acceptance a and G drafted tokens a pass emits (1 - a^(G + 1)) / (1 - a) tokens and costs
    one pass of the base and G + 1 of the memory. The costs are bytes of weights, not times, so that
    the same request with the same seed always drafts alike.
    """

    def __init__(self, wanted, draft: PreTrainedModel, others: list[PreTrainedModel]):
        self.fixed = None if wanted == "auto" else int(wanted)
        self.ratio = weight_bytes(draft) / sum(map(weight_bytes, others))
        self.slope = PASS_SLOPE.get(draft.device.type, PASS_SLOPE["cuda"])
        self.accepted, self.tested = 0.0, 0.0

    @property
    def acceptance(self) -> float:
        share, weight = _PRIOR
        return (self.accepted + share * weight) / (self.tested + weight)

    def next(self, most: int) -> int:
        """At most `most`: what is left to decode."""
        if self.fixed is not None:
            return min(self.fixed, most)
        lengths = range(min(MOST, most) + 1)
        return max(lengths, key=lambda drafted: self.rate(drafted))

    def rate(self, drafted: int) -> float:
        """Tokens per base pass's time."""
        a = self.acceptance
        tokens = sum(a**i for i in range(drafted + 1))
        return tokens / (1 + self.slope * drafted + self.ratio * (drafted + 1))

    def learn(self, tested: int, accepted: int) -> None:
        """Counts of one pass, over all rows."""
        self.tested = _DECAY * self.tested + tested
        self.accepted = _DECAY * self.accepted + accepted


def weight_bytes(model: PreTrainedModel) -> int:
    """What decoding one token reads: all weights but an input embedding that is not the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    skipped = None if head is None or head.weight is embedding.weight else embedding.weight
    return sum(p.numel() * p.element_size() for p in model.parameters() if p is not skipped)
