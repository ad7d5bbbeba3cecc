"""How fast: dense and compressed side by side, in one run, in alternating rounds.

Machines drift; a ratio of two times taken seconds apart drifts much less. So every round times everything once, and
what is reported is the median over rounds of the round's ratio to the first, with its quartiles.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Ratio(NamedTuple):
    """A median over rounds with its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}× ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Speed:
    """Medians over rounds. Speed-ups are against the first model of the run; ranges are their quartiles."""

    prefill_seconds: float
    decode_seconds_per_token: float
    prefill_speedup: float
    prefill_speedup_range: tuple[float, float]
    decode_speedup: float
    decode_speedup_range: tuple[float, float]


def speedup(mine: Sequence[float], reference: Sequence[float]) -> Ratio:
    """How many times faster than `reference`, from the seconds both took in the same rounds."""
    ratios = [theirs / own for own, theirs in zip(mine, reference, strict=True)]
    return Ratio(statistics.median(ratios), *_quartiles(ratios))


@torch.inference_mode()
def time_alternately(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: tuple[int, int] = (5, 15),
    least_seconds: float = 0.003,
    budget_seconds: float = 1.5,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of one call of each, round by round; a round times each once, every other round in reverse order.

    least_seconds: a timing repeats its call until it lasts this long. rounds: fewest and most; in between, as many as
    the budget allows. warm: every call was made before, so that none needs to be made untimed.
    """
    if not warm:
        for call in calls.values():
            call()
    first = {name: _seconds(call, 1) for name, call in calls.items()}
    if long := min(first.values()) > 30 * least_seconds:
        times, seconds = {name: [taken] for name, taken in first.items()}, first
    else:  # short calls vary at first, and cost little to make again
        times = {name: [] for name in calls}
        seconds = {name: min(_seconds(call, 1), _seconds(call, 1)) for name, call in calls.items()}
    repeats = {name: max(1, math.ceil(least_seconds / taken)) for name, taken in seconds.items()}
    round_seconds = sum(seconds[name] * repeats[name] for name in calls)
    count = min(max(int(budget_seconds / round_seconds), rounds[0]), rounds[1])
    for number in range(1 if long else 0, count):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            times[name].append(_seconds(calls[name], repeats[name]))
    return times


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = now()
    for _ in range(repeats):
        call()
    return (now() - start) / repeats


@torch.inference_mode()
def compare_speed(
    models: Mapping[str, Any], prompt: dict[str, Tensor], *, new_tokens: int = 16, rounds: int = 15
) -> dict[str, Speed]:
    """Time prefill (one forward pass over `prompt`, which fills the KV cache) and decode (`new_tokens` forward passes
    of one token on that cache) of every model, greedily; the first of `models` is the reference."""
    for model in models.values():
        _prefill_and_decode(model, prompt, new_tokens)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(_prefill_and_decode(model, prompt, new_tokens))
    reference = times[next(iter(models))]
    return {name: _summary(mine, reference) for name, mine in times.items()}


def _prefill_and_decode(model: Any, prompt: dict[str, Tensor], new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and seconds per decoded token."""
    mask, padded = prompt["attention_mask"], not prompt["attention_mask"].all()
    start = now()
    output = model(**prompt, use_cache=True)
    prefill = now() - start
    start = now()
    for _ in range(new_tokens):
        token, places = output.logits[:, -1:].argmax(-1), {}
        if padded:  # only then: Qwen-VL models take a mask of the whole length for positions of the whole length
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            places = {"attention_mask": mask, "position_ids": mask.cumsum(-1)[:, -1:] - 1}
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **places)
    return prefill, (now() - start) / new_tokens


def now() -> float:
    """Seconds of a clock, read when the accelerator has finished what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _summary(mine: list[tuple[float, float]], reference: list[tuple[float, float]]) -> Speed:
    prefill, decode = (speedup([own[i] for own in mine], [theirs[i] for theirs in reference]) for i in (0, 1))
    return Speed(
        statistics.median(own[0] for own in mine),
        statistics.median(own[1] for own in mine),
        prefill.median,
        (prefill.low, prefill.high),
        decode.median,
        (decode.low, decode.high),
    )


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high
