"""One option of every row at the least total value within a capacity: how a budget is shared out, without a model."""

from collections.abc import Sequence

import numpy as np

from hyperfade.errors import PlanError


def cheapest(options: Sequence[Sequence[tuple[int, float]]], capacity: int) -> list[int]:
    """Which (cost, value) of every row to take so that Σ value is minimal while Σ cost ≤ capacity: the multiple-choice
    knapsack, exactly, in O(rows · options · capacity). Raises `PlanError` where nothing fits."""
    best = np.zeros(capacity + 1)  # the least value of the rows so far at every cost up to the capacity
    taken = np.zeros((len(options), capacity + 1), dtype=np.int16)
    for row, own in enumerate(options):
        values = np.full((len(own), capacity + 1), np.inf)
        for i, (cost, value) in enumerate(own):
            if cost <= capacity:
                values[i, cost:] = best[: capacity + 1 - cost] + value
        taken[row], best = values.argmin(0), values.min(0)
    if not np.isfinite(best[capacity]):
        raise PlanError("Even the smallest sizes exceed replace.budget.", "Raise the budget, or exclude matrices.")
    chosen, left = [], capacity
    for row in reversed(range(len(options))):
        chosen.append(int(taken[row, left]))
        left -= options[row][chosen[-1]][0]
    return chosen[::-1]
