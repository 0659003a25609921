"""The program that tests/test_train_distributed.py starts twice with torchrun: every training run
that two processes are tested with, and what came out of it."""

import dataclasses
import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch
from pipeline_fixtures import tiny_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from train_fixtures import config, steps
from transformers import AutoModelForCausalLM

import mdkernels.train
from mdkernels.corpus import open_corpus
from mdkernels.distributed import Processes, leave
from mdkernels.targets import open_targets
from mdkernels.train import TrainResult, train

# Two processes with half the batch each. 23 of the corpus's windows: the last step is short, and
# leaves one of the processes without a window.
SHARED = {"batch_size": 2, "grad_accum": 2, "epochs": 0.5, "save_every": 2}
FAMILY = {"ddp": "llama", "fsdp2": "qwen2"}  # qwen2: the head is tied to the embedding


class Stop(Exception):
    """Ends a run in the middle."""


def dropout(model):
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return model


def message(run) -> str:
    """What `run` was stopped with."""
    try:
        run()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def poison(model, step):
    if step == 2:
        model.get_output_embeddings().weight.data[7, 0] = float("nan")


def stop_at_three(model, step):
    if step == 3:
        raise Stop("enough")
    return {"step": step}


class Wrapped(Processes):
    """Counts how often DDP exchanges gradients: these models are one bucket."""

    exchanges = 0

    def wrap(self, module, blocks):
        wrapped = super().wrap(module, blocks)
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, self.exchange)
        return wrapped

    @staticmethod
    def exchange(state, bucket):
        Wrapped.exchanges += 1
        return allreduce_hook(state, bucket)


def cases(rank: int, data, out: Path) -> dict:
    found = {}

    def settings(name: str, mode: str, **changes):
        changes = {"parallel": mode, "model": tiny_model(FAMILY[mode], seed=3)} | SHARED | changes
        return config(data, out / name, **changes)

    for mode in FAMILY:
        found[mode] = train(settings(mode, mode))
        found[f"{mode}-exchanges"], Wrapped.exchanges = Wrapped.exchanges, 0
        random = {"model": dropout(tiny_model(FAMILY[mode], seed=3)), "eval_every": 1}
        whole = train(settings(f"{mode}-whole", mode, **random))
        stopped = settings(f"{mode}-resumed", mode, **random)
        run = dataclasses.replace(stopped, model=dropout(tiny_model(FAMILY[mode], seed=3)))
        found[f"{mode}-stop"] = message(lambda run=run: train(run, on_eval=stop_at_three))
        fresh = dropout(tiny_model(FAMILY[mode], seed=4))  # its weights come from the checkpoint
        found[f"{mode}-other"] = message(
            lambda run=run, fresh=fresh: train(dataclasses.replace(run, model=fresh))
        )
        again = dropout(tiny_model(FAMILY[mode], seed=3))
        resumed = train(dataclasses.replace(stopped, model=again))
        found[f"{mode}-whole"], found[f"{mode}-resumed"] = whole, resumed
        if mode == "fsdp2":
            saved = AutoModelForCausalLM.from_pretrained(out / "fsdp2")
            found["fsdp2-saved"] = saved.state_dict()

    seen = []

    def best_at_four(model, step):
        """A forward that only a whole model survives."""
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        seen.append(step)
        logits = model(torch.arange(6)[None]).logits
        return {"mixture_perplexity": abs(step - 4), "mean": float(logits.mean())}

    options = {"eval_every": 2, "patience": 1, "save_every": None}
    found["best"] = train(settings("best", "fsdp2", **options), on_eval=best_at_four)
    found["best-seen"] = seen
    if importlib.util.find_spec("peft"):
        found["lora"] = train(settings("lora", "fsdp2", lora=2, lr=1e-2))
    found["nan"] = message(
        lambda: train(settings("nan", "ddp", save_every=1, eval_every=2), on_eval=poison)
    )

    def press(model, step):  # process 0 alone: the other one has to hear of it
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    found["ctrl-c"] = message(
        lambda: train(settings("ctrl-c", "ddp", save_every=None, eval_every=2), on_eval=press)
    )
    found["device"] = message(lambda: train(settings("device", "ddp", device="cuda:0")))
    return found


def plain(value):
    """Results as what torch.load takes; weights that are cut into DTensors are left out."""
    if not isinstance(value, TrainResult):
        return value
    state = value.model.state_dict()
    cut = any(isinstance(tensor, DTensor) for tensor in state.values())
    return {"weights": None if cut else state, "rows": steps(value), "metrics": value.metrics}


def main() -> None:
    torch.set_num_threads(1)
    mdkernels.train.Processes = Wrapped
    corpus, targets, out = sys.argv[1:]
    rank = int(os.environ["RANK"])
    found = cases(rank, (open_corpus(corpus), open_targets(targets)), Path(out))
    torch.save({name: plain(value) for name, value in found.items()}, Path(out) / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    main()
