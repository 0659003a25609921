"""lm-evaluation-harness on a mixture: a task of its own, nothing downloaded."""

import json

import pytest
import torch
from mixture_fixtures import oracle
from pipeline_fixtures import save_tiny_pair, tiny_model, tiny_tokenizer

from mdkernels.mixture import MemoryMixture

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mdkernels.integrations.lm_eval import MixtureLM  # noqa: E402

ROWS = [
    {"q": "the tensor", "choices": [" returns", " copies its neighbours"], "gold": 0},
    {"q": "a kernel sorts", "choices": [" the mask", " every row in place"], "gold": 1},
    {"q": "the", "choices": [" index", " gradient"], "gold": 0},
]
COMMON = {"test_split": "test", "dataset_path": "json"}
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q * 30}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "tiny_until": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["never"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def encode(text):
    return tiny_tokenizer()(text, add_special_tokens=False).input_ids


def gold(mixture, context, continuation):
    logprobs = oracle(mixture, [*context, *continuation][:-1])[0][-len(continuation) :]
    return sum(float(row[i]) for row, i in zip(logprobs, continuation, strict=True))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def results(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    files = {"data_files": {"test": str(root / "rows.jsonl")}, "cache_dir": str(root / "cache")}
    tasks = [
        {"task": name, "dataset_kwargs": files, **COMMON, **task} for name, task in TASKS.items()
    ]
    return lm_eval.simple_evaluate(
        model="mdkernels",
        model_args=f"base={checkpoints[0]},memory={checkpoints[1]},mix_weight=0.6,"
        "memory_temperature=1.3",
        tasks=tasks,
        device="cuda:0",  # what `lm_eval` passes unless told otherwise
        batch_size=2,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )


@pytest.fixture(scope="module")
def mixture():
    return MemoryMixture(tiny_model("llama"), tiny_model("gpt2", seed=1), 0.6, 1.3)


def samples(results, task):
    found = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    assert [sample["doc"]["q"] for sample in found] == [row["q"] for row in ROWS]
    return found


def test_loglikelihood(results, mixture):
    for sample, row in zip(samples(results, "tiny_choice"), ROWS, strict=True):
        for (logprob, _), choice in zip(sample["filtered_resps"], row["choices"], strict=True):
            whole, context = encode(row["q"] + choice), encode(row["q"])
            wanted = gold(mixture, context, whole[len(context) :])
            assert float(logprob) == pytest.approx(wanted, abs=2e-5)


def test_loglikelihood_rolling(results, mixture):
    """Texts longer than the context are cut into windows, of which each token is scored once."""
    longest = 0
    for sample, row in zip(samples(results, "tiny_rolling"), ROWS, strict=True):
        ids, total = encode(row["q"] * 30), 0.0
        longest = max(longest, len(ids))
        for start in range(0, len(ids), 64):
            part = ids[start : start + 64]
            # What the window reads before it: the last one reaches back as far as it can.
            before = [0, *ids][: start + 1][-(65 - len(part)) :]
            total += gold(mixture, before, part)
        assert float(sample["filtered_resps"][0]) == pytest.approx(total, abs=1e-4)
    assert longest > 64


def test_generate_until_equals_generate(results, mixture):
    for sample, row in zip(samples(results, "tiny_until"), ROWS, strict=True):
        ids = tiny_tokenizer()(row["q"], add_special_tokens=False, return_tensors="pt").input_ids
        tokens = mixture.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        text = tiny_tokenizer().decode(tokens, skip_special_tokens=True)
        assert sample["filtered_resps"][0] == text


def generated(model, prompts, **options):
    requests = [
        Instance(
            "generate_until", {}, (prompt, {"until": ["never"], "max_gen_toks": 8} | options), 0
        )
        for prompt in prompts
    ]
    return model.generate_until(requests, disable_tqdm=True)


def test_greedy_tasks_may_carry_sampling_options(mixture):
    model = MixtureLM(mixture, tokenizer=tiny_tokenizer(), batch_size=2)
    prompts = [row["q"] for row in ROWS]
    unused = {"temperature": 0.0, "top_p": 0.95, "top_k": 5, "min_p": 0.1, "typical_p": 0.9}
    found = generated(model, prompts, do_sample=False, **unused)
    assert found == generated(model, prompts, do_sample=False)
    torch.manual_seed(0)
    drawn = generated(model, prompts, do_sample=True, **unused | {"temperature": 3.0})
    assert drawn != found


@pytest.mark.parametrize("others", [[], ["the tensor"]])
def test_an_empty_prompt_starts_at_the_prefix_token(mixture, others):
    model = MixtureLM(mixture, tokenizer=tiny_tokenizer(), batch_size=2)
    tokens = mixture.generate(torch.zeros(1, 1, dtype=torch.int64), max_new_tokens=8)[0, 1:]
    wanted = tiny_tokenizer().decode(tokens, skip_special_tokens=True)
    assert generated(model, [*others, ""], do_sample=False)[-1] == wanted


def test_a_hugging_face_model_of_the_mixture_gives_the_same(mixture):
    """The harness's own way: log-softmax of whole logits."""
    options = {"tokenizer": tiny_tokenizer(), "batch_size": 2}
    ours, theirs = MixtureLM(mixture, **options), HFLM(mixture, max_length=64, **options)
    texts = [(row["q"] * n, choice) for row in ROWS for choice in row["choices"] for n in (1, 30)]
    pairs = [Instance("loglikelihood", {}, pair, 0) for pair in [*texts, ("", "the tensor")]]
    found, wanted = (lm.loglikelihood(pairs, disable_tqdm=True) for lm in (ours, theirs))
    for (logprob, greedy), (their_logprob, their_greedy) in zip(found, wanted, strict=True):
        assert logprob == pytest.approx(their_logprob, abs=2e-5)
        assert greedy == their_greedy


def test_automatic_batches_and_live_models(mixture):
    model = MixtureLM(mixture, tokenizer=tiny_tokenizer(), batch_size="auto", max_batch_size=2)
    requests = [(None, encode(row["q"]), encode(row["choices"][0])) for row in ROWS]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    for (logprob, _), (_, context, continuation) in zip(found, requests, strict=True):
        assert logprob == pytest.approx(gold(mixture, context, continuation), abs=2e-5)


def test_refusals(mixture, checkpoints, monkeypatch):
    with pytest.raises(TypeError, match="MixtureLM takes no parallelize"):
        MixtureLM(mixture, tokenizer=tiny_tokenizer(), parallelize=True)
    with pytest.raises(ValueError, match="tokenizer: needed with a live mixture"):
        MixtureLM(mixture)
    with pytest.raises(ValueError, match="one of mixture, a live MemoryMixture, and base"):
        MixtureLM()
    with pytest.raises(ValueError, match="device: a live mixture stays"):
        MixtureLM(mixture, tokenizer=tiny_tokenizer(), device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process, WORLD_SIZE is 2"):
        MixtureLM(base=checkpoints[0], memory=checkpoints[1])
