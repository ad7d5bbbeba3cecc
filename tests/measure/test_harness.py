"""lm-evaluation-harness on compressed models in memory, against the same numbers worked out without it. No network."""

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import easy_vqa
import pytest
import torch
import yaml
from tiny_models import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hyperfade import cli
from hyperfade.errors import DataError, MissingLibraryError
from hyperfade.hub import EMBEDDED_FOLDER, fold_, load, load_processor, save
from hyperfade.measure import run_tasks
from hyperfade.nn import light_modules
from hyperfade.recipe import Layer, Replace
from hyperfade.report import harness_lines
from hyperfade.surgery import plan, swap_

CHOICES = ["red", "a blue triangle", "green"]
WORDS = ["what", "is", "shown", "color", "the", "shape", "in", "red", "a", "blue", "triangle", "green", "it", "?"]
needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def compressed() -> tuple[Any, PreTrainedTokenizerFast]:
    """A tiny random Llama, all FFNs replaced, and a tokenizer of whole words."""
    model = FAMILIES["llama"].build()
    swap_(model, plan(model, Replace(language=Layer(n=4))))
    fold_(model)
    assert len(light_modules(model)) == 9
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    vocabulary |= {f"word{i}": i for i in range(len(vocabulary), 96)}  # whatever the model says can be written
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> None:
    """A task of the harness in `folder`: a YAML file, and its data beside it."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 2.5},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | fields), encoding="utf-8")


def questions(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (4,), generator=generator)) for _ in range(count)]


@torch.no_grad()
def likelihood(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """log P(answer | question), one token after the other."""
    asked, said = (tokenizer(text, add_special_tokens=False).input_ids for text in (question, answer))
    logs = model(torch.tensor([asked + said])).logits.log_softmax(-1)[0]
    return sum(logs[len(asked) + i - 1, token].item() for i, token in enumerate(said))


@needs_harness
def test_choices_are_those_of_the_models_likelihoods(compressed: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = compressed
    rows = [{"question": question, "label": i % 3} for i, question in enumerate(questions(12))]
    write_task(
        tmp_path,
        "tiny_colors",
        rows,
        output_type="multiple_choice",
        doc_to_choice=CHOICES,
        doc_to_target="label",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    found = run_tasks(model, tokenizer, ["tiny_colors"], include=tmp_path, batch_size=5)
    scores = [[likelihood(model, tokenizer, row["question"], choice) for choice in CHOICES] for row in rows]
    right = [max(range(3), key=own.__getitem__) == row["label"] for own, row in zip(scores, rows, strict=True)]
    assert 0 < sum(right) < 12
    mean = sum(right) / 12
    deviation = math.sqrt(sum((hit - mean) ** 2 for hit in right) / 11)
    metrics = found["results"]["tiny_colors"]
    assert metrics["acc,none"] == pytest.approx(mean)
    assert metrics["acc_stderr,none"] == pytest.approx(deviation / math.sqrt(12))
    assert found["n-samples"]["tiny_colors"] == {"original": 12, "effective": 12}
    assert found["versions"] == {"tiny_colors": 2.5}
    assert json.loads(json.dumps(found)) == found
    margin = metrics["acc_stderr,none"]
    assert [line.split() for line in harness_lines(found)] == [
        ["tiny_colors", "acc", f"{mean:.4f}", "±", f"{margin:.4f}", "of", "12"]
    ]
    few = run_tasks(model, tokenizer, [" tiny_colors ", ""], include=tmp_path, limit=5)
    assert few["results"]["tiny_colors"]["acc,none"] == pytest.approx(sum(right[:5]) / 5)
    assert few["n-samples"]["tiny_colors"]["effective"] == 5


@needs_harness
def test_answers_are_those_the_model_generates(compressed: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = compressed
    rows = []
    for i, question in enumerate(questions(6)):
        ids = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
        said = model.generate(ids, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]
        text = tokenizer.decode(said, skip_special_tokens=True)
        rows.append({"question": question, "answer": text if i % 3 else "something else"})
    write_task(
        tmp_path,
        "tiny_says",
        rows,
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    found = run_tasks(model, tokenizer, ["tiny_says"], include=tmp_path, batch_size=2)
    assert found["results"]["tiny_says"]["exact_match,none"] == pytest.approx(4 / 6)


@needs_harness
def test_a_model_that_takes_images_is_asked_about_them(tmp_path: Path) -> None:
    """The shipped model through `hf-multimodal`, with its own chat template."""
    asked, answers, numbers = easy_vqa.get_test_questions()
    images = easy_vqa.get_test_image_paths()
    rows = [{"question": asked[i], "answer": answers[i], "image": images[numbers[i]]} for i in range(8)]
    write_task(
        tmp_path,
        "tiny_sees",
        rows,
        output_type="generate_until",
        doc_to_text="<image>{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    with (tmp_path / "tiny_sees.yaml").open("a", encoding="utf-8") as file:
        file.write("doc_to_image: !function opened.images\n")
    code = 'from PIL import Image\n\n\ndef images(row):\n    return [Image.open(row["image"]).convert("RGB")]\n'
    (tmp_path / "opened.py").write_text(code, encoding="utf-8")
    embedded = load(str(EMBEDDED_FOLDER), "float32"), load_processor(str(EMBEDDED_FOLDER))
    found = run_tasks(*embedded, ["tiny_sees"], include=tmp_path, batch_size=4, chat=True)
    assert found["results"]["tiny_sees"]["exact_match,none"] == 1  # as `evaluate` finds for the same eight


@needs_harness
def test_the_command_prints_and_writes_what_the_harness_finds(
    compressed: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = compressed
    rows = [{"question": question, "label": i % 3} for i, question in enumerate(questions(6))]
    for name in ("tiny_one", "tiny_two"):
        write_task(tmp_path, name, rows, output_type="multiple_choice", doc_to_choice=CHOICES, doc_to_target="label")
    save(model, tmp_path / "model", tokenizer)
    arguments = [str(tmp_path / "model"), "--tasks", "tiny_two,tiny_one", "--include", str(tmp_path), "--limit", "4"]
    monkeypatch.setattr(sys, "argv", ["hyperfade", "evaluate", *arguments, "--output", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    expected = run_tasks(model, tokenizer, ["tiny_one", "tiny_two"], include=tmp_path, limit=4)
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(harness_lines(expected))
    written = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert written["harness"]["results"] == expected["results"]
    assert (written["model"], written["limit"], written["chat"]) == (str(tmp_path / "model"), 4, False)


@needs_harness
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["no_such_task"], "has no task no_such_task, nor has"),
        (["tiny_lost"], "The data of tiny_lost cannot be loaded"),
        ([" "], "No task of lm-evaluation-harness is named"),
    ],
    ids=["unknown", "no data", "nothing"],
)
def test_tasks_that_cannot_be_run_are_named(
    tasks: list[str], message: str, compressed: tuple[Any, Any], tmp_path: Path
) -> None:
    write_task(tmp_path, "tiny_lost", [], output_type="multiple_choice", doc_to_choice=CHOICES, doc_to_target="label")
    (tmp_path / "tiny_lost.jsonl").unlink()
    with pytest.raises(DataError, match=message):
        run_tasks(*compressed, tasks, include=tmp_path)


@needs_harness
def test_a_folder_of_tasks_must_be_there(compressed: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is no folder"):
        run_tasks(*compressed, ["tiny_colors"], include=tmp_path / "nowhere")


def test_without_the_harness_the_extra_is_named(compressed: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(MissingLibraryError, match=r'pip install "hyperfade\[lm-eval\]"'):
        run_tasks(*compressed, ["arc_easy"])
