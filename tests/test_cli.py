"""The command line: instant help, two-line errors, and commands that do what they say."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig
from transformers.utils.logging import disable_progress_bar, enable_progress_bar
from typer.main import get_command

from hyperfade import cli
from hyperfade.hub import EMBEDDED_FOLDER, load, stored_dtype
from hyperfade.measure import evaluate, read_answers
from hyperfade.recipe import Recipe
from hyperfade.recipe.keys import describe

COMMANDS = get_command(cli.app).commands  # type: ignore[attr-defined]
EMBEDDED = str(EMBEDDED_FOLDER)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Run `hyperfade ARGUMENTS` in this process: exit code, standard output, standard error."""
    disable_progress_bar()  # `main` sees to that, in time only where transformers is not imported yet

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hyperfade", *arguments])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    yield run
    enable_progress_bar()


def fresh(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `hyperfade ARGUMENTS` in a process of its own."""
    command = [sys.executable, *python, "-m", "hyperfade", *arguments]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_is_instant() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert fresh("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5  # observed 0.37 s on a loaded machine, 0.19 s on an idle one


@pytest.mark.parametrize("arguments", [("--help",), ("compress", "--help"), ("recipe", "--keys")], ids=str)
def test_help_and_recipes_need_no_heavy_import(arguments: tuple[str, ...]) -> None:
    done = fresh(*arguments, python=("-X", "importtime"))
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "typer" in imported
    heavy = {"torch", "transformers", "matplotlib", "datasets", "peft", "accelerate", "numpy"}
    assert imported & heavy == set()


def test_the_commands_are_these() -> None:
    wanted = {"inspect", "compress", "convert", "quantize", "export", "demo", "evaluate", "benchmark", "recipe"}
    assert set(COMMANDS) == wanted
    assert all(command.help for command in COMMANDS.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_has_a_help_text_and_help_shows_it(name: str, call: Any) -> None:
    code, output, _ = call(name, "--help")
    assert code == 0
    for parameter in COMMANDS[name].params:
        shown = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name
        assert shown in output or shown.upper() in output
        assert len(parameter.help) > 8  # type: ignore[attr-defined]
        assert "[default" not in parameter.help  # type: ignore[attr-defined]  # taken for markup, and not shown


def test_no_arguments_print_help(call: Any) -> None:
    _, output, errors = call()
    assert "compress" in output + errors


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipe", "quartet"), "Cannot read recipe 'quartet'"),
        (("compress", "--recipe", "quartet"), "Cannot read recipe 'quartet'"),
        (("compress", "--set", "train.polish_step=5"), "quarter: train.polish_step: Extra inputs are not permitted"),
        (("compress", "--set", "trian.polish_steps=5"), "there is no section 'trian'"),
        (("compress", "--set", "train.batch_size.x=5"), "there is no section 'train.batch_size'"),
        (("compress", "--set", "train.learning_rate=fast"), "train.learning_rate"),
        (("compress", "--set", "train.polish_steps"), "--set train.polish_steps"),
        (("compress", "--set", "train.train_also=[a"), "is not YAML"),
        (("compress", "--seed", "-1"), "seed"),
        (("inspect", "no/such/model"), "Cannot load 'no/such/model'"),
        (("inspect", EMBEDDED, "--bits", "12"), "--bits 12 is not a multiple of 8"),
        (("inspect", EMBEDDED, "--set", "replace.language.n=5"), "gate_proj"),
        (("evaluate", EMBEDDED, "--data", "questions.csv"), "'questions.csv' is no data source"),
        (("evaluate", EMBEDDED, "--include", "tasks"), "--include needs --tasks"),
        (("evaluate", EMBEDDED, "--chat"), "--chat needs --tasks"),
        (("evaluate", EMBEDDED, "--tasks", "a", "--data", "b.jsonl"), "--data cannot be given together with --tasks"),
        (("evaluate", EMBEDDED, "--tasks", "a", "--answers", "b.jsonl"), "--answers cannot be given together with"),
        (("benchmark", EMBEDDED, "--data", "missing.jsonl"), "Cannot read missing.jsonl"),
        (
            ("benchmark", EMBEDDED, "--recipe", "quarter", "--keep-derived"),
            "--keep-derived is for finished checkpoints",
        ),
        (("benchmark", EMBEDDED, "--keep-derived"), "no hypercomplex layers that can"),
        (("benchmark", EMBEDDED, "--keep-derived", "--compile"), "compiled layers keep nothing"),
        (("benchmark", EMBEDDED, "--compile"), "no hypercomplex layers to compile"),
        (("benchmark", EMBEDDED, "--set", "seed=1"), "--set changes a recipe, and none was given"),
        (("benchmark", EMBEDDED, EMBEDDED, "--recipe", "quarter"), "--recipe plans one model, 2 were given"),
        (("benchmark", EMBEDDED, "--recipe", "quartet"), "Cannot read recipe 'quartet'"),
        (("benchmark", "no/such/model", "--recipe", "quarter"), "Cannot load 'no/such/model'"),
        (("benchmark", EMBEDDED, "--recipe", "quarter", "--tokens", "1,few"), "--tokens 1,few: not numbers"),
        (("benchmark", EMBEDDED, "--recipe", "quarter", "--tokens", "0,8"), "a call has at least one token"),
        (("benchmark", EMBEDDED, "--recipe", "quarter", "--set", "replace.language.n=5"), "gate_proj"),
    ],
    ids=str,
)
def test_an_error_is_two_lines_and_exit_code_two(arguments: tuple[str, ...], message: str, call: Any) -> None:
    code, output, errors = call(*arguments)
    assert code == 2
    assert output == ""
    lines = errors.splitlines()
    assert len(lines) == 2, errors
    assert lines[0].startswith("Error: ")
    assert message in lines[0]
    assert len(lines[1]) > 8


def test_an_error_of_a_real_process_has_no_traceback_unless_asked_for() -> None:
    plain, debug = fresh("recipe", "quartet"), fresh("--debug", "recipe", "quartet")
    assert (plain.returncode, plain.stdout, len(plain.stderr.splitlines())) == (2, "", 2)
    assert "Traceback" not in plain.stderr
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "RecipeError" in debug.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("compres",),
        ("compress", "--epochs", "3"),
        ("evaluate", EMBEDDED, "--limit", "0"),
        ("evaluate", EMBEDDED, "--batch-size", "0"),
        ("benchmark", EMBEDDED, "--rounds", "0"),
        ("benchmark",),
        ("inspect", EMBEDDED, "--bits", "4"),
    ],
    ids=str,
)
def test_what_cannot_be_typed_is_a_usage_error(arguments: tuple[str, ...], call: Any) -> None:
    code, _, errors = call(*arguments)
    assert code == 2
    assert "Usage:" in errors
    assert "Traceback" not in errors


# --- commands --------------------------------------------------------------------------------------------------------


def test_inspect_of_the_papers_model_prints_the_papers_sizes(tmp_path: Path, call: Any) -> None:
    """Qwen2.5-VL-7B from its config alone: the paper's 8.29 B → 5.38 B."""
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=False,
    )
    path = tmp_path / "config.json"
    path.write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    code, output, _ = call("inspect", str(path), "--recipe", "paper")
    assert code == 0
    assert "8.29 B → 5.38 B" in output
    assert list(tmp_path.iterdir()) == [path]


