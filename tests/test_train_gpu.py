"""Training on a GPU: nothing in a step waits for the device, and results agree with the CPU's."""

import pytest
import torch
import train_fixtures
from pipeline_fixtures import tiny_model
from train_fixtures import config, steps

from mdkernels.train import _Run, train

pytestmark = pytest.mark.gpu


data = train_fixtures.data


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "grad_accum": 2, "clip": None}])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_step_waits_for_the_device(data, tmp_path, monkeypatch, family, options):
    step, checked = _Run._step, []

    def strict(self, number):
        # The first steps compile kernels, create handles and fill the allocators' pools.
        torch.cuda.set_sync_debug_mode("error" if number > 3 else "default")
        try:
            step(self, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        checked.append(number)

    monkeypatch.setattr(_Run, "_step", strict)
    model = tiny_model(family, seed=3)
    train(config(data, tmp_path / "out", model=model, device="cuda", log_every=4, **options))
    assert checked == list(range(1, 13))


def test_the_losses_are_those_of_the_cpu(data, tmp_path):
    there = steps(train(config(data, tmp_path / "gpu", device="cuda", max_steps=6)))
    here = steps(train(config(data, tmp_path / "cpu", device="cpu", max_steps=6)))
    for left, right in zip(here, there, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-3)
