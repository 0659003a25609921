"""The shortcut of an ordinary mixture call: what takes it, what does not, and that it changes no
bit. See `logit_mix.arguments.plain`."""

import gc
import math
import sys

import mix_fixtures
import pytest
import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

import mdkernels
from mdkernels.ops import native
from mdkernels.ops.logit_mix.arguments import plain

CPU = native.load("_cpu").module
pytestmark = pytest.mark.skipif(
    CPU is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="needs the CPU extension and the exchange table of torch 2.10",
)
BASE, MEMORY = torch.randn(3, 40), torch.randn(3, 37)


def found(base=BASE, memory=MEMORY, weight=0.25, recording=False):
    return CPU.plain_mixture(base, memory, weight, recording)


def test_what_it_finds():
    wide = torch.randn(4, 90, dtype=torch.bfloat16)
    base, memory = wide[:, 5:55], torch.randn(4, 60, dtype=torch.float16)
    assert found(base, memory, 0.25) == (
        "cpu",
        4,
        60,
        ((base.data_ptr(), 90, 50, 1), (memory.data_ptr(), 60, 60, 2)),
        (0.75, 0.25),
        memory,
    )
    # Kept for as long as its address is used: another thread may empty the list meanwhile.
    assert found(BASE, [MEMORY])[5] is MEMORY
    assert found(BASE, [MEMORY], [0.25]) == found(BASE, (MEMORY,), (0.25,)) == found()
    assert found(torch.ones(3, 2)[:, :1]) is not None  # one column: its stride means nothing


def freed(x: torch.Tensor, size: int) -> torch.Tensor:
    """Its values within a storage that was cut to `size` bytes."""
    wide = torch.zeros(50, 90)
    view = wide[40 : 40 + x.shape[0], 3 : 3 + x.shape[1]]
    wide.untyped_storage().resize_(size)
    return view


@pytest.mark.parametrize("table", [None, 12345, object(), "dlpack_exchange_api"])
def test_tables_of_another_kind_are_left_alone(table):
    assert CPU.accept_tensors(torch.Tensor, table) is False
    assert found() is not None
    assert CPU.accept_tensors(torch.Tensor, torch.Tensor.__dlpack_c_exchange_api__) is True


