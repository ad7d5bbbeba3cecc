"""Speed: ratios of times taken in the same round. Models that sleep make the times known."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES

import hyperfade.measure.speed as speed
from hyperfade.measure import compare_speed

PROMPT = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
PADDED = PROMPT | {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}


class Sleeper:
    """Answers like a causal model, after a while; notes what it was called with."""

    def __init__(self, prefill_seconds: float, decode_seconds: float) -> None:
        self.seconds = (prefill_seconds, decode_seconds)
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> Any:
        assert given["use_cache"]
        input_ids = given["input_ids"]
        time.sleep(self.seconds["past_key_values" in given])
        self.calls.append(given)
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4), past_key_values=object())


def test_a_model_that_sleeps_longer_is_slower_by_the_ratio_of_the_sleeps() -> None:
    models = {"fast": Sleeper(0.010, 0.004), "slow": Sleeper(0.040, 0.008)}
    result = compare_speed(models, PROMPT, new_tokens=2, rounds=5)
    slow = result["slow"]
    # medians of sleeps; a loaded machine makes a sleep longer, never shorter
    assert slow.prefill_seconds >= 0.040
    assert slow.decode_seconds_per_token >= 0.008
    assert slow.prefill_speedup == pytest.approx(0.25, rel=0.4)  # observed 0.25
    assert slow.decode_speedup == pytest.approx(0.5, rel=0.4)  # observed 0.50
    for low, middle, high in (
        (slow.prefill_speedup_range[0], slow.prefill_speedup, slow.prefill_speedup_range[1]),
        (slow.decode_speedup_range[0], slow.decode_speedup, slow.decode_speedup_range[1]),
    ):
        assert low <= middle <= high


def test_the_reference_has_ratio_one_exactly() -> None:
    fast = compare_speed({"a": Sleeper(0, 0), "b": Sleeper(0, 0)}, PROMPT, new_tokens=1, rounds=3)["a"]
    assert (fast.prefill_speedup, fast.decode_speedup) == (1.0, 1.0)
    assert fast.prefill_speedup_range == fast.decode_speedup_range == (1.0, 1.0)


def test_decoding_feeds_one_token_at_a_time_on_the_cache() -> None:
    model = Sleeper(0, 0)
    compare_speed({"model": model}, PROMPT, new_tokens=3, rounds=2)
    shapes = [(*call["input_ids"].shape, "past_key_values" in call) for call in model.calls]
    assert shapes == [(2, 5, False), (2, 1, True), (2, 1, True), (2, 1, True)] * 3  # one to warm up


def test_padding_stays_masked_while_decoding() -> None:
    model = Sleeper(0, 0)
    compare_speed({"model": model}, PADDED, new_tokens=2, rounds=1)
    for number, call in enumerate(model.calls[1:3], start=1):
        assert call["attention_mask"].tolist() == [[0, 0] + [1] * (3 + number), [1] * (5 + number)]
        assert call["position_ids"].tolist() == [[2 + number], [4 + number]]


def test_models_take_turns_and_the_reported_value_is_the_median_of_the_rounds_ratios(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[Any] = []
    script = iter([(9, 9), (9, 9), (1, 1), (2, 4), (3, 1), (3, 2), (1, 1), (4, 1)])

    def timed(model: Any, prompt: Any, new_tokens: int) -> tuple[float, float]:
        turns.append(model)
        return next(script)

    monkeypatch.setattr(speed, "_prefill_and_decode", timed)
    result = compare_speed({"a": "A", "b": "B"}, PROMPT, rounds=3)["b"]
    assert turns == ["A", "B"] * 4
    assert result.prefill_seconds == 3  # of 2, 3, 4
    assert result.prefill_speedup == 0.5  # of 1/2, 3/3, 1/4
    assert result.decode_speedup == 0.5  # of 1/4, 1/2, 1/1


def test_one_round_has_no_spread() -> None:
    result = compare_speed({"a": Sleeper(0, 0), "b": Sleeper(0, 0)}, PROMPT, new_tokens=1, rounds=1)["b"]
    assert result.prefill_speedup_range == (result.prefill_speedup, result.prefill_speedup)


@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "llama"])
def test_what_is_timed_is_greedy_generation(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that the timed passes feed are those `generate` gives."""
    model, prompt = FAMILIES[family].build(), FAMILIES[family].inputs()
    fed: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"][0, -1].item()), with_kwargs=True
    )
    compare_speed({"model": model}, prompt, new_tokens=4, rounds=1)
    handle.remove()
    generated = model.generate(**prompt, do_sample=False, min_new_tokens=4, max_new_tokens=4)[0, -4:]
    assert fed[-4:] == generated.tolist()


@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_5_vl", "smolvlm", "paligemma", "llama"])
def test_a_padded_prompt_decodes_in_every_family(family: str) -> None:
    model, prompt = FAMILIES[family].build(), FAMILIES[family].inputs()
    padding = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0}
    prompt |= {k: torch.nn.functional.pad(prompt[k], (2, 0), value=v) for k, v in padding.items() if k in prompt}
    assert compare_speed({"model": model}, prompt, new_tokens=2, rounds=1)["model"].decode_seconds_per_token > 0
