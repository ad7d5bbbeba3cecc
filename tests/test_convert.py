"""A checkpoint converted from disk is, file by file, the one that fitting the model in memory and saving it gives."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import TEXT
from tiny_models import FAMILIES, generated, logits
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import hyperfade.convert
import hyperfade.distill.calibrate
from hyperfade.cli import app
from hyperfade.convert import convert
from hyperfade.distill import fit_
from hyperfade.errors import CheckpointError, FitError, HyperfadeError, OutputError, PlanError, RecipeError
from hyperfade.hub import fold_, load, load_processor, round_, save
from hyperfade.recipe import Fit, Layer, Recipe, Replace
from hyperfade.surgery import plan, swap_
from hyperfade.task import open_task

PRODUCTS = Layer(n=4)
UP = "language_model.model.layers.1.mlp.up_proj.weight"  # in the file of the tiny LLaVA
KINDS = {
    "companion": Layer(n=4, companion_rank=2),
    "complex": Layer(kind="complex", terms=2),
    "low_rank": Layer(kind="low_rank", fraction=0.4),
}


def source(folder: Path, family: str = "llava_siglip", **options: Any) -> Path:
    """A dense checkpoint of the tiny model."""
    FAMILIES[family].build().save_pretrained(folder, **options)
    return folder


def recipe(folder: Path, output: Path, layer: Layer = PRODUCTS, **fields: Any) -> Recipe:
    chosen = Replace(language=layer, vision=layer, projector=layer)
    fields = {"dtype": "float32", "fit": Fit(method="frobenius", sweeps=2), **fields}
    return Recipe(model=str(folder), output=output, replace=chosen, **fields)


def in_memory(wanted: Recipe, folder: Path, processor: Any = None, **options: Any) -> Path:
    """The same fit as `hyperfade compress` makes it: with the model in memory."""
    model = load(wanted.model, wanted.dtype)
    whole = plan(model, wanted)
    calibrated = wanted.fit.method == "calibrated"
    batches = open_task(wanted, model).calibration_batches(wanted.fit) if calibrated else []
    swap_(model, whole)
    fit_(model, whole, batches, wanted.fit)
    storage = getattr(torch, wanted.save_dtype or wanted.dtype)
    fold_(model)
    round_(model, storage)
    save(model, folder, processor, storage_dtype=storage)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a checkpoint's folder but its card, which says when it was made."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "README.md"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def quiet(line: str) -> None:
    pass


# --- the same checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_checkpoint_that_fitting_in_memory_gives(family: str, tmp_path: Path) -> None:
    wanted = recipe(source(tmp_path / "dense", family), tmp_path / "out")
    convert(wanted, quiet)
    assert files(tmp_path / "out" / "model") == files(in_memory(wanted, tmp_path / "expected"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str, tmp_path: Path) -> None:
    wanted = recipe(source(tmp_path / "dense", "blip2_opt"), tmp_path / "out", KINDS[kind])
    convert(wanted, quiet)
    assert files(tmp_path / "out" / "model") == files(in_memory(wanted, tmp_path / "expected"))


def test_dtypes_of_running_and_of_storing(tmp_path: Path) -> None:
    dtypes = {"dtype": "bfloat16", "save_dtype": "float32"}
    wanted = recipe(source(tmp_path / "dense"), tmp_path / "out", **dtypes)
    convert(wanted, quiet)
    assert files(tmp_path / "out" / "model") == files(in_memory(wanted, tmp_path / "expected"))


def test_it_loads_like_any_other(tmp_path: Path) -> None:
    family = FAMILIES["llava_siglip"]
    wanted = recipe(source(tmp_path / "dense"), tmp_path / "out")
    convert(wanted, quiet)
    folder = tmp_path / "out" / "model"
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    expected = load(str(in_memory(wanted, tmp_path / "expected")))
    assert torch.equal(logits(model.eval(), family), logits(expected, family))
    assert torch.equal(generated(model, family), generated(expected, family))
    assert "AutoModelForImageTextToText" in (folder / "README.md").read_text(encoding="utf-8")


def test_files_of_bounded_size_from_files_of_any_size(tmp_path: Path) -> None:
    one = recipe(source(tmp_path / "dense"), tmp_path / "one")
    many = recipe(source(tmp_path / "shards", max_shard_size=20_000), tmp_path / "many")
    convert(one, quiet)
    convert(many, quiet, shard_bytes=30_000)
    shards = sorted((tmp_path / "many" / "model").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert all(file.stat().st_size < 30_000 + 10_000 for file in shards)  # with their headers; observed: 36 kB
    left, right = weights(tmp_path / "one" / "model"), weights(tmp_path / "many" / "model")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    load(str(tmp_path / "many" / "model"))


def test_keys_that_loading_renames_and_keys_that_nobody_wants(tmp_path: Path) -> None:
    """LLaVA's files say `language_model.model.layers`, transformers' class `model.language_model.layers`."""
    old, said = source(tmp_path / "old"), []
    tensors, unwanted = load_file(old / "model.safetensors"), "language_model.model.rotary_emb.inv_freq"
    save_file(tensors | {unwanted: torch.ones(4)}, old / "model.safetensors", metadata={"format": "pt"})
    wanted = recipe(old, tmp_path / "out")
    convert(wanted, said.append)
    written = weights(tmp_path / "out" / "model")
    assert UP.replace("weight", "T") in written
    assert unwanted not in written
    assert any("1 tensors" in line and unwanted in line for line in said)
    assert files(tmp_path / "out" / "model") == files(in_memory(wanted, tmp_path / "expected"))


def test_the_command_calibrates_as_compress_does(tmp_path: Path) -> None:
    changes = [
        "fit.samples=6",
        "fit.batch_size=2",
        "fit.sweeps=1",
        "fit.prefix=corrected",
        "fit.block_epochs=1",
        "dtype=float32",
    ]
    changes += ["replace.rules=[{layer: null}, {last_layers: 1, layer: {n: 4}}]"]
    arguments = [part for change in changes for part in ("--set", change)]
    result = CliRunner().invoke(app, ["convert", "embedded", "--output", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 0, result.output
    assert "calibrating on 6 examples" in result.output
    assert "compressed takes its place, and no FFN trains by itself" in result.output  # both need the dense model
    wanted = Recipe.load(tmp_path / "out" / "recipe.yaml")
    wanted = wanted.model_copy(
        update={"fit": wanted.fit.model_copy(update={"prefix": "compressed", "block_epochs": 0})}
    )
    expected = in_memory(wanted, tmp_path / "expected", load_processor("embedded"))
    assert files(tmp_path / "out" / "model") == files(expected)
    facts = json.loads((tmp_path / "out" / "fit.json").read_text(encoding="utf-8"))
    assert {"machine", "recipe", "layers", "params_ratio"} <= facts.keys()
    assert [path.name for path in (tmp_path / "out" / "work").iterdir()] == ["source.json"]


# --- interrupted -----------------------------------------------------------------------------------------------------


def _killed_at(wanted: Recipe, fatal: int) -> int:
    """Convert in a process that is killed in the middle of writing its file number `fatal`; its exit code."""

    def work() -> None:
        calls = 0

        def deadly(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
            nonlocal calls
            calls += 1
            save_file(tensors, path, **options)
            if calls == fatal:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        hyperfade.convert.save_file = hyperfade.distill.calibrate.save_file = deadly
        convert(wanted, quiet, shard_bytes=30_000)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def test_killed_again_and_again_it_ends_with_the_same_files(tmp_path: Path) -> None:
    dense = source(tmp_path / "dense")
    convert(recipe(dense, tmp_path / "whole"), quiet, shard_bytes=30_000)
    wanted, kills, seen = recipe(dense, tmp_path / "out"), 0, {}
    while code := _killed_at(wanted, fatal=2):  # so one file is finished each time
        assert code == -signal.SIGKILL
        assert not (tmp_path / "out" / "model").exists()
        kills += 1
        now = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "work" / "model").glob("*.safetensors")}
        assert now.items() >= seen.items()  # final once written
        seen = now
    assert kills >= 6  # observed: 9
    assert files(tmp_path / "out" / "model") == files(tmp_path / "whole" / "model")
    assert not list((tmp_path / "out").rglob("*partial"))


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    wanted, said = recipe(source(tmp_path / "dense"), tmp_path / "out"), []
    first = convert(wanted, quiet)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert convert(wanted, said.append) == first
    assert said == [f"Finished earlier: {tmp_path / 'out' / 'model'}"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("changed", ["weights", "config", "recipe"])
def test_what_changed_in_between_is_refused(changed: str, tmp_path: Path) -> None:
    dense = source(tmp_path / "dense")
    wanted = recipe(dense, tmp_path / "out")
    _killed_at(wanted, fatal=3)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    if changed == "weights":
        tensors = load_file(dense / "model.safetensors")
        tensors[UP][0, 0] += 1
        save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    elif changed == "config":
        (dense / "config.json").write_text((dense / "config.json").read_text() + " ")
    else:
        wanted = wanted.model_copy(update={"fit": Fit(method="frobenius", sweeps=3)})
    with pytest.raises(OutputError, match="another recipe" if changed == "recipe" else "changed since"):
        convert(wanted, quiet, shard_bytes=30_000)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


# --- refused ---------------------------------------------------------------------------------------------------------


def _without(dense: Path, key: str) -> None:
    tensors = load_file(dense / "model.safetensors")
    del tensors[key]
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})


REFUSED: dict[str, tuple[type[HyperfadeError], str, dict[str, Any]]] = {
    "a hub name": (CheckpointError, "is no folder", {"model": "someone/model"}),
    "quantize": (RecipeError, "quantize", {"quantize": {"to": "int8"}}),
    "random": (RecipeError, "random", {"fit": Fit(method="random")}),
    "budget": (
        RecipeError,
        "budget",
        {"fit": Fit(), "replace": Replace(budget=0.5, language=Layer(kind="dense", width=0.5), vision=None)},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipes_that_need_more_are_refused_before_a_folder_exists(case: str, tmp_path: Path) -> None:
    error, words, update = REFUSED[case]
    wanted = recipe(source(tmp_path / "dense"), tmp_path / "out").model_copy(update=update)
    with pytest.raises(error, match=words):
        convert(wanted, quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "of another shape", "compressed"])
def test_checkpoints_that_are_not_whole_are_refused_before_a_folder_exists(damage: str, tmp_path: Path) -> None:
    dense = source(tmp_path / "dense")
    wanted, file = recipe(dense, tmp_path / "out"), dense / "model.safetensors"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 100)
    elif damage == "missing":
        _without(dense, UP)
    elif damage == "of another shape":
        tensors = load_file(file)
        save_file(tensors | {UP: tensors[UP][:-8].clone()}, file, metadata={"format": "pt"})
    else:
        convert(wanted, quiet)
        wanted = recipe(tmp_path / "out" / "model", tmp_path / "again")
    with pytest.raises(PlanError if damage == "compressed" else CheckpointError) as caught:
        convert(wanted, quiet)
    assert damage not in ("missing", "of another shape") or "layers.1.mlp.up_proj.weight" in caught.value.message
    assert not wanted.output.exists()


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    dense = source(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors[UP][3, 3] = float("nan")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FitError, match=r"layers\.1\.mlp\.up_proj"):
        convert(recipe(dense, tmp_path / "out"), quiet)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read where Linux keeps them")
def test_memory_holds_an_ffn_and_a_file_and_never_the_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=32, num_attention_heads=4, vocab_size=1000
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "dense", max_shard_size="30MB")
    whole = sum(p.numel() * p.element_size() for p in model.parameters())  # 136 MB
    del model
    warm_up = source(tmp_path / "small", "llama")
    command = [sys.executable, Path(__file__).parent / "convert_memory.py", warm_up, tmp_path / "dense", tmp_path]
    path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    grown = json.loads(done.stdout.splitlines()[-1])
    assert grown["from disk"] < whole / 2  # observed: 23 MB
    assert grown["in memory"] > whole / 2  # observed: 136 to 155 MB, by the way that the bound above has to tell apart


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    TEXT["mixtral"]().save_pretrained(tmp_path / "dense")
    with pytest.raises(PlanError, match=r"experts\.\w+ holds the matrices of 4 experts") as refused:
        convert(recipe(tmp_path / "dense", tmp_path / "out"))
    assert '["*.experts.*"]' in refused.value.hint
    assert not (tmp_path / "out").exists()