def test_inspect_follows_the_changes(call: Any) -> None:
    _, quarter, _ = call("inspect", EMBEDDED)
    _, half, _ = call("inspect", EMBEDDED, "-r", "half")
    changes = ("-s", "replace.language.width=0.6667", "-s", "replace.vision.width=0.6667")
    _, changed, _ = call("inspect", EMBEDDED, *changes)
    assert "keep 25" in quarter
    assert half == changed != quarter
    _, language_only, _ = call("inspect", EMBEDDED, "--set", "replace.vision=null")
    assert "stay dense" in language_only
    _, budgeted, _ = call("inspect", EMBEDDED, "--set", "replace.budget=0.2")
    assert budgeted.startswith(quarter)
    assert "compress distributes 20.0% of the parameters" in budgeted


def test_compress_hands_over_the_recipe_with_all_changes(
    tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Recipe] = []
    import hyperfade.pipeline as pipeline

    monkeypatch.setattr(pipeline, "compress", lambda recipe, say: given.append(recipe))
    own = tmp_path / "own.yaml"
    own.write_text("train: {polish_steps: 7}\nseed: 3\n", encoding="utf-8")
    arguments = ["compress", "-r", str(own), "--model", "m", "--output", "o", "--seed", "5"]
    changes = ["train.learning_rate=1e-5", "train.train_also=[a.*, b.*]", "replace.vision=null", "seed=4"]
    assert call(*arguments, *(x for change in changes for x in ("--set", change)))[0] == 0
    recipe = given[0]
    assert (recipe.model, recipe.output, recipe.seed) == ("m", Path("o"), 5)
    assert (recipe.train.polish_steps, recipe.train.learning_rate) == (7, 1e-5)
    assert (recipe.train.train_also, recipe.replace.vision) == (("a.*", "b.*"), None)
    assert call("demo", "--output", "d")[0] == 0
    assert given[1] == Recipe.parse({**Recipe.load("demo").model_dump(), "output": "d"})


