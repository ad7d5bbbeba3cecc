"""From a recipe to a finished model on the shipped example model, and back from every kind of interruption."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import easy_vqa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hyperfade.distill import latest_step
from hyperfade.errors import DataError, NothingMatchedError, OutputError, PlanError
from hyperfade.hub import EMBEDDED_FOLDER, load, load_processor
from hyperfade.measure import evaluate, paired_difference, read_answers
from hyperfade.nn import LowRankLinear, PHMLinear, light_modules
from hyperfade.pipeline import compress
from hyperfade.recipe import Recipe

Lines = list[str]
ONE = ["*language_model.layers.1.*"]  # stays dense: the fit of one wide language layer is enough
SMALL = {"language": None, "vision": {"n": 4}}  # fitted in a second; the language model's wide matrices take several


def recipe_for(output: Path, **changes: Any) -> Recipe:
    """The shipped model with a budget of seconds; sections in `changes` are merged into it."""
    fields: dict[str, Any] = {
        "model": str(EMBEDDED_FOLDER),
        "output": output,
        "dtype": "float32",
        "save_dtype": "float16",
        "fit": {"samples": 16, "batch_size": 8, "sweeps": 2},
        "train": {"fade_steps": 2, "polish_steps": 2, "batch_size": 4, "log_every": 2, "checkpoint_every": 2},
        "data": {"evaluation_limit": 64, "max_new_tokens": 4},
    }
    for key, value in changes.items():
        fields[key] = {**fields[key], **value} if isinstance(value, dict) and key in fields else value
    return Recipe.parse(fields)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- a whole run -----------------------------------------------------------------------------------------------------

RIVALS: dict[str, Any] = {
    "low_rank": {
        "replace": {
            "language": {"kind": "low_rank", "fraction": 0.25},
            "vision": {"kind": "low_rank", "fraction": 0.25},
            "exclude": ONE,
        }
    },
    "paper": {
        "replace": {"language": {"kind": "paper", "terms": 2}, "vision": {"kind": "paper", "terms": 2}, "exclude": ONE},
        "fit": {"method": "frobenius", "sweeps": 1},
        "train": {
            "fade_steps": 3,
            "polish_steps": 1,
            "batch_size": 4,
            "train_also": ["*lm_head*", "*embed_tokens*"],
            "lora_rank": 2,
            "kd_ramp": True,
            "reconstruction_weight": 5e-6,
        },
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Any], Lines]:
    recipe = recipe_for(tmp_path_factory.mktemp("finished") / "out", replace={"exclude": ONE}, rivals=RIVALS)
    lines: Lines = []
    return recipe, compress(recipe, lines.append), lines


def test_the_results_hold_every_number_for_every_model(finished: tuple[Recipe, dict[str, Any], Lines]) -> None:
    recipe, results, _ = finished
    assert json.loads((recipe.output / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    for entry in (results, results["rivals"]["low_rank"], results["rivals"]["paper"]):
        assert 0 <= entry["quality"]["compressed"] <= 1
        assert entry["quality"]["dense"] == results["quality"]["dense"]
        for key in ("ffn_params_ratio", "params_ratio", "prefill_speedup", "decode_speedup"):
            assert isinstance(entry[key], float)
            assert entry[key] > 0
        assert entry["disk_bytes"]["dense"] == (EMBEDDED_FOLDER / "model.safetensors").stat().st_size
        assert entry["reload_bit_equal"] is True
        assert entry["fit_seconds"] > 0
        assert entry["training"]["steps"] == 4
    assert list(results["rivals"]) == ["low_rank", "paper"]
    assert results["recipe"]["seed"] == recipe.seed
    assert results["machine"]["torch"] == torch.__version__ or results["machine"]["torch"] in torch.__version__
    assert results["skipped"] == []


def test_sizes_are_those_of_the_files_and_layers(finished: tuple[Recipe, dict[str, Any], Lines]) -> None:
    recipe, results, _ = finished
    dense = load(str(EMBEDDED_FOLDER), "float32")
    dense_parameters = sum(p.numel() for p in dense.parameters())
    folders = {"compressed": recipe.output / "model"} | {
        name: recipe.output / "rivals" / name / "model" for name in RIVALS
    }
    kinds = {"compressed": PHMLinear, "low_rank": LowRankLinear, "paper": PHMLinear}
    for name, folder in folders.items():
        entry = results if name == "compressed" else results["rivals"][name]
        assert entry["disk_bytes"]["compressed"] == (folder / "model.safetensors").stat().st_size
        model = load(str(folder))
        light = light_modules(model)
        assert len(light) == len(entry["layers"]) == 9
        assert all(isinstance(layer, kinds[name]) for layer in light.values())
        assert entry["params_ratio"] == sum(p.numel() for p in model.parameters()) / dense_parameters
        before = sum(p.numel() for n in light for p in dense.get_submodule(n).parameters())
        after = sum(p.numel() for layer in light.values() for p in layer.parameters())
        assert entry["ffn_params_ratio"] == pytest.approx(after / before, rel=1e-9)
        assert results["parameters"][name] == sum(p.numel() for p in model.parameters())
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
        assert model.dtype == torch.float32
    assert results["ffn_params_ratio"] == pytest.approx(0.25, abs=0.005)
    assert results["rivals"]["low_rank"]["ffn_params_ratio"] <= 0.255


def test_the_quality_is_that_of_the_saved_folder(finished: tuple[Recipe, dict[str, Any], Lines]) -> None:
    recipe, results, _ = finished
    for folder, key in ((str(EMBEDDED_FOLDER), "dense"), (str(recipe.output / "model"), "compressed")):
        quality = evaluate(load(folder, "float32"), load_processor(folder), limit=64, max_new_tokens=4)
        assert results["quality"][key] == quality.overall.value
        assert results["quality"]["details"][key] == json.loads(json.dumps(quality.to_dict()))
        assert results["quality"]["details"][key]["tasks"]["question"]["scores"]["exact_match"]["count"] == 64
    retention = results["quality"]["compressed"] / results["quality"]["dense"]
    assert results["quality"]["task"] == "question"
    assert results["quality"]["retention"] == results["quality"]["retention_by_task"]["question"] == retention


def test_every_models_answers_are_kept_for_paired_comparisons(
    finished: tuple[Recipe, dict[str, Any], Lines],
) -> None:
    recipe, results, _ = finished
    files = {path.stem: path for path in (recipe.output / "answers").iterdir()}
    assert files.keys() == {"dense", "compressed", *RIVALS}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) == 64 for path in files.values())
    answers = {name: read_answers(path) for name, path in files.items()}
    places = [[answer.where for answer in given] for given in answers.values()]
    assert places == places[:1] * 4
    assert len(set(places[0])) == 64
    for name in RIVALS:
        entry = results["rivals"][name]["quality"]
        difference = paired_difference(answers[name], answers["dense"])
        assert difference.value == entry["compressed"] - entry["dense"]  # 64ths: exact
        itself = paired_difference(answers[name], answers[name])
        assert (itself.value, itself.low, itself.high, itself.count) == (0, 0, 0, 64)


@pytest.mark.parametrize(("asked", "found"), [("eager", "eager"), ("sdpa", "sdpa"), (None, "sdpa")])
def test_the_attention_asked_for_is_the_models(asked: str | None, found: str, tmp_path: Path) -> None:
    import hyperfade.pipeline as pipeline

    task = pipeline._checked(recipe_for(tmp_path / "out", attention=asked))
    config = task.dense().config
    assert config._attn_implementation == found
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == found


def test_training_batches_ask_for_the_logits_of_answers_alone(tmp_path: Path) -> None:
    import hyperfade.pipeline as pipeline

    task = pipeline._checked(recipe_for(tmp_path / "out"))
    batch = {name: part.cpu() for name, part in task.training_batch([0, 1, 2]).items()}
    whole = task.collator.training_batch([task.source[i] for i in range(3)])
    assert task.keeps_logits
    assert batch["logits_to_keep"].shape == batch["labels"].shape[1:] < whole["labels"].shape[1:]
    assert torch.equal(batch["labels"][batch["labels"] != -100], whole["labels"][whole["labels"] != -100])
    assert torch.equal(batch["input_ids"], whole["input_ids"])


def test_the_paper_rival_trained_all_that_it_was_told_to(finished: tuple[Recipe, dict[str, Any], Lines]) -> None:
    recipe, _, _ = finished
    folders = [EMBEDDED_FOLDER, recipe.output / "rivals" / "paper" / "model", recipe.output / "model"]
    dense, paper, own = (load(str(folder), "float32").state_dict() for folder in folders)
    names = [n for n in dense if n.endswith(("embed_tokens.weight", "q_proj.weight")) and "vision" not in n]
    assert len(names) == 3
    for name in names:
        assert not torch.equal(dense[name], paper[name])
        assert torch.equal(dense[name], own[name])
    assert not any("lora" in name for name in paper)
    fitted = load_file(next((recipe.output / "rivals" / "paper" / "work" / "fit").glob("*language*0.mlp.safetensors")))
    trained = 0
    for key, value in fitted.items():
        matrix, _, part = key.partition("/")
        trained += not torch.equal(value.half().float(), paper[f"{matrix}.{part}"]) if part.endswith("weight") else 0
    assert trained == 3  # gate, up and down trained although LoRA came to the attention


def test_pages_cards_and_plots_are_there(finished: tuple[Recipe, dict[str, Any], Lines]) -> None:
    recipe, results, lines = finished
    for name in ("training", "layers", "comparison"):
        with Image.open(recipe.output / "plots" / f"{name}.png") as image:
            image.load()
            assert (image.format, min(image.size) > 200) == ("PNG", True)
    page = (recipe.output / "report.md").read_text(encoding="utf-8")
    for text in (f"{results['quality']['compressed']:.2%}", "low-rank, whitened", "paper's recipe", "plots/layers.png"):
        assert text in page
    for folder in (recipe.output / "model", *(recipe.output / "rivals" / name / "model" for name in RIVALS)):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlibrary_name: transformers\n")
    assert any("low-rank of the same size" in line for line in lines)
    assert any(line.startswith("[paper] step 4/4") for line in lines)


def test_a_rival_calibrates_on_samples_of_its_own(tmp_path: Path) -> None:
    """Its fit is its own in every key."""
    seen: dict[str, int] = {}
    import hyperfade.build as build
    import hyperfade.pipeline as pipeline

    def spy(student: Any, plan: Any, batches: Any, *rest: Any) -> Any:
        seen[str(len(seen))] = sum(len(batch["input_ids"]) for batch in batches)
        raise DataError("enough", "enough") if len(seen) == 2 else _Skip

    class _Skip(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "fit_", spy)
        own = recipe_for(tmp_path / "a", fit={"samples": 6, "batch_size": 4})
        rival = {"replace": {"language": {"n": 4}}, "fit": {"samples": 3}}
        with pytest.raises(_Skip):
            compress(own, lambda line: None)
        both = recipe_for(tmp_path / "b", rivals={"other": rival})
        variant = pipeline.variants(both)[1]
        with pytest.raises(DataError):
            build.build(variant, pipeline._checked(both), lambda line: None)
    assert seen == {"0": 6, "1": 3}


def test_a_second_call_finds_everything_done(finished: tuple[Recipe, dict[str, Any], Lines]) -> None:
    recipe, results, _ = finished
    made = ["model.safetensors", "metrics.jsonl", "built.json", "quality-dense.json", "state.safetensors"]
    stamps = {path: path.stat().st_mtime_ns for name in made for path in recipe.output.rglob(name)}
    assert len(stamps) == 3 + 3 + 3 + 1 + 3
    lines: Lines = []
    again = compress(recipe, lines.append)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert lines[0].startswith("Continuing")
    assert sum("finished earlier" in line for line in lines) == 3
    assert not any(" step " in line or " fit " in line for line in lines)
    timed = {"prefill_speedup", "decode_speedup", "speed", "dense_speed", "rivals"}
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in results.items() if k not in timed}


# --- data ------------------------------------------------------------------------------------------------------------


def _write_rows(path: Path, number: int, bad: dict[int, str]) -> Path:
    """Questions of easy-vqa as JSON lines; `bad` makes rows unusable: "text" without image, "broken" with no image."""
    questions, answers, numbers = easy_vqa.get_train_questions()
    images = easy_vqa.get_train_image_paths()
    (path.parent / "broken.png").write_bytes(b"not an image")
    with path.open("w", encoding="utf-8") as file:
        for row in range(number):
            image = "broken.png" if bad.get(row) == "broken" else images[numbers[row]]
            content = [{"type": "image"}, {"type": "text", "text": questions[row]}]
            messages = [
                {"role": "user", "content": content[1:] if bad.get(row) == "text" else content},
                {"role": "assistant", "content": answers[row]},
            ]
            given = {} if bad.get(row) == "text" else {"images": [image]}
            file.write(json.dumps({"messages": messages, "kind": "all", **given}) + "\n")
    return path


def test_skipped_samples_are_counted_once_each(tmp_path: Path) -> None:
    train = _write_rows(tmp_path / "train.jsonl", 8, {2: "text", 5: "broken"})
    evaluation = _write_rows(tmp_path / "evaluation.jsonl", 6, {1: "broken"})
    data = {"train": str(train), "evaluation": str(evaluation), "on_bad_sample": "skip", "evaluation_limit": None}
    recipe = recipe_for(tmp_path / "out", replace=SMALL, data=data)
    results = compress(recipe, lambda line: None)  # several epochs of 7 rows
    assert sorted(where for where, _ in results["skipped"]) == [
        "evaluation.jsonl line 2",
        "train.jsonl line 3",
        "train.jsonl line 6",
    ]
    assert results["quality"]["details"]["dense"]["tasks"]["question"]["scores"]["exact_match"]["count"] == 5
    assert "train.jsonl line 6" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_of_several_tasks_the_one_that_kept_least_stands_for_all(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    rows = [json.loads(line) for line in _write_rows(tmp_path / "rows.jsonl", 9, {}).read_text().splitlines()]
    for number, row in enumerate(rows):
        row["task"] = ("question", "caption", "reading")[number % 3]
        if row["task"] == "caption":  # long enough to have n-grams of every length, too long for the model
            row["messages"][-1]["content"] = f"there is a shape of number {number} here"
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"evaluation": str(evaluation), "evaluation_limit": None}
    train = {"fade_steps": 0, "polish_steps": 0}
    lines: Lines = []
    results = compress(recipe_for(tmp_path / "out", replace=SMALL, data=data, train=train), lines.append)
    quality = results["quality"]
    headlines = {"question": "exact_match", "caption": "cider", "reading": "character_accuracy"}
    assert quality["retention_by_task"].keys() == headlines.keys()
    for task, metric in headlines.items():
        before, after = (
            quality["details"][name]["tasks"][task]["scores"][metric]["value"] for name in ("dense", "compressed")
        )
        assert quality["retention_by_task"][task] == (after / before if before else None)
        assert sum(f"] {task}: " in line for line in lines) == 2
        if task == quality["task"]:
            assert (quality["dense"], quality["compressed"]) == (before, after)
    kept = [share for share in quality["retention_by_task"].values() if share is not None]
    assert quality["retention"] == min(kept)
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert all(f"## Quality: {task}\n" in page for task in headlines)


@pytest.mark.parametrize("where", ["train", "evaluation"])
def test_data_that_cannot_be_used_is_refused_before_a_folder_exists(where: str, tmp_path: Path) -> None:
    rows = _write_rows(tmp_path / "rows.jsonl", 4, {1: "text"})
    data = {"train": str(rows)} if where == "train" else {"evaluation": str(tmp_path / "missing.jsonl")}
    with pytest.raises(DataError, match=r"rows\.jsonl line 2: .* no image" if where == "train" else "Cannot read"):
        compress(recipe_for(tmp_path / "out", data=data), lambda line: None)
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_is_refused_before_a_folder_exists(tmp_path: Path) -> None:
    rows = _write_rows(tmp_path / "rows.jsonl", 2, {})
    rows.write_text(rows.read_text(encoding="utf-8").replace('"kind"', '"task": "captoin", "kind"'), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: there is no task 'captoin'"):
        compress(recipe_for(tmp_path / "out", data={"evaluation": str(rows)}), lambda line: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"replace": {"language": {"kind": "learned", "n": 2, "terms": 4}}}, PlanError),
        ({"train": {"train_also": ["no.such.*"]}}, NothingMatchedError),
        ({"rivals": {"r": {"replace": {"language": None, "vision": None}}}}, PlanError),
        ({"rivals": {"r": {"replace": {}, "train": {"train_also": ["no.such.*"]}}}}, NothingMatchedError),
    ],
    ids=["own plan", "own train_also", "rival's plan", "rival's train_also"],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused_before_a_folder_exists(
    changes: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error):
        compress(recipe_for(tmp_path / "out", **changes), lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError):
        compress(recipe_for(tmp_path), lambda line: None)
    assert _contents(tmp_path) == {"thesis.tex": b"mine"}


def test_a_run_without_training_distributes_its_budget_is_fitted_saved_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"fade_steps": 0, "polish_steps": 0}
    replace = SMALL | {"vision": {"kind": "low_rank"}, "budget": 0.3}
    fit = {"prefix": "corrected", "block_epochs": 4, "samples": 128, "budget_samples": 16, "batch_size": 8}
    recipe = recipe_for(tmp_path / "out", replace=replace, fit=fit, train=train, data={"evaluation_limit": 8})
    lines: Lines = []
    results = compress(recipe, lines.append)
    corrected = [layer for layer in results["layers"] if layer["correction"] is not None]
    gained = sum(layer["held_out"] < 1 for layer in corrected)
    said = f"[compressed] FFNs trained by themselves: {gained} gained, {len(corrected) - gained} undone, 0 cannot"
    assert said in lines
    assert gained  # observed 1 of 3
    work, shares = tmp_path / "out" / "work", results["allocation"]["shares"]
    assert json.loads((work / "allocation.json").read_text(encoding="utf-8")) == results["allocation"]
    assert 0.29 < results["ffn_params_ratio"] <= 0.3  # observed 0.2999
    assert len({share["size"] for share in shares}) > 1
    assert results["allocation"]["loss"] <= results["allocation"]["uniform_loss"]
    built = load(str(tmp_path / "out" / "model"), "float32")
    after = {s["name"]: sum(p.numel() for p in built.get_submodule(s["name"]).parameters()) for s in shares}
    assert after == {share["name"]: share["parameters"] for share in shares}
    measured = [line for line in lines if "measuring" in line]
    assert measured[0] == "[compressed] measuring what errors of every FFN cost, on 16 training samples"
    told = [line for line in lines if "budget: " in line]
    assert told[-1].startswith("[compressed] budget: ")
    assert all(share["name"] in (tmp_path / "out" / "report.md").read_text(encoding="utf-8") for share in shares)

    (work / "built.json").unlink()  # as if it had been killed after the fit: what was measured is not measured again
    monkeypatch.delattr("hyperfade.build.allocate")
    assert compress(recipe, lines.append)["allocation"] == results["allocation"]
    assert [line for line in lines if "budget: " in line] == 2 * told
    assert results["training"]["steps"] == 0
    assert results["reload_bit_equal"] is True
    assert (tmp_path / "out" / "plots" / "training.png").stat().st_size > 1000


# --- interruptions ---------------------------------------------------------------------------------------------------

FADE, POLISH = 20, 20


def _long(output: Path) -> Recipe:
    return recipe_for(
        output,
        replace={"language": {"n": 4}, "vision": {"n": 4}, "exclude": ONE},
        fit={"samples": 32, "batch_size": 8, "basis": "energy"},
        train={
            "fade_steps": FADE,
            "polish_steps": POLISH,
            "checkpoint_every": 3,
            "lora_rank": 2,
            "train_also": ["*embed_tokens*"],
            "reconstruction_weight": 1e-3,
            "weight_decay": 0.01,
        },
        data={"evaluation_limit": 16},
    )


def _interrupt(recipe: Recipe, file: Path, when: Callable[[], bool], sign: signal.Signals) -> tuple[int, str]:
    """Start the command in a process of its own, and send `sign` at some moment after `when`."""
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "hyperfade", "compress", "--recipe", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it, and so would the run
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))
    process.send_signal(sign)
    return process.wait(60), process.communicate()[1]


def test_a_run_that_was_killed_again_and_again_equals_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL in the fit, in the fade and in the polish, and Ctrl-C: the same weights to the last bit."""
    whole, parts = _long(tmp_path / "whole"), _long(tmp_path / "parts")
    compress(whole, lambda line: None)
    work = parts.output / "work"

    def step() -> int:
        return latest_step(work)

    killed = -signal.SIGKILL
    file = tmp_path / "parts.yaml"
    fitted = work / "fit"
    assert _interrupt(parts, file, lambda: len([*fitted.glob("*.safetensors")]) >= 1, signal.SIGKILL)[0] == killed
    assert step() == 0
    kept = {path: path.stat().st_mtime_ns for path in fitted.glob("*.safetensors")}
    assert _interrupt(parts, file, lambda: step() >= 3, signal.SIGKILL)[0] == killed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # what was fitted is not fitted again
    first = step()
    assert 3 <= first < FADE
    code, said = _interrupt(parts, file, lambda: step() > first, signal.SIGINT)
    assert code == 130
    assert "Run the same command again to continue" in said
    assert "Traceback" not in said
    assert _interrupt(parts, file, lambda: step() > FADE, signal.SIGKILL)[0] == killed
    assert FADE < step() < FADE + POLISH
    lines: Lines = []
    results = compress(parts, lines.append)
    assert any("continuing after step" in line for line in lines)

    one, other = (load_file(recipe.output / "model" / "model.safetensors") for recipe in (whole, parts))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    texts = [(recipe.output / "work" / "metrics.jsonl").read_text(encoding="utf-8") for recipe in (whole, parts)]
    metrics = [[json.loads(line) | {"seconds": 0} for line in text.splitlines()] for text in texts]
    assert metrics[0] == metrics[1]
    assert [line["step"] for line in metrics[1]] == list(range(1, FADE + POLISH + 1))
    assert results["reload_bit_equal"] is True
    left = [path for path in parts.output.rglob("*") if ".partial" in path.name or ".replaced" in path.name]
    assert left == []


# --- few bits on top --------------------------------------------------------------------------------------------------


def test_a_quantized_run_saves_what_it_measured(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    lines: Lines = []
    recipe = recipe_for(tmp_path / "out", replace=SMALL, quantize="int4", train={"fade_steps": 1, "polish_steps": 0})
    results = compress(recipe, lines.append)
    assert results["reload_bit_equal"] is True
    assert results["quantized"]["to"] == "int4"
    assert results["quantized"]["calibrated"]
    assert results["quantized"]["matrices"] == 6 + 6  # the vision tower's stacked products, and the dense language FFNs
    assert results["quantized"]["bytes"]["after"] < 0.17 * results["quantized"]["bytes"]["before"]  # float32 before
    assert results["params_ratio"] == results["parameters"]["compressed"] / results["parameters"]["dense"]
    assert any(line.startswith("[compressed] int4 by groups of 64, calibrated: 12 matrices") for line in lines)
    assert results["quantized"]["never_reached"] == []
    assert results["disk_bytes"]["compressed"] < 0.5 * results["disk_bytes"]["dense"]
    model = load(str(recipe.output / "model"))
    assert {type(layer) for layer in light_modules(model).values()} == {PHMLinear}
