"""Intervals against scipy and a textbook, and differences against what pairing is for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hyperfade.data import Example
from hyperfade.errors import DataError, OutputError
from hyperfade.measure import (
    METRICS,
    Answer,
    bootstrap,
    by_task,
    paired_difference,
    read_answers,
    score_answers,
    wilson,
    write_answers,
)
from hyperfade.measure.intervals import resampled_sums, score
from hyperfade.measure.scores import Array

OF = {metric.name: metric for metrics in METRICS.values() for metric in metrics}
GENERATOR = np.random.default_rng(7)
COUNT = 150
LENGTHS = GENERATOR.integers(3, 20, COUNT)
STATISTICS: dict[str, Array] = {
    "vqa_accuracy": np.stack([GENERATOR.integers(0, 4, COUNT) / 3, np.ones(COUNT)], axis=1),
    "cider": np.stack([GENERATOR.gamma(1.0, 1.0, COUNT), np.ones(COUNT)], axis=1),
    "word_error_rate": np.stack([GENERATOR.binomial(LENGTHS, 0.2), LENGTHS], axis=1).astype(float),
    "character_accuracy": np.stack([GENERATOR.binomial(LENGTHS, 0.1), LENGTHS], axis=1).astype(float),
}


def scipys(statistic: Callable[..., object], *columns: Array, seed: int = 0) -> tuple[float, float]:
    """scipy's percentile bootstrap, by the same generator."""
    found = scipy.stats.bootstrap(
        columns,
        statistic,
        n_resamples=1000,
        method="percentile",
        paired=True,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return found.confidence_interval.low, found.confidence_interval.high


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("name", STATISTICS)
def test_the_bootstrap_is_scipys(name: str, seed: int) -> None:
    """Draw for draw: numpy's generators give the same numbers in one call or several."""
    statistics = STATISTICS[name]

    def statistic(*columns: Array, axis: int) -> Array:
        return OF[name].of(np.stack([column.sum(axis=axis) for column in columns], axis=-1))

    low, high = bootstrap(OF[name].of, statistics, seed=seed)
    assert (low, high) == pytest.approx(scipys(statistic, *statistics.T, seed=seed), rel=1e-12)
    assert low < OF[name].of(statistics.sum(axis=0)) < high


def test_the_bootstrap_of_bleu_is_scipys_too() -> None:
    words = ["a", "dog", "cat", "runs", "on", "the", "beach", "red", "bus"]
    pairs = [
        [" ".join(GENERATOR.choice(words, GENERATOR.integers(4, 9))) for _ in range(2)] for _ in range(40)
    ]  # random words: matches of every order are rare, and smoothing matters
    statistics = OF["bleu4"].statistics([one for one, _ in pairs], [[other] for _, other in pairs])

    def statistic(*columns: Array, axis: int) -> Array:
        return OF["bleu4"].of(np.stack([column.sum(axis=axis) for column in columns], axis=-1))

    assert bootstrap(OF["bleu4"].of, statistics) == pytest.approx(scipys(statistic, *statistics.T), rel=1e-9)


def test_many_examples_are_resampled_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = STATISTICS["word_error_rate"]
    whole = resampled_sums(statistics, 100, 3)
    monkeypatch.setattr("hyperfade.measure.intervals._AT_ONCE", 7 * COUNT + 1)
    assert np.array_equal(resampled_sums(statistics, 100, 3), whole)
    monkeypatch.setattr("hyperfade.measure.intervals._AT_ONCE", 1)
    assert np.array_equal(resampled_sums(statistics, 100, 3), whole)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_a_score_lies_in_its_interval(rows: list[tuple[int, int]]) -> None:
    statistics = np.array(rows, float)
    for name in ("character_error_rate", "character_accuracy", "cider"):
        found = score(OF[name], statistics)
        assert found.low <= found.value <= found.high
        assert found.count == len(rows)
        alike = score(OF[name], np.repeat(statistics[:1], 7, axis=0))
        assert (alike.low, alike.high) == pytest.approx((alike.value, alike.value), rel=1e-12)


def test_shares_of_hits_have_wilsons_interval() -> None:
    hits = np.stack([np.arange(40) < 31, np.ones(40)], axis=1).astype(float)
    assert score(OF["exact_match"], hits) == wilson(31, 40)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # the score method without continuity correction in Newcombe (1998), table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_equal_newcombes_table(hits: int, count: int, low: float, high: float) -> None:
    found = wilson(hits, count)
    assert found.value == hits / count
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)  # what the table rounds off
    mirrored = wilson(count - hits, count)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-12)


def test_wilson_of_nothing_knows_nothing() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high, wilson(0, 0).count) == (0.0, 1.0, 0)


@given(st.integers(0, 300), st.integers(1, 300))
def test_wilson_intervals_hold_the_share(hits: int, more: int) -> None:
    for found in (wilson(hits, hits + more), wilson(hits + more, hits + more), wilson(0, more)):
        assert 0 <= found.low <= found.value <= found.high <= 1


# --- differences -----------------------------------------------------------------------------------------------------


def _answers(worth: Array, task: str = "question", metric: str = "exact_match") -> list[Answer]:
    return [
        Answer(f"line {i}", task, "", "text", "", ("yes",), {metric: tuple(float(x) for x in row)})
        for i, row in enumerate(worth)
    ]


