"""What only a GPU can show: streams, graphs, no hidden synchronisation, offsets past 2^31, peak
memory, determinism, and errors of a launch. Values are tested in the modules of the operators."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_fixtures import BACKENDS, DEVICE, OPS, Call, every_op, only, randn
from helpers import csr, problem

import mdkernels
from mdkernels import SparseTargets
from mdkernels.ops import dispatch

pytestmark = pytest.mark.gpu


def same(found, wanted) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@every_op
def test_runs_on_the_current_stream(op, backend):
    """Inputs that are written late, on a side stream: a kernel on another one would see NaN."""
    call = Call(op, backend)
    wanted = call.run(*call.inputs)
    late = [torch.full_like(t, torch.nan) for t in call.inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for a, b in zip(late, call.inputs, strict=True):
            a.copy_(b)
        found = call.run(*late)
    side.synchronize()
    assert same(found, wanted)


@every_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_inputs(op, backend):
    call = Call(op, backend)
    wanted = call.run(*call.inputs)
    with torch.cuda.device(1):
        found = call.run(*call.inputs)
    assert all(t.device.index == 0 for t in found)
    assert same(found, wanted)


def captured(run):
    """(graph, results) of run() after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = run()
    finally:  # a capture that fails leaves its stream current
        torch.cuda.set_stream(torch.cuda.default_stream())
    return graph, results


@only("sparse_kl", "token_logprobs", "logit_mix", "mix_argmax", "mix_sample")
def test_graph_replay_is_the_eager_call(op, backend):
    """Also on values that the graph was not captured with."""
    call = Call(op, backend)
    graph, found = captured(lambda: call.run(*call.inputs))
    for seed in (10, 20):
        for number, tensor in enumerate(call.inputs):
            tensor.copy_(randn(*tensor.shape, seed=seed + number))
        if op == "mix_sample":
            call.options["offsets"].add_(1)
        graph.replay()
        assert same(found, call.run(*call.inputs))


@only("sparse_kl")
def test_graph_of_a_step_in_place(op, backend):
    call = Call(op, backend)
    z = call.inputs[0].clone()
    graph, found = captured(lambda: call.in_place(z))
    for seed in (10, 20):
        fresh = randn(*z.shape, seed=seed)
        z.copy_(fresh)
        graph.replay()
        assert same(found, call.in_place(fresh))


@pytest.mark.skipif(("sparse_kl", "cuda") not in BACKENDS, reason="the extension is not built")
def test_launches_of_a_step_in_place():
    """The factors, the kernel, the sums, and in the backward the look at the upstream gradient."""
    call = Call("sparse_kl", "cuda")
    z = call.inputs[0].clone()
    call.in_place(z)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call.in_place(z)
        torch.cuda.synchronize()
    kind = torch.profiler.DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == kind]
    assert sum("_kernel" in name for name in names if "mdk::" in name) == 4, names
    assert len(names) <= 5, names  # torch makes the upstream gradient, a 1


@pytest.fixture
def no_synchronisation():
    """A context in which torch makes waiting for the device an error."""

    class Watched:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *error):
            torch.cuda.set_sync_debug_mode("default")

    return Watched()


@only("sparse_kl", "token_logprobs", "logit_mix", "mix_argmax", "mix_sample")
def test_never_waits_for_the_device(op, backend, no_synchronisation):
    call = Call(op, backend)
    call.run(*call.inputs)
    with no_synchronisation:
        call.run(*call.inputs)
        if op == "sparse_kl":
            call.in_place(call.inputs[0])


# More elements between the first and the last row than 32 bits can count, in 5 GB of bf16: a row
# stride of 2^24 instead of that many rows.
FAR, FAR_ROWS = 1 << 24, 140


def far_apart(values: torch.Tensor) -> torch.Tensor:
    rows, width = values.shape
    flat = torch.empty((rows - 1) * FAR + width, dtype=values.dtype, device=values.device)
    return flat.as_strided((rows, width), (FAR, 1)).copy_(values)


