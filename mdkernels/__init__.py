"""mdkernels: a performance engine for Memory Decoder (arXiv 2508.09874).

The operators, importable by any trainer; the pipeline stages live in the modules named after them.
"""

from .ops.dispatch import BackendUnavailable, backends
from .ops.knn_targets import knn_targets
from .ops.logit_mix import logit_mix
from .ops.mix_argmax import mix_argmax
from .ops.mix_sample import MixSampleOutput, mix_sample
from .ops.sparse_kl import SparseKLOutput, sparse_kl
from .ops.sparse_targets import SparseTargets
from .ops.token_logprobs import token_logprobs

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "MixSampleOutput",
    "SparseKLOutput",
    "SparseTargets",
    "backends",
    "knn_targets",
    "logit_mix",
    "mix_argmax",
    "mix_sample",
    "sparse_kl",
    "token_logprobs",
]
