"""A decoding step of a mixture as one graph."""

import torch
from mixture_fixtures import PLAIN, greedy, left_padded, mixture_of, prompts
from transformers import CompileConfig

NEW = 10

_graphs = []


def _record(graph, _inputs):  # a function: generation copies its configuration, backend and all
    _graphs.append(graph)
    return graph.forward


def test_static_cache_compiles_to_one_graph():
    mixture = mixture_of("gpt2", "qwen2")
    torch._dynamo.reset()
    _graphs.clear()
    config = CompileConfig(fullgraph=True, backend=_record, mode=None)
    config._compile_all_devices = True
    rows = prompts()
    ids, mask = left_padded(rows)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "cache_implementation": "static"}
    for weights in ([0.2, 0.5, 0.9], [0.9, 0.1, 0.4]):
        found = mixture.generate(
            ids, compile_config=config, mix_weight=torch.tensor(weights), **options, **PLAIN
        )
        want = [
            greedy(mixture, row, NEW, weights=[w]) for row, w in zip(rows, weights, strict=True)
        ]
        assert found[:, -NEW:].tolist() == want
    assert len(_graphs) == 1
    targets = [str(node.target) for node in _graphs[0].graph.nodes]
    assert sum(target.startswith("mdk.logit_mix") for target in targets) == 1
    torch._dynamo.reset()
