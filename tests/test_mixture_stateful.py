"""Models that keep a state instead of keys and values: decoded as they are alone, or refused."""

import pytest
import torch
from mixture_fixtures import PLAIN, greedy, left_padded, prompts
from pipeline_fixtures import tiny_model
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

from mdkernels.decode import decode
from mdkernels.fast_decode import fast_decode
from mdkernels.mixture import MemoryMixture

SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}


def mamba():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MambaForCausalLM(MambaConfig(state_size=4, **SIZES)).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("base", [False, True])
def test_padded_rows_decode_as_they_would_alone(base):
    """Mamba multiplies what it reads with its mask, which must not be that of the whole text."""
    models = [mamba(), tiny_model("llama")]
    mixture = MemoryMixture(*(models if base else models[::-1]), 0.6)
    rows = prompts()
    expected = [greedy(mixture, row, 6) for row in rows]
    ids, mask = left_padded(rows)
    for options in ({}, {"custom_generate": fast_decode}):
        found = mixture.generate(ids, attention_mask=mask, max_new_tokens=6, **PLAIN, **options)
        assert found[:, -6:].tolist() == expected, options
    assert decode(mixture, ids, mask, max_new_tokens=6)[:, -6:].tolist() == expected


def test_what_a_state_cannot_do_is_refused():
    mixture = MemoryMixture(tiny_model("llama"), mamba(), 0.6)
    ids = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 4, **PLAIN}
    with pytest.raises(ValueError, match=r"draft_tokens: got 2 .* keep a state .* pass 0"):
        mixture.generate(ids, custom_generate=fast_decode, draft_tokens=2, **options)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        mixture.generate(ids, prompt_lookup_num_tokens=2, **options)


def test_padding_in_a_static_cache_is_refused():
    """Such rows would come out otherwise than alone; whole ones are right."""
    mixture = MemoryMixture(tiny_model("llama"), mamba(), 0.6)
    ids, mask = left_padded(prompts())
    options = {"custom_generate": fast_decode, "max_new_tokens": 6, **PLAIN}
    static = options | {"cache_implementation": "static"}
    with pytest.raises(ValueError, match=r"cache: static, with padded rows .* keep a state"):
        mixture.generate(ids, attention_mask=mask, **static)
    whole = ids[-1:]
    assert mask[-1].all()
    assert torch.equal(mixture.generate(whole, **static), mixture.generate(whole, **options))


def test_a_family_without_a_cache_is_refused():
    rwkv = RwkvForCausalLM(RwkvConfig(attention_hidden_size=32, **SIZES))
    with pytest.raises(TypeError, match=r"memory: RwkvForCausalLM takes no \w+, .* would forget"):
        MemoryMixture(tiny_model("llama"), rwkv, 0.5)