REFUSED = {
    "a parameter": lambda x: Parameter(x),
    "a subclass": lambda x: TwoTensor(x, x),
    "a negation": lambda x: torch._neg_view(-x),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
    "a vector": lambda x: x[0],
    "a cube": lambda x: x[None],
    "fp64": lambda x: x.double(),
    "integers": lambda x: x.int(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "columns apart": lambda x: x.T.contiguous().T,
    "no rows": lambda x: x[:0],
    "no columns": lambda x: x[:, :0],
    "other rows": lambda x: x[:2],
    "freed": lambda x: freed(x, 0),
    "cut short": lambda x: freed(x, 4 * (42 * 90 + 3 + x.shape[1]) - 1),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "two": lambda x: [x, x],
    "none": lambda x: [],
    "a number": lambda x: 1.0,
    "nothing": lambda x: None,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_ordinary(kind):
    assert found(memory=REFUSED[kind](MEMORY)) is None
    assert found(base=REFUSED[kind](BASE)) is None
    assert found() is not None  # and no exception is left behind


def test_a_storage_that_just_covers_is_ordinary():
    assert found(memory=freed(MEMORY, 4 * (42 * 90 + 3 + MEMORY.shape[1]))) is not None


@pytest.mark.parametrize("size", [0, 64])
def test_freed_storage_is_named(size):
    view = freed(MEMORY, size)
    for op in (mdkernels.logit_mix, mdkernels.mix_argmax):
        with pytest.raises(RuntimeError, match="memory_logits: its storage has been freed"):
            op(BASE, view, 0.25)


class Interrupted(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "is_neg":
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def test_an_interrupt_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt), Interrupted():
        found()
    assert found() is not None


@pytest.mark.parametrize(
    "weight", [1, True, -0.1, 1.1, math.nan, "0.5", None, [], [0.2, 0.3], [1], torch.tensor(0.5)]
)
def test_weights_that_are_not_ordinary(weight):
    assert found(weight=weight) is None


def test_a_gradient_takes_the_long_way():
    base = BASE.clone().requires_grad_()
    assert found(base, recording=True) is None
    assert found(MEMORY, base.detach().requires_grad_(), recording=True) is None
    assert found(base, recording=False) is not None
    assert mdkernels.logit_mix(base, MEMORY, 0.25).requires_grad
    with torch.no_grad():
        assert not mdkernels.logit_mix(base, MEMORY, 0.25).requires_grad
    assert mdkernels.mix_argmax(base, MEMORY, 0.25).dtype == torch.int64
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(BASE, torch.ones_like(BASE))
        mixed = mdkernels.logit_mix(dual, MEMORY, 0.25)
        assert torch.autograd.forward_ad.unpack_dual(mixed).tangent is not None


@pytest.mark.parametrize("kind", ["a parameter", "a subclass", "a negation"])
def test_the_long_way_gives_the_same(kind):
    opaque = REFUSED[kind](MEMORY)
    with torch.no_grad():
        mixed = mdkernels.logit_mix(BASE, opaque, 0.25)
    mixed = mixed.a if isinstance(mixed, TwoTensor) else mixed
    torch.testing.assert_close(mixed, mdkernels.logit_mix(BASE, MEMORY, 0.25), rtol=0, atol=0)
    zeros = torch._efficientzerotensor(MEMORY.shape)
    expected = mdkernels.logit_mix(BASE, torch.zeros(MEMORY.shape), 0.25)
    assert torch.equal(mdkernels.logit_mix(BASE, zeros, 0.25), expected)


def test_backends_and_the_environment(monkeypatch):
    given = (BASE, MEMORY, 0.25, 1.0)
    assert plain("logit_mix", *given, "cpu")[0].__name__.endswith("cpu_kernels")
    assert plain("logit_mix", *given, "reference") is None
    with pytest.raises(ValueError, match="backend: got 'gpu'"):
        plain("logit_mix", *given, "gpu")
    for temperature in (1, 0.0, -1.0, math.inf, math.nan, torch.tensor(1.0)):
        assert plain("logit_mix", BASE, MEMORY, 0.25, temperature, "auto") is None
    monkeypatch.setenv("MDK_BACKEND", "")
    assert plain("logit_mix", *given, "auto") is not None
    monkeypatch.setenv("MDK_BACKEND", "reference")
    assert plain("logit_mix", *given, "auto") is None


@pytest.mark.parametrize("backend", sorted(mix_fixtures.AVAILABLE & {"cpu", "cuda"}))
@pytest.mark.parametrize("dtype", mix_fixtures.DTYPES)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_no_bit_depends_on_the_way(monkeypatch, backend, dtype, weight):
    base, memory = (torch.randn(3, n + 5).to(dtype)[:, 2:-3] for n in (1000, 1009))
    base, memory = mix_fixtures.place([base, memory], backend)
    seeds, offsets = mix_fixtures.place([torch.arange(3), torch.arange(3) + 7], backend)
    options = {"memory_temperature": 1.25, "backend": backend}
    draw = {"seeds": seeds, "offsets": offsets, **options}

    def results():
        yield from (
            mdkernels.logit_mix(base, memory, weight, scale=scale, **options)
            for scale in ("logprob", "base")
        )
        yield mdkernels.mix_argmax(base, memory, weight, **options)
        yield mdkernels.mix_sample(base, memory, weight, **draw)
        yield mdkernels.mix_sample(base, memory, weight, temperature=0.0, **draw)
        yield mdkernels.mix_sample(base, memory, weight, temperature=0.7, top_k=9, **draw)
        yield mdkernels.mix_sample(base, memory, weight, **(draw | {"seeds": 5, "offsets": 2}))

    taken = []
    found = CPU.plain_mixture
    monkeypatch.setattr(CPU, "plain_mixture", lambda *a: taken.append(found(*a)) or taken[-1])
    short = list(results())
    assert len(taken) == 7
    assert None not in taken
    monkeypatch.setattr(CPU, "plain_mixture", lambda *args: None)
    for quick, slow in zip(short, results(), strict=True):
        assert torch.equal(quick, slow)


def test_bad_rows_are_refused_all_the_same():
    spoiled = MEMORY.clone()
    spoiled[1, 3] = math.nan
    assert mdkernels.logit_mix(BASE, spoiled, 0.25).isnan().all(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        mdkernels.mix_sample(BASE, spoiled, 0.25, seeds=0)
    with pytest.raises(ValueError, match="seeds: expected shape"):
        mdkernels.mix_sample(BASE, MEMORY, 0.25, seeds=torch.arange(2))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("offsets", [2, "tensor"])
def test_compiled_without_a_break(temperature, offsets):
    def draw(base, memory, seeds, offsets):
        draw = {"seeds": seeds, "offsets": offsets, "temperature": temperature}
        return mdkernels.mix_sample(base, memory, 0.25, **draw)

    given = BASE, MEMORY, torch.arange(3), torch.arange(3) if offsets == "tensor" else offsets
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), draw(*given))


def test_seeds_without_memory():
    zeros = torch._efficientzerotensor((3,), dtype=torch.int64)
    wanted = mdkernels.mix_sample(
        BASE, MEMORY, 0.25, seeds=torch.zeros(3, dtype=torch.int64), offsets=0
    )
    assert torch.equal(mdkernels.mix_sample(BASE, MEMORY, 0.25, seeds=zeros), wanted)
    seeds = torch.zeros(3, dtype=torch.int64)
    found = mdkernels.mix_sample(BASE, MEMORY, 0.25, seeds=seeds, offsets=zeros)
    assert torch.equal(found, wanted)


def test_seeds_that_are_negations():
    seeds, offsets = torch.tensor([3, 4, 5]), torch.tensor([1, 2, 3])
    wanted = mdkernels.mix_sample(BASE, MEMORY, 0.25, seeds=seeds, offsets=offsets)
    for change in ({"seeds": torch._neg_view(-seeds)}, {"offsets": torch._neg_view(-offsets)}):
        draw = {"seeds": seeds, "offsets": offsets} | change
        assert torch.equal(mdkernels.mix_sample(BASE, MEMORY, 0.25, **draw), wanted)


def test_no_reference_is_kept_or_lost():
    kept = [None, False, True, BASE, MEMORY]
    odd = [REFUSED[kind](MEMORY) for kind in ("fp64", "meta", "a negation", "two", "a number")]
    gc.collect()
    before = [sys.getrefcount(one) for one in kept]
    for _ in range(1000):
        found()
        found(recording=True)
        for one in odd:
            found(memory=one)
    gc.collect()
    after = [sys.getrefcount(one) for one in kept]
    # One per call would be a thousand; whatever else runs moves the counts of constants a little.
    assert all(abs(a - b) < 500 for a, b in zip(after, before, strict=True)), (before, after)
