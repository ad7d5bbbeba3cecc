"""Scores against the libraries called directly, an example worked by hand, and what must hold for any answers."""

import math
import random
import sys

import jiwer
import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from hyperfade.errors import MissingLibraryError
from hyperfade.measure import METRICS, TASKS, is_right, statistics
from hyperfade.measure.vqa import even_out, vqa_accuracy

CAPTIONS = [  # answer, references
    ("A dog runs on the beach.", ["A dog is running on the beach.", "A brown dog runs along the shore"]),
    ("two men play chess in a park", ["Two men are playing chess in the park", "Men play chess.", "A game of chess"]),
    ("a red bus", ["A red double-decker bus drives down the street"]),
    ("a cat sits on the mat , asleep", ["The cat sits on the mat, asleep!", "a cat asleep on a mat"]),
    ("", ["An empty street at night", "nobody is here"]),
]
READINGS = [
    ("NO SMOKING", ["NO SMOKING"]),
    ("Exit  on\nthe left", ["Exit on the right"]),
    ("exit", ["EXIT"]),
    ("", ["open 24 hours"]),
    ("platform 9 3/4", ["Platform 9", "platform 9 3/4 "]),
]


def scores(task: str, pairs: list[tuple[str, list[str]]]) -> dict[str, float]:
    """Every metric of the task over all pairs."""
    answers, references = zip(*pairs, strict=True)
    found = statistics(task, answers, references)
    return {metric.name: float(metric.of(found[metric.name].sum(axis=0))) for metric in METRICS[task]}


# --- caption ---------------------------------------------------------------------------------------------------------


def test_bleu_is_sacrebleus_corpus_score() -> None:
    answers = [answer for answer, _ in CAPTIONS]
    most = max(len(texts) for _, texts in CAPTIONS)
    streams = [[texts[i] if i < len(texts) else None for _, texts in CAPTIONS] for i in range(most)]
    expected = sacrebleu.corpus_bleu(answers, streams, lowercase=True, tokenize="13a")  # type: ignore[arg-type]
    assert 10 < expected.score < 60
    assert scores("caption", CAPTIONS)["bleu4"] == pytest.approx(expected.score, rel=1e-12)


def test_cider_is_pycocoevalcaps() -> None:
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    def tokens(text: str) -> str:  # by hand what 13a does to these captions
        for sign in ".,!":
            text = text.replace(sign, " ")
        return " ".join(text.lower().split())

    references = {i: [tokens(text) for text in texts] for i, (_, texts) in enumerate(CAPTIONS)}
    answers = {i: [tokens(answer)] for i, (answer, _) in enumerate(CAPTIONS)}
    mean, each = Cider().compute_score(references, answers)
    assert 1 < mean < 9
    assert scores("caption", CAPTIONS)["cider"] == pytest.approx(mean, rel=1e-12)
    found = statistics("caption", *zip(*CAPTIONS, strict=True))["cider"]
    assert found[:, 0] == pytest.approx(each, rel=1e-12)
    assert found[4, 0] == 0


def test_captions_without_a_word_score_zero_and_not_an_error() -> None:
    pytest.importorskip("pycocoevalcap")
    assert scores("caption", [("?", ["!"]), ("a dog", ["..."])]) == {"cider": 0, "bleu4": pytest.approx(0, abs=1)}
    assert scores("caption", [("a dog runs home", ["a dog runs home"])])["cider"] == 0  # nothing to weigh n-grams by


def test_captions_without_their_library_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    with pytest.raises(MissingLibraryError, match=r'pip install "hyperfade\[metrics\]"'):
        statistics("caption", ["a dog"], [["a dog"]])
    assert statistics("question", ["a dog"], [["a dog"]])["exact_match"].tolist() == [[1, 1]]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_error_rates_are_jiwers_over_the_nearest_references() -> None:
    nearest = [texts[-1].strip() for _, texts in READINGS]
    answers = [" ".join(answer.split()) for answer, _ in READINGS]
    found = scores("reading", READINGS)
    assert found["character_error_rate"] == pytest.approx(jiwer.cer(nearest, answers), rel=1e-12)
    assert found["word_error_rate"] == pytest.approx(jiwer.wer(nearest, answers), rel=1e-12)
    assert found["character_accuracy"] == pytest.approx(1 - jiwer.cer(nearest, answers), rel=1e-12)
    assert 0.3 < found["character_error_rate"] < 0.5
    assert found["exact_match"] == 2 / 5  # case is read as well


def test_character_accuracy_does_not_fall_below_zero() -> None:
    found = scores("reading", [("once upon a time there was a model that would not stop", ["stop"])])
    assert found["character_error_rate"] > 5
    assert found["character_accuracy"] == 0


