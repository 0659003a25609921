"""Loss curves of `mdkernels.train` and of the authors' loss from the same seed, and fp32 noise.

Four runs on the same windows in the same order, from the same weights:

    reference   the authors' loss and model in fp64: the curve without rounding
    official    the same in fp32
    permuted    the same in fp32, the windows of every batch in reverse: equal mathematics in
                another order of summation, so that its distance from `official` is fp32 noise
    ours        `mdkernels.train.train`

Text is WikiText-2 from the optional shared data beside the checkout (or $MDK_SHARED_DATA), with a
byte-pair tokenizer trained on it, else generated words. Targets are real: keys of the initial
model, exact search.
"""

from __future__ import annotations

import copy
import lzma
import os
import random
import tempfile
import time
from pathlib import Path

import end_to_end
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mdkernels.batches import WindowBatches
from mdkernels.corpus import build_corpus
from mdkernels.datastore import build_datastore
from mdkernels.index import build_index
from mdkernels.targets import build_targets
from mdkernels.train import TrainConfig, train

EOS = "<|endoftext|>"
KL_WEIGHT, CLIP = 0.5, 1.0
FULL = {"characters": 200_000, "vocab": 4001, "width": 128, "layers": 2, "steps": 200}
SMOKE = {"characters": 20_000, "vocab": 401, "width": 32, "layers": 1, "steps": 25}
SHARED = {"block": 64, "stride": 32, "batch_size": 8, "lr": 1e-3, "seed": 0}


def text(characters: int) -> tuple[str, str]:
    """(name, text)."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("MDK_SHARED_DATA", default)) / "general" / "wikitext-2.valid.txt.xz"
    if path.exists():
        with lzma.open(path, "rt", encoding="utf-8") as stream:
            return "WikiText-2, valid", stream.read(characters)
    draw = random.Random(0)
    letters = "etaoinshrdlu"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(2000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    return "generated words", " ".join(draw.choices(words, weights, k=characters // 6))


def make_tokenizer(content: str, vocab: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([content], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def make_model(setting: dict) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=setting["vocab"],
        n_positions=SHARED["block"] + 1,
        n_embd=setting["width"],
        n_layer=setting["layers"],
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    return GPT2LMHeadModel(config)


def official_losses(model, corpus, targets, steps: int, *, reverse: bool = False) -> list[float]:
    """`steps` optimizer steps with dense targets and the authors' loss, in the dtype of `model`."""
    block, size = SHARED["block"], SHARED["batch_size"]
    spans = corpus.windows(block, SHARED["stride"])
    order = WindowBatches(corpus.token_ids, spans, block, seed=SHARED["seed"])
    tokens = torch.from_numpy(corpus.token_ids.astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=SHARED["lr"], weight_decay=0.0)
    first = next(model.parameters())
    device, dtype, vocab = first.device, first.dtype, model.config.vocab_size
    model.train()
    losses = []
    for step in range(steps):
        picked = order.picked(step * size, (step + 1) * size)
        picked = picked[::-1] if reverse else picked
        inputs = torch.stack([tokens[stop - block : stop] for _, stop in picked]).to(device)
        logits = model(input_ids=inputs).logits
        rows = zip(logits, picked, strict=True)
        scored = torch.cat([row[block - (stop - start) :] for row, (start, stop) in rows])
        following = torch.cat([tokens[start + 1 : stop + 1] for start, stop in picked]).to(device)
        dense = torch.cat([targets.rows(a, b).to_dense(vocab) for a, b in picked.tolist()])
        dense = dense.to(device, dtype)
        dense = dense / dense.sum(dim=-1, keepdim=True)
        kl = F.kl_div(F.log_softmax(scored, dim=-1), dense, reduction="batchmean")
        ce = torch.nn.CrossEntropyLoss()(scored, following)
        loss = KL_WEIGHT * kl + (1 - KL_WEIGHT) * ce
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def our_losses(model, corpus, targets, steps: int, tokenizer, out: Path) -> list[float]:
    config = TrainConfig(
        corpus=corpus,
        targets=targets,
        model=model,
        tokenizer=tokenizer,
        out=out,
        kl_weight=KL_WEIGHT,
        clip=CLIP,
        schedule="constant",
        max_steps=steps,
        save_every=None,
        device=str(model.device),
        **SHARED,
    )
    return [row["loss"] for row in train(config).metrics if "loss" in row]


