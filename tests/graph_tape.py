"""A stand-in for a CUDA graph on the CPU.

It records the operators of one call with their tensors, and replays them into the same tensors:
what was a number on the host stays what it was, and what Python did is not done again. So a step
that would replay wrongly on a GPU does here too; a value read on the host is an error, as there.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default)
# Of a tensor made from numbers: a copy from memory that is not pinned, which a GPU waits for.
COPIES = (aten.lift_fresh.default,)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masked = function in INDEXED and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if function in READS or masked:
            raise RuntimeError("a value was read on the host during the capture")
        if function in COPIES:
            raise RuntimeError("a tensor was made from numbers of the host during the capture")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class Tape:
    """As `mdkernels.cuda_graph.Captured`: run, then record, then replay. But the recorded call
    counts, where a capture has no effect and is replayed at once."""

    replays = 0

    def __init__(self, function):
        self.function, self.warm, self.calls = function, False, None

    def __call__(self):
        if not self.warm:
            self.warm = True
            self.function()
        elif self.calls is None:
            before = import_utils.is_cuda_stream_capturing
            import_utils.is_cuda_stream_capturing = lambda: True
            try:
                with _Recorder() as recorder:
                    self.function()
            finally:
                import_utils.is_cuda_stream_capturing = before
            self.calls = recorder.calls
        else:
            type(self).replays += 1
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
