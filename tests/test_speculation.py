"""Memory-drafted speculative decoding: lossless, exact in length, as fast as its formula says."""

import numpy as np
import pytest
import torch
from decode_fixtures import decoded, double_mixture, fixed_distributions, joint, small_vocabulary
from mix_sample_oracle import g_test
from mixture_fixtures import PAIRS, PLAIN, left_padded, prompts
from pipeline_fixtures import tiny_model
from transformers import MistralConfig, MistralForCausalLM

from mdkernels.decode import decode
from mdkernels.draft_length import MOST, DraftLength
from mdkernels.fast_decode import fast_decode
from mdkernels.mixture import MemoryMixture
from mdkernels.mixture_cache import CACHE

NEW = 24


def plain(mixture, rows, new=NEW, **options):
    """Each row alone, without drafts."""
    return [decoded(mixture, torch.tensor([row]), new=new, **options).sequences[0] for row in rows]


@pytest.mark.parametrize(
    ("families", "draft"),
    [
        *((pair, 4) for pair in PAIRS),
        (("llama", "gpt2"), 1),
        (("llama", "gpt2"), "auto"),
        (("llama", "gpt2", "qwen2"), 3),
    ],
    ids=str,
)
def test_greedy_tokens_are_those_without_drafts(families, draft):
    """Eight ragged rows that accept different numbers of tokens; one row alone; fp64."""
    weight = 0.6 if len(families) == 2 else (0.2, 0.5)
    mixture = double_mixture(*families, weight=weight)
    rows = prompts(4) + prompts(4, seed=1)
    want = plain(mixture, rows)
    ids, mask = left_padded(rows)
    found = decoded(mixture, ids, mask, new=NEW, draft=draft)
    assert found.cache is None
    for row, tokens, wanted in zip(rows, found.sequences, want, strict=True):
        assert tokens[-len(wanted) :].tolist() == wanted.tolist(), len(row)
    for row, wanted in zip(rows[:3], want[:3], strict=True):
        alone = decoded(mixture, torch.tensor([row]), new=NEW, draft=draft)
        assert torch.equal(alone.sequences[0], wanted)
        assert alone.stats.new_tokens == NEW
        assert alone.cache.get_seq_length() == len(wanted) - 1
    if draft != "auto":
        assert found.stats.accepted > 0
        assert found.stats.accepted < found.stats.tested


def test_drafts_under_autocast():
    """Which gives logits another dtype than that of the weights."""
    mixture = MemoryMixture(tiny_model("llama"), tiny_model("gpt2", seed=1), 0.6)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.autocast("cpu", torch.bfloat16):
        found = decode(mixture, ids, max_new_tokens=6, draft_tokens=3)
        memory = MemoryMixture(mixture.base, mixture.memories, 1.0)
        alone = decode(memory, ids, max_new_tokens=6, draft_tokens=3)
        assert torch.equal(alone, decode(memory, ids, max_new_tokens=6))
    assert found.shape == (2, 9)


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_the_length_is_exact(new):
    mixture = double_mixture("llama", "gpt2")
    rows = prompts()
    ids, mask = left_padded(rows)
    found = decoded(mixture, ids, mask, new=new, draft=5)
    assert found.sequences.shape == (3, ids.shape[1] + new)
    assert found.stats.new_tokens == 3 * new
    for tokens, wanted in zip(found.sequences, plain(mixture, rows, new), strict=True):
        assert torch.equal(tokens[-new:], wanted[-new:])


def test_the_longest_text_that_fits_a_context_of_learned_positions():
    mixture = double_mixture("gpt2", "gpt2")
    rows = [[5, 6, 7], [3, 9, 8]]
    found = decoded(mixture, torch.tensor(rows), new=62, draft=6)
    assert [row.tolist() for row in found.sequences] == [
        row.tolist() for row in plain(mixture, rows, 62)
    ]


@pytest.mark.parametrize("rows", [prompts(5), prompts()[:1]], ids=["batch", "one row"])
def test_a_row_ends_at_eos_inside_an_accepted_run(rows):
    mixture = double_mixture("llama", "gpt2")
    free = [row[-NEW:].tolist() for row in plain(mixture, rows)]
    ids, mask = left_padded(rows)
    for place in range(1, NEW, 6):
        eos = free[0][place]
        found = decoded(mixture, ids, mask, new=NEW, draft=6, eos=(eos, 319))
        ends = [next((i + 1 for i, t in enumerate(new) if t in (eos, 319)), NEW) for new in free]
        assert found.sequences.shape[1] == ids.shape[1] + max(ends)
        assert found.stats.new_tokens == sum(ends)
        for new, wanted, end in zip(found.sequences[:, ids.shape[1] :], free, ends, strict=True):
            assert new.tolist() == wanted[:end] + [0] * (max(ends) - end)
        if len(rows) == 1:
            assert found.cache.get_seq_length() == found.sequences.shape[1] - 1


