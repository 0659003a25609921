"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: only they are trained.

Checkpoints hold the adapter alone, beside the state of the optimizer; the finished model has it
merged into its weights and is a plain Hugging Face directory.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from .models import lm_head
from .train_config import TrainConfig


def add_adapter(model, config: TrainConfig):
    """A `peft.PeftModel` around `model`, whose linear layers get adapters in place.

    Raises ImportError with the pip line if peft is missing, ValueError for `lora_targets` that name
    no layer of the model, the LM head, whose weight the loss reads itself, or an embedding tied to
    it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"lora: adapters need peft ({error}): pip install 'mdkernels[lora]'"
        ) from error
    targets = config.lora_targets
    if not isinstance(targets, str):
        targets = "all-linear" if list(targets) == ["all-linear"] else list(targets)
    head, embedding = lm_head(model), model.get_input_embeddings()
    settings = peft.LoraConfig(
        r=config.lora,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        # GPT-2's layers store their weights transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ValueError(f"lora_targets {config.lora_targets!r}: {error}") from error
    if model.get_output_embeddings() is not head:
        raise ValueError(
            "lora_targets: the LM head cannot have an adapter, because the loss reads its weight; "
            'name other layers, or "all-linear", which leaves it out'
        )
    if model.get_input_embeddings() is not embedding and embedding.weight is head.weight:
        raise ValueError(
            "lora_targets: the embedding is tied to the LM head, which would not have its adapter "
            'while training, and would once it is merged; name other layers, or "all-linear"'
        )
    return wrapped


def is_adapted(model) -> bool:
    """Whether `model` is what `add_adapter` returned."""
    return hasattr(model, "peft_config")


def inner(model):
    """The Hugging Face model itself, whether adapted or not."""
    return model.base_model.model if is_adapted(model) else model


def save_adapter(model, directory: Path) -> None:
    # "auto" would look the base model up on the hub, to compare vocabularies.
    model.save_pretrained(directory, save_embedding_layers=False)


def load_adapter(model, directory: Path) -> None:
    """Put what `save_adapter` wrote into `model`. Raises ValueError if it is of another one."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(directory / "adapter_model.safetensors"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(trained & set(result.missing_keys)) + sorted(result.unexpected_keys)
    if odd:
        raise ValueError(f"{directory} does not hold the adapter of this model: {odd[0]} differs")


def merge(model):
    """The Hugging Face model with the adapter added into its weights; `model` is used up."""
    return model.merge_and_unload()
