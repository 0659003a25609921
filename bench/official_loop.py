"""The authors' training step, rebuilt from a description of their code: what one step of it does.

    collate    every window's rows are sliced from an Arrow table and decoded to torch, all four
               columns, once for each column that is used; a dense fp32 (rows, V) target is zeroed
               and filled by a Python loop over its rows; the windows are concatenated
    forward    logits of every position of every window
    loss       a shifted contiguous copy, a boolean mask over it, the dense target divided by its
               row sums, asserts over it, F.kl_div and CrossEntropyLoss, a log line of three scalars

Left out, all to the advantage of the baseline: the DataLoader's worker processes and their copies
through shared memory, and the overhead of the datasets package around the Arrow calls.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def open_table(path: Path) -> pa.Table:
    """The memory-mapped columns id_cnt, token_id, prob and label of a targets file."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def decode(table: pa.Table) -> dict[str, Tensor | list[Tensor]]:
    """Every column as torch formatting gives it: integers as int64, floats as fp32, and a list of
    one tensor per row where rows differ in length."""
    columns = {}
    for name in table.column_names:
        values = table.column(name).to_numpy()
        if values.dtype == object:
            columns[name] = [_tensor(row) for row in values]
        else:
            columns[name] = _tensor(values)
    return columns


def _tensor(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float32 if values.dtype.kind == "f" else torch.int64)


def collate_targets(table: pa.Table, spans: np.ndarray, vocab: int) -> tuple[Tensor, Tensor]:
    """(dense (n, V) fp32, labels (n,)) of the rows of all spans."""
    dense, labels = [], []
    for start, stop in spans.tolist():
        part = table.slice(start, stop - start)
        labels.append(decode(part)["label"])
        ids = decode(part)["token_id"]
        probs = decode(part)["prob"]
        window = torch.zeros(stop - start, vocab)
        for row in range(stop - start):
            window[row][ids[row]] = probs[row]
        dense.append(window)
    return torch.cat(dense), torch.cat(labels)


def collate_tokens(tokens: np.ndarray, spans: np.ndarray, block: int) -> tuple[Tensor, Tensor]:
    """(input_ids, labels), both (B, block + 1): the inputs of a span and the token after them.

    The authors' model drops the logits of the last position, so a window takes one token more than
    ours for the same rows. Labels are -100 but for the tokens that scored rows predict.
    """
    windows = np.stack([tokens[stop - block : stop + 1] for _, stop in spans.tolist()])
    input_ids = torch.from_numpy(windows.astype(np.int64))
    labels = torch.full_like(input_ids, IGNORED)
    for window, (start, stop) in enumerate(spans.tolist()):
        first = block + 1 - (stop - start)
        labels[window, first:] = input_ids[window, first:]
    return input_ids, labels


def loss(
    logits: Tensor, labels: Tensor, dense: Tensor, row_labels: Tensor, kl_weight: float
) -> tuple[Tensor, str]:
    """The loss from (B, T, V) logits, and the line that is formatted for the log on every step."""
    shifted = logits[:, :-1].contiguous()
    following = labels[:, 1:].contiguous()
    scored = following != IGNORED
    shifted, following = shifted[scored].float(), following[scored]
    dense = dense / dense.sum(dim=-1, keepdim=True)
    assert torch.all(dense >= 0)
    assert torch.allclose(dense.sum(dim=-1), torch.ones_like(dense[:, 0]), atol=1e-3)
    assert torch.all(following == row_labels)
    kl = F.kl_div(F.log_softmax(shifted, dim=-1), dense, reduction="batchmean")
    ce = torch.nn.CrossEntropyLoss()(shifted, following)
    total = kl_weight * kl + (1 - kl_weight) * ce
    return total, f"loss {total}, kl {kl}, ce {ce}"
