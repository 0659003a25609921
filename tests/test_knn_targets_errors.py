"""What knn_targets refuses, and which row and argument it names."""

import math

import pytest
import torch

from mdkernels import knn_targets
from mdkernels.ops import native

BACKENDS = ["reference"] if native.load("_cpu").module is None else ["reference", "cpu"]


def good():
    return {
        "distances": torch.rand(3, 4),
        "neighbor_ids": torch.arange(12).reshape(3, 4),
        "values": torch.arange(12),
        "temperature": 1.0,
    }


def bad_cell(tensor, row, column, value):
    tensor = tensor.clone()
    tensor[row, column] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": None}, TypeError, "temperature: expected a number, got None"),
        ({"temperature": 0.0}, ValueError, "temperature: .* got 0.0"),
        ({"temperature": -1}, ValueError, "temperature: .* got -1"),
        ({"temperature": math.nan}, ValueError, "temperature: .* got nan"),
        ({"temperature": math.inf}, ValueError, "temperature: .* got inf"),
        ({"distances": torch.rand(12)}, ValueError, r"distances: expected shape .*\(12,\)"),
        ({"distances": torch.rand(3, 4).double()}, TypeError, r"distances: .*\.float\(\)"),
        ({"distances": [[1.0]]}, TypeError, "distances: expected a torch.Tensor"),
        ({"distances": torch.rand(4, 3).t()}, ValueError, r"distances: rows .*\.contiguous\(\)"),
        ({"neighbor_ids": torch.zeros(3, 5).long()}, ValueError, r"neighbor_ids: .*\(3, 5\)"),
        ({"neighbor_ids": torch.zeros(3, 4)}, TypeError, "neighbor_ids: .*float32"),
        ({"values": torch.zeros(3, 4).long()}, ValueError, "values: expected a contiguous vector"),
        ({"values": torch.arange(24)[::2]}, ValueError, "values: expected a contiguous vector"),
        ({"values": torch.zeros(12)}, TypeError, "values: .*float32"),
        ({"exclude_ids": torch.zeros(4).long()}, ValueError, r"exclude_ids: .*\(3,\).*\(4,\)"),
        ({"exclude_ids": torch.zeros(3).int()}, TypeError, "exclude_ids: .*int64"),
        (
            {"neighbor_ids": bad_cell(good()["neighbor_ids"], 1, 2, 12)},
            ValueError,
            r"neighbor_ids: row 1 has id 12, outside \[-1, 12\)",
        ),
        (
            {"neighbor_ids": bad_cell(good()["neighbor_ids"], 2, 3, -2)},
            ValueError,
            "neighbor_ids: row 2 has id -2",
        ),
        (
            {"neighbor_ids": bad_cell(good()["neighbor_ids"], 0, 3, 2**63 - 1)},
            ValueError,
            "neighbor_ids: row 0 has id 9223372036854775807",
        ),
        (
            {"neighbor_ids": bad_cell(good()["neighbor_ids"].int(), 1, 0, 2**31 - 1)},
            ValueError,
            "neighbor_ids: row 1 has id 2147483647",
        ),
        (
            {"distances": bad_cell(torch.rand(3, 4), 1, 1, math.nan)},
            ValueError,
            "distances: row 1 has NaN or -inf for neighbour id 5",
        ),
        (
            {"distances": bad_cell(torch.rand(3, 4), 2, 0, -math.inf)},
            ValueError,
            "distances: row 2 has NaN or -inf for neighbour id 8",
        ),
        (
            {"values": torch.arange(12) - 5},
            ValueError,
            "values: a neighbour of row 0 has token id -5",
        ),
        (
            {"values": torch.arange(12).int() - 5},
            ValueError,
            "values: a neighbour of row 0 has token id -5",
        ),
        (
            {"values": torch.arange(12) + 2**31 - 9},
            ValueError,
            "values: a neighbour of row 2 has token id 2147483648",
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend, change, error, message):
    with pytest.raises(error, match=message):
        knn_targets(**{**good(), **change}, backend=backend)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU extension is not built")
def test_the_first_faulty_row_is_named_whatever_the_threads():
    distances, ids, values = torch.rand(500, 20), torch.zeros(500, 20).long(), torch.zeros(1).long()
    distances[[37, 38, 199, 480], 3] = math.nan
    for _ in range(20):
        with pytest.raises(ValueError, match="distances: row 37 "):
            knn_targets(distances, ids, values, temperature=1.0, backend="cpu")
    distances[37:] = 1.0
    assert knn_targets(distances, ids, values, temperature=1.0, backend="cpu").num_rows == 500
