"""bench/tune.py: candidates are set while they run, put back, and left out where they are wrong."""

import importlib

import bench_fixtures
import pytest
import torch

from mdkernels.ops.token_logprobs import reference

load = bench_fixtures.load
KNOBS = [
    (op, backend)
    for op in ("sparse_kl", "token_logprobs", "logit_mix", "mix_argmax", "mix_sample", "mix_verify")
    for backend in ("cuda", "triton")
]


@pytest.mark.parametrize(("op", "backend"), KNOBS)
def test_every_knob_is_there_and_is_put_back(load, op, backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="its launchers import triton")
    knob = load("tune").knobs(op, backend)
    if knob is None:
        assert (op, backend) == ("token_logprobs", "triton")
        return
    module = importlib.import_module(f"mdkernels.ops.{knob.module}")
    before = getattr(module, knob.attribute)
    content = dict(before) if isinstance(before, dict) else before
    assert len(knob.values) > 3
    for value in knob.values.values():
        with knob.turned(value):
            now = getattr(module, knob.attribute)
            assert value.items() <= now.items() if isinstance(now, dict) else now == value
        assert getattr(module, knob.attribute) is before
        assert before == content


def test_a_candidate_that_is_wrong_or_fails_is_left_out(load, monkeypatch, capsys):
    tune = load("tune")
    right = reference.forward

    def wrong(*args):
        logprobs, lse = right(*args)
        return logprobs + 1, lse

    def failing(*args):
        raise RuntimeError("token_logprobs: too many threads")

    values = {"right": right, "wrong": wrong, "failing": failing}
    knob = tune.Knob("token_logprobs.reference", "forward", values)
    monkeypatch.setattr(tune, "knobs", lambda op, backend: knob)
    monkeypatch.setenv("MDK_BACKEND", "reference")
    monkeypatch.setattr(tune.Device, "backends", lambda self, op: ["reference"])
    options = ["--ops", "token_logprobs", "--device", "cpu", "--suite", "smoke", "--cases", "gold"]
    monkeypatch.setattr("sys.argv", ["tune.py", *options])
    with torch.no_grad():
        tune.main()
    out, err = capsys.readouterr()
    assert reference.forward is right
    assert out.count("reference: right") == out.count("reference: as it is") == 2
    assert "wrong" not in out
    assert "failing" not in out
    assert err.count("left out reference: wrong") == 2
    assert "left out reference: failing: token_logprobs: too many threads" in err
