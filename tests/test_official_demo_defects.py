"""What the authors' demo class (memDec.py, commit 1aad746) gets wrong, and MemoryMixture does not.

Each test says what the demo gives. Where a few lines can do it the demo's way, the test runs them
too and sees the wrong result, so that its input is known to tell right from wrong.
"""

import inspect

import pytest
import torch
from mixture_fixtures import (
    PLAIN,
    beam_search,
    greedy,
    left_padded,
    mixture_of,
    oracle,
    prompts,
)
from pipeline_fixtures import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from mdkernels.mixture import MemoryMixture
from mdkernels.mixture_cache import CACHE

NEW = 8


@pytest.fixture(scope="module")
def mixture():
    return mixture_of("llama", "gpt2")


@pytest.fixture(scope="module")
def row():
    return prompts()[1]


def test_01_imports_with_the_installed_transformers():
    """Demo: ImportError on transformers 5, from an output class that it imports and never uses."""
    assert issubclass(MemoryMixture, (PreTrainedModel, GenerationMixin))


def test_02_is_constructed_with_sdpa_attention(mixture):
    """Demo: ValueError, the wrapper does not declare that its models support sdpa."""
    assert mixture.config._attn_implementation == "sdpa"
    assert [model.config._attn_implementation for model in mixture.models] == ["sdpa", "sdpa"]


def test_03_as_many_tokens_as_asked_for(mixture, row):
    """Demo: asked for 5, gives 6; the first one is appended before the loop counts."""
    for new in (1, 5):
        found = mixture.generate(torch.tensor([row]), max_new_tokens=new, **PLAIN)
        assert found.shape == (1, len(row) + new)


def test_04_generation_config_counts(mixture, row):
    """Demo: generation_config=GenerationConfig(max_new_tokens=3) gives 21 tokens."""
    config = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    assert mixture.generate(torch.tensor([row]), config).shape == (1, len(row) + 3)


def test_05_num_beams_searches_beams(mixture, row):
    """Demo: swallows num_beams and decodes greedily, which here finds a less probable text."""
    found = mixture.generate(torch.tensor([row]), max_new_tokens=NEW, num_beams=4, **PLAIN)
    assert found[0].tolist() == beam_search(mixture, row, NEW, 4)[0][0]
    assert found[0].tolist() != row + greedy(mixture, row, NEW)


def test_06_a_streamer_is_fed(mixture, row):
    """Demo: swallows streamer=."""
    seen = []

    class Streamer(BaseStreamer):
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    mixture.generate(torch.tensor([row]), max_new_tokens=NEW, streamer=Streamer(), **PLAIN)
    assert seen == [*row, *greedy(mixture, row, NEW), "end"]


def test_07_generation_stops_at_eos(mixture, row):
    """Demo: never stops."""
    eos = greedy(mixture, row, 3)[-1]
    options = {**PLAIN, "eos_token_id": eos}
    found = mixture.generate(torch.tensor([row]), max_new_tokens=NEW, **options)
    assert found[0].tolist() == row + greedy(mixture, row, NEW, eos=eos)
    assert len(found[0]) < len(row) + NEW


def test_08_a_finished_row_is_padded(mixture):
    """Demo: a row goes on after its eos for as long as the batch does."""
    rows = prompts(2)
    ids, mask = left_padded(rows)
    eos = greedy(mixture, rows[0], 2)[-1]
    options = {**PLAIN, "eos_token_id": eos, "pad_token_id": 3}
    found = mixture.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
    ended = greedy(mixture, rows[0], NEW, eos=eos)
    new = found[0, ids.shape[1] :].tolist()
    assert new == ended + [3] * (len(new) - len(ended))
    assert len(new) > len(ended)


def tokens_alone(mixture, rows):
    return torch.tensor([greedy(mixture, row, NEW) for row in rows])