def room(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"less than {gigabytes} GB of device memory are free")


def agree(found, wanted) -> None:
    """Another stride is another alignment, so sums may take another order."""
    for a, b in zip(found, wanted, strict=True):
        if a.dtype.is_floating_point:
            rounding = {torch.bfloat16: 2.0**-7, torch.float32: 1e-5}[a.dtype]
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding / 100)
        else:
            assert torch.equal(a, b)


@every_op
def test_rows_further_apart_than_32_bits_count(op, backend):
    room(16)
    call = Call(op, backend, rows=FAR_ROWS, vocab=5003)
    far = [far_apart(t) for t in call.inputs]
    assert far[0].stride(0) * (FAR_ROWS - 1) > 2**31
    agree(call.run(*far), call.run(*call.inputs))
    if op == "sparse_kl":
        agree(call.in_place(far[0]), call.in_place(call.inputs[0].clone()))


@only("sparse_kl", "logit_mix")
def test_outputs_larger_than_32_bits_count(op, backend):
    """The last rows of more than 2^31 elements are what they are alone."""
    room(40)
    rows, vocab = 14200, 151936
    assert (rows - 3) * vocab > 2**31
    call = Call(op, backend, rows=2, vocab=vocab)
    big = [t[:1].expand(rows, -1).clone() for t in call.inputs]
    for tensor, source in zip(big, call.inputs, strict=True):
        tensor[-2:] = source
    call.labels = call.labels[:1].expand(rows).clone()
    call.labels[-2:] = torch.arange(2, device=DEVICE) * 37
    ids = call.targets.token_ids.view(2, -1)
    ids = torch.cat([ids[:1].expand(rows - 2, -1), ids]).flatten()
    small = call.targets
    call.targets = SparseTargets(
        torch.arange(rows + 1, device=DEVICE) * 64, ids, small.probs[:1].expand(len(ids)).clone()
    )
    call.options |= {"reduction": "sum"} if op == "sparse_kl" else {}
    found = call.run(*big)[-1][-2:]
    call.targets, call.labels = small, torch.arange(2, device=DEVICE) * 37
    agree([found], [call.run(*(t[-2:] for t in big))[-1]])


