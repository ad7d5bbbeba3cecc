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


def test_a_fits_rest_is_reckoned_by_the_last_ffns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    the_plan = plan(FAMILIES["llama"].meta(), Replace(language=Layer(n=4), vision=None))
    said, names = list[str](), {swap.name: swap.spec.label for swap in the_plan.swaps}
    line = fit_progress(the_plan, said.append)
    for seconds, ffn in zip((0.0, 60.0, 90.0), the_plan.ffns, strict=True):  # of like size; the first lay on disk
        now += seconds
        for name in ffn.linears:
            line(LayerFit(name, names[name], 0.25, None, 0, 3.0))
    assert said[0].startswith(f"fit {the_plan.ffns[0].linears[0]}: {the_plan.swaps[0].spec.label}, error 0.2500")
    assert [text.partition("; ")[2] for text in said] == [
        *("1/9, 0:00 left", "2/9, 0:00 left", "3/9, 0:00 left"),
        *("4/9, 0:30 left", "5/9, 0:30 left", "6/9, 0:30 left"),  # the median of none and a minute
        *("7/9, 0:00 left", "8/9, 0:00 left", "9/9, 0:00 left"),
    ]


def test_batches_are_counted_every_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = 100.0, list[str]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    line = batch_progress("measuring", said.append)
    for done in range(1, 9):
        now += 12.0
        line(done, 8)
    assert said == ["measuring: batch 3/8, 1:00 left", "measuring: batch 6/8, 0:24 left"]
