"""The translation of PTX for the host (tests/ptx): that what a GPU would not forgive is no pass."""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PTX = Path(__file__).with_name("ptx")
sys.path.insert(0, str(PTX))
import objects  # noqa: E402
from translate import translate  # noqa: E402

KERNEL = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry {name}(.param .u32 first, .param .u64 out)
.maxntid 64, 1, 1
{{
  .reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<8>; .reg .b64 %rd<8>;
  mov.u32 %r1, %tid.x;
  ld.param.u64 %rd1, [out];
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  {body}
  st.global.u32 [%rd3], %r2;
  ret;
}}
"""
BODIES = {
    # The neighbour's number through shared memory.
    "exchanged": "shl.b32 %r3, %r1, 2; mov.b32 %r4, memory; add.s32 %r4, %r4, %r3;"
    "st.shared.u32 [%r4], %r1; bar.sync 0; xor.b32 %r3, %r3, 4; mov.b32 %r5, memory;"
    "add.s32 %r3, %r5, %r3; ld.shared.u32 %r2, [%r3];",
    # Halves: 1.5 and NaN; comparisons with NaN; the product and sum of fma.
    "numbers": "mov.b16 %rs1, 0x3FC0; cvt.f32.bf16 %r3, %rs1; mov.b32 %r4, 0f7FC00000;"
    "setp.lt.f32 %p1, %r3, %r4; setp.geu.f32 %p2, %r3, %r4; selp.b32 %r5, 100, 0, %p1;"
    "@%p2 add.s32 %r5, %r5, 10; fma.rn.f32 %r3, %r3, %r3, 0f3F400000; cvt.rzi.s32.f32 %r6, %r3;"
    "add.s32 %r2, %r5, %r6;",
    "misaligned": "ld.global.u32 %r2, [%rd3+2];",
    "outside": "mov.b32 %r3, memory; ld.shared.u32 %r2, [%r3+256];",
    "divided": "ld.param.u32 %r3, [first]; div.s32 %r2, %r1, %r3;",
    "part_of_a_warp": "shfl.sync.idx.b32 %r2, %r1, 0, 31, 1;",
    "unjoined": "setp.eq.s32 %p1, %r1, 0; @%p1 ret; bar.sync 0; mov.b32 %r2, 1;",
    "without_arriving": "barrier.cluster.wait.acquire.aligned; mov.b32 %r2, 1;",
}

pytestmark = [
    pytest.mark.skipif(shutil.which(objects.CXX) is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the shim needs Linux"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    head, _, body = KERNEL.partition(".visible")
    kernels = [".visible" + body.format(name=name, body=text) for name, text in BODIES.items()]
    return objects.linked(head + "".join(kernels))


def launch(library, name, threads=64):
    lib = ctypes.CDLL(str(library))
    lib.ptx_launch.restype = ctypes.c_char_p
    out = (ctypes.c_uint32 * 64)()
    parameters = bytes(8) + ctypes.addressof(out).to_bytes(8, "little")
    blocks, shared = ctypes.c_int64(1), ctypes.c_size_t(256)
    error = lib.ptx_launch(name.encode(), blocks, ctypes.c_int(threads), shared, parameters)
    return error or list(out)


def test_shared_memory_and_a_barrier(library):
    assert launch(library, "exchanged") == [i ^ 1 for i in range(64)]


def test_numbers(library):
    assert launch(library, "numbers") == [13] * 64


def test_a_barrier_that_not_all_threads_reach(library):
    assert b"deadlock: 63 threads wait at a block barrier" in launch(library, "unjoined")
    assert launch(library, "exchanged") == [i ^ 1 for i in range(64)]  # the fibers work again


def test_more_threads_than_compiled_for(library):
    assert launch(library, "exchanged", 96) == b"more threads than the kernel is compiled for"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("misaligned", "misaligned address in thread 0 of block 0"),
        ("outside", "address outside shared memory"),
        ("divided", "division by zero"),
        ("part_of_a_warp", "a mask of less than the warp"),
        ("without_arriving", "wait at the cluster barrier without arriving"),
    ],
)
def test_what_ends_the_process(library, name, message):
    code = f"import test_ptx; test_ptx.launch({str(library)!r}, {name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PTX.parent, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"PTX: {message}" in done.stderr


@pytest.mark.parametrize(
    "instruction",
    [
        "tanh.approx.f16x2 %r2, %r1",
        "bar.sync 1, 32",
        "ld.tensor.u32 %r2, [%rd3]",
        ".local .b8 x[4]",
    ],
)
def test_an_unknown_instruction_is_no_translation(instruction):
    body = KERNEL.format(name="k", body=f"{instruction};")
    with pytest.raises((ValueError, RuntimeError)):
        objects.compiled(translate(body))


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_a_kernel_of_triton():
    """bf16, which the interpreter gets wrong: a launch, in a process with the translation."""
    code = (
        "import torch, mdkernels\n"
        "from ptx import triton_host\n"
        "triton_host.install()\n"
        "z = torch.randn(3, 301).bfloat16(); y = torch.tensor([0, 7, 300])\n"
        "got = mdkernels.token_logprobs(z, y, backend='triton')\n"
        "want = torch.log_softmax(z.double(), 1)[range(3), y]\n"
        "torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PTX.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