def increment(run) -> int:
    """Bytes that run() allocates at most beyond what is allocated before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


MEGABYTE = 1 << 20


@only("sparse_kl", "token_logprobs", "logit_mix", "mix_argmax", "mix_sample")
def test_memory_beyond_the_outputs(op, backend):
    rows, vocab = 512, 50257
    call = Call(op, backend, rows=rows, vocab=vocab)
    z = call.inputs[0]
    if op == "sparse_kl":
        assert increment(lambda: call.in_place(z)) <= MEGABYTE
    # The gradient has the dtype of the logits, the mixture is fp32.
    outputs = {"sparse_kl": 2, "token_logprobs": 2, "logit_mix": 4}.get(op, 0) * rows * vocab
    assert increment(lambda: call.run(*call.inputs)) <= outputs + MEGABYTE


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_every_time(op, backend, dtype):
    call = Call(op, backend, rows=37, dtype=dtype)
    wanted = call.run(*call.inputs)
    for _ in range(5):
        assert same(call.run(*call.inputs), wanted)
    if op == "sparse_kl":
        wanted = call.in_place(call.inputs[0].clone())
        for _ in range(5):
            assert same(call.in_place(call.inputs[0].clone()), wanted)


def registered_calls():
    """Arguments of every registered operator, but for the backend."""
    p = problem("normal", 5, 33, torch.bfloat16)
    z, t, labels = p.logits.to(DEVICE), p.targets.to(DEVICE), p.labels.to(DEVICE)
    sparse = (t.row_offsets, t.token_ids, t.probs, labels, -100)
    lse = z.double().logsumexp(1)
    coefs = (torch.linspace(0.1, 0.5, 5, device=DEVICE), torch.ones(5, device=DEVICE))
    mixed = (z, [z.flip(1)], None, [0.6, 0.4], 1.2)
    seeds = torch.arange(5, device=DEVICE)
    distances = torch.rand(5, 9, device=DEVICE)
    ids = torch.arange(45, device=DEVICE).reshape(5, 9)
    return {
        "sparse_kl_forward": (z, *sparse),
        "sparse_kl_backward": (z, *sparse, lse, *coefs),
        "sparse_kl_loss_grad_": (z.clone(), *sparse, 0.3, "mean"),
        "sparse_kl_scale_": (z.clone(), torch.tensor(0.5, device=DEVICE)),
        "token_logprobs_forward": (z, labels, -100),
        "token_logprobs_backward": (z, labels, -100, lse, coefs[0]),
        "logit_mix_forward": (*mixed, False),
        "mix_argmax_forward": mixed,
        "mix_sample_forward": (*mixed, 0.8, 0, 1.0, 0.0, seeds, seeds),
        "mix_sample_logprobs": (*mixed, seeds),
        "knn_targets_forward": (distances, ids, torch.arange(45, device=DEVICE), 0.5, None),
    }


@every_op
def test_opcheck(op, backend):
    for name, arguments in registered_calls().items():
        if name.startswith(f"{op}_"):
            operator = getattr(torch.ops.mdk, name).default
            results = torch.library.opcheck(operator, (*arguments, backend))
            assert set(results.values()) == {"SUCCESS"}, (name, results)


# A device-side assertion ends the context: every launch after it fails. Inputs and the cached
# memory for the results exist before it, so the first thing to fail is the launch.
DEAD_CONTEXT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from gpu_fixtures import Call
calls = [Call(op, {backend!r}, rows=8, vocab=1003) for op in {ops!r}]
for call in calls:
    call.run(*call.inputs)
torch.cuda.synchronize()
torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]
time.sleep(2)
for call in calls:
    try:
        call.run(*call.inputs)
    except RuntimeError as error:
        print("ERROR", call.op, str(error).replace(chr(10), " "))
"""


@functools.cache
def errors_of_a_dead_context(backend) -> dict[str, str]:
    ops = [op for op, other in BACKENDS if other == backend]
    script = DEAD_CONTEXT.format(tests=str(Path(__file__).parent), backend=backend, ops=ops)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200
    )
    lines = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert lines, done.stderr
    return {op: message for _, op, message in lines}


@every_op
def test_launch_error_names_the_operator(op, backend):
    assert op in errors_of_a_dead_context(backend)[op]


def test_cpu_only_backends_say_so():
    z = torch.zeros(2, 5, device=DEVICE)
    with pytest.raises(mdkernels.BackendUnavailable, match="CPU tensors, not cuda"):
        mdkernels.token_logprobs(z, torch.zeros(2, dtype=torch.int64, device=DEVICE), backend="cpu")


def test_inputs_on_two_devices_are_refused():
    z = torch.zeros(2, 5, device=DEVICE)
    targets = csr([([1], [1.0])] * 2)
    with pytest.raises(ValueError, match=r"targets: on cpu, logits on cuda:0; use \.to\(\)"):
        mdkernels.sparse_kl(z, targets, kl_weight=1.0)
    with pytest.raises(ValueError, match="memory_logits: on cpu, base_logits on cuda:0"):
        mdkernels.logit_mix(z, torch.zeros(2, 5), 0.5)


def test_automatic_choice_takes_a_gpu_backend():
    for op in OPS:
        if any(other == op for other, _ in BACKENDS):
            dtype = torch.float32 if op == "knn_targets" else torch.bfloat16
            module = dispatch.resolve(op, "auto", "cuda", dtype)
            assert not module.__name__.endswith("reference")
