"""TRL's SFTTrainer with the loss of SparseKLTrainer."""

import pytest
import torch
from integration_fixtures import assert_close, dense_loss, gradients, topk_examples
from pipeline_fixtures import tiny_model, tiny_tokenizer

from mdkernels.integrations import SparseKLTrainer, SparseTargetsCollator

pytest.importorskip("trl", reason="trl is not installed")
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

LR = 0.5


class Distillation(SparseKLTrainer, SFTTrainer):
    pass


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_that_of_dense_float64(tmp_path, monkeypatch, accumulate):
    monkeypatch.setenv("CI", "1")  # no telemetry
    examples = topk_examples()
    exact = tiny_model("llama").double()
    loss = dense_loss(exact, SparseTargetsCollator()(examples), 0.3)
    model = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=3 // accumulate,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    data = Dataset.from_list(examples)
    options = {"train_dataset": data, "eval_dataset": data, "processing_class": tiny_tokenizer()}
    trainer = Distillation(model, settings, kl_weight=0.3, **options)
    trainer.train()
    step = {name: (before[name] - p.detach()) / LR for name, p in model.named_parameters()}
    assert_close(step, gradients(exact, loss), 1e-4)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    with torch.no_grad():
        left = float(dense_loss(model.double(), SparseTargetsCollator()(examples), 0.3))
    model.float()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(left, rel=1e-5)