def demo_batch(models, ids, mask, positions):
    """The demo's loop over a padded batch: the mask only at prefill; `positions` at prefill."""
    outputs = [
        model(ids, attention_mask=mask, position_ids=positions, use_cache=True) for model in models
    ]
    tokens = []
    for _ in range(NEW):
        p = [out.logits[:, -1].softmax(-1) for out in outputs]
        tokens.append((0.4 * p[0] + 0.6 * p[1]).argmax(-1, keepdim=True))
        outputs = [
            model(tokens[-1], use_cache=True, **{CACHE: out[CACHE]})
            for model, out in zip(models, outputs, strict=True)
        ]
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_09_padding_stays_masked_while_decoding(family):
    """Demo: attention_mask=None after the prefill, so padding is read: rows differ."""
    mixture = mixture_of(family, family, temperature=1.0)
    rows = [row for seed in range(4) for row in prompts(seed=seed)]
    ids, mask = left_padded(rows)
    want = tokens_alone(mixture, rows)
    found = mixture.generate(ids, attention_mask=mask, max_new_tokens=NEW, **PLAIN)
    assert torch.equal(found[:, -NEW:], want)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    demo = demo_batch(mixture.models, ids, mask, positions)
    wrong = (demo != want).any(1)
    assert wrong.sum() > len(rows) / 3
    assert not wrong[[len(row) == ids.shape[1] for row in rows]].any()


@torch.no_grad()
def test_10_positions_count_from_the_first_token_of_a_row():
    """Demo: positions are not derived from the mask; a padded GPT-2 row is wrong from its first
    token on."""
    mixture = mixture_of("gpt2", "gpt2", temperature=1.0)
    rows = [row for seed in range(4) for row in prompts(seed=seed)]
    ids, mask = left_padded(rows)
    want = tokens_alone(mixture, rows)
    found = mixture.generate(ids, attention_mask=mask, max_new_tokens=NEW, **PLAIN)
    assert torch.equal(found[:, -NEW:], want)
    assert torch.equal(mixture(ids, mask).logits[:, -1].argmax(-1), want[:, 0])
    demo = demo_batch(mixture.models, ids, mask, None)
    assert (demo != want)[:, 0].sum() > len(rows) / 3


