"""How far long work has come: callbacks that say what is done, and how long the rest takes by what it took so far."""

import statistics
import time
from collections import deque
from collections.abc import Callable

from hyperfade.distill import LayerFit
from hyperfade.report.lines import few_tokens_text, fit_text
from hyperfade.surgery import Plan

_SAY_SECONDS = 30.0
_RECENT = 5  # FFNs


def time_left(seconds: float) -> str:
    """Minutes and seconds that are left."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} left"


def fit_progress(plan: Plan, say: Callable[[str], None]) -> Callable[[LayerFit], None]:
    """What is called with every finished `LayerFit` of the plan. An FFN's matrices come all at once; what is left is
    reckoned by FFNs' parameters, from the last few FFNs: those that lie on disk from an earlier run take no time, and
    the first may hold passes for all."""
    sizes = {swap.name: swap.dense_parameters for swap in plan.swaps}
    left = {ffn.name: sum(sizes.get(name, 0) for name in ffn.linears) for ffn in plan.ffns}
    ffn_of = {name: ffn.name for ffn in plan.ffns for name in ffn.linears}
    last, done, speeds = time.monotonic(), 0, deque[float](maxlen=_RECENT)

    def line(layer: LayerFit) -> None:
        nonlocal last, done
        done, size = done + 1, left.pop(ffn_of[layer.name], 0)
        if size:
            last, before = time.monotonic(), last
            speeds.append((last - before) / size)
        if layer.error is not None:
            rest = time_left(sum(left.values()) * statistics.median(speeds))
            say(f"{fit_text(layer)}; {done}/{len(sizes)}, {rest}")
        if layer.few_tokens:
            say(f"fit {layer.name}: {few_tokens_text(layer.few_tokens)}")

    return line


def batch_progress(what: str, say: Callable[[str], None]) -> Callable[[int, int], None]:
    """What is called with how many batches are done and of how many, and says so every half a minute. Where batches
    with gradients come first, less than it says is left."""
    began = said = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _SAY_SECONDS:
            said = now
            say(f"{what}: batch {done}/{total}, {time_left((now - began) * (total - done) / done)}")

    return line
