"""mdkernels: a performance engine for Memory Decoder (arXiv 2508.09874).

The operators, importable by any trainer; the pipeline stages live in the modules named after them.
Names load on first use, so that `mdkernels --help` does not wait for torch and the command line can
still choose settings that count only before torch is loaded.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .mixture import MemoryMixture
    from .ops.dispatch import BackendUnavailable, backends
    from .ops.knn_targets import knn_targets
    from .ops.linear_sparse_kl import linear_sparse_kl
    from .ops.linear_token_logprobs import linear_token_logprobs
    from .ops.logit_mix import logit_mix
    from .ops.mix_argmax import mix_argmax
    from .ops.mix_sample import MixSampleOutput, mix_sample
    from .ops.mix_verify import MixVerifyOutput, mix_verify
    from .ops.sparse_kl import SparseKLOutput, sparse_kl
    from .ops.sparse_targets import SparseTargets
    from .ops.token_logprobs import token_logprobs

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "MemoryMixture",
    "MixSampleOutput",
    "MixVerifyOutput",
    "SparseKLOutput",
    "SparseTargets",
    "backends",
    "knn_targets",
    "linear_sparse_kl",
    "linear_token_logprobs",
    "logit_mix",
    "mix_argmax",
    "mix_sample",
    "mix_verify",
    "sparse_kl",
    "token_logprobs",
]

_HOME = {
    "BackendUnavailable": "ops.dispatch",
    "MemoryMixture": "mixture",
    "MixSampleOutput": "ops.mix_sample",
    "MixVerifyOutput": "ops.mix_verify",
    "SparseKLOutput": "ops.sparse_kl",
    "SparseTargets": "ops.sparse_targets",
    "backends": "ops.dispatch",
    "knn_targets": "ops.knn_targets",
    "linear_sparse_kl": "ops.linear_sparse_kl",
    "linear_token_logprobs": "ops.linear_token_logprobs",
    "logit_mix": "ops.logit_mix",
    "mix_argmax": "ops.mix_argmax",
    "mix_sample": "ops.mix_sample",
    "mix_verify": "ops.mix_verify",
    "sparse_kl": "ops.sparse_kl",
    "token_logprobs": "ops.token_logprobs",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mdkernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
