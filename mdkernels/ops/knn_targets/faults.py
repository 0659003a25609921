"""The errors of values that only show while the op runs, worded once for all backends."""

import torch


def raise_fault(fault: tuple[str, int, int], num_values: int) -> None:
    """Raise the ValueError of a fault (what, row, value)."""
    what, row, value = fault
    message = {
        "neighbor_id": (
            f"neighbor_ids: row {row} has id {value}, outside [-1, {num_values}); was the index "
            "built from the datastore of these values?"
        ),
        "distance": (
            f"distances: row {row} has NaN or -inf for neighbour id {value}; are its key and the "
            "query finite?"
        ),
        "value": (
            f"values: a neighbour of row {row} has token id {value}; expected one in [0, 2**31)"
        ),
    }
    raise ValueError(message[what])


def raise_row_fault(counts, distances, neighbor_ids, values, exclude_ids) -> None:
    """Raise the ValueError of the first row with a negative count, the mark of a GPU kernel for
    one of the faults above. Only this path looks for the neighbour at fault, on the CPU."""
    row = int((counts < 0).nonzero()[0, 0])
    ids, d = neighbor_ids[row].long().cpu(), distances[row].cpu()
    inside = (ids >= 0) & (ids < len(values))
    tokens = torch.zeros_like(ids)
    tokens[inside] = values[ids[inside].to(values.device)].long().cpu()
    usable = inside if exclude_ids is None else inside & (ids != exclude_ids[row].cpu())
    for what, bad, shown in (
        ("neighbor_id", (ids < -1) | (ids >= len(values)), ids),
        ("distance", usable & ~(d > -torch.inf), ids),
        ("value", (tokens < 0) | (tokens >= 1 << 31), tokens),
    ):
        if bool(bad.any()):
            raise_fault((what, row, int(shown[bad][0])), len(values))
    raise RuntimeError(f"knn_targets: row {row} was marked as faulty, but no neighbour of it is")
