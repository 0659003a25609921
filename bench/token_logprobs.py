"""token_logprobs: gold log-probabilities for evaluation, without a gradient."""

from collections.abc import Iterator

import baselines
import floors
import torch
from cases import (
    BASELINE,
    SUBJECT,
    Case,
    Goal,
    Provider,
    compiled,
    nbytes,
    random_logits,
    require,
)
from sources import Head

import mdkernels

SHAPES = {"full": ((512, 50257),), "smoke": ((9, 1001),)}
GOALS = {"fp32": {"stock": 5}, "bf16": {"stock": 30}}
LIMIT = 2e-5  # absolute, on log-probabilities down to about -30
# torch adds a row of fp32 exponentials up in fp32: 4e-5 off at V=151936 on an AVX2 processor.
BASELINE_LIMIT = 1e-4


def cases(suite: str) -> Iterator[Case]:
    for rows, vocab in SHAPES[suite]:
        for dtype in ("fp32", "bf16"):
            yield case(suite, rows, vocab, dtype)


def case(suite: str, rows: int, vocab: int, dtype: str) -> Case:
    head = Head(random_logits(rows, vocab, dtype, seed=3))
    logits = head.buffer
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    functions = {
        "mdkernels": mdkernels.token_logprobs,
        "gather_minus_logsumexp": baselines.gather_minus_logsumexp,
        "log_softmax_gather": baselines.log_softmax_gather,
    }
    if suite == "full":
        functions["compiled"] = compiled(baselines.gather_minus_logsumexp)

    def check():
        z = head.pristine.double()
        wanted = z.gather(1, labels[:, None]).squeeze(1) - z.logsumexp(1)
        errors = {}
        for name, function in functions.items():
            found = {"absolute": float((function(logits, labels) - wanted).abs().max())}
            limit = LIMIT if name == "mdkernels" else BASELINE_LIMIT
            errors[name] = require(name, found, {"absolute": limit})
        return errors

    providers = [
        Provider(
            name,
            lambda function=function: function(logits, labels),
            SUBJECT if name == "mdkernels" else BASELINE,
            head.refresh,
        )
        for name, function in functions.items()
    ]
    providers.append(floors.read(logits, prepare=head.refresh))
    goals = [Goal("mdkernels", "gather_minus_logsumexp", GOALS[dtype])]
    return Case(
        op="token_logprobs",
        shape={"N": rows, "V": vocab},
        dtype=dtype,
        providers=providers,
        check=check,
        bytes_moved=nbytes(logits),
        floor="logits read",
        goals=goals if suite == "full" else [],
    )
