"""MemoryMixture as a model: its forward pass against float64, its cache, saving and loading."""

import copy

import pytest
import torch
from mixture_fixtures import PAIRS, left_padded, mixture_of, oracle, prompts
from pipeline_fixtures import FAMILIES, save_tiny_checkpoint, tiny_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from mdkernels import mixture as mixture_module
from mdkernels.mixture import MemoryMixture
from mdkernels.mixture_cache import CACHE, MixtureCache
from mdkernels.mixture_config import MemoryMixtureConfig


def close(found, want, tolerance=2e-5):
    assert torch.equal(found.isfinite(), want.isfinite())
    finite = want.isfinite()
    torch.testing.assert_close(
        found[finite].double(), want[finite], atol=tolerance, rtol=0, check_dtype=False
    )


@pytest.mark.parametrize("families", [*PAIRS, ("llama", "gpt2", "qwen2")], ids="-".join)
def test_logits_and_logprobs_of_a_padded_batch(families):
    weight = 0.6 if len(families) == 2 else [0.25, 0.4]
    models = [tiny_model(family, seed=i) for i, family in enumerate(families)]
    mixture = MemoryMixture(models[0], models[1:], weight, 1.3)
    rows = prompts()
    ids, mask = left_padded(rows)
    with torch.no_grad():
        out = mixture(ids, mask, output_logprobs=True, output_component_logprobs=True)
    assert out.logits.dtype == torch.float32
    assert len(out.component_logprobs) == len(families)
    for i, row in enumerate(rows):
        logprobs, base_scale = oracle(mixture, row)
        close(out.logits[i, -len(row) :], base_scale)
        close(out.logprobs[i, -len(row) :], logprobs)
        for k in range(len(families)):
            alone = [float(j == k) for j in range(1, len(families))]
            close(out.component_logprobs[k][i, -len(row) :], oracle(mixture, row, alone)[0])


@pytest.mark.parametrize("wide", ["base", "memory"])
def test_unequal_padded_vocabularies(wide):
    sizes = {"base": 320, "memory": 320, wide: 384}
    base = tiny_model("llama", vocab_size=sizes["base"])
    memory = tiny_model("gpt2", vocab_size=sizes["memory"], seed=1)
    mixture = MemoryMixture(base, memory, 0.5)
    (ids,) = prompts(1)
    with torch.no_grad():
        out = mixture(torch.tensor([ids]), output_logprobs=True, output_component_logprobs=True)
    logprobs, base_scale = oracle(mixture, ids)
    assert out.logits.shape == (1, len(ids), sizes["base"])
    close(out.logits[0], base_scale)
    close(out.logprobs[0], logprobs)
    assert [one.shape for one in out.component_logprobs] == [out.logits.shape] * 2


def test_weights_of_one_call():
    mixture = mixture_of("llama", "gpt2")
    ids = torch.tensor([prompts(1)[0], prompts(1, seed=1)[0]])
    per_row = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        for given, want in (
            (0.3, [[0.3], [0.3]]),
            ([0.3], [[0.3], [0.3]]),
            (torch.tensor(0.3), [[0.3], [0.3]]),
            (per_row, [[0.2], [0.9]]),
            (per_row[:, None], [[0.2], [0.9]]),
        ):
            found = mixture(ids, mix_weight=given).logits
            for i in range(2):
                close(found[i], oracle(mixture, ids[i].tolist(), want[i])[1])
        assert mixture.mix_weight == (0.6,)
        two = mixture_of("llama", "gpt2", "qwen2", weight=(0.25, 0.4))
        per_row = torch.tensor([[0.1, 0.2], [0.5, 0.5]])
        for given, want in ((per_row[0], [per_row[0]] * 2), (per_row, per_row)):
            found = two(ids, mix_weight=given).logits
            for i in range(2):
                close(found[i], oracle(two, ids[i].tolist(), want[i].double().tolist())[1])
        exact = [0.125, 0.25]  # the same number in a list and in an fp32 tensor
        assert torch.equal(
            two(ids, mix_weight=exact).logits, two(ids, mix_weight=torch.tensor(exact)).logits
        )
        with pytest.raises(ValueError, match=r"expected shape \(2,\), one per memory, or \(2, 2\)"):
            two(ids, mix_weight=torch.zeros(3))
        with pytest.raises(ValueError, match="got 1 weight"):
            two(ids, mix_weight=0.5)


