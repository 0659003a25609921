"""What only a GPU can show of the mixture operators: graphs, launches, side streams, neighbours."""

import pytest
import torch
from mix_fixtures import ON_GPU, pair

from mdkernels import logit_mix, mix_argmax, mix_sample, mix_verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("backend", ["cuda", "triton"]),
]


@pytest.fixture(autouse=True)
def _built(backend):
    if torch.cuda.is_available() and backend not in ON_GPU:
        pytest.skip(f"backend {backend!r} is not available here")


def case(rows, width=50257):
    base, memory = (x.cuda() for x in pair(rows, width, torch.bfloat16))
    return base, memory, torch.full((rows,), 0.3, device="cuda")


FILTERS = {"top_k": 50, "top_p": 0.9}


def test_a_graph_draws_what_the_stream_draws(backend):
    base, memory, weights = case(4)
    seeds = torch.arange(4, device="cuda")
    offsets = torch.zeros_like(seeds)

    def step():
        mix = (base, memory, weights)
        drawn = mix_sample(
            *mix,
            seeds=seeds,
            offsets=offsets,
            return_logprobs=True,
            backend=backend,
            **FILTERS,
        )
        return (*drawn, mix_argmax(*mix, backend=backend), logit_mix(*mix, backend=backend))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = set()
    for position in range(8):
        offsets.fill_(position)
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)
        seen.add(tuple(captured[0].tolist()))
    assert len(seen) > 1


@pytest.mark.parametrize("rows", [1, 64])
def test_launches(backend, rows):
    """One kernel in CUDA, two in Triton and four with filters, and no copy."""
    base, memory, weights = case(rows)
    seeds = torch.arange(rows, device="cuda")
    mix = (base, memory, weights)
    drawn = {"seeds": seeds, "offsets": seeds, "backend": backend}
    calls = (
        (2, lambda: mix_sample(*mix, **drawn)),
        (4, lambda: mix_sample(*mix, **drawn, **FILTERS)),
        (2, lambda: mix_argmax(*mix, backend=backend)),
        (2, lambda: logit_mix(*mix, backend=backend)),
    )
    for in_triton, call in calls:
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        names = [
            e.name for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA
        ]
        assert len(names) == (1 if backend == "cuda" else in_triton), names


@pytest.mark.parametrize("width", [50257, 151936])
def test_a_row_does_not_depend_on_its_batch(backend, width):
    base, memory, weights = case(300, width)
    seeds = torch.arange(300, device="cuda") * 12345
    options = {"seeds": seeds, "backend": backend, **FILTERS}
    many = mix_sample(base, memory, weights, **options)
    mixed = logit_mix(base, memory, weights, backend=backend)
    for row in (0, 7, 299):
        one = slice(row, row + 1)
        alone = mix_sample(base[one], memory[one], weights[one], **{**options, "seeds": seeds[one]})
        assert torch.equal(alone, many[one])
        assert torch.equal(
            logit_mix(base[one], memory[one], weights[one], backend=backend), mixed[one]
        )
    assert torch.equal(mix_sample(base, memory, weights, **options), many)


def test_runs_on_the_current_stream(backend):
    base, memory, weights = case(64)
    want = logit_mix(base, memory, weights, backend=backend)
    late = torch.full_like(base, torch.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # cycles
        late.copy_(base)
        got = logit_mix(late, memory, weights, backend=backend)
    side.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_a_graph_verifies_what_the_stream_verifies(backend, temperature):
    """Nothing waits for the device, and a row does not depend on its batch."""
    base, memory, _ = case(4 * 5)
    base, memory = base.view(4, 5, -1), memory.view(4, 5, -1)
    ids = memory[:, :4].argmax(2)
    seeds = torch.arange(4, device="cuda")
    offsets = torch.zeros_like(seeds)
    weights = torch.full((4,), 0.6, device="cuda")
    lengths = torch.tensor([4, 0, 3, 4], device="cuda")

    def step(rows=slice(None)):
        return mix_verify(
            base[rows],
            memory[rows],
            weights[rows],
            ids[rows],
            draft_lengths=lengths[rows],
            seeds=seeds[rows],
            offsets=offsets[rows],
            temperature=temperature,
            backend=backend,
            **(FILTERS if temperature == 0.8 else {}),
        )

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for position in range(8):
        offsets.fill_(position)
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)
    for got, want in zip(step(slice(2, 3)), step(), strict=True):
        assert torch.equal(got, want[2:3])
