"""Damaged, foreign and newer checkpoints: an error that names the file and the remedy, never a model half right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folded import edit_json, saved, weights
from safetensors.torch import save_file
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BertModel, LlamaForCausalLM

from hyperfade.errors import CheckpointError, PlanError
from hyperfade.hub import HyperfadeConfig, load, load_config, skeleton, verify_checkpoint

Change = Callable[[Any], Any]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("sharded") / "model", shard_bytes=20_000)


INNER = {"quant_method": "torchao", "to": "int4", "group_sizes": {f"{UP}.core": 32}}


def _copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "copy"))


def _layer(q: dict[str, Any]) -> dict[str, Any]:
    return q["layers"][UP]


CONFIGS: dict[str, tuple[Change, str]] = {
    "newer version": (lambda q: q.update(version=2), "format version 2; this hyperfade reads up to 1"),
    "version zero": (lambda q: q.update(version=0), "format version 0"),
    "version in text": (lambda q: q.update(version="1"), "format version '1'"),
    "version true": (lambda q: q.update(version=True), "format version True"),
    "no version": (lambda q: q.pop("version"), "no `version`"),
    "no layers": (lambda q: q.pop("layers"), "no `layers`"),
    "layers a list": (lambda q: q.update(layers=[UP]), "`layers` of quantization_config in config.json is list"),
    "layers null": (lambda q: q.update(layers=None), "is NoneType, not an object"),
    "unknown keys": (lambda q: q.update(bits=4, act=8), "unknown keys: act, bits"),
    "inner of another tool": (lambda q: q.update(inner={"quant_method": "torchao"}), "`inner` of quantization_config"),
    "inner with a key more": (lambda q: q.update(inner={**INNER, "act": 8}), "`inner` of quantization_config"),
    "inner in unknown bits": (lambda q: q.update(inner={**INNER, "to": "int3"}), "`inner` of quantization_config"),
    "inner with groups in text": (
        lambda q: q.update(inner={**INNER, "group_sizes": {f"{UP}.core": "32"}}),
        "`inner` of quantization_config",
    ),
    "inner for nothing": (lambda q: q.update(inner={**INNER, "group_sizes": {}}), "`inner` of quantization_config"),
    "layer a number": (lambda q: q["layers"].update({UP: 3}), f"Layer {UP} is described wrongly"),
    "layer with a field more": (lambda q: _layer(q).update(bits=4), f"Layer {UP} is described wrongly"),
    "layer with a field less": (lambda q: _layer(q).pop("bias"), f"Layer {UP} is described wrongly"),
    "unknown algebra": (lambda q: _layer(q)["algebra"].update(name="sedenion"), f"Layer {UP} is described wrongly"),
    "n does not divide": (lambda q: _layer(q)["algebra"].update(n=5), f"Layer {UP} is described wrongly"),
    "rank in text": (lambda q: _layer(q).update(rank="2"), f"Layer {UP} is described wrongly"),
    "negative width": (lambda q: _layer(q).update(in_features=-32), f"Layer {UP} is described wrongly"),
    "wider than what it replaces": (lambda q: _layer(q).update(replaced=[32, 40]), f"Layer {UP} is described wrongly"),
}


@pytest.mark.parametrize("how", CONFIGS)
def test_a_quantization_config_that_is_not_ours_is_refused(how: str, whole: Path, tmp_path: Path) -> None:
    folder, (change, message) = _copy(whole, tmp_path), CONFIGS[how]
    edit_json(folder / "config.json", lambda fields: change(fields["quantization_config"]))
    for read in (load, AutoModelForCausalLM.from_pretrained, skeleton):
        with pytest.raises(CheckpointError) as caught:
            read(str(folder))
        assert message in caught.value.message
        assert caught.value.hint


PLACES: dict[str, Change] = {
    "a layer that is not there": lambda q: q["layers"].update({"model.layers.9.mlp.up_proj": _layer(q)}),
    "another width": lambda q: _layer(q).update(in_features=64),
    "narrower than another matrix": lambda q: _layer(q).update(replaced=[32, 64]),
    "a bias": lambda q: _layer(q).update(bias=True),
}


@pytest.mark.parametrize("how", PLACES)
def test_layers_that_do_not_fit_the_model_are_named(how: str, whole: Path, tmp_path: Path) -> None:
    folder = _copy(whole, tmp_path)
    edit_json(folder / "config.json", lambda fields: PLACES[how](fields["quantization_config"]))
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(PlanError, match=r"The checkpoint replaces model\.layers\.\d\.mlp\.up_proj"):
            read(str(folder))


SHAPES: dict[str, Change] = {
    "a layer is not mentioned": lambda q: q["layers"].pop(UP),
    "no layer is mentioned": lambda q: q["layers"].clear(),
    "another size": lambda q: _layer(q)["algebra"].update(size=3),
}


@pytest.mark.parametrize("how", SHAPES)
def test_weights_of_another_shape_than_the_config_says(how: str, whole: Path, tmp_path: Path) -> None:
    folder = _copy(whole, tmp_path)
    edit_json(folder / "config.json", lambda fields: SHAPES[how](fields["quantization_config"]))
    with pytest.raises(CheckpointError, match=r"shape.*config\.json"):
        load(str(folder))
    with pytest.raises((CheckpointError, RuntimeError), match=r"shape|mismatched"):  # whoever looks first
        AutoModelForCausalLM.from_pretrained(folder)


def _halve(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


WHOLE_FILES: dict[str, tuple[Change, str]] = {
    "truncated": (lambda f: _halve(f / "model.safetensors"), "model.safetensors"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors (0 bytes)"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors (64 bytes)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda f: _halve(f / "config.json"), "config.json cannot be read"),
    "config of nothing": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be read"),
}
SHARDED_FILES: dict[str, tuple[Change, str]] = {
    "missing shard": (lambda f: _first_shard(f).unlink(), "model-00001-of-"),
    "truncated shard": (lambda f: _halve(_first_shard(f)), "model-00001-of-"),
    "broken index": (lambda f: _halve(f / "model.safetensors.index.json"), "model.safetensors.index.json"),
    "index a list": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json cannot be read"),
    "index without map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json cannot be read"),
    "index of numbers": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
        "index.json cannot be read",
    ),
}


@pytest.mark.parametrize("how", [*WHOLE_FILES, *SHARDED_FILES])
def test_a_damaged_folder_is_named_before_anything_is_loaded(
    how: str, whole: Path, sharded: Path, tmp_path: Path
) -> None:
    folder = _copy(whole if how in WHOLE_FILES else sharded, tmp_path)
    damage, message = (WHOLE_FILES | SHARDED_FILES)[how]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load(str(folder))
    assert message in caught.value.message
    assert str(folder) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage", "missing shard", "truncated shard"])
def test_from_pretrained_alone_names_damaged_weights_as_well(
    how: str, whole: Path, sharded: Path, tmp_path: Path
) -> None:
    folder = _copy(whole if how in WHOLE_FILES else sharded, tmp_path)
    damage, message = (WHOLE_FILES | SHARDED_FILES)[how]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert message in caught.value.message


def _drop(folder: Path, key: str) -> None:
    tensors = weights(folder)
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["T", "P", "Q"])
def test_a_hypercomplex_tensor_that_is_missing_is_never_made_up(part: str, whole: Path, tmp_path: Path) -> None:
    folder = _copy(whole, tmp_path)
    _drop(folder, f"{UP}.{part}")
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=rf"no weights for model\.layers\.0\.mlp\.up_proj\.{part}"):
            read(str(folder))


def test_a_dense_tensor_that_is_missing_is_never_made_up(whole: Path, tmp_path: Path) -> None:
    folder = _copy(whole, tmp_path)
    _drop(folder, "model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(CheckpointError, match=r"no weights for model\.layers\.1\.self_attn\.q_proj\.weight"):
        load(str(folder))


def test_an_index_that_points_out_of_the_folder_is_not_followed(sharded: Path, tmp_path: Path) -> None:
    folder = _copy(sharded, tmp_path)
    (tmp_path / "outside.safetensors").write_bytes((_first_shard(folder)).read_bytes())
    edit_json(
        folder / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"x": "../outside.safetensors"}),
    )
    with pytest.raises(CheckpointError, match=r"outside\.safetensors is missing"):
        verify_checkpoint(folder)


def test_the_wrong_class_is_an_error(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForImageTextToText.from_pretrained(whole)
    llava = saved(tmp_path / "llava", "llava_siglip")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_pretrained(llava)
    with pytest.raises(PlanError, match="BertModel has no such module") as caught:
        BertModel.from_pretrained(llava)
    assert "architectures" in caught.value.hint


def test_a_hyperfade_config_for_a_dense_checkpoint_is_refused(whole: Path, tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "dense")
    ours = HyperfadeConfig.from_dict(json.loads((whole / "config.json").read_text())["quantization_config"])
    with pytest.raises(CheckpointError, match="passed for a dense checkpoint") as caught:
        LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=ours)
    assert "hyperfade compress" in caught.value.hint


@pytest.mark.parametrize("read", [load, load_config, skeleton])
def test_a_name_that_leads_nowhere(read: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere") as caught:
        read(str(tmp_path / "nowhere"))
    assert "embedded" in caught.value.hint


def test_running_out_of_memory_is_not_called_a_damaged_checkpoint(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load(str(whole))
