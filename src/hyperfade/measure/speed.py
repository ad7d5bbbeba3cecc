"""How fast: dense and compressed models side by side, in one run, in alternating rounds.

Machines drift; a ratio of two times taken seconds apart drifts much less. So every round times every model once, and
what is reported is the median over rounds of the round's ratio to the first model, with its quartiles.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Speed:
    """Medians over rounds. Speed-ups are against the first model of the run; ranges are their quartiles."""

    prefill_seconds: float
    decode_seconds_per_token: float
    prefill_speedup: float
    prefill_speedup_range: tuple[float, float]
    decode_speedup: float
    decode_speedup_range: tuple[float, float]


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
    start = _now()
    output = model(**prompt, use_cache=True)
    prefill = _now() - start
    start = _now()
    for _ in range(new_tokens):
        token, places = output.logits[:, -1:].argmax(-1), {}
        if padded:  # only then: Qwen-VL models take a mask of the whole length for positions of the whole length
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            places = {"attention_mask": mask, "position_ids": mask.cumsum(-1)[:, -1:] - 1}
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **places)
    return prefill, (_now() - start) / new_tokens


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _summary(mine: list[tuple[float, float]], reference: list[tuple[float, float]]) -> Speed:
    prefill, decode = ([theirs[i] / own[i] for own, theirs in zip(mine, reference, strict=True)] for i in (0, 1))
    return Speed(
        statistics.median(own[0] for own in mine),
        statistics.median(own[1] for own in mine),
        statistics.median(prefill),
        _quartiles(prefill),
        statistics.median(decode),
        _quartiles(decode),
    )


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high
