"""The errors of values that only show while the op runs, worded once for all backends."""


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