def test_11_position_ids_may_be_given(mixture):
    """Demo: RuntimeError in the second step, which sends those of the whole prompt again."""
    rows = prompts(2)
    ids, mask = left_padded(rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": mask, "position_ids": positions, "max_new_tokens": NEW}
    found = mixture.generate(ids, **options, **PLAIN)
    assert torch.equal(found[:, -NEW:], tokens_alone(mixture, rows))


@torch.no_grad()
def test_12_the_memory_keeps_its_cache_between_steps(mixture, row):
    """Demo: GenerationMixin hands on only the cache that it knows, the memory starts each step with
    an empty one and sees one token."""
    want = greedy(mixture, row, NEW)
    found = mixture.generate(torch.tensor([row]), max_new_tokens=NEW, **PLAIN)
    assert found[0, -NEW:].tolist() == want
    tokens = list(row)
    for step in range(NEW):
        p = mixture.base(torch.tensor([tokens])).logits[0, -1].softmax(-1) * 0.4
        seen = tokens if step == 0 else tokens[-1:]
        p += 0.6 * (mixture.memories[0](torch.tensor([seen])).logits[0, -1] / 1.3).softmax(-1)
        tokens.append(int(p.argmax()))
    assert tokens[-NEW:] != want


def test_13_called_as_lm_eval_does(mixture):
    """Demo: TypeError in generate_until, which passes use_cache; the demo does too."""
    rows = prompts(2)
    ids, mask = left_padded(rows)

    class AnyText(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(len(input_ids), dtype=torch.bool)

    found = mixture.generate(
        input_ids=ids,
        attention_mask=mask,
        max_length=ids.shape[1] + NEW,
        stopping_criteria=StoppingCriteriaList([AnyText()]),
        pad_token_id=0,
        use_cache=True,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(found[:, -NEW:], tokens_alone(mixture, rows))
    assert "attention_mask" in inspect.signature(mixture.forward).parameters


@torch.no_grad()
def test_14_labels_give_a_loss(mixture, row):
    """Demo: no labels."""
    ids = torch.tensor([row])
    logprobs = oracle(mixture, row)[0]
    want = -logprobs[:-1].gather(1, ids[0, 1:, None]).mean()
    assert float(mixture(ids, labels=ids).loss) == pytest.approx(float(want), abs=1e-5)


def test_15_prefill_computes_the_last_position_only(mixture, row):
    """Demo: mixes all T positions of the prompt, (B, T, V) of each model and of the mixture."""
    shapes = []
    heads = [model.lm_head for model in mixture.models]
    hooks = [h.register_forward_hook(lambda m, i, out: shapes.append(out.shape)) for h in heads]
    mixture.generate(torch.tensor([row]), max_new_tokens=1, **PLAIN)
    for hook in hooks:
        hook.remove()
    assert shapes == [(1, 1, 320)] * 2


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_16_a_step_copies_no_number_from_the_host(mixture):
    """Demo: builds two tensors from Python numbers per step, each a synchronous copy to the device
    that no CUDA graph can capture; and nine device operations to mix and choose."""
    logits = [torch.randn(2, 1, 320), torch.randn(2, 1, 320)]
    with Recorder() as recorder:
        mixture._mix(logits, list(mixture.mix_weight), "base")
    views = ("aten.slice", "aten.view", "aten.alias", "aten._unsafe_view", "aten.unsqueeze")
    work = [call for call in recorder.calls if not call.startswith(views)]
    assert work == ["mdk.logit_mix_forward.default"]


@torch.no_grad()
def test_17_bf16_models_are_mixed_in_fp32():
    """Demo: softmax, logarithm and sum in bf16."""
    pair = [tiny_model("llama", vocab_size=50257), tiny_model("gpt2", vocab_size=50257, seed=1)]
    pair = [model.bfloat16() for model in pair]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50257, (2, 33), generator=generator)
    found = MemoryMixture(*pair, 0.5)(ids[:, :-1], output_logprobs=True).logprobs
    logits = [model(ids[:, :-1]).logits for model in pair]
    want = sum(0.5 * one.double().softmax(-1) for one in logits).log()
    half = torch.tensor(0.5).log().bfloat16()
    demo = torch.logaddexp(*[one.log_softmax(-1) + half for one in logits])

    def error(logprobs):
        gold = ids[:, 1:, None]
        return (logprobs.double().gather(2, gold) - want.gather(2, gold)).abs().mean()

    assert error(found) <= 1e-5
    assert error(demo) >= 1e-3


@torch.no_grad()
def test_18_the_memory_temperature_is_applied(row):
    """Demo: evaluate_joint.py parses --knn_temp and never uses it."""
    warm = mixture_of("llama", "gpt2", temperature=2.0)
    cold = mixture_of("llama", "gpt2", temperature=1.0)
    found = warm(torch.tensor([row]), output_logprobs=True).logprobs[0].double()
    torch.testing.assert_close(found, oracle(warm, row)[0], atol=2e-5, rtol=0)
    assert (found - oracle(cold, row)[0]).abs().max() > 0.1


@pytest.mark.parametrize("sizes", [(320, 384), (384, 320)])
def test_19_padded_vocabularies_may_differ(sizes, row):
    """Demo: needs equal widths; Qwen2.5 pads its one vocabulary to 151936 or 152064."""
    models = [tiny_model("qwen2", vocab_size=size, seed=i) for i, size in enumerate(sizes)]
    mixture = MemoryMixture(*models, 0.5)
    found = mixture.generate(torch.tensor([row]), max_new_tokens=NEW, **PLAIN)
    assert found[0].tolist() == row + greedy(mixture, row, NEW)
    assert int(found.max()) < 320
