"""The CPU extension: instruction sets, 16-bit conversions, threads, fork, and what it links."""

import multiprocessing
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from buffers import bits
from helpers import csr, make_logits, problem, threads

from mdkernels import sparse_kl, token_logprobs
from mdkernels.ops import native

OP = "sparse_kl"
CPU = native.load("_cpu")
pytestmark = pytest.mark.skipif(CPU.module is None, reason=f"no CPU extension: {CPU.reason}")


# ---- instruction sets


def test_set_isa():
    before = CPU.module.isa()
    names = CPU.module.supported_isas()
    assert names[0] == "generic"
    assert set(names) <= set(CPU.module.compiled_isas())
    assert before in names
    for name in names:
        CPU.module.set_isa(name)
        assert CPU.module.isa() == name
    with pytest.raises(
        ValueError, match=r"unknown instruction set 'mmx'; expected auto or one of generic"
    ):
        CPU.module.set_isa("mmx")
    assert CPU.module.isa() == names[-1]
    for best in ("auto", ""):
        CPU.module.set_isa("generic")
        CPU.module.set_isa(best)
        assert CPU.module.isa() == names[-1]
    CPU.module.set_isa(before)


# ---- 16-bit conversions, all of them


def every_value(dtype) -> torch.Tensor:
    """All 65536 bit patterns."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def roundings(dtype) -> torch.Tensor:
    """fp32 values at, halfway between and just beside all positive finite values of a 16-bit type,
    up to where it overflows."""
    exact = every_value(dtype)[:0x8000]
    exact = exact[exact.isfinite()].double()
    ends = torch.cat([exact[1:], 2 * exact[-1:] - exact[-2:-1]])
    middle = ((exact + ends) / 2).float()
    around = [
        middle,
        middle.nextafter(torch.tensor(0.0)),
        middle.nextafter(torch.tensor(torch.inf)),
    ]
    return torch.cat([exact.float(), *around])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_nearest_even(variant, half):
    """The softmax is 1 at id 0, so elsewhere the gradient is -kl_coef p: any fp32 number."""
    if variant.isa is None:
        pytest.skip("only native code converts by itself")
    values = roundings(half)
    logits = torch.full((2, len(values) + 1), -torch.inf, dtype=half)
    logits[:, 0] = 0.0
    targets = csr([(torch.arange(1, len(values) + 1), values)] * 2)
    args = (targets.row_offsets, targets.token_ids, targets.probs, None, -100)
    lse, sign = torch.zeros(2, dtype=torch.float64), torch.tensor([-1.0, 1.0])
    # A mass beyond fp32 would make the row NaN: bf16 reaches 3e38, so its values go in one by one.
    if half == torch.bfloat16:
        keep = values < 1e30
        targets = csr([(torch.arange(1, len(values) + 1)[keep], values[keep])] * 2)
        args = (targets.row_offsets, targets.token_ids, targets.probs, None, -100)
        values = values.where(keep, 0.0)
    grad = torch.ops.mdk.sparse_kl_backward(
        logits, *args, lse, sign, torch.zeros(2), variant.backend
    )
    expected = torch.stack([values, -values]).to(half)
    assert torch.equal(bits(grad[:, 1:] + 0.0), bits(expected + 0.0))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [2, 96])
def test_every_logit_is_read_exactly(variant, half, vocab):
    """Two live logits, z and 0: log p of the unlikelier one is -|z| - log1p(exp(-|z|))."""
    if variant.isa is None:
        pytest.skip("only native code converts by itself")
    z = every_value(half)
    z = z[z.isfinite()]
    at = torch.arange(len(z)) % (vocab - 1)
    logits = torch.full((len(z), vocab), -torch.inf, dtype=half)
    logits[:, -1] = 0.0
    logits[torch.arange(len(z)), at] = z
    labels = at.where(z < 0, vocab - 1)
    found = token_logprobs(logits, labels, backend=variant.backend).double()
    magnitude = z.double().abs()
    exact = -magnitude - torch.log1p(torch.exp(-magnitude))
    assert ((found - exact).abs() <= 8 * 2.0**-24 * (1 + magnitude)).all()


def test_gradient_overflow_is_infinite(variant):
    if torch.float16 not in variant.dtypes():
        pytest.skip(f"{variant} takes no fp16")
    z = make_logits("normal", 1, 40, torch.float16).to(variant.device).requires_grad_()
    label = torch.tensor([3], device=variant.device)
    targets = csr([([3], [1.0])]).to(variant.device)
    (1e6 * sparse_kl(z, targets, label, backend=variant.backend).loss).backward()
    assert z.grad[0, 3] == -torch.inf
    assert not z.grad.isnan().any()


# ---- threads


def training_step(p):
    z = p.logits.clone().requires_grad_()
    out = sparse_kl(z * 1, p.targets, p.labels, inplace=True, backend="cpu")
    out.loss.backward()
    return out.loss.detach(), z.grad


def test_more_threads_than_rows():
    p = problem("peaked", 3, 20011, torch.float32)
    with threads(1):
        expected = training_step(p)
    with threads(16):
        found = training_step(p)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_called_from_many_python_threads():
    """The GIL is released inside, so calls overlap, each with a team of its own."""
    problems = [problem("peaked", 6, 9001, torch.bfloat16, seed=s) for s in range(4)]
    expected = [training_step(p) for p in problems]
    with threads(2), ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, right in zip(pool.map(training_step, problems), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


# ---- fork


def kernels_alone(p, scratch):
    """The forward and the in-place pass, without anything that torch itself would run in threads:
    its own pool does not survive a fork."""
    sparse = (p.targets.row_offsets, p.targets.token_ids, p.targets.probs, p.labels, -100)
    kl, ce, _ = torch.ops.mdk.sparse_kl_forward(p.logits, *sparse, "cpu")
    torch.ops.mdk.sparse_kl_loss_grad_(scratch, *sparse, 0.5, "mean", "cpu")
    return kl.tolist(), ce.tolist(), scratch.numpy().tobytes()


def run_in_child(p, scratch, queue):
    result = kernels_alone(p, scratch)
    queue.put((CPU.module.after_fork(), torch.get_num_threads(), *result))


def forked(p):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=run_in_child, args=(p, p.logits.clone(), queue))
    child.start()
    try:
        return queue.get(timeout=60)
    finally:
        child.join(timeout=10)
        if child.is_alive():
            child.kill()
            pytest.fail("the child of fork() hangs")


def test_child_of_fork_after_the_parent_used_its_threads():
    """The pool's threads do not exist in the child: a parallel region there would wait for ever."""
    p = problem("peaked", 24, 9001, torch.float32)
    with threads(2):
        expected = kernels_alone(p, p.logits.clone())
        assert not CPU.module.after_fork()
        for _ in range(2):
            after_fork, count, *found = forked(p)
            assert after_fork
            assert count == 2
            assert tuple(found) == expected
        assert kernels_alone(p, p.logits.clone()) == expected
    assert not CPU.module.after_fork()


