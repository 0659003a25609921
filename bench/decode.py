"""Decoding speed of base, memory and mixture: `python bench/decode.py [--device cuda] [--smoke]`.

Random weights: what is timed does not depend on what the models say, but for the acceptance of
drafts, which `mix_weight` sets to about 0.8 (1 - (1 - w) TV(p, q), with TV as measured) and which
is reported as it came out. Every round runs every contender once, in rotating order; ratios are
taken within a round, then their median and spread over the rounds. One request of one row, sampling
at temperature 1, prompt included.

Correctness first: greedy tokens of the loop, with and without drafts, against generate() in fp64 on
a small pair.
"""

import dataclasses
import itertools
import statistics
from pathlib import Path

import end_to_end
import torch
from timing import quantiles
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mdkernels.decode_loop import DecodeStats
from mdkernels.fast_decode import fast_decode
from mdkernels.mixture import MemoryMixture
from mdkernels.mixture_cache import CACHE

VOCAB = 50257
ACCEPTANCE = 0.8


@dataclasses.dataclass
class Size:
    """Of a Llama with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    inner: int
    vocab: int = VOCAB

    def build(self, seed: int, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=max(1, self.heads // 4),
            intermediate_size=self.inner,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
        torch.manual_seed(seed)
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, dtype=dtype)
        return model.eval()


TINY = {"tiny": (Size(64, 2, 4, 128, 512), Size(32, 1, 2, 64, 512))}
# 308M and 26M parameters: 12 times.
CPU = {"0.3B+0.03B": (Size(1024, 20, 16, 2816), Size(384, 4, 6, 1024))}
QWEN = 151936
CUDA = {
    "7B+0.5B": (Size(3584, 28, 28, 18944, QWEN), Size(896, 24, 14, 4864, QWEN)),
    "1.5B+0.5B": (Size(1536, 28, 12, 8960, QWEN), Size(896, 24, 14, 4864, QWEN)),
}


@torch.no_grad()
def official_loop(base, memory, weight: float, ids: torch.Tensor, new: int) -> torch.Tensor:
    """The authors' demo as described in mix.md section 2.1, patched so far as to run: logits of all
    prompt positions, mixed in the models' dtype by an eager chain, two tensors made per step, a
    growing `cat`, no attention mask. Greedy, as there."""
    caches = [DynamicCache(config=model.config) for model in (base, memory)]
    step = ids
    for _ in range(new):
        logits = [
            model(input_ids=step, use_cache=True, **{CACHE: cache}).logits
            for model, cache in zip((base, memory), caches, strict=True)
        ]
        logprobs = [torch.log_softmax(one, dim=-1) for one in logits]
        share = torch.log(torch.tensor(weight, device=ids.device, dtype=logits[0].dtype))
        rest = torch.log(torch.tensor(1 - weight, device=ids.device, dtype=logits[0].dtype))
        mixed = torch.logaddexp(logprobs[0] + rest, logprobs[1] + share)
        step = mixed[:, -1, :].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, step], dim=-1)
    return ids


@torch.no_grad()
def total_variation(base, memory, ids: torch.Tensor) -> float:
    """Mean TV distance of the two models' next-token distributions along `ids`."""
    p, q = (model(ids).logits.float().softmax(-1) for model in (base, memory))
    return float((p - q).abs().sum(-1).mean() / 2)


def check() -> None:
    base, memory = (size.build(i, torch.float64, "cpu") for i, size in enumerate(TINY["tiny"]))
    for model in (base, memory):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    mixture = MemoryMixture(base, memory, 0.6)
    ids = torch.arange(10)[None]
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    want = mixture.generate(ids, **options)
    for draft in (0, 4, "auto"):
        found = mixture.generate(ids, custom_generate=fast_decode, draft_tokens=draft, **options)
        if not torch.equal(found, want):
            raise SystemExit(f"draft_tokens={draft}: other greedy tokens than generate()'s")
    if not torch.equal(official_loop(base, memory, 0.6, ids, 24), want):
        raise SystemExit("the official loop as rebuilt gives other greedy tokens")


def contenders(base, memory, mixture, ids, new: int) -> dict:
    """name -> function of a round's seed, returning DecodeStats or None."""
    options = {
        "max_new_tokens": new,
        "min_new_tokens": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
        "do_sample": True,
        "top_k": 0,
    }

    def fast(model, draft=0):
        def call(seed):
            return model.generate(
                ids,
                custom_generate=fast_decode,
                draft_tokens=draft,
                seed=seed,
                return_dict_in_generate=True,
                **options,
            ).stats

        return call

    def stock(seed):
        torch.manual_seed(seed)
        mixture.generate(ids, **options)

    def official(seed):
        official_loop(base, memory, mixture.mix_weight[0], ids, new)

    return {
        "base alone": fast(MemoryMixture(base, [])),
        "memory alone": fast(MemoryMixture(memory, [])),
        "mixture": fast(mixture),
        "mixture, 4 drafts": fast(mixture, 4),
        "mixture, auto drafts": fast(mixture, "auto"),
        "mixture, generate()": stock,
        "official loop": official,
    }


