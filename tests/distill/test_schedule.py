"""Schedules as pure functions of the optimizer step: where they begin, where they end, and that they count steps."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperfade.distill import alpha_at, fade_progress, kd_weight_at, learning_rate_factor, total_steps
from hyperfade.recipe import Train

TRAINS = st.builds(
    Train,
    fade_steps=st.integers(0, 60),
    polish_steps=st.integers(0, 60),
    fade_shape=st.sampled_from(["linear", "cosine", "step"]),
    fade_order=st.sampled_from(["together", "layer_by_layer"]),
    warmup_fraction=st.floats(0, 1),
    accumulation=st.integers(1, 8),
    kd_ramp=st.booleans(),
)


@given(TRAINS, st.integers(1, 7))
def test_alpha_stays_inside_never_falls_and_is_one_when_the_fade_is_over(train: Train, num_layers: int) -> None:
    for layer in range(num_layers):
        alphas = [alpha_at(step, train, layer, num_layers) for step in range(total_steps(train) + 3)]
        assert all(0 <= alpha <= 1 for alpha in alphas)
        assert alphas == sorted(alphas)
        assert set(alphas[train.fade_steps :]) == {1.0}
        if train.fade_steps:
            assert alphas[train.fade_steps - 1] == 1.0


def test_alpha_of_every_shape_by_hand() -> None:
    def shape(name: str) -> list[float]:
        return [alpha_at(step, Train(fade_steps=4, polish_steps=1, fade_shape=name)) for step in range(5)]

    assert shape("linear") == [0.25, 0.5, 0.75, 1, 1]
    assert shape("cosine") == pytest.approx([(1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1, 1])
    assert shape("step") == [0, 0, 0, 1, 1]


def test_layers_fade_one_after_the_other_in_order() -> None:
    train = Train(fade_steps=6, fade_order="layer_by_layer")
    table = [[alpha_at(step, train, layer, 3) for layer in range(3)] for step in range(6)]
    expected = [[0.5, 0, 0], [1, 0, 0], [1, 0.5, 0], [1, 1, 0], [1, 1, 0.5], [1, 1, 1]]
    assert [value for row in table for value in row] == pytest.approx([value for row in expected for value in row])


@given(TRAINS)
def test_a_layer_begins_only_when_the_one_before_has_faded(train: Train) -> None:
    train = train.model_copy(update={"fade_order": "layer_by_layer"})
    for step in range(train.fade_steps):
        alphas = [alpha_at(step, train, layer, 4) for layer in range(4)]
        assert alphas == sorted(alphas, reverse=True)
        assert sum(0 < alpha < 1 for alpha in alphas) <= 1


def test_a_fade_of_no_steps_is_over_at_once() -> None:
    train = Train(fade_steps=0, polish_steps=3, kd_ramp=True, kd_weight=0.6)
    assert total_steps(train) == 3
    assert [fade_progress(0, train), alpha_at(0, train), kd_weight_at(0, train)] == [1, 1, 0.6]


@pytest.mark.parametrize("accumulation", [1, 8])
def test_warm_up_takes_a_tenth_of_the_optimizer_steps_whatever_the_accumulation(accumulation: int) -> None:
    train = Train(fade_steps=60, polish_steps=140, accumulation=accumulation)
    factors = [learning_rate_factor(step, train) for step in range(200)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert max(range(200), key=factors.__getitem__) in (19, 20)  # the peak is reached when the warm-up ends
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert factors[110] == pytest.approx(0.5)  # half-way down a cosine
    assert 0 <= factors[-1] < 1e-3  # observed 7.6e-5


@given(TRAINS)
def test_the_learning_rate_never_leaves_its_range(train: Train) -> None:
    factors = [learning_rate_factor(step, train) for step in range(total_steps(train))]
    assert all(0 <= factor <= 1 for factor in factors)
    if factors:
        assert max(factors) > 0.5
        assert factors[0] > 0


def test_kd_weight_is_constant_or_grows_with_the_fade() -> None:
    flat, ramp = (Train(fade_steps=4, polish_steps=2, kd_weight=0.8, kd_ramp=on) for on in (False, True))
    assert [kd_weight_at(step, flat) for step in range(6)] == [0.8] * 6
    assert [kd_weight_at(step, ramp) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