# ---- memory


def test_huge_page_advice_on_any_range():
    """It is advice: ranges without a whole page, of no bytes, and odd addresses are all fine."""
    buffer = torch.arange(3 << 20, dtype=torch.int32)
    kept = buffer.clone()
    for offset in (0, 1, 4095, 4097):
        for size in (0, 1, 4096, (2 << 20) - 1, 8 << 20):
            CPU.module.advise_huge_pages(buffer.data_ptr() + offset, size)
    assert torch.equal(buffer, kept)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_buffers_that_end_with_the_last_element(variant, dtype, inplace):
    """Nothing to see without AddressSanitizer, which knows where an allocation ends."""
    for vocab in (*range(1, 70), 127, 129, 511, 4095, 4097, 4099):
        z = torch.ones(3, vocab, dtype=dtype).requires_grad_()
        targets = csr([([vocab - 1], [1.0]), ([0] * 5, [0.2] * 5), (range(vocab), [1.0] * vocab)])
        labels = torch.tensor([vocab - 1, 0, -100])
        out = sparse_kl(z * 1, targets, labels, inplace=inplace, backend=variant.backend)
        out.loss.backward()
        assert z.grad.isfinite().all()
        token_logprobs(z.detach(), labels, backend=variant.backend)


@pytest.mark.parametrize("shape", [(0, 7), (3, 5), (2, 1 << 20)])
def test_empty_huge(shape):
    like = torch.zeros(2, 3, dtype=torch.bfloat16)
    out = native.empty_huge(like, shape)
    assert (tuple(out.shape), out.dtype, out.is_contiguous()) == (shape, torch.bfloat16, True)
    assert native.empty_huge(like, shape, torch.float32).dtype == torch.float32
    out.fill_(1.0)


# ---- symbols


def listed(*command) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def objects() -> list[Path]:
    root = Path(CPU.module.__file__).resolve().parents[1]
    pattern = "build/cmake-*[!e]/CMakeFiles/cpu_kernels.dir/csrc/cpu/kernels_*.o"  # not *-sanitize
    found = sorted(root.glob(pattern))
    if not found:
        pytest.skip("the object files of this build are not beside the package")
    return found


def test_instruction_set_objects_share_no_symbol():
    """A weak symbol compiled for AVX-512 could be the one the linker keeps for everybody."""
    allowed = re.compile(
        r"mem(cpy|set|move)|(exp2?|log|log1p|frexp|nearbyint|rint)f?|_GLOBAL_OFFSET_TABLE_"
    )
    seen = 0
    for path in objects():
        for line in listed("nm", str(path)).splitlines():
            kind, name = line.split()[-2:]
            assert kind not in "WwVvu", f"{path.name} defines the weak symbol {name}"
            if kind == "U":
                assert allowed.fullmatch(name), f"{path.name} needs {name}"
            elif kind.isupper():
                assert name == "mdk_kernels_" + path.name.split(".")[0].removeprefix("kernels_")
                seen += 1
    assert seen == len(objects())


def test_extension_knows_nothing_of_torch_or_cuda():
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed("readelf", "-d", CPU.module.__file__))
    assert needed
    assert not [name for name in needed if re.search(r"torch|c10|cuda|python", name)], needed
    undefined = listed("nm", "-D", "--undefined-only", CPU.module.__file__)
    assert not re.search(r"_ZN2at|_ZN3c10|_ZN5torch|THP|cuda", undefined)


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_extension_exports_its_init_function_alone(name):
    """Of its own code, that is: templates of the standard library have default visibility."""
    module = native.load(name).module
    if module is None:
        pytest.skip(f"{name} is not built here")
    names = [
        line.split()[-1]
        for line in listed("nm", "-D", "--defined-only", module.__file__).splitlines()
    ]
    own = [name for name in names if re.search(r"mdk|pybind11|^PyInit", name)]
    assert own == [f"PyInit_{name}"]
