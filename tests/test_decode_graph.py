"""What a GPU does, as far as a CPU can tell: steps that replay as graphs, a host that looks late.
On a GPU itself: test_decode_gpu.py."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from decode_fixtures import double_mixture
from graph_tape import Tape
from mixture_fixtures import greedy, left_padded, prompts
from pipeline_fixtures import tiny_model
from stateful_models import stateful_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MistralConfig, MistralForCausalLM

from mdkernels import cuda_graph, decode_loop, speculate
from mdkernels.decode_loop import Decoded, DecodeStats, run
from mdkernels.decode_rows import Request, Sampling
from mdkernels.mixture import MemoryMixture

NEW = 24


def request(mixture, ids, mask=None, **options):
    room = ids.shape[1] + NEW - 1
    options = {"sampling": None, "max_new_tokens": NEW, **options}
    cache = mixture.new_cache(room)
    return Request(
        mixture=mixture, input_ids=ids, fresh=ids.shape[1], mask=mask, cache=cache, **options
    )


@pytest.fixture
def graphs(monkeypatch):
    """Steps are recorded once and replayed."""
    monkeypatch.setattr(Tape, "replays", 0)
    machinery = lambda _: (lambda calls: [call() for call in calls], Tape)  # noqa: E731
    monkeypatch.setattr(decode_loop, "machinery", machinery)
    monkeypatch.setattr(speculate, "machinery", machinery)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_step_replays(family, graphs):
    mixture = double_mixture(family, "gpt2" if family == "llama" else family)
    rows = prompts()
    ids, mask = left_padded(rows)
    found = run(request(mixture, ids, mask))
    assert Tape.replays == NEW - 3
    assert found.sequences[:, -NEW:].tolist() == [greedy(mixture, row, NEW) for row in rows]
    found = run(request(mixture, ids[2:]))
    assert found.sequences[0, -NEW:].tolist() == greedy(mixture, rows[2], NEW)


def test_a_sampled_step_replays_with_new_random_numbers(graphs):
    mixture = double_mixture("llama", "gpt2")
    ids = torch.tensor(prompts()[:1]).repeat(4, 1)
    sampling = Sampling(torch.arange(4), temperature=0.8, top_k=50, top_p=0.95)
    options = {"sampling": sampling, "eos": (5,)}
    found = run(request(mixture, ids, **options)).sequences
    assert Tape.replays > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tape, "__call__", lambda self: self.function())
        assert torch.equal(found, run(request(mixture, ids, **options)).sequences)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("draft", [1, 3])
def test_drafts_and_their_verification_replay(draft, padded, graphs):
    mixture = double_mixture("llama", "gpt2", "qwen2", weight=(0.5, 0.2))
    row = prompts()[2]
    ids, mask = left_padded([row, [*row, 1, 1]]) if padded else (torch.tensor([row]), None)
    ids, mask = ids[:1], None if mask is None else mask[:1]
    found = run(request(mixture, ids, mask, draft_tokens=draft))
    assert Tape.replays > found.stats.base_passes
    assert found.sequences[0, -NEW:].tolist() == greedy(mixture, row, NEW)
    sampling = Sampling(torch.arange(1) + 7)
    found = run(request(mixture, ids, mask, draft_tokens=draft, sampling=sampling))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tape, "__call__", lambda self: self.function())
        again = run(request(mixture, ids, mask, draft_tokens=draft, sampling=sampling))
    assert torch.equal(found.sequences, again.sequences)


class Event:
    def __init__(self):
        self.waited = 0

    def synchronize(self):
        self.waited += 1


@pytest.fixture
def late(monkeypatch):
    """Copies to the host, in order."""
    copies = []

    def to_host(values):
        copies.append((values.clone(), Event()))
        return copies[-1]

    monkeypatch.setattr(cuda_graph, "to_host", to_host)
    monkeypatch.setattr(decode_loop, "_RUN_AHEAD", ("cpu",))
    return copies


def test_the_host_looks_late_and_cuts_what_was_decoded_too_far(late):
    mixture = double_mixture("llama", "gpt2")
    rows = prompts()
    ids, mask = left_padded(rows)
    free = [greedy(mixture, row, NEW) for row in rows]
    for place in (0, 3, 9, NEW - 1):
        eos = free[0][place]
        for chosen in ([0], [0, 1, 2]):
            late.clear()
            asked = request(mixture, ids[chosen], mask[chosen], eos=(eos,), pad=9)
            found = run(asked)
            ends = [free[i].index(eos) + 1 if eos in free[i] else NEW for i in chosen]
            assert found.sequences.shape[1] == ids.shape[1] + max(ends)
            for row, i, end in zip(found.sequences, chosen, ends, strict=True):
                new = row[ids.shape[1] :].tolist()
                assert new == free[i][:end] + [9] * (max(ends) - end)
            assert found.stats.base_passes <= max(ends) - 1 + 2 * cuda_graph.EVERY
            assert int(asked.cache.get_seq_length()) == found.sequences.shape[1] - 1
            assert len(late) <= NEW // cuda_graph.EVERY
            assert sum(event.waited for _, event in late) <= len(late)


@pytest.mark.parametrize("kind", ["state", "window"])
def test_a_kept_cache_that_cannot_go_back_is_never_read_too_far(late, kind):
    config = MistralConfig(sliding_window=4, **tiny_model("llama").config.to_dict())
    memory = stateful_model("mamba") if kind == "state" else MistralForCausalLM(config).eval()
    mixture = MemoryMixture(tiny_model("gpt2"), memory, 0.4)
    row = prompts()[2]
    free = greedy(mixture, row, NEW)
    end = max(map(free.index, free))
    options = {"eos": (free[end],), "pad": 9}
    for keeps in (True, False):
        asked = request(mixture, torch.tensor([row]), keeps_cache=keeps, **options)
        asked.cache = mixture.new_cache()
        found = run(asked)
        assert found.sequences[0].tolist() == row + free[: end + 1]
        if keeps:
            assert int(asked.cache.get_seq_length()) == len(row) + end
            ids = torch.tensor([row + free[: end + 1] + [5, 6]])
            more = {"fresh": 3, "cache": asked.cache, "max_new_tokens": 4}
            more = Request(mixture=mixture, input_ids=ids, mask=None, sampling=None, **more)
            assert run(more).sequences[0, -4:].tolist() == greedy(mixture, ids[0].tolist(), 4)


def test_tokens_are_shown_one_step_late_and_never_past_the_end(late):
    mixture = double_mixture("llama", "gpt2")
    rows = prompts()
    ids, mask = left_padded(rows)
    eos = greedy(mixture, rows[0], NEW)[5]
    for options in ({}, {"eos": (eos,)}):
        for chosen in (slice(0, 1), slice(None)):
            shown = []
            emit = shown.append
            asked = request(mixture, ids[chosen], mask[chosen], emit=emit, **options)
            found = run(asked)
            assert torch.equal(torch.stack(shown, 1), found.sequences[:, ids.shape[1] :])
            assert found.stats.base_passes <= found.sequences.shape[1] - ids.shape[1]


def test_a_gpu_that_is_not_the_current_one_is_made_so(monkeypatch):
    """Streams and captures belong to the current device, whichever the models are on."""
    current = []

    @contextlib.contextmanager
    def made_current(device):
        current.append(device)
        yield
        current.pop()

    def plain(request):
        assert current == [torch.device("cuda:1")]
        return Decoded(torch.ones(1, 4), None, DecodeStats())

    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(decode_loop, "_plain", plain)
    with FakeTensorMode():
        ids = torch.ones(1, 3, dtype=torch.int64, device="cuda:1")
    asked = SimpleNamespace(input_ids=ids, draft_tokens=0, updates_cache=False)
    assert run(asked).sequences.shape == (1, 4)


def test_side_streams_are_the_same_in_every_call(monkeypatch):
    """Each keeps memory, and torch has 32 to hand out."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or len(made))
    device = torch.device("cuda:7")
    first, second = (cuda_graph.Streams(3, device) for _ in range(2))
    assert first.side == second.side == [1, 2]
    cuda_graph._side_stream.cache_clear()