def add(total: DecodeStats | None, one: DecodeStats | None) -> DecodeStats | None:
    if total is None or one is None:
        return one
    fields = dataclasses.asdict(one)
    return DecodeStats(**{name: getattr(total, name) + value for name, value in fields.items()})


RATIOS = (
    ("mixture", "base alone"),
    ("base alone", "mixture, auto drafts"),
    ("base alone", "mixture, 4 drafts"),
    ("official loop", "mixture"),
    ("official loop", "mixture, auto drafts"),
    ("mixture, generate()", "mixture"),
)
# Mixture over base alone on a GPU, by pair.
ON_GPU = {"7B+0.5B": 1.08, "1.5B+0.5B": 1.20}


def measure(calls: dict, rounds: int, device: str, new: int) -> dict:
    """ms, ratios and figures of one pair."""
    totals = {}

    def counted(name):
        seeds = itertools.count()

        def call():
            totals[name] = add(totals.get(name), calls[name](next(seeds)))

        return call

    sampler = end_to_end.Sampler(device)
    timed = {name: counted(name) for name in calls}
    for call in timed.values():  # warm-up
        call()
    totals.clear()
    sampler.run(timed, rounds)
    seconds = sampler.seconds
    parts = zip(seconds["mixture"], seconds["base alone"], seconds["memory alone"], strict=True)
    ratios = {"mixture / base + memory": quantiles([m / (a + b) for m, a, b in parts])}
    ratios |= {f"{over} / {under}": sampler.ratio(over, under) for over, under in RATIOS}
    drafts = {}
    for name in ("mixture, 4 drafts", "mixture, auto drafts"):
        drafts[name] = {
            "acceptance": totals[name].acceptance,
            "tokens_per_pass": totals[name].tokens_per_pass,
            "base_passes": totals[name].base_passes,
            "drafted": totals[name].drafted,
        }
    speeds = {name: new / statistics.median(values) for name, values in seconds.items()}
    return {
        "ms": sampler.ms(),
        "ratios": ratios,
        "figures": {"tokens_per_s": speeds, "drafts": drafts},
    }


def goals(pair: str, found: dict, device: str) -> list[dict]:
    ratios = {name: value["median"] for name, value in found["ratios"].items()}
    drafts = found["figures"]["drafts"]["mixture, 4 drafts"]
    a = drafts["acceptance"]
    off = drafts["tokens_per_pass"] / sum(a**i for i in range(5)) - 1
    listed = [
        ("4 drafts: tokens a pass from (1 - a^5) / (1 - a), within 10 %", off, abs(off) < 0.1)
    ]

    def at_least(text, ratio, bound):
        listed.append((f"{text} at least {bound:g}x", ratio, ratio >= bound))

    def at_most(text, ratio, bound):
        listed.append((f"{text} at most {bound:g}x", ratio, ratio <= bound))

    if device == "cuda":
        at_most("mixture over base alone", ratios["mixture / base alone"], ON_GPU.get(pair, 1.2))
        at_least("mixture against the official loop", ratios["official loop / mixture"], 5)
    else:
        at_most("mixture over base and memory", ratios["mixture / base + memory"], 1.1)
        fast = ratios["official loop / mixture, auto drafts"]
        at_least("mixture with auto drafts against the official loop", fast, 1.5)
    for drafting in ("4 drafts", "auto drafts"):
        ratio = ratios[f"base alone / mixture, {drafting}"]
        at_least(f"{drafting} against base alone", ratio, 1.5)
    return [end_to_end.goal(f"{pair}: {text}", value, met) for text, value, met in listed]


def main(arguments: list[str] | None = None) -> Path:
    parser = end_to_end.parser(__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--new", type=int, help="tokens per request (64; 256 on a GPU; smoke: 8)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    args = parser.parse_args(arguments)
    check()
    dtype = getattr(torch, args.dtype)
    pairs = TINY if args.smoke else {"cpu": CPU, "cuda": CUDA}[args.device]
    rounds = args.rounds or (2 if args.smoke else 5)
    new = args.new or (8 if args.smoke else {"cpu": 64, "cuda": 256}[args.device])
    setting = {"dtype": args.dtype, "prompt": args.prompt, "new_tokens": new, "pairs": {}}
    content = {"ms": {}, "ratios": {}, "figures": {}}
    reached = []
    for pair, sizes in pairs.items():
        base, memory = (size.build(i, dtype, args.device) for i, size in enumerate(sizes))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(sizes[0].vocab, (1, args.prompt), generator=generator).to(args.device)
        tv = total_variation(base, memory, ids)
        weight = min(1.0, max(0.0, 1 - (1 - ACCEPTANCE) / tv))
        setting["pairs"][pair] = {
            "parameters": [model.num_parameters() for model in (base, memory)],
            "tv": tv,
            "mix_weight": weight,
        }
        calls = contenders(base, memory, MemoryMixture(base, memory, weight), ids, new)
        found = measure(calls, rounds, args.device, new)
        reached += goals(pair, found, args.device)
        for kind, values in found.items():
            content[kind] |= {f"{pair}: {name}": value for name, value in values.items()}
    return end_to_end.write(args, "decode", setting=setting, **content, goals=reached)


if __name__ == "__main__":
    main()
