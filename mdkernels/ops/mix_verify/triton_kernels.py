"""Launcher of the Triton kernels in triton_programs.py. Derivation: README.md."""

import torch
import triton
from torch import Tensor

from ..logit_mix.triton_common import BLOCK, DTYPES, LAUNCH, PROGRAMS, plan
from ..mix_argmax import triton_kernels as mix_argmax
from ..mix_sample.triton_filter import cut
from ..triton_rows import launching
from .arguments import with_draft
from .reference import accept_greedy
from .triton_programs import accept_kernel, emit_kernel, mass_kernel

__all__ = ["DTYPES", "forward"]


def forward(
    base_logits,
    memory_logits,
    row_weights,
    weights,
    memory_temperature,
    draft_ids,
    draft_lengths,
    draft_memory,
    draft_temperature,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    offsets,
) -> tuple[Tensor, Tensor]:
    if temperature == 0.0:
        mix = (base_logits, memory_logits, row_weights, weights, memory_temperature)
        best = mix_argmax.forward(*mix).view(len(draft_ids), -1)
        return accept_greedy(best, draft_ids, draft_lengths)
    draft_ids, draft_lengths, seeds, offsets = (
        x.contiguous() for x in (draft_ids, draft_lengths, seeds, offsets)
    )
    batch, places = len(draft_ids), draft_ids.shape[1] + 1
    num_accepted = torch.empty_like(draft_lengths)
    tokens = draft_ids.new_empty((batch, places))
    *mix, draft = with_draft(
        memory_logits, row_weights, weights, memory_temperature, draft_memory, draft_temperature
    )
    with launching("mix_verify", base_logits):
        made = plan(base_logits, *mix, all_models=False, also=draft)
        if not batch:
            return num_accepted, tokens
        slope = min(1.0 / temperature, 1e30)
        masses = base_logits.new_empty(made.rows, dtype=torch.float32)
        filters = (temperature, slope, top_k, top_p, min_p)
        kept = cut(made, *filters, also=draft, log_masses=masses)
        # The tempered mixture needs a normaliser of its own; at temperature 1 the maximum 0 and
        # the sum 1 of a single part stand for it.
        tempered = kept is None and temperature != 1.0
        if kept is None:
            shape = (2, made.rows, made.parts)
            tops, masses = base_logits.new_empty(shape, dtype=torch.float32)
        else:
            tops = kept.best
        if tempered:
            mass_kernel[made.grid](
                *made.models,
                made.maxima,
                made.sums,
                tops,
                masses,
                slope,
                ALSO=draft,
                **made.combined,
            )
        accepted = draft_ids.new_empty((batch, places), dtype=torch.int32)
        common = (draft_ids, draft_lengths, accepted, seeds, offsets, slope, kept, places)
        flags = {"DRAFT": draft, "TEMPERED": tempered, "PARTS": triton.next_power_of_2(made.parts)}
        if places > 1:
            accept_kernel[(batch * (places - 1),)](
                *made.models,
                made.maxima,
                made.sums,
                tops,
                masses,
                *common,
                made.width,
                made.parts,
                **flags,
                **LAUNCH,
            )
        share = max(1, min(made.parts, batch * made.parts // PROGRAMS))
        splits = triton.cdiv(made.parts, share)
        keys = base_logits.new_empty((batch, 2, made.parts), dtype=torch.float32)
        winners = base_logits.new_empty((batch, 2, made.parts), dtype=torch.int32)
        emit_kernel[(batch * splits,)](
            *made.models,
            made.maxima,
            made.sums,
            tops,
            masses,
            *common,
            made.tickets,
            keys,
            winners,
            num_accepted,
            tokens,
            made.parts,
            share,
            splits,
            PLACES=triton.next_power_of_2(places),
            BLOCK=BLOCK,
            **flags,
            **LAUNCH,
        )
    return num_accepted, tokens