def _hits(hits: Array) -> Array:
    return np.stack([hits, np.ones(len(hits))], axis=1).astype(float)


ONE = GENERATOR.random(400) < 0.8
OTHER = np.where(GENERATOR.random(400) < 0.95, ONE, ~ONE)  # mostly right about the same questions


def test_a_paired_difference_is_scipys() -> None:
    found = paired_difference(_answers(_hits(ONE)), _answers(_hits(OTHER)))
    assert found.value == pytest.approx(ONE.mean() - OTHER.mean())
    expected = scipys(lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis), ONE.astype(float), OTHER.astype(float))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)
    assert found.count == 400


def test_pairing_takes_out_what_the_examples_share() -> None:
    found = paired_difference(_answers(_hits(ONE)), _answers(_hits(OTHER)))
    apart = [wilson(hits.sum(), 400) for hits in (ONE, OTHER)]
    assert found.high - found.low < 0.7 * max(one.high - one.low for one in apart)  # observed 0.51


def test_a_difference_of_error_rates_is_one_of_sums() -> None:
    name = "character_accuracy"
    one, other = STATISTICS[name], STATISTICS["word_error_rate"]
    found = paired_difference(_answers(one, "reading", name), _answers(other, "reading", name))
    assert found.value == pytest.approx((other[:, 0].sum() - one[:, 0].sum()) / LENGTHS.sum())
    assert found.low < found.value < found.high


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_differences_of_a_model_and_itself_in_another_order_are_zero(hits: list[bool], chance: object) -> None:
    one = _answers(_hits(np.array(hits)))
    other = chance.sample(one, len(one))  # type: ignore[attr-defined]
    found = paired_difference(one, other)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def _example(number: int, task: str, references: tuple[str, ...]) -> Example:
    return Example((), (), f"rows.jsonl line {number}", references, "kind", task)


EXAMPLES = [
    _example(1, "", ("yes",)),
    _example(2, "caption", ("a dog runs on the beach", "a dog is running")),
    _example(3, "reading", ("NO SMOKING",)),
    _example(4, "caption", ("two men play chess in a park",)),
]
GIVEN = ["Yes", "a dog runs home on the beach", "NO SMOKlNG", "two men play chess in a park"]


def test_answers_are_written_and_read_back_for_later_comparisons(tmp_path: Path) -> None:
    mine = score_answers(list(zip(EXAMPLES, GIVEN, strict=True)))
    write_answers(tmp_path / "new" / "mine.jsonl", mine)
    assert read_answers(tmp_path / "new" / "mine.jsonl") == tuple(mine)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine.jsonl"]
    with pytest.raises(OutputError, match="Cannot write"):
        write_answers(tmp_path / "new" / "mine.jsonl" / "below.jsonl", mine)
    assert [answer.task for answer in mine] == ["question", "caption", "reading", "caption"]
    assert by_task(mine).keys() == {"question", "caption", "reading"}
    theirs = score_answers([*zip(EXAMPLES, ["no", "a cat", "EXIT", "nothing"], strict=True)][::-1])
    for task, metric in (("question", None), ("caption", "cider"), ("caption", "bleu4"), ("reading", None)):
        assert paired_difference(mine, theirs, task=task, metric=metric).value > 0
    assert paired_difference(mine, theirs, task="caption", metric="bleu4").count == 2


@given(st.text(), st.text(min_size=1))
def test_any_text_is_read_back(tmp_path_factory: pytest.TempPathFactory, answer: str, reference: str) -> None:
    """Line separators of Unicode, too, which are no ends of lines here."""
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    given = [
        Answer("line 1", "question", "\u2028", "image", answer + "\x85", (reference,), {"exact_match": (1, 1)})
    ] * 2
    write_answers(path, given)
    assert read_answers(path) == tuple(given)


def test_models_with_other_answers_cannot_be_compared(tmp_path: Path) -> None:
    mine = score_answers(list(zip(EXAMPLES, GIVEN, strict=True)))
    for one, other, options, message in (
        (mine, mine, {}, "of 3 tasks: caption, question, reading"),
        (mine, mine, {"task": "ocr"}, "no task 'ocr'"),
        (mine, mine, {"task": "caption", "metric": "wer"}, "caption have no metric 'wer'"),
        (mine, mine[:3], {"task": "caption"}, r"rows\.jsonl line 4 was answered by one"),
        (mine + mine, mine, {"task": "caption"}, "4 answers to 2 examples, and 2 to 2"),
        ([], [], {"task": "caption"}, "0 answers to 0 examples"),
        ([], [], {}, "of 0 tasks"),
    ):
        with pytest.raises(DataError, match=message):
            paired_difference(one, other, **options)  # type: ignore[arg-type]
    changed = score_answers([(_example(1, "", ("no",)), "yes")])
    with pytest.raises(DataError, match=r"line 1: one model was scored by the references"):
        paired_difference(mine[:1], changed)
    for text in ("{}", "[]", "no JSON", '{"references": 1, "statistics": {}}'):
        (tmp_path / "bad.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="line 1 is no answer"):
            read_answers(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="missing"):
        read_answers(tmp_path / "missing.jsonl")
