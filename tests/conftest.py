"""Parametrisation over backends and instruction sets, and the fixtures the operator tests share."""

import cuda_host
import pytest
import torch
from helpers import INTERPRETED, PTX_TRITON, variants
from hypothesis import HealthCheck, settings

from mdkernels.ops import dispatch, native

# derandomize: CI must not fail on a draw nobody can repeat; deadline: a busy machine is no bug;
# fixtures: the `variant` of a test holds for all of its examples.
settings.register_profile(
    "mdk",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("mdk")

# The oracles are small; waking threads for them on a shared machine costs more than they compute.
# Kernels that should run threaded do so inside `helpers.threads`.
torch.set_num_threads(1)

if cuda_host.PATH:
    cuda_host.install()
if PTX_TRITON:
    from ptx import triton_host

    triton_host.install()


def pytest_generate_tests(metafunc):
    """A test that asks for `variant` runs on every backend and instruction set available here for
    the operator its module names as OP; with `dtype`, on every dtype that variant takes."""
    names = metafunc.fixturenames
    if "variant" not in names:
        return
    found = variants(metafunc.module.OP)
    if INTERPRETED:
        found = [v for v in found if v.backend == "triton"]
    marks = {v: [pytest.mark.gpu] if v.device == "cuda" else [] for v in found}
    if "dtype" not in names:
        params = [pytest.param(v, id=str(v), marks=marks[v]) for v in found]
        metafunc.parametrize("variant", params, indirect=True)
        return
    params = [
        pytest.param(v, dtype, id=f"{v}-{str(dtype).removeprefix('torch.')}", marks=marks[v])
        for v in found
        for dtype in v.dtypes()
    ]
    metafunc.parametrize(("variant", "dtype"), params, indirect=["variant"])


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` selects
def pytest_collection_modifyitems(config, items):
    # The interpreter takes milliseconds for every iteration of a program: under it only the tests
    # marked `interpreted` run, on the triton backend alone.
    if INTERPRETED:
        dropped = [item for item in items if not _interpreted(item)]
        items[:] = [item for item in items if _interpreted(item)]
        config.hook.pytest_deselected(items=dropped)
    on_gpu = {v.backend for op in dispatch.OPS for v in variants(op) if v.device == "cuda"}
    for item in items:
        # Of the fixtures named `backend` that some modules have instead of `variant`.
        if hasattr(item, "callspec") and item.callspec.params.get("backend") in on_gpu:
            item.add_marker(pytest.mark.gpu)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device is visible to torch")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _interpreted(item) -> bool:
    """Marked ``interpreted``, with the parameters one of its marks names, if it names any: a value,
    as in interpreted(inplace=True), or a list of them."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return any(
        all(
            parameters.get(name) in (value if isinstance(value, list) else [value])
            for name, value in mark.kwargs.items()
        )
        for mark in item.iter_markers("interpreted")
    )


@pytest.fixture
def variant(request):
    """A `helpers.Variant` whose instruction set is active during the test."""
    chosen = request.param
    if chosen.isa is None:
        yield chosen
        return
    module = native.load("_cpu").module
    before = module.isa()
    module.set_isa(chosen.isa)
    yield chosen
    module.set_isa(before)


@pytest.fixture
def poisoned_memory():
    """Every new tensor starts as NaN (integers: the largest value) until somebody writes it."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)
