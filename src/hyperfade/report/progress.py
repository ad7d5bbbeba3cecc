"""How far long work has come: callbacks that say what is done, and how long the rest takes by what it took so far."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from hyperfade.report.lines import few_tokens_text, fit_text
from hyperfade.surgery import Plan

_SAY_SECONDS = 30.0
_RECENT = 12  # matrices


def time_left(seconds: float) -> str:
    """Minutes and seconds that are left."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} left"


def fit_progress(plan: Plan, say: Callable[[str], None]) -> Callable[[Any], None]:
    """What is called with every finished `LayerFit` of the plan. What is left is reckoned by parameters, from the last
    few: those that lie on disk from an earlier run take no time."""
    sizes = {swap.name: swap.dense_parameters for swap in plan.swaps}
    num_matrices, last, recent = len(sizes), time.monotonic(), deque[tuple[float, int]](maxlen=_RECENT)

    def line(layer: Any) -> None:
        nonlocal last
        last, before = time.monotonic(), last
        recent.append((last - before, sizes.pop(layer.name)))
        left = time_left(sum(sizes.values()) * sum(took for took, _ in recent) / sum(size for _, size in recent))
        if layer.error is not None:
            say(f"{fit_text(layer)}; {num_matrices - len(sizes)}/{num_matrices}, {left}")
        if layer.few_tokens:
            say(f"fit {layer.name}: {few_tokens_text(layer.few_tokens)}")

    return line


def batch_progress(what: str, say: Callable[[str], None]) -> Callable[[int, int], None]:
    """What is called with how many batches are done and of how many, and says so every half a minute."""
    began = said = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _SAY_SECONDS:
            said = now
            say(f"{what}: batch {done}/{total}, {time_left((now - began) * (total - done) / done)}")

    return line
