"""Texts, and a plain way to score them: what the tests of scoring and of evaluate share."""

import numpy as np
import pytest
import torch
from train_fixtures import make_corpus


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A test corpus and a validation corpus."""
    root = tmp_path_factory.mktemp("corpora")
    return make_corpus(root / "test", 6, 3), make_corpus(root / "valid", 4, 4)


def naive_logprobs(model, corpus, block, stride):
    """log p of every next token: one window at a time, full logits, fp64 softmax."""
    tokens = corpus.token_ids.astype(np.int64)
    found = torch.full((corpus.num_rows,), torch.nan, dtype=torch.float64)
    start = 0
    while start < corpus.num_rows:
        stop = min(corpus.num_rows, block if start == 0 else start + stride)
        first = max(0, stop - block)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[first:stop])[None]).logits[0].double()
        for row in range(start, stop):
            found[row] = logits[row - first].log_softmax(0)[tokens[row + 1]]
        start = stop
    return found