def test_evaluate_prints_and_writes_what_the_library_measures(tmp_path: Path, call: Any) -> None:
    from hyperfade.hub import load_processor

    scores_file, answers_file = tmp_path / "new" / "scores.json", tmp_path / "new" / "answers.jsonl"
    options = ("--limit", "24", "--batch-size", "10", "--max-new-tokens", "4")
    files = ("--output", str(scores_file), "--answers", str(answers_file))
    code, output, errors = call("evaluate", EMBEDDED, *options, *files)
    assert code == 0
    assert "24/24 examples" in errors
    quality = evaluate(
        load(EMBEDDED, "float32"), load_processor(EMBEDDED), limit=24, max_new_tokens=4, keep_answers=True
    )
    own = quality.tasks["question"]
    expected = {("all", "exact match"): own.scores["exact_match"], ("all", "VQA accuracy"): own.scores["vqa_accuracy"]}
    expected |= {(f"kind {kind}", "exact match"): scores["exact_match"] for kind, scores in own.by_kind.items()}
    rows = [re.split(r"\s{2,}", line) for line in output.splitlines()]
    assert [(row[0], (row[1], row[2])) for row in rows] == [("question", key) for key in expected]
    for row, score in zip(rows, expected.values(), strict=True):
        assert row[3] == f"{score.value:.2%} ({score.low:.1%}-{score.high:.1%})"
        assert row[4] == f"of {score.count}"
    written = json.loads(scores_file.read_text(encoding="utf-8"))
    assert (written["data"], written["limit"], written["max_new_tokens"]) == ("easy-vqa:test", 24, 4)
    assert written["quality"] == json.loads(json.dumps(quality.to_dict()))
    assert list(written["quality"]) == ["tasks", "skipped"]
    assert read_answers(answers_file) == quality.answers
    assert len(quality.answers) == 24


def test_evaluate_lists_what_it_left_out(tmp_path: Path, call: Any) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("{}\n" + _text_row("what color?") + "\n", encoding="utf-8")
    code, output, _ = call("evaluate", EMBEDDED, "--data", str(path), "--on-bad-sample", "skip")
    assert code == 0
    assert "left out: some.jsonl line 1: " in output
    code, _, errors = call("evaluate", EMBEDDED, "--data", str(path))
    assert code == 2
    assert "some.jsonl line 1" in errors


def _text_row(question: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "red"}]})


def test_benchmark_times_models_side_by_side_and_writes_the_numbers(tmp_path: Path, call: Any) -> None:
    other = tmp_path / "other"
    other.symlink_to(EMBEDDED_FOLDER, target_is_directory=True)
    file = tmp_path / "new" / "speed.json"
    options = ("--rounds", "3", "--new-tokens", "2", "--batch-size", "2", "--output", str(file))
    code, output, _ = call("benchmark", EMBEDDED, str(other), *options)
    assert code == 0
    first, second = output.splitlines()
    assert first.startswith(f"{EMBEDDED}: prefill ")
    assert "(1.00×, quartiles 1.00-1.00)" in first
    assert second.startswith(f"{other}: prefill ")
    written = json.loads(file.read_text(encoding="utf-8"))
    assert list(written["models"]) == [EMBEDDED, str(other)]
    assert written["models"][str(other)]["prefill_seconds"] > 0
    facts = {key: written[key] for key in ("dtype", "batch_size", "new_tokens", "rounds")}
    assert facts == {"dtype": "float32", "batch_size": 2, "new_tokens": 2, "rounds": 3}
    assert written["machine"]["torch"]


