"""The Hugging Face Trainer with the Memory Decoder loss. Needs accelerate, like any Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..ops.checks import probability
from .causal_lm import causal_lm_loss
from .windows import IGNORE_INDEX, SparseTargetsCollator


class SparseKLTrainer(Trainer):
    """`transformers.Trainer` on batches of a `SparseTargetsCollator`, its default collator.

    Everything else is the Trainer's: arguments, checkpoints, DDP, callbacks. The loss is summed
    over the scored positions and divided by their number in all micro-batches and processes of an
    optimizer step, so that gradient accumulation changes nothing; logs carry `kl` and `ce` (nats
    per scored position since the last log) beside `loss`. An evaluation set
    without targets is scored by CE alone, so exp(eval_loss) is the perplexity (up to rounding of
    unequal batches).

    `class T(SparseKLTrainer, trl.SFTTrainer): pass` is the same with TRL's, whose dataset_kwargs
    then need {"skip_prepare_dataset": True}.

    `args.remove_unused_columns` is set to False: the Trainer would drop the targets.

    Args:
        kl_weight: weight of the KL term, the rest is CE; the paper's beta, in [0, 1].

    Raises ValueError for `compute_loss_func` or `label_smoothing_factor`, which would change the
    loss, for `torch_compile`, in place of which `model.base_model.compile()` compiles all but the
    loss, and what `causal_lm_loss` raises.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        *,
        kl_weight: float = 0.5,
        **kwargs: Any,
    ):
        collator = SparseTargetsCollator() if data_collator is None else data_collator
        super().__init__(model, args, collator, **kwargs)
        self.kl_weight = probability("kl_weight", kl_weight)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: the loss of this trainer is sparse KL; leave out")
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"args.label_smoothing_factor: expected 0, got {self.args.label_smoothing_factor}; "
                "the targets are soft already"
            )
        if self.args.torch_compile:
            raise ValueError(
                "args.torch_compile: expected False, as the loss runs inside the model's forward; "
                "call model.base_model.compile() instead"
            )
        self.args.remove_unused_columns = False
        # The count of scored positions is ours to divide by, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = True
        self._sums: Tensor | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch in nats, scaled for the optimizer step it belongs to.

        With `return_outputs` also {"loss", "kl", "ce"}, kl and ce per scored position of this
        batch: what `compute_metrics` sees as predictions. There are no logits.
        """
        without = not model.training and "targets" not in inputs
        kl_weight = 0.0 if without else self.kl_weight
        out = causal_lm_loss(model, inputs, kl_weight=kl_weight, reduction="sum")
        rows = (inputs["shift_labels"] != IGNORE_INDEX).sum()
        if not model.training:
            # Of all processes, some of which may repeat a batch for want of another; and evaluation
            # averages the losses of batches.
            num_items_in_batch = None
        count = rows if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = out.loss / count.clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is that of all processes, and DDP is going to average their gradients.
            loss = loss * self.accelerator.num_processes
        if model.training:
            sums = torch.stack([out.kl, out.ce, rows.to(out.kl.dtype)])
            self._sums = sums if self._sums is None else self._sums + sums
        if not return_outputs:
            return loss
        mine = rows.clamp(min=1)
        return loss, {"loss": loss, "kl": out.kl / mine, "ce": out.ce / mine}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums is not None:
            kl, ce, rows = self.accelerator.reduce(self._sums).tolist()
            logs |= {"kl": kl / max(rows, 1), "ce": ce / max(rows, 1)}
            self._sums = None
        super().log(logs, *args, **kwargs)