def test_weight_zero_gives_the_logits_of_the_base_itself():
    mixture = MemoryMixture(tiny_model("llama"), tiny_model("gpt2", seed=1), 0.0)
    ids = torch.tensor([prompts(1)[0]])
    with torch.no_grad():
        close(mixture(ids).logits, mixture.base(ids).logits.double(), 2e-6)
        alone = MemoryMixture(mixture.base, [])
        close(alone(ids).logits, mixture.base(ids).logits.double(), 2e-6)


def test_loss_and_gradients():
    pair = [tiny_model("llama").double(), tiny_model("gpt2", seed=1).double()]
    mixture = MemoryMixture(*pair, 0.4, 1.2)
    ids = torch.tensor([prompts(2)[1], prompts(2, seed=3)[1]])
    labels = ids.clone()
    labels[0, :4] = -100
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    parameters = [*mixture.parameters(), weight]
    out = mixture(ids, labels=labels, mix_weight=weight)
    found = torch.autograd.grad(out.loss, parameters)
    p = [model(ids).logits for model in pair]
    p = [p[0].softmax(-1), (p[1] / 1.2).softmax(-1)]
    w = weight[:, None, None]
    logp = ((1 - w) * p[0] + w * p[1]).log()[:, :-1]
    want = F.nll_loss(logp.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    # Hugging Face computes the loss of any logits in fp32.
    assert float(out.loss.detach()) == pytest.approx(float(want.detach()), abs=1e-5)
    for one, other in zip(found, torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_logits_to_keep_limits_the_work_of_every_part(monkeypatch):
    mixture = mixture_of("llama", "gpt2")
    ids = torch.tensor([prompts()[-1]] * 2)
    rows = []
    heads = [
        model.lm_head.register_forward_hook(lambda m, i, o: rows.append(o.shape[:2].numel()))
        for model in mixture.models
    ]
    real = mixture_module.logit_mix

    def counted(base, *args, **kwargs):
        rows.append(len(base))
        return real(base, *args, **kwargs)

    monkeypatch.setattr(mixture_module, "logit_mix", counted)
    with torch.no_grad():
        whole = mixture(ids).logits
        assert rows == [2 * ids.shape[1]] * 3
        for keep in (1, 3, torch.tensor([0, 5])):
            rows.clear()
            kept = mixture(ids, logits_to_keep=keep).logits
            want = whole[:, keep] if isinstance(keep, torch.Tensor) else whole[:, -keep:]
            torch.testing.assert_close(kept, want, atol=1e-5, rtol=0)
            assert rows == [2 * want.shape[1]] * 3
        rows.clear()
        mixture.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert rows == [2] * 9
    for head in heads:
        head.remove()


def test_bf16_models_are_mixed_in_fp32():
    pair = tiny_model("llama").bfloat16(), tiny_model("gpt2", seed=1).bfloat16()
    ids = torch.tensor([prompts(1)[0]])
    with torch.no_grad():
        found = MemoryMixture(*pair, 0.5)(ids, output_logprobs=True)
        p = sum(0.5 * model(ids).logits.double().softmax(-1) for model in pair)
    assert found.logits.dtype == torch.float32
    close(found.logprobs, p.log(), 5e-6)


# ---- the cache


def test_cache_operations_reach_every_model():
    mixture = mixture_of("llama", "gpt2")
    ids = torch.tensor([prompts(1)[0], prompts(1, seed=1)[0]])
    with torch.no_grad():
        cache = mixture(ids)[CACHE]
        assert len(cache) == 4
        assert [len(view) for view in cache.views] == [2, 2]
        assert cache.layers[2] is cache.views[1].layers[0]
        assert cache.get_seq_length() == 4
        assert cache.get_max_length() == -1
        assert not cache.is_compileable
        assert cache.is_croppable
        follow = torch.tensor([[5], [6], [5], [6]])

        def continued(used, rows, order):
            found = mixture(follow[: len(order)], cache=used).logits[:, -1]
            again = torch.cat([rows[order], follow[: len(order)]], 1)
            torch.testing.assert_close(found, mixture(again).logits[:, -1], atol=1e-5, rtol=0)

        twin = copy.deepcopy(cache)
        assert twin.layers[2] is twin.views[1].layers[0]
        twin.reorder_cache(torch.tensor([1, 0]))
        continued(twin, ids, [1, 0])
        twin = copy.deepcopy(cache)
        twin.batch_repeat_interleave(2)
        assert [layer.keys.shape[0] for layer in twin.layers] == [4] * 4
        continued(twin, ids, [0, 0, 1, 1])
        twin.batch_select_indices(torch.tensor([3, 0]))
        twin.crop(-2)
        continued(twin, ids[:, :3], [1, 0])
        twin.reset()
        continued(cache, ids, [0, 1])  # the copies shared nothing with it


def test_static_and_foreign_caches():
    mixture = mixture_of("llama", "gpt2")
    ids = torch.tensor([prompts(1)[0]])
    cache = mixture.new_cache(max_cache_len=9)
    assert cache.is_compileable
    assert cache.get_max_length() == 9
    with torch.no_grad():
        mixture(ids[:, :2], cache=cache)
        found = mixture(ids[:, 2:], past_key_values=cache).logits
        torch.testing.assert_close(found, mixture(ids).logits[:, 2:], atol=1e-5, rtol=0)
        assert CACHE not in mixture(ids, use_cache=False)
    lengths = zip(mixture.models, (9, 5), strict=True)
    uneven = [StaticCache(config=model.config, max_cache_len=n) for model, n in lengths]
    assert MixtureCache(uneven).get_max_length() == 5
    assert [MixtureCache(uneven).get_max_length(i) for i in range(4)] == [9, 9, 5, 5]
    with pytest.raises(TypeError, match=r"mixture.new_cache\(\) makes one"):
        mixture(ids, cache=DynamicCache(config=mixture.base.config))
    with pytest.raises(TypeError, match="over 2 models"):
        mixture(ids, cache=MemoryMixture(mixture.base, []).new_cache())
    with pytest.raises(ValueError, match="has no layers yet"):
        MixtureCache([DynamicCache()])


def test_forward_refuses_what_does_not_fit():
    mixture = MemoryMixture(tiny_model("llama"), tiny_model("gpt2", context=16), 0.5)
    ids = torch.ones(1, 17, dtype=torch.int64)
    with pytest.raises(
        ValueError, match="do not fit the shortest context of base and memories, 16"
    ):
        mixture(ids)
    with pytest.raises(ValueError, match="labels: expected"):
        mixture(ids[:, :4], labels=ids[:, :3])
    with pytest.raises(ValueError, match="logits_to_keep=0"):
        mixture(ids[:, :4], labels=ids[:, :4], logits_to_keep=1)
    with pytest.raises(ValueError, match=r"expected \(batch, length\)"):
        mixture(ids[0])
    with pytest.raises(ValueError, match="resize base and memories"):
        mixture.resize_token_embeddings(400)


# ---- construction, saving, loading


def test_a_live_model_is_left_as_it_is():
    base = tiny_model("gpt2")
    base.lm_head = torch.nn.Linear(32, 320)  # neither initialised nor tied by transformers
    before = copy.deepcopy(base.state_dict())
    mixture = MemoryMixture(base, tiny_model("llama", seed=1), 0.5)
    assert mixture.base is base
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert base.config._attn_implementation == "sdpa"
    assert mixture.config.base is base.config


@pytest.mark.parametrize("families", PAIRS, ids="-".join)
def test_save_and_load(families, tmp_path):
    mixture = mixture_of(*families)
    mixture.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    ids = torch.tensor([prompts(1)[0]])
    for load in (MemoryMixture.from_pretrained, AutoModelForCausalLM.from_pretrained):
        again = load(tmp_path)
        assert type(again) is MemoryMixture
        assert not again.training
        assert (again.mix_weight, again.memory_temperature) == ((0.6,), 1.3)
        assert torch.equal(again(ids).logits, mixture(ids).logits)
        for one, other in zip(again.models, mixture.models, strict=True):
            saved, original = one.config.to_dict(), other.config.to_dict()
            for name in ("architectures", "_name_or_path", "transformers_version"):
                saved.pop(name), original.pop(name)
            assert saved == original
            tied = other.lm_head.weight is other.get_input_embeddings().weight
            assert (one.lm_head.weight is one.get_input_embeddings().weight) == tied
    chosen = MemoryMixture.from_pretrained(tmp_path, mix_weight=0.1, attn_implementation="eager")
    assert chosen.mix_weight == (0.1,)
    assert [model.config._attn_implementation for model in chosen.models] == ["eager"] * 2
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.vocab_size == 320
    assert config.max_position_embeddings == 64
    assert type(MemoryMixture(config).base) is type(mixture.base)


def test_models_of_two_dtypes_keep_them(tmp_path):
    mixture = MemoryMixture(tiny_model("llama").bfloat16(), tiny_model("gpt2", seed=1), 0.5)
    mixture.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for one, other in zip(again.parameters(), mixture.parameters(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    wide = MemoryMixture.from_pretrained(tmp_path, dtype="float32")
    assert {one.dtype for one in wide.parameters()} == {torch.float32}


def test_generation_defaults_are_those_of_the_base(tmp_path):
    base = tiny_model("llama")
    base.generation_config.update(eos_token_id=[17, 18], do_sample=True, top_k=3)
    mixture = MemoryMixture(base, tiny_model("gpt2", seed=1), 0.5)
    mixture.save_pretrained(tmp_path)
    for one in (mixture, AutoModelForCausalLM.from_pretrained(tmp_path)):
        found = one.generation_config
        assert (found.eos_token_id, found.do_sample, found.top_k) == ([17, 18], True, 3)
    mixture.generation_config.top_k = 5
    assert base.generation_config.top_k == 3


def test_from_pretrained_of_parts(tmp_path):
    base = save_tiny_checkpoint(tmp_path / "base", "llama")
    memories = [save_tiny_checkpoint(tmp_path / name, name, seed=1) for name in FAMILIES[::2]]
    mixture = MemoryMixture.from_pretrained(base, memories, mix_weight=[0.2, 0.3])
    assert [model.config.model_type for model in mixture.models] == ["llama", "gpt2", "qwen2"]
    live = MemoryMixture.from_pretrained(mixture.base, memories[0], dtype=torch.bfloat16)
    assert live.base is mixture.base
    assert [model.dtype for model in live.models] == [torch.float32, torch.bfloat16]
    assert live.mix_weight == (0.5,)
    with pytest.raises(ValueError, match="not the configuration of a saved mixture"):
        MemoryMixture.from_pretrained(base)
    other = save_tiny_checkpoint(tmp_path / "other", "gpt2", vocab_size=330)
    with pytest.raises(ValueError, match="tokenizers differ"):
        MemoryMixture.from_pretrained(base, [memories[0], other], mix_weight=[0.2, 0.3])


def test_construction_refuses_what_does_not_fit():
    base, memory = tiny_model("llama"), tiny_model("gpt2")
    for weight, message in (
        (-0.1, r"must be in \[0, 1\]"),
        (1.5, r"must be in \[0, 1\]"),
        (float("nan"), r"must be in \[0, 1\]"),
        ([0.5, 0.5], r"2 weight\(s\) for 1"),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryMixture(base, memory, weight)
        with pytest.raises(ValueError, match=message):
            MemoryMixture(base, memory).mix_weight = weight
    with pytest.raises(ValueError, match=r"sum to 1.2"):
        MemoryMixture(base, [memory, memory], [0.6, 0.6])
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="memory_temperature must be > 0"):
            MemoryMixture(base, memory, 0.5, temperature)
    with pytest.raises(TypeError, match=r"memory: expected a live .*from_pretrained loads"):
        MemoryMixture(base, "gpt2")
    with pytest.raises(TypeError, match="base: is a mixture itself"):
        MemoryMixture(MemoryMixture(base, memory), memory)
    with pytest.raises(TypeError, match="GPT2Model is no causal language model"):
        MemoryMixture(base, memory.transformer)
    with pytest.raises(TypeError, match="leave it out"):
        MemoryMixture(MemoryMixtureConfig(base.config, [memory.config], 0.5), memory)
    with pytest.raises(ValueError, match=r"is on meta, base .* on cpu"):
        MemoryMixture(base, tiny_model("gpt2").to("meta"))
