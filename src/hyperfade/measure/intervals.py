"""How sure: 95 % intervals of scores, over the examples that might have been asked instead.

The percentile bootstrap draws as many examples as there are, with replacement, a thousand times, and takes the middle
95 % of the scores. Scores are functions of sums of statistics (`scores`), so a resample is a vector of how often each
example was drawn, and all of them together are one matrix product.

Shares of hits have a better interval, Wilson's: where all of 262 answers are right a bootstrap knows only right answers
and says 100 % to 100 %; Wilson says 98.6 % to 100 %.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hyperfade.measure.scores import Array, Metric

RESAMPLES = 1000
_AT_ONCE = 4_000_000
"""Draws held in memory together."""


@dataclass(frozen=True)
class Score:
    """A score of `count` examples with its 95 % interval."""

    value: float
    low: float
    high: float
    count: int


def score(metric: Metric, statistics: Array) -> Score:
    """The metric's score of examples with these (examples, statistics), at least one."""
    sums = statistics.sum(axis=0)
    if metric.counts_hits:
        return wilson(round(sums[0]), len(statistics))
    value = float(metric.of(sums))
    low, high = bootstrap(metric.of, statistics)
    return Score(
        value, min(low, value), max(high, value), len(statistics)
    )  # where all is alike, sums round differently


def bootstrap(
    of: Callable[[Array], Array], statistics: Array, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of `of(sums)` over resampled examples.

    statistics: (examples, statistics). of: (resamples, statistics) sums → (resamples,) scores. The draws depend on
    `seed` and the number of examples only, so two models are resampled alike.
    """
    low, high = np.percentile(of(resampled_sums(statistics, resamples, seed)), (2.5, 97.5))
    return float(low), float(high)


def resampled_sums(statistics: Array, resamples: int, seed: int) -> Array:
    """(resamples, statistics): sums over examples drawn with replacement, as many as there are."""
    count, width = statistics.shape
    random, sums = np.random.default_rng(seed), np.empty((resamples, width))
    rows = max(1, _AT_ONCE // count)
    for first in range(0, resamples, rows):
        drawn = random.integers(0, count, (min(rows, resamples - first), count))
        drawn += count * np.arange(len(drawn))[:, None]
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        sums[first : first + rows] = times @ statistics
    return sums


def wilson(hits: int, count: int) -> Score:
    """Share of hits with Wilson's 95 % interval (Wilson 1927), which stays inside [0, 1]."""
    if not count:
        return Score(0.0, 0.0, 1.0, 0)
    z, p = 1.959964, hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    # where p is 0 or 1 the end equals it, but for rounding
    return Score(p, max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p)), count)
