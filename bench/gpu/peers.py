"""The closest functions of other kernel libraries, where they are importable. None is required."""

from collections.abc import Callable

import torch


def cross_entropies() -> dict[str, Callable]:
    """Mean cross-entropy with a gradient, as loss(logits, labels): half of what sparse_kl does."""
    found: dict[str, Callable] = {}
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss
    except ImportError:
        pass
    else:
        module = LigerCrossEntropyLoss()
        found["liger_ce_only"] = lambda logits, labels: module(logits, labels)
    try:
        from quack.cross_entropy import cross_entropy
    except ImportError:
        pass
    else:
        found["quack_ce_only"] = lambda logits, labels: cross_entropy(logits, labels).mean()
    return found


def mix_samplers() -> dict[str, Callable]:
    """Two softmaxes, a mixture in torch, one draw from it, as sampler(base, memory, mix_weight,
    memory_temperature, temperature, top_k, top_p, min_p)."""
    try:
        from flashinfer import sampling
    except ImportError:
        return {}

    def draw(base, memory, mix_weight, memory_temperature, temperature, top_k, top_p, min_p):
        first = sampling.softmax(base.float(), 1.0)
        second = sampling.softmax(memory.float(), memory_temperature)
        probs = torch.lerp(first, second, mix_weight)
        if temperature != 1.0:
            probs = probs.pow_(1.0 / temperature)
            probs /= probs.sum(-1, keepdim=True)
        if top_k or top_p < 1.0:
            top_k = top_k or probs.shape[1]
            tokens = sampling.top_k_top_p_sampling_from_probs(probs, top_k, top_p)
        else:
            tokens = sampling.sampling_from_probs(probs)
        return tokens.long()

    return {"flashinfer_softmax_x2": draw}
