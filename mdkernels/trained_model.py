"""The model of a training run as its processes hold it: whole, in copies, or cut into parts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import lora
from .distributed import Processes, gather
from .memory_loss import MemoryLoss
from .optimizer import adamw
from .train_config import DTYPES, TrainConfig


class TrainedModel:
    """A causal LM, perhaps with adapters, with its loss and its optimizer.

    `model` is the Hugging Face model, `saved` what checkpoints store: the same, or the adapter
    around it. `spread` comes before everything below it, and after the weights to start from.
    """

    def __init__(self, model, config: TrainConfig, processes: Processes):
        self.model, self.config, self.processes = model, config, processes
        self.saved = lora.add_adapter(model, config) if config.lora else model
        if config.activation_checkpointing:
            # transformers 5 renames it.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        self._spare = None  # under FSDP2, process 0's whole copy of `saved`

    def spread(self) -> None:
        """Give every process its share of the weights that process 0 has; make the optimizer."""
        config, processes = self.config, self.processes
        processes.equalise(self.model)
        if processes.sharded and processes.is_main:
            self._spare = copy.deepcopy(self.saved).to("cpu")
        autocast = None if config.dtype == "float32" else DTYPES[config.dtype]
        loss = MemoryLoss(
            self.model, kl_weight=config.beta, autocast=autocast, compile=config.compile
        )
        # Only now: FSDP2 makes new parameters.
        self.module = processes.wrap(loss, set(self.model._no_split_modules or ()))
        self.optimizer = adamw(self.model, config)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def clip(self) -> Tensor:
        """Scale the gradients down to norm `config.clip`; their norm before, fp32."""
        limit = math.inf if self.config.clip is None else self.config.clip
        return gather(torch.nn.utils.clip_grad_norm_(self._parameters, limit)).float()

    def update(self, lr: float) -> None:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def whole(self):
        """`saved` with all its weights in process 0. Every process must call it."""
        if not self.processes.sharded:
            return self.saved
        kept = {} if self._spare is None else dict(self._spare.named_parameters())
        for name, parameter in self.saved.named_parameters():
            if parameter.requires_grad:
                gathered = gather(parameter)
                if name in kept:
                    kept[name].data.copy_(gathered)
        return self.saved if self._spare is None else self._spare

    def evaluate(self, hook: Callable[[Any, int], Any], step: int) -> Any:
        """What `hook` returns in process 0, in eval mode. Every process must call it."""
        self.model.eval()
        model = lora.inner(self.whole())

        def run():
            with torch.no_grad():
                if self._spare is None:
                    return hook(model, step)
                try:
                    return hook(model.to(self.processes.device).eval(), step)
                finally:
                    model.to("cpu")

        result = self.processes.on_main(run)
        self.model.train()
        return result

    def finished(self, load: Callable[[Any], None] | None):
        """The Hugging Face model to keep, in eval mode, adapters merged; under FSDP2 whole in
        process 0 only. Process 0 has `load` put other weights into it first."""
        processes, saved = self.processes, self.whole()
        if load is not None:
            processes.on_main(lambda: load(saved))
            if not processes.sharded:
                processes.equalise(self.model)
        cut = processes.sharded and not processes.is_main
        model = lora.merge(saved) if lora.is_adapted(saved) and not cut else lora.inner(saved)
        return model.eval()
