"""What an answer is worth, task by task, by implementations that are kept by others.

The score of many examples need not be a mean over them: BLEU divides sums of n-gram counts, an error rate divides a sum
of edits by a sum of lengths. So an example is turned into a few numbers, its *statistics*, and a score is a function of
their sums. Sums over some of the examples give the scores of kinds and modalities, sums over resampled examples give
intervals (`intervals`), and no answer is looked at twice.

| task | metric | statistics | by |
|---|---|---|---|
| question | exact match (headline), VQA accuracy | worth, 1 | equality; `vqa` |
| caption | CIDEr (headline) | CIDEr, 1 | pycocoevalcap |
| caption | BLEU-4, 0 to 100 | lengths, matching and all n-grams | sacrebleu |
| reading | character accuracy (headline), character error rate | edits, characters | jiwer |
| reading | word error rate; exact match | edits, words; worth, 1 | jiwer; equality |

CIDEr here is what pycocoevalcap computes (CIDEr-D, 0 to 10; papers print it a hundredfold), but with sacrebleu's 13a
tokenizer, lower-cased, in place of COCO's, which is a Java program; tokens without a letter or digit are left out, as
COCO's are. It weighs n-grams by how many of the task's examples have them in a reference. These document frequencies
belong to the data: they stay the same for parts, for resamples and for other models, so scores can be subtracted. One
example alone always scores 0.

White space is evened out everywhere. Case is too, except in reading, where it is part of what is read. Where several
texts are accepted, the nearest counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from hyperfade.errors import MissingLibraryError
from hyperfade.measure.vqa import vqa_accuracy

Array = np.ndarray[Any, np.dtype[np.float64]]
References = Sequence[Sequence[str]]

TASKS = ("question", "caption", "reading")


@dataclass(frozen=True)
class Metric:
    """A score as a function of summed statistics."""

    name: str
    of: Callable[[Array], Array]
    """(…, statistics) summed over examples → (…) scores."""
    statistics: Callable[[Sequence[str], References], Array]
    """Answers and the references of each → (examples, statistics)."""
    counts_hits: bool = False
    """Whether every example is worth 0 or 1, so that the score is a share."""


def statistics(task: str, answers: Sequence[str], references: References) -> dict[str, Array]:
    """(examples, statistics) of every metric of `task`; `references[i]` are the texts accepted for `answers[i]`.

    References without a character but white space are left out. Raises `MissingLibraryError` for captions without
    pycocoevalcap.
    """
    given = [[text for text in texts if text.strip()] for texts in references]
    return {metric.name: metric.statistics(answers, given) for metric in METRICS[task]}


def require(task: str) -> None:
    """Raises `MissingLibraryError` if `task` cannot be scored with what is installed."""
    if task == "caption":
        _cider_scorer()


def is_right(answer: str, references: Sequence[str]) -> bool:
    """Exact match after case and white space are evened out."""
    return _joined(answer).casefold() in {_joined(reference).casefold() for reference in references}


def _joined(text: str) -> str:
    return " ".join(text.split())


# --- from sums to scores ----------------------------------------------------------------------------------------------


def _ratio(sums: Array) -> Array:
    return sums[..., 0] / sums[..., 1]


def _accuracy(sums: Array) -> Array:
    return np.maximum(0.0, 1.0 - _ratio(sums))


def _bleu(sums: Array) -> Array:
    """sacrebleu's corpus score of statistics in the order of `_ngrams`."""
    rows = sums.reshape(-1, sums.shape[-1])
    scores = [
        BLEU.compute_bleu(row[2:6].tolist(), row[6:].tolist(), int(row[0]), int(row[1]), smooth_method="exp").score
        for row in rows
    ]
    return np.array(scores).reshape(sums.shape[:-1])


# --- from texts to statistics -----------------------------------------------------------------------------------------


def _each(worth: Callable[[str, Sequence[str]], float]) -> Callable[[Sequence[str], References], Array]:
    """The statistics of a mean: what each answer is worth, and 1."""

    def pairs(answers: Sequence[str], references: References) -> Array:
        return np.array([(worth(*pair), 1.0) for pair in zip(answers, references, strict=True)], float).reshape(-1, 2)

    return pairs


def _is_read(answer: str, references: Sequence[str]) -> bool:
    return _joined(answer) in {_joined(reference) for reference in references}


def _edits(process: Callable[[str, str], Any]) -> Callable[[Sequence[str], References], Array]:
    """Edits from the nearest reference, and that one's length, by a function of jiwer."""

    def nearest(answer: str, references: Sequence[str]) -> tuple[int, int]:
        pairs = []
        for reference in references:
            found = process(_joined(reference), _joined(answer))
            kept = found.hits + found.substitutions + found.deletions
            pairs.append((found.substitutions + found.deletions + found.insertions, kept))
        return min(pairs, key=lambda pair: (pair[0] / pair[1], pair[1]))  # their order must not matter

    def pairs(answers: Sequence[str], references: References) -> Array:
        return np.array([nearest(*pair) for pair in zip(answers, references, strict=True)], float).reshape(-1, 2)

    return pairs


def _ngrams(answers: Sequence[str], references: References) -> Array:
    """Length, the nearest reference length, matching n-grams and all n-grams for n = 1 to 4, by sacrebleu."""
    scorer = BLEU(lowercase=True, tokenize="13a", effective_order=True)  # the order is for the score it gives, unused
    found = [scorer.sentence_score(*pair) for pair in zip(answers, references, strict=True)]
    return np.array([(s.sys_len, s.ref_len, *s.counts, *s.totals) for s in found], float).reshape(-1, 10)


def _cider(answers: Sequence[str], references: References) -> Array:
    scorer = _cider_scorer()(n=4)
    tokenizer = Tokenizer13a()

    def words(text: str) -> str:
        tokens = tokenizer(_joined(text).lower()).split()
        return " ".join(token for token in tokens if any(sign.isalnum() for sign in token))

    pairs = [
        (words(answer), [words(text) for text in texts]) for answer, texts in zip(answers, references, strict=True)
    ]
    if not any(text for _, texts in pairs for text in texts):  # what pycocoevalcap has no answer to
        return np.array([(0.0, 1.0) for _ in pairs]).reshape(-1, 2)
    for pair in pairs:
        scorer += pair
    _, scores = scorer.compute_score()
    return np.stack([scores, np.ones_like(scores)], axis=1)


def _cider_scorer() -> Any:
    try:  # optional: its package brings 100 MB of Java programs, none of which is used
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ImportError as error:
        raise MissingLibraryError(
            "Captions are scored by CIDEr, and pycocoevalcap is not installed.", 'pip install "hyperfade[metrics]"'
        ) from error
    return CiderScorer


METRICS: dict[str, tuple[Metric, ...]] = {
    "question": (
        Metric("exact_match", _ratio, _each(is_right), counts_hits=True),
        Metric("vqa_accuracy", _ratio, _each(vqa_accuracy)),
    ),
    "caption": (Metric("cider", _ratio, _cider), Metric("bleu4", _bleu, _ngrams)),
    "reading": (
        Metric("character_accuracy", _accuracy, _edits(jiwer.process_characters)),
        Metric("character_error_rate", _ratio, _edits(jiwer.process_characters)),
        Metric("word_error_rate", _ratio, _edits(jiwer.process_words)),
        Metric("exact_match", _ratio, _each(_is_read), counts_hits=True),
    ),
}
"""The metrics of every task, its headline first."""
