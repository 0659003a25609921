"""Decoding on a GPU: graphs against eager steps and float64, and a host that seldom waits."""

import warnings

import pytest
import torch
from decode_fixtures import double_mixture
from mixture_fixtures import PLAIN, greedy, left_padded, prompts

from mdkernels.fast_decode import fast_decode
from mdkernels.mixture import MemoryMixture

pytestmark = pytest.mark.gpu

NEW = 24


@pytest.fixture(scope="module")
def mixture():
    models = [type(m)(m.config) for m in double_mixture("llama", "gpt2").models]
    for model, source in zip(models, double_mixture("llama", "gpt2").models, strict=True):
        model.double().load_state_dict(source.state_dict())
    return MemoryMixture(models[0], models[1:], 0.6, 1.3).to("cuda")


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("graph", [True, False])
def test_greedy(mixture, draft, graph):
    rows = prompts()
    want = [greedy(double_mixture("llama", "gpt2"), row, NEW) for row in rows]
    ids, mask = (x.cuda() for x in left_padded(rows))
    options = {"custom_generate": fast_decode, "draft_tokens": draft, "cuda_graph": graph, **PLAIN}
    found = mixture.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
    assert found[:, -NEW:].tolist() == want
    found = mixture.generate(ids[2:], max_new_tokens=NEW, **options)
    assert found[0, -NEW:].tolist() == want[2]


@pytest.mark.parametrize("draft", [0, 3])
def test_a_graph_draws_what_eager_steps_draw(mixture, draft):
    ids = torch.tensor(prompts()[:1]).cuda()
    options = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0, "seed": 3}
    options |= {"custom_generate": fast_decode, "draft_tokens": draft, "max_new_tokens": NEW}
    graph, eager = (mixture.generate(ids, cuda_graph=g, **options) for g in (True, False))
    assert torch.equal(graph, eager)


def test_the_host_waits_every_few_steps_only(mixture):
    """A run of NEW tokens, EOS possible: synchronising calls are warnings, counted."""
    ids = torch.tensor(prompts()[:1]).cuda()
    options = {**PLAIN, "eos_token_id": 319, "custom_generate": fast_decode}
    counts = []
    for new in (16, 48):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                mixture.generate(ids, max_new_tokens=new, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(one.message) for one in caught))
    assert counts[1] - counts[0] <= 32 // 4
