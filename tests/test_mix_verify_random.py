"""Is speculation with mix_verify lossless: the distribution of what it emits, and of how much."""

import mix_fixtures
import numpy as np
import pytest
import torch
from helpers import threads
from mix_fixtures import (
    ON_GPU,
    UNCHECKED,
    logit_mix,
    mix_sample,
    mix_verify,
    needs_cpu,
    pair,
)
from mix_sample_oracle import g_test, processed

backend = mix_fixtures.backend
ALPHA = 1e-4  # of all the frequency tests together
TESTS = 10  # how many there are, per backend
STATES = 6  # tokens, and contexts: the logits depend on the last token
WEIGHT, MEMORY_TEMPERATURE = 0.35, 1.2
SETTINGS = {
    "plain": {},
    "draft_temperature": {"draft_temperature": 2.0},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "all": {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
}
# Where a GPU is imitated, tokens are compared with the specification only: test_mix_verify.py.
backends = ["reference", *(["cpu"] if mix_fixtures.extension else []), *sorted(ON_GPU & UNCHECKED)]


def tables():
    """(STATES, STATES) logits of base and memory after each token."""
    return pair(STATES, STATES, seed=4)


def chain(filters):
    """(STATES, STATES): the distribution of the mixture's next token after each token, float64."""
    base, memory = tables()
    mixed = logit_mix(
        base.double(),
        memory.double(),
        WEIGHT,
        memory_temperature=MEMORY_TEMPERATURE,
        backend="reference",
    )
    p = processed(mixed.exp().numpy(), **filters)[0]
    return p / p.sum(1, keepdims=True)


def draft(context, seeds, offset, drafted, temperature, backend):
    """(B, drafted + 1) tokens: the context's last, then what the memory draws after it."""
    memory, tokens = tables()[1], [context]
    for i in range(drafted):
        row = memory[tokens[-1]]
        tokens.append(
            mix_sample(
                row,
                row,
                0.0,
                seeds=seeds,
                offsets=offset + i,
                temperature=temperature,
                backend=backend,
            )
        )
    return torch.stack(tokens, 1)


def speculate(length, drafted, rows, backend, drawn_at=None, **options):
    """(rows, length) tokens after token 0, in cycles of a draft and a verification; and the share
    of drafted tokens that were accepted where they were looked at."""
    base, memory = tables()
    emitted = torch.zeros(rows, length + drafted + 1, dtype=torch.int64)
    count = torch.zeros(rows, dtype=torch.int64)
    seeds = torch.arange(rows) * 31 + 7
    temperature = MEMORY_TEMPERATURE * options.get("temperature", 1.0)
    drawn_at = drawn_at or options.get("draft_temperature", temperature)
    looked_at = accepted = 0
    while bool((count < length).any()):
        going = (count < length).nonzero()[:, 0]
        last = emitted[going, count[going]]
        mine, offset = seeds[going], count[going]
        tokens = draft(last, mine, offset, drafted, drawn_at, backend)
        found = mix_verify(
            base[tokens],
            memory[tokens],
            WEIGHT,
            tokens[:, 1:],
            seeds=mine,
            offsets=offset,
            memory_temperature=MEMORY_TEMPERATURE,
            backend=backend,
            **options,
        )
        for i in range(drafted + 1):
            here = found.num_accepted >= i
            emitted[going[here], count[going[here]] + 1 + i] = found.tokens[here, i]
        looked_at += int((found.num_accepted + 1).clamp(max=drafted).sum())
        accepted += int(found.num_accepted.sum())
        count[going] += found.num_accepted + 1
    return emitted[:, 1 : length + 1].numpy(), accepted / looked_at


def pairs(tokens, first):
    return np.bincount(STATES * tokens[:, first] + tokens[:, first + 1], minlength=STATES**2)


@pytest.mark.parametrize("name", backends)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_emitted_has_the_distribution_of_the_mixture(name, settings):
    """Pairs of neighbours in a chain: the first two tokens cover every way in which a cycle can
    end between or after them, the last two are in the middle of later cycles."""
    filters = {k: x for k, x in settings.items() if k != "draft_temperature"}
    v = chain(filters)
    with threads(1):
        tokens, _ = speculate(4, 2, 40000, name, **settings)
    first = v[0]
    wanted = first[:, None] * v
    assert g_test(pairs(tokens, 0), wanted.ravel()) > ALPHA / TESTS
    later = (first @ v @ v)[:, None] * v
    assert g_test(pairs(tokens, 2), later.ravel()) > ALPHA / TESTS


@needs_cpu
@pytest.mark.parametrize("drawn_at", [1.0, 1.4])
def test_a_draft_from_another_distribution_would_be_noticed(drawn_at):
    tokens, _ = speculate(2, 2, 20000, "cpu", drawn_at=drawn_at)
    v = chain({})
    assert g_test(pairs(tokens, 0), (v[0][:, None] * v).ravel()) < ALPHA / TESTS


@needs_cpu
def test_acceptance_is_that_of_the_identity():
    """1 - (1 - w) TV(p, q) at every place that is looked at, averaged over where the chain is."""
    base, memory = tables()
    p = base.double().softmax(1).numpy()
    q = (memory.double() / MEMORY_TEMPERATURE).softmax(1).numpy()
    rate = 1 - (1 - WEIGHT) * np.abs(p - q).sum(1) / 2
    rows = 50000
    _, measured = speculate(1, 1, rows, "cpu")
    assert rate[0] > WEIGHT
    error = np.sqrt(rate[0] * (1 - rate[0]) / rows)
    assert abs(measured - rate[0]) < 4 * error
