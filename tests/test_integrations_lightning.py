"""Lightning moves, pins and batches sparse targets as it does tensors."""

import pytest
import torch
from pipeline_fixtures import tiny_model
from torch.utils.data import DataLoader
from train_fixtures import BLOCK, STRIDE, make_corpus, make_targets, same, weights

from mdkernels import SparseTargets
from mdkernels.integrations import SparseTargetsCollator, WindowDataset, causal_lm_loss

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

LR, STEPS = 1e-2, 6


class Memory(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        out = causal_lm_loss(self.model, batch, kl_weight=0.3)
        self.log("kl", out.kl, batch_size=len(batch["scored"]))
        return out.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=LR)


def test_its_steps_are_those_of_a_plain_loop(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", count=6)
    windows = WindowDataset(corpus, make_targets(corpus, tmp_path), block=BLOCK, stride=STRIDE)
    loader = DataLoader(windows, batch_size=4, collate_fn=SparseTargetsCollator())
    memory = Memory(tiny_model("llama").train())
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(memory, loader)
    assert trainer.global_step == STEPS

    model = tiny_model("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    batches = [batch for _ in range(STEPS) for batch in loader][:STEPS]
    for batch in batches:
        out = causal_lm_loss(model, batch, kl_weight=0.3)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert same(weights(memory.model), weights(model))
    assert float(trainer.callback_metrics["kl"]) == float(out.kl.detach())


def test_batches_move_to_another_device():
    from lightning.pytorch.utilities import move_data_to_device

    example = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    batch = SparseTargetsCollator()([example]) | {"more": [torch.ones(1)]}
    batch["targets"] = SparseTargets.empty(2)
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved["targets"].device.type == moved["scored"].device.type == "meta"
    assert batch["targets"].device.type == "cpu"