# --- question --------------------------------------------------------------------------------------------------------


def test_vqa_accuracy_worked_by_hand() -> None:
    """Ten people: yes ×3, no ×6, maybe ×1.

    "yes": without one of the three who said it two others match, 2/3; without another three match, 1.
    """
    people = ["yes"] * 3 + ["no"] * 6 + ["maybe"]
    assert vqa_accuracy("yes", people) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)  # 0.9
    assert vqa_accuracy("no", people) == 1
    assert vqa_accuracy("maybe", people) == pytest.approx((1 * 0 + 9 * 1 / 3) / 10)  # 0.3
    assert vqa_accuracy("perhaps", people) == 0


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("matches", range(12))
def test_vqa_accuracy_is_the_mean_over_all_ways_to_leave_one_out(count: int, matches: int) -> None:
    people = (["Red."] * matches + ["blue"] * count)[:count]
    random.Random(0).shuffle(people)
    left = [people[:i] + people[i + 1 :] for i in range(count)]
    expected = sum(min(1, others.count("Red.") / 3) for others in left) / count
    if count < 3:  # accepted alternatives, not people
        expected = float("Red." in people)
    assert vqa_accuracy("red", people) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "even"),
    [  # by the rules of visualqa.org/evaluation.html
        ("Yes.", "yes"),
        ("The cat", "cat"),
        ("two", "2"),
        ("none", "0"),
        ("100,978", "100978"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("t-shirt", "t shirt"),
        ("2.5", "2.5"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("dont", "don't"),
        ("Couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        (" a\n dog\t", "dog"),
        ("What?!", "what"),
        ("the", ""),
    ],
)
def test_answers_are_evened_out_by_the_rule(answer: str, even: str) -> None:
    assert even_out(answer) == even


# --- what must hold for any answers ----------------------------------------------------------------------------------

SOME = ("red", "a", "dog", "2", "two", "Cat!", "runs,", "on", "the", "U.S.", "beach", "don't")
WORDS = st.lists(st.sampled_from(SOME), min_size=4, max_size=9)
TEXTS = WORDS.map(" ".join)
PAIRS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=4)), min_size=1, max_size=5)


@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_perfect_answers_are_perfect(texts: list[str]) -> None:
    pairs = [(text, [text]) for text in texts]
    assert scores("question", pairs) == {"exact_match": 1, "vqa_accuracy": 1}
    perfect = {"character_accuracy": 1, "character_error_rate": 0, "word_error_rate": 0, "exact_match": 1}
    assert scores("reading", pairs) == perfect
    found = scores("caption", pairs)
    assert found["bleu4"] == pytest.approx(100)
    assert found["cider"] <= 10 + 1e-9


def test_the_perfect_cider_is_ten() -> None:
    texts = ["a dog runs on the beach", "two men play chess outside", "one red bus is parked there"]
    assert scores("caption", [(text, [text]) for text in texts])["cider"] == pytest.approx(10)


@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_examples_and_of_references_does_not_matter(
    pairs: list[tuple[str, list[str]]], chance: random.Random
) -> None:
    shuffled = [(answer, chance.sample(texts, len(texts))) for answer, texts in chance.sample(pairs, len(pairs))]
    for task in TASKS:
        assert scores(task, shuffled) == pytest.approx(scores(task, pairs), rel=1e-9, abs=1e-12)


@given(PAIRS)
def test_scores_stay_in_their_range_and_agree_with_each_other(pairs: list[tuple[str, list[str]]]) -> None:
    for name, value in (scores("question", pairs) | scores("reading", pairs)).items():
        assert math.isfinite(value)
        assert 0 <= value <= (math.inf if name.endswith("rate") else 1)
    captions = scores("caption", pairs)
    assert -1e-9 <= captions["cider"] <= 10 + 1e-9
    assert 0 <= captions["bleu4"] <= 100 + 1e-9
    for answer, texts in pairs:
        if is_right(answer, texts):
            assert vqa_accuracy(answer, texts) > 0 or len(texts) >= 3


@given(PAIRS)
def test_the_statistics_of_an_example_do_not_depend_on_the_others(pairs: list[tuple[str, list[str]]]) -> None:
    """But for CIDEr, whose document frequencies are the data's."""
    for task in TASKS:
        whole = statistics(task, *zip(*pairs, strict=True))
        for row, (answer, texts) in enumerate(pairs):
            alone = statistics(task, [answer], [texts])
            for name in whole.keys() - {"cider"}:
                assert np.array_equal(whole[name][row], alone[name][0])
