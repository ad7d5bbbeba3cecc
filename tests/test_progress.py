"""How far long work has come: the time that is left against what it took so far, by hand."""

import pytest
from tiny_models import FAMILIES

from hyperfade.distill import LayerFit
from hyperfade.recipe import Layer, Replace
from hyperfade.report import batch_progress, fit_progress, progress, time_left
from hyperfade.surgery import plan


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00 left"), (59.6, "1:00 left"), (3725.2, "62:05 left")])
def test_time_left_is_in_minutes_and_seconds(seconds: float, text: str) -> None:
    assert time_left(seconds) == text


def test_a_fits_rest_is_reckoned_by_parameters() -> None:
    the_plan = plan(FAMILIES["llama"].meta(), Replace(language=Layer(n=4), vision=None))
    said = list[str]()
    line, first = fit_progress(the_plan, said.append), the_plan.swaps[0]
    line(LayerFit(first.name, first.spec.label, 0.25, None, 0, 3.0))
    rest = sum(swap.dense_parameters for swap in the_plan.swaps[1:])
    assert said[0].startswith(f"fit {first.name}: {first.spec.label}, error 0.2500")
    assert said[0].endswith(f"1/{len(the_plan.swaps)}, {time_left(3 * rest / first.dense_parameters)}")
    for swap in the_plan.swaps[1:]:
        line(LayerFit(swap.name, swap.spec.label, 0.25, None, 0, 3.0))
    assert said[-1].endswith(f"{len(the_plan.swaps)}/{len(the_plan.swaps)}, 0:00 left")


def test_batches_are_counted_every_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = 100.0, list[str]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    line = batch_progress("measuring", said.append)
    for done in range(1, 9):
        now += 12.0
        line(done, 8)
    assert said == ["measuring: batch 3/8, 1:00 left", "measuring: batch 6/8, 0:24 left"]