def test_benchmark_with_a_recipe_times_a_models_ffns_from_its_config_alone(tmp_path: Path, call: Any) -> None:
    config, file = tmp_path / "config.json", tmp_path / "ffns.json"
    config.write_text((EMBEDDED_FOLDER / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    options = ("--recipe", "quarter", "--set", "replace.rules=[{region: language, last_layers: 1, layer: {n: 2}}]")
    code, output, errors = call("benchmark", str(config), *options, "--tokens", "8,1", "--output", str(file))
    assert code == 0
    assert errors.count("timing ") == 3
    assert output.startswith(f"{config}, bfloat16, ")  # the recipe's dtype
    for line in (
        "vision: 3 FFNs 192 → 768 → 192, random weights",
        "language: 1 FFNs 256 → 3072 → 256, gated, random weights",
        "language: all 2 FFNs together",
    ):
        assert line in output.splitlines()
    rows = [line.split() for line in output.splitlines() if line.endswith(("×", ")"))]
    assert [row[0] for row in rows] == ["1", "8"] * 4  # three kinds, and language together
    written = json.loads(file.read_text(encoding="utf-8"))
    assert {tuple(ffn["labels"]) for ffn in written["ffns"]} == {
        ("products n=4 R=12 192→256", "products n=4 R=12 256→192"),
        ("products n=4 R=12 256→1024", "products n=4 R=12 1024→256"),
        ("products n=2 R=2",),
    }
    times = written["ffns"][0]["times"]["8"]
    assert times["dense"]["flops"] == 2 * 8 * 2 * 192 * 768
    assert times["compressed"]["weight_bytes"] < times["dense"]["weight_bytes"] / 3.5


def test_recipe_prints_a_recipe_that_reads_back_and_every_key(call: Any) -> None:
    code, output, _ = call("recipe", "half")
    assert code == 0
    assert Recipe.parse(yaml.safe_load(output)) == Recipe.load("half")
    code, output, _ = call("recipe", "--keys")
    assert (code, output.splitlines()) == (0, describe())
    for key in ("replace.language.width", "fit.prefix", "fit.refit_writer", "attention"):
        assert sum(line.startswith(f"{key}: ") for line in output.splitlines()) == 1


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import hyperfade.pipeline as pipeline

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "compress", stopped)
    code, _, errors = call("compress")
    assert code == 130
    assert "Run the same command again to continue" in errors
    assert "Traceback" not in errors


# --- few bits, and exports --------------------------------------------------------------------------------------------


def test_quantize_then_export_dense(call: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    low, dense = tmp_path / "int8", tmp_path / "dense"
    code, out, err = call("quantize", EMBEDDED, "--to", "int8", "--output", str(low))
    assert (code, err) == (0, "")
    assert out.startswith("int8 by rows: 12 matrices, ")
    assert f"{low}: " in out
    size = (EMBEDDED_FOLDER / "model.safetensors").stat().st_size
    assert (low / "model.safetensors").stat().st_size < 0.75 * size
    code, out, err = call("export", str(low), "--to", "dense", "--output", str(dense))
    assert (code, err) == (0, "")
    assert "12 matrices materialised" in out
    assert "saves nothing" in out
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    for arguments in (("quantize", EMBEDDED, "--to", "int4"), ("export", str(low), "--to", "dense")):
        code, _, err = call(*arguments, "--output", str(low))
        assert (code, err.splitlines()[0]) == (2, f"Error: {low} exists.")


def test_quantize_by_what_layers_read(call: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    low = tmp_path / "int4"
    data = ("--data", "easy-vqa:train", "--samples", "20")
    code, out, err = call("quantize", EMBEDDED, "--to", "int4", *data, "--output", str(low))
    assert (code, err) == (0, "")
    assert out.startswith("int4 by groups of 64, calibrated: 12 matrices, ")
    code, _, err = call("quantize", EMBEDDED, "--to", "int8", *data, "--output", str(tmp_path / "int8"))
    assert (code, err.splitlines()[0]) == (2, "Error: Calibrated rounding is for int4, not int8.")
    code, _, err = call("quantize", EMBEDDED, "--to", "int4", "--data", "no.jsonl", "--output", str(tmp_path / "other"))
    assert (code, "no.jsonl" in err) == (2, True)
    code, _, err = call("quantize", EMBEDDED, "--to", "int4", "--samples", "3", "--output", str(tmp_path / "other"))
    assert (code, err.splitlines()[0]) == (2, "Error: --samples counts examples of --data, and there is no --data.")
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]


def test_quantize_keeps_the_dtype_that_weights_are_stored_in(call: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    source, low = tmp_path / "source", tmp_path / "int4"
    shutil.copytree(EMBEDDED_FOLDER, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert stored_dtype(source) == torch.float16
    code, _, err = call("quantize", str(source), "--to", "int4", "--output", str(low))
    assert (code, err) == (0, "")
    assert len({file.stat().st_mode for file in low.iterdir()}) == 1  # safetensors' own would be for the owner alone
    tensors = load_file(low / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}
    assert {p.dtype for p in load(str(low)).parameters() if p.is_floating_point()} == {torch.float32}


def test_a_format_that_cannot_be_had_is_one_line(call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, _, err = call("quantize", EMBEDDED, "--to", "nf4", "--output", str(tmp_path / "nf4"))
    assert code == 2
    assert "nf4 needs bitsandbytes, which is not installed here; int8, int4 and fp8 do not." in err
    assert not (tmp_path / "nf4").exists()
