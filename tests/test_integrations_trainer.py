"""The Hugging Face Trainer on sparse targets: one process, and two."""

import multiprocessing
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from integration_fixtures import assert_close, dense_loss, gradients
from pipeline_fixtures import tiny_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from train_fixtures import BLOCK, STRIDE, make_corpus, make_targets

from mdkernels.integrations.causal_lm import causal_lm_loss
from mdkernels.integrations.windows import SparseTargetsCollator, WindowDataset
from mdkernels.scoring import gold_logprobs

pytest.importorskip("accelerate", reason="accelerate, which transformers.Trainer needs, is absent")
from transformers import TrainingArguments

from mdkernels.integrations.hf_trainer import SparseKLTrainer

WORLD = 2
LR = 0.5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("trainer")
    make_targets(make_corpus(path / "corpus", count=3), path)
    return path


def dataset(root, count=None):
    data = WindowDataset(root / "corpus", root / "targets", block=BLOCK, stride=STRIDE)
    # The first window scores twice as many rows as the others, so means of means would differ.
    return data if count is None else torch.utils.data.Subset(data, range(count))


def arguments(out, **changes):
    settings = {
        "output_dir": str(out),
        "optim": "sgd",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**settings | changes)


def trained(out, data, accepts_loss_kwargs=True, **changes):
    """(the step that was taken / lr, the first row of the log) of a tiny model."""
    model = tiny_model("llama")
    model.accepts_loss_kwargs = accepts_loss_kwargs  # of models whose own losses are plain means
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = SparseKLTrainer(model, arguments(out, **changes), train_dataset=data, kl_weight=0.3)
    trainer.train()
    step = {name: (before[name] - p.detach()) / LR for name, p in model.named_parameters()}
    return step, trainer.state.log_history[0]


@pytest.fixture(scope="module")
def expected(root):
    """Gradient and loss of the first four windows, dense, in float64."""
    data = dataset(root, 4)
    batch = SparseTargetsCollator()(list(data))
    model = tiny_model("llama").double()
    loss = dense_loss(model, batch, 0.3)
    return gradients(model, loss), float(loss.detach())


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 4, "dataloader_num_workers": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 4, "accepts_loss_kwargs": False},
    ],
)
def test_a_step_is_that_of_the_whole_batch_however_it_is_cut(root, tmp_path, expected, changes):
    changes = {"per_device_train_batch_size": 1} | changes
    step, log = trained(tmp_path, dataset(root, 4), **changes)
    gradient, loss = expected
    # The step is read off fp32 weights of size 0.2: their rounding, over the learning rate.
    assert_close(step, gradient, 1e-4)
    assert log["loss"] == pytest.approx(loss, rel=1e-5)
    assert 0.3 * log["kl"] + 0.7 * log["ce"] == pytest.approx(loss, rel=1e-5)


def test_training_saving_and_evaluating(root, tmp_path):
    """Several steps, a checkpoint that resumes, and CE on text without targets."""
    data = dataset(root)
    plain = WindowDataset(root / "corpus", block=BLOCK, stride=STRIDE)
    changes = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 8, "save_steps": 4}
    changes |= {"save_strategy": "steps", "per_device_train_batch_size": 4, "bf16": True}

    def run(resume=None):
        trainer = SparseKLTrainer(
            tiny_model("llama"), arguments(tmp_path, **changes), train_dataset=data
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]
    resumed = run(str(tmp_path / "checkpoint-4"))
    again = [row["loss"] for row in resumed.state.log_history if "loss" in row]
    assert again == losses
    one = arguments(tmp_path, per_device_eval_batch_size=1)
    metrics = {"compute_metrics": lambda found: {"ce": found.predictions[1].mean()}}
    # Of the trainer with bf16 the model keeps a forward under autocast: its weights, and no more.
    model = tiny_model("llama")
    model.load_state_dict(trainer.model.state_dict())
    evaluated = SparseKLTrainer(model, one, eval_dataset=plain, **metrics).evaluate()
    ce = gold_logprobs(model, data.corpus, block=BLOCK, stride=STRIDE)
    rows = [end - start for start, end in data.spans]
    means = torch.stack([-part.mean() for part in ce.split([int(n) for n in rows])])
    assert evaluated["eval_loss"] == pytest.approx(float(means.mean()), rel=1e-5)
    assert evaluated["eval_ce"] == pytest.approx(float(means.mean()), rel=1e-5)


def test_settings_that_would_change_the_loss_are_refused(root, tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="compute_loss_func"):
        SparseKLTrainer(model, arguments(tmp_path), compute_loss_func=lambda *_, **__: 0)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        SparseKLTrainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="kl_weight"):
        SparseKLTrainer(model, arguments(tmp_path), kl_weight=1.5)


def test_a_model_compiled_as_a_whole_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # torch_compile leaves it changed
    with pytest.raises(ValueError, match=r"args\.torch_compile: .* model\.base_model\.compile\(\)"):
        SparseKLTrainer(tiny_model("llama"), arguments(tmp_path, torch_compile=True))


def worker(rank: int, root, port: int) -> None:
    """The same four windows on two processes: by the Trainer's DDP, then sharded by FSDP2."""
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    results = {}
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    step, log = trained(root / f"ddp{rank}", dataset(root, 4), **changes)
    results["ddp"], results["log"] = step, log
    options = {"eval_dataset": dataset(root, 3), "kl_weight": 0.3}
    settings = arguments(root / f"eval{rank}", per_device_eval_batch_size=1)
    results["eval"] = SparseKLTrainer(tiny_model("llama"), settings, **options).evaluate()

    model = tiny_model("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    # As accelerate does for bf16; the loss must not be rounded to it.
    fully_shard(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
    mine = SparseTargetsCollator()([dataset(root)[i] for i in (2 * rank, 2 * rank + 1)])
    for _ in range(2):  # the second pass would see what the first left behind
        model.zero_grad()
        out = causal_lm_loss(model, mine, kl_weight=0.3, reduction="sum")
        (out.loss * WORLD / (BLOCK + 3 * STRIDE)).backward()
    results["fsdp"] = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }
    if rank == 0:
        torch.save(results, root / "results.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(root):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # One server imports what takes long and forks both: half the cost of spawning them.
    multiprocessing.set_forkserver_preload(
        ["accelerate", "transformers.trainer", "torch.distributed.fsdp"]
    )
    context = mp.start_processes(
        worker, args=(root, port), nprocs=WORLD, join=False, start_method="forkserver"
    )
    for _ in range(24):
        if context.join(timeout=5):
            return torch.load(root / "results.pt")
    for process in context.processes:
        process.kill()
    return pytest.fail("the two processes did not finish in two minutes")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_take_the_step_of_one(two_processes, expected, how):
    gradient, loss = expected
    assert_close(two_processes[how], gradient, 1e-4)
    log = two_processes["log"]
    assert log["loss"] == pytest.approx(loss, rel=1e-5)
    assert 0.3 * log["kl"] + 0.7 * log["ce"] == pytest.approx(loss, rel=1e-5)


def test_two_processes_evaluate_as_one(two_processes, root):
    """Of three windows one of them gets two, the other one again the first."""
    model = tiny_model("llama").double()
    batches = [SparseTargetsCollator()([item]) for item in dataset(root, 3)]
    expected = sum(float(dense_loss(model, batch, 0.3).detach()) for batch in batches) / 3
    assert two_processes["eval"]["eval_loss"] == pytest.approx(expected, rel=1e-5)