def test_the_cache_of_a_row_can_be_continued():
    mixture = double_mixture("llama", "gpt2")
    row = prompts()[1]
    options = {"custom_generate": fast_decode, "draft_tokens": 4, **PLAIN}
    first = mixture.generate(
        torch.tensor([row]), max_new_tokens=9, return_dict_in_generate=True, **options
    )
    whole = mixture.generate(first.sequences, cache=first[CACHE], max_new_tokens=9, **options)
    assert torch.equal(whole[0], plain(mixture, [row], 18)[0])


def test_a_wider_memory_drafts_only_what_the_base_can_read():
    pair = tiny_model("llama").double(), tiny_model("gpt2", vocab_size=384, seed=1).double()
    for base, memory in (pair, pair[::-1]):
        mixture = MemoryMixture(base, memory, 0.7)
        rows = prompts(4)
        ids, mask = left_padded(rows)
        found = decoded(mixture, ids, mask, new=12, draft=4)
        for tokens, wanted in zip(found.sequences, plain(mixture, rows, 12), strict=True):
            assert torch.equal(tokens[-12:], wanted[-12:])
        seeds = torch.arange(4)
        assert int(decoded(mixture, ids, mask, new=12, draft=4, seeds=seeds).sequences.max()) < 320


FILTERS = {
    "whole": {},
    "cold": {"temperature": 0.7},
    "filtered": {"temperature": 1.4, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize(
    ("filters", "draft"),
    [("whole", 1), ("whole", 2), ("whole", "auto"), ("cold", 2), ("filtered", 1), ("filtered", 2)],
)
def test_sampling_is_lossless(filters, draft, monkeypatch):
    """The joint distribution of three tokens against its enumeration: 125 cells, 12000 rows.
    Three tokens are one pass of two drafts, or passes that end in a rejection at either place.
    So many rows are not worth drafts: "auto" is made to change its mind with what was accepted."""
    wavering = lambda self, most: min(most, 1 + int(self.accepted) % 2)  # noqa: E731
    if draft == "auto":
        monkeypatch.setattr(DraftLength, "next", wavering)
    mixture = small_vocabulary()
    prompt, count = [1, 3, 2], 12_000
    expected = joint(mixture, prompt, 3, **FILTERS[filters])
    ids = torch.tensor([prompt]).repeat(count, 1)
    seeds = torch.arange(count) * 7919 + (3 if draft == "auto" else draft)
    found = decoded(mixture, ids, new=3, draft=draft, seeds=seeds, **FILTERS[filters])
    new = found.sequences[:, 3:].numpy()
    counts = np.zeros_like(expected)
    np.add.at(counts, tuple(new.T), 1)
    assert counts[expected == 0].sum() == 0
    assert g_test(counts.ravel(), expected.ravel()) > 1e-3
    assert 0 < found.stats.accepted < found.stats.tested


def test_the_test_of_losslessness_sees_a_target_that_is_a_little_off():
    mixture = small_vocabulary()
    off = small_vocabulary(weight=0.5)
    expected = joint(off, [1, 3, 2], 3)
    ids = torch.tensor([[1, 3, 2]]).repeat(12_000, 1)
    found = decoded(mixture, ids, new=3, draft=2, seeds=torch.arange(12_000))
    counts = np.zeros_like(expected)
    np.add.at(counts, tuple(found.sequences[:, 3:].numpy().T), 1)
    assert g_test(counts.ravel(), expected.ravel()) < 1e-3


def test_a_row_draws_the_same_tokens_in_any_batch():
    mixture = double_mixture("llama", "gpt2")
    rows, seeds = prompts(5), torch.arange(5) + 40
    ids, mask = left_padded(rows)
    options = {"new": NEW, "draft": 3, "temperature": 0.8}
    batch = decoded(mixture, ids, mask, seeds=seeds, **options).sequences
    for i, row in enumerate(rows):
        alone = decoded(mixture, torch.tensor([row]), seeds=seeds[i : i + 1], **options)
        assert torch.equal(batch[i, -NEW:], alone.sequences[0, -NEW:])
    assert len({tuple(row[-NEW:].tolist()) for row in batch}) == 5


@pytest.mark.parametrize("draft", [1, 6])
def test_tokens_per_base_pass_follow_the_formula(draft):
    """Models whose distributions do not depend on the text, so that acceptance is the same at every
    place: 1 - (1 - w) TV(p, q)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 50, generator=generator, dtype=torch.float64) * 1.2
    mixture = fixed_distributions(*logits, weight=0.6)
    p, q = logits.softmax(1)
    a = float(1 - 0.4 * (p - q).abs().sum() / 2)
    assert 0.7 < a < 0.9
    rows, new = 64, 101
    seeds = torch.arange(rows) + 1000
    prompt = torch.zeros(rows, 1, dtype=torch.int64)
    found = decoded(mixture, prompt, new=new, draft=draft, seeds=seeds)
    stats = found.stats
    assert abs(stats.acceptance - a) < 5 * (a * (1 - a) / stats.tested) ** 0.5
    wanted = (1 - a ** (draft + 1)) / (1 - a)
    # A pass emits 1 to draft + 1 tokens; the last pass of a row may be cut short.
    assert abs(stats.tokens_per_pass - wanted) < 5 * draft / 2 / stats.verified**0.5 + 2 / new
    assert stats.new_tokens == rows * new
    assert stats.verified + stats.accepted + rows == rows * new
    # Each token is drawn anew: neighbours are independent, in five groups of ids.
    share = torch.stack([(0.4 * p + 0.6 * q)[i::5].sum() for i in range(5)]).numpy()
    pairs = found.sequences[:, 1:new].numpy().reshape(-1, 2) % 5
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(pairs.T), 1)
    assert g_test(counts.ravel(), np.outer(share, share).ravel()) > 1e-3


def test_a_memory_of_weight_one_is_never_rejected():
    mixture = double_mixture("llama", "gpt2", weight=1.0, temperature=1.0)
    stats = decoded(mixture, torch.tensor([[1, 2]]), new=31, draft=5, seeds=torch.arange(1)).stats
    assert stats.acceptance == 1.0
    assert stats.base_passes == 5


def test_the_memory_of_the_largest_share_drafts():
    """With nearly all the weight on the second memory, its drafts are nearly all accepted."""
    mixture = double_mixture("llama", "gpt2", "qwen2", weight=(0.01, 0.98), temperature=1.0)
    ids = torch.tensor(prompts()[:1])
    stats = decoded(mixture, ids, new=40, draft=4, seeds=torch.arange(1)).stats
    assert stats.acceptance > 0.9
    weights = torch.tensor([[0.98, 0.01]], dtype=torch.float64)
    found = mixture.generate(
        ids,
        custom_generate=fast_decode,
        mix_weight=weights,
        draft_tokens=4,
        do_sample=True,
        top_k=0,
        seed=1,
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    assert found.stats.acceptance > 0.9


def test_drafts_follow_what_is_accepted():
    small, large = tiny_model("gpt2"), tiny_model("gpt2", hidden_size=128, layers=8)
    length = DraftLength("auto", small, [large], rows=1)
    assert length.ratio < 0.1
    for _ in range(60):
        length.learn(8, 8)
    assert length.next(100) == MOST
    assert length.next(3) == 3
    assert length.next(0) == 0
    for _ in range(100):
        length.learn(1, 0)
    assert length.next(100) == 0
    for _ in range(400):  # without drafts there is nothing to learn, and the memory fades
        length.learn(0, 0)
    assert length.next(100) > 0
    equals = DraftLength("auto", large, [large], rows=1)
    for _ in range(60):
        equals.learn(2, 1)
    assert equals.next(100) == 0
    assert DraftLength(7, large, [large], rows=1).next(100) == 7


def test_drafts_that_cannot_be_made():
    mixture = double_mixture("llama", "gpt2")
    ids = torch.tensor([[1, 2], [3, 4]])
    options = {"custom_generate": fast_decode, "max_new_tokens": 4, **PLAIN}
    for bad in (-1, 1.5, "many", True):
        with pytest.raises(ValueError, match='draft_tokens must be "auto" or an integer'):
            decode(mixture, ids, draft_tokens=bad, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"draft_tokens: .* nothing could draft"):
        decode(MemoryMixture(mixture.base, []), ids, draft_tokens=2, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"draft_tokens: .* static cache"):
        mixture.generate(ids, draft_tokens=2, cache_implementation="static", **options)
    with pytest.raises(ValueError, match=r"cache: .* rows of different lengths"):
        mixture.generate(ids, draft_tokens=2, cache=mixture.new_cache(), **options)
    config = MistralConfig(sliding_window=4, **tiny_model("llama").config.to_dict())
    sliding = MemoryMixture(MistralForCausalLM(config).eval(), tiny_model("gpt2"), 0.5)
    with pytest.raises(ValueError, match=r"draft_tokens: .* sliding window"):
        decode(sliding, ids, draft_tokens=2, max_new_tokens=4)
