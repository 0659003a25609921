"""Bridges to other people's trainers, and to the files of the authors' code.

A module here may need a package that mdkernels itself does not; its first lines say which. Names
load on first use.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .causal_lm import causal_lm_loss
    from .hf_trainer import SparseKLTrainer
    from .keys import KeyDataset
    from .topk import from_topk_logprobs
    from .windows import SparseTargetsCollator, WindowDataset

__all__ = [
    "KeyDataset",
    "SparseKLTrainer",
    "SparseTargetsCollator",
    "WindowDataset",
    "causal_lm_loss",
    "from_topk_logprobs",
]

_HOME = {
    "KeyDataset": "keys",
    "SparseKLTrainer": "hf_trainer",
    "SparseTargetsCollator": "windows",
    "WindowDataset": "windows",
    "causal_lm_loss": "causal_lm",
    "from_topk_logprobs": "topk",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
