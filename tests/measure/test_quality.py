"""Quality against answers asked for one by one, and intervals against a textbook."""

import json
import random
from pathlib import Path
from typing import Any

import easy_vqa
import pytest
import torch
from PIL import Image

from hyperfade.errors import DataError
from hyperfade.hub import EMBEDDED_FOLDER, load, load_processor
from hyperfade.measure import evaluate, is_right, machine, wilson

SHAPES = ("circle", "rectangle", "triangle")


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load(str(EMBEDDED_FOLDER), "float32"), load_processor(str(EMBEDDED_FOLDER))


def _answer_alone(model: Any, processor: Any, question: str, image: Image.Image) -> str:
    """One question, no batch, no padding: transformers alone."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=image.convert("RGB"), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_scores_equal_those_of_questions_asked_one_by_one(embedded: tuple[Any, Any]) -> None:
    limit, seed, batch_size = 200, 5, 7
    questions, answers, numbers = easy_vqa.get_test_questions()
    images = easy_vqa.get_test_image_paths()
    chosen = sorted(random.Random(seed).sample(range(len(questions)), limit))
    right: dict[str, list[bool]] = {"yes/no": [], "shape": [], "color": []}
    for i in chosen:
        given = _answer_alone(*embedded, questions[i], Image.open(images[numbers[i]]))
        kind = "yes/no" if answers[i] in ("yes", "no") else "shape" if answers[i] in SHAPES else "color"
        right[kind].append(given.strip() == answers[i])
    progress: list[tuple[int, int]] = []
    quality = evaluate(
        *embedded,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=4,
        on_batch=lambda *seen: progress.append(seen),
    )
    every = [hit for hits in right.values() for hit in hits]
    assert quality.overall == wilson(sum(every), limit)
    assert quality.by_kind == {kind: wilson(sum(hits), len(hits)) for kind, hits in right.items()}
    assert quality.by_kind["color"].accuracy > 0.5  # the shipped model knows its colours; a guess is right in a tenth
    assert quality.skipped == ()
    assert progress == [(min(i + batch_size, limit), limit) for i in range(0, limit, batch_size)]


def test_another_seed_asks_other_questions(embedded: tuple[Any, Any]) -> None:
    scores = [evaluate(*embedded, limit=20, seed=seed, max_new_tokens=4) for seed in (0, 0, 1)]
    assert scores[0] == scores[1]
    counts = [{kind: score.count for kind, score in quality.by_kind.items()} for quality in scores]
    assert counts[0] != counts[2]


def _rows(tmp_path: Path) -> Path:
    """Four rows: one whose second reference is the answer, one whose image is broken, two without a kind."""
    questions, answers, numbers = easy_vqa.get_test_questions()
    images = easy_vqa.get_test_image_paths()
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = []
    for i in range(4):
        image = "broken.png" if i == 2 else images[numbers[i]]
        content = [{"type": "image"}, {"type": "text", "text": questions[i]}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "unthinkable"}]
        row = {"messages": messages, "images": [image], "references": [answers[i].upper()] if i == 0 else []}
        rows.append(json.dumps(row | ({"kind": "first"} if i < 2 else {})))
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def test_bad_samples_are_counted_or_stop_the_evaluation(tmp_path: Path, embedded: tuple[Any, Any]) -> None:
    path = _rows(tmp_path)
    quality = evaluate(*embedded, str(path), max_new_tokens=4, on_bad_sample="skip")
    assert quality.overall.count == 3
    assert list(quality.by_kind) == ["first"]  # examples without a kind count in the whole only
    assert quality.by_kind["first"].count == 2
    assert [where for where, _ in quality.skipped] == ["questions.jsonl line 3"]
    assert "cannot be read" in quality.skipped[0][1]
    with pytest.raises(DataError, match=r"questions\.jsonl line 3"):
        evaluate(*embedded, str(path), max_new_tokens=4)


def test_any_reference_will_do_in_any_case(tmp_path: Path, embedded: tuple[Any, Any]) -> None:
    path = _rows(tmp_path)
    quality = evaluate(*embedded, str(path), max_new_tokens=4, on_bad_sample="skip")
    question, answer, image = (part[0] for part in easy_vqa.get_test_questions())
    given = _answer_alone(*embedded, question, Image.open(easy_vqa.get_test_image_paths()[image]))
    assert quality.overall.accuracy == pytest.approx((given.strip() == answer) / 3)


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("yes", ["yes"], True),
        (" Yes\n", ["yes"], True),
        ("a  red\tcircle", ["a red circle"], True),
        ("STRASSE", ["straße"], True),
        ("grey", ["gray", "grey"], True),
        ("yes.", ["yes"], False),
        ("", ["yes"], False),
        ("yes yes", ["yes"], False),
        ("redcircle", ["red circle"], False),
        ("yes", [], False),
    ],
)
def test_right_is_equal_but_for_case_and_white_space(answer: str, references: list[str], right: bool) -> None:
    assert is_right(answer, references) is right


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
    score = wilson(hits, count)
    assert score.accuracy == hits / count
    assert (score.low, score.high) == pytest.approx((low, high), abs=5e-5)  # what the table rounds off
    mirrored = wilson(count - hits, count)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((score.low, score.high), abs=1e-12)


def test_wilson_of_nothing_knows_nothing() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high, wilson(0, 0).count) == (0.0, 1.0, 0)


def test_the_machine_says_what_numbers_depend_on() -> None:
    facts = machine()
    assert facts["torch"] == torch.__version__.partition("+")[0] or facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert all(facts[key] for key in ("date", "processor", "cores", "accelerator", "python", "transformers"))
