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


def test_a_fits_rest_is_reckoned_by_the_parameters_of_the_last_few(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "_RECENT", 2)
    the_plan = plan(FAMILIES["llama"].meta(), Replace(language=Layer(n=4), vision=None))
    said, sizes = list[str](), [swap.dense_parameters for swap in the_plan.swaps]
    line = fit_progress(the_plan, said.append)
    for i, swap in enumerate(the_plan.swaps):
        now += 0.0 if i == 0 else 60.0  # the first lay on disk
        line(LayerFit(swap.name, swap.spec.label, 0.25, None, 0, 3.0))
    assert said[0].startswith(f"fit {the_plan.swaps[0].name}: {the_plan.swaps[0].spec.label}, error 0.2500")
    assert said[0].endswith(f"; 1/{len(sizes)}, 0:00 left")
    assert said[1].endswith(f"; 2/{len(sizes)}, {time_left(60 * sum(sizes[2:]) / sum(sizes[:2]))}")
    assert said[2].endswith(f"; 3/{len(sizes)}, {time_left(120 * sum(sizes[3:]) / sum(sizes[1:3]))}")
    assert said[-1].endswith(f"; {len(sizes)}/{len(sizes)}, 0:00 left")


def test_batches_are_counted_every_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = 100.0, list[str]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    line = batch_progress("measuring", said.append)
    for done in range(1, 9):
        now += 12.0
        line(done, 8)
    assert said == ["measuring: batch 3/8, 1:00 left", "measuring: batch 6/8, 0:24 left"]