def curves(root: Path, setting: dict, device: str) -> tuple[str, dict[str, list[float]]]:
    """(name of the text, losses in nats by run)."""
    name, content = text(setting["characters"])
    tokenizer = make_tokenizer(content, setting["vocab"])
    setting["vocab"] = len(tokenizer)
    corpus = build_corpus([content], tokenizer, root / "corpus", as_text=True)
    model = make_model(setting).to(device)
    block = SHARED["block"]
    datastore = build_datastore(corpus, copy.deepcopy(model), root / "keys", block=block)
    index = build_index(datastore, root / "index")
    targets = build_targets(datastore, index, root / "targets", num_neighbors=64)
    steps, run = setting["steps"], lambda m, **o: official_losses(m, corpus, targets, steps, **o)
    return name, {
        "reference": run(copy.deepcopy(model).double()),
        "official": run(copy.deepcopy(model)),
        "permuted": run(copy.deepcopy(model), reverse=True),
        "ours": our_losses(
            copy.deepcopy(model), corpus, targets, steps, tokenizer, root / "memory"
        ),
    }


def differences(losses: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Largest and final distance of pairs of curves, in nats."""
    pairs = {
        "ours - official": ("ours", "official"),
        "noise: permuted - official": ("permuted", "official"),
        "ours - reference": ("ours", "reference"),
        "official - reference": ("official", "reference"),
    }
    found = {}
    for name, (a, b) in pairs.items():
        gap = np.abs(np.subtract(losses[a], losses[b]))
        found[name] = {"max": float(gap.max()), "final": float(gap[-1]), "mean": float(gap.mean())}
    return found


def fp32_noise(found: dict[str, dict[str, float]]) -> float:
    """How far fp32 moves the official curve, in nats: from itself in another order of summation, or
    from fp64. Two curves that both are this far from the truth differ by twice as much."""
    return max(found["noise: permuted - official"]["max"], found["official - reference"]["max"])


def draw(path: Path, losses: dict[str, list[float]]) -> None:
    """The curves, and their distances from the fp64 one; nothing where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("official", "ours"):
        left.plot(losses[name], label=name, linestyle="-" if name == "official" else "--")
    for name in ("official", "permuted", "ours"):
        gap = np.abs(np.subtract(losses[name], losses["reference"]))
        right.semilogy(np.maximum(gap, 1e-9), label=name, linewidth=1)
    left.set(xlabel="step", ylabel="loss (nats)")
    right.set(xlabel="step", ylabel="distance from fp64 (nats)")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = end_to_end.parser(__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    setting = dict(SMOKE if args.smoke else FULL)
    setting["steps"] = args.steps or setting["steps"]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        name, losses = curves(Path(folder), setting, args.device)
    found = differences(losses)
    ours, noise = found["ours - official"]["max"], fp32_noise(found)
    for pair, gap in found.items():
        print(f"{pair:28} max {gap['max']:.2e}, final {gap['final']:.2e}, mean {gap['mean']:.2e}")
    path = end_to_end.write(
        args,
        "loss_curves",
        setting=setting | SHARED | {"text": name},
        figures={"losses": losses, "differences": found, "seconds": time.perf_counter() - started},
        goals=[
            end_to_end.goal(
                "largest distance from the official curve over fp32 noise, at most 2",
                ours / noise,
                ours <= 2 * noise,
            )
        ],
    )
    draw(path.with_suffix(".png"), losses)


if __name__ == "__main__":
    main()
