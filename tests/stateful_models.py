"""Tiny models of families whose layers keep a state, alone or beside layers that attend."""

import inspect

import pytest
import torch
import transformers
from pipeline_fixtures import CONTEXT, HIDDEN_SIZE, VOCAB_SIZE

from mdkernels.mixture_cache import CACHE

_PLAIN = {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "num_hidden_layers": 2}
_HYBRID = {
    **_PLAIN,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_SMALL_MAMBA = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 4}
_EVERY_SECOND = {"attn_layer_period": 2, "attn_layer_offset": 1}
_DELTA_NET = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# model_type: (name of the classes, settings)
_FAMILIES = {
    "mamba": ("Mamba", {**_PLAIN, "state_size": 4}),
    "mamba2": ("Mamba2", {**_PLAIN, **_SMALL_MAMBA}),
    "jamba": (
        "Jamba",
        {**_HYBRID, **_EVERY_SECOND, "mamba_d_state": 4, "mamba_dt_rank": 4},
    ),
    "qwen3_next": (
        "Qwen3Next",
        {**_HYBRID, **_DELTA_NET, "head_dim": 16, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 32},
    ),
    "minimax": ("MiniMax", {**_HYBRID, "head_dim": 16, "num_local_experts": 4}),
    "xlstm": ("xLSTM", {**_PLAIN, "num_heads": 2, "chunk_size": 16}),
    "rwkv": ("Rwkv", {**_PLAIN, "attention_hidden_size": 32}),
}


def stateful_model(family: str, seed: int = 1):
    """A random-init causal LM of `family`, a model_type, in eval mode."""
    name, settings = _FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**settings)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    if "mamba" in family and CACHE not in inspect.signature(model_class.forward).parameters:
        pytest.skip(f"{name} has a cache of its own in transformers {transformers.__version__}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    if "num_experts" in settings:
        model.set_experts_implementation("eager")  # the others take no float64
    return model
