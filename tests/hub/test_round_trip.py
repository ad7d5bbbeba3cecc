"""Save, load by `from_pretrained`, compare bit for bit: logits, greedy answers with a KV cache, every tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folded import KINDS, NARROW, files, folded, saved, stored_dtypes, weights
from tiny_models import FAMILIES, generated, logits, num_parameters, randomize_
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hyperfade.hub import HyperfadeConfig, load, mark_, round_, save
from hyperfade.nn import light_modules


def _auto(name: str) -> Any:
    return AutoModelForImageTextToText if FAMILIES[name].image else AutoModelForCausalLM


def _assert_same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


ROUND_TRIPS = [(name, kind) for name in FAMILIES for kind in KINDS]
ROUND_TRIPS += [(name, kind) for name in ("llava_siglip", "qwen2_5_vl", "blip2_t5") for kind in NARROW]


@pytest.mark.parametrize(("name", "kind"), ROUND_TRIPS)
def test_from_pretrained_gives_the_model_back_bit_for_bit(name: str, kind: str, tmp_path: Path) -> None:
    family, model = FAMILIES[name], folded(name, (KINDS | NARROW)[kind])
    randomize_(model, seed=7)  # every factor off its starting point, P, Q, A and the companion too
    save(model, tmp_path / "model")
    again, report = _auto(name).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(again) is type(model)
    assert not any(report.values()), report  # no key missing, unexpected, mismatched or failed
    assert list(light_modules(again)) == list(light_modules(model)) != []
    assert torch.equal(logits(again.eval(), family), logits(model, family))
    assert torch.equal(generated(again, family), generated(model, family))
    _assert_same_state(again, model)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_pretrained_after_fold_writes_the_same_files_as_save(name: str, tmp_path: Path) -> None:
    model = folded(name)
    model.save_pretrained(tmp_path / "plain")
    save(model, tmp_path / "atomic")
    assert files(tmp_path / "plain") == files(tmp_path / "atomic")


@pytest.mark.parametrize("name", ["llava_siglip", "qwen2_vl", "blip2_t5", "qwen2"])
def test_a_reloaded_model_saves_the_same_checkpoint_again(name: str, tmp_path: Path) -> None:
    first = saved(tmp_path / "first", name)
    _auto(name).from_pretrained(first).save_pretrained(tmp_path / "second")
    one, two = files(first), files(tmp_path / "second")
    for file in (one, two):
        file.pop("generation_config.json")  # transformers notes there where it came from
    assert one == two


def test_config_json_says_what_the_layers_are_in_plain_values(tmp_path: Path) -> None:
    model = folded("llava_siglip", KINDS["companion"])
    save(model, tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert fields.keys() == {"quant_method", "version", "layers", "inner"}
    assert (fields["quant_method"], fields["version"], fields["inner"]) == ("hyperfade", 1, None)
    assert fields["layers"].keys() == light_modules(model).keys()
    up = fields["layers"]["model.language_model.layers.0.mlp.up_proj"]
    assert (up["in_features"], up["out_features"], up["bias"], up["rank"]) == (32, 48, False, 2)
    assert (up["algebra"]["name"], up["algebra"]["n"]) == ("products", 4)
    assert HyperfadeConfig.from_dict(fields).to_dict() == fields


@pytest.mark.parametrize("kind", NARROW)
def test_config_json_says_which_matrix_a_narrow_layer_replaces(kind: str, tmp_path: Path) -> None:
    model = folded("llava_siglip", NARROW[kind])
    save(model, tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    layers = fields["layers"]
    up, down = (layers[f"model.language_model.layers.0.mlp.{name}"] for name in ("up_proj", "down_proj"))
    assert (up["in_features"], up["out_features"], up["replaced"]) == (32, 24, [32, 48])
    assert (down["in_features"], down["out_features"], down["replaced"]) == (24, 32, [48, 32])
    assert (up["algebra"] is None) == (kind == "narrow")
    as_wide = [name for name, layer in layers.items() if "replaced" not in layer]
    assert as_wide == [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)]
    assert model.config.quantization_config.to_dict() == fields  # plain values in memory already
    assert sum(t.numel() for t in weights(tmp_path / "model").values()) == num_parameters(model)


def test_no_dense_weight_is_left_in_the_file_only_an_empty_one_under_its_name(tmp_path: Path) -> None:
    model = folded("llava_siglip")
    save(model, tmp_path / "model")
    stored = weights(tmp_path / "model")
    empty = {name for name, tensor in stored.items() if tensor.numel() == 0}
    assert len(empty) == len(light_modules(model))
    assert all(name.endswith((".weight",)) for name in empty)
    assert sum(t.numel() for t in stored.values()) == num_parameters(model)


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen2", "paligemma", "blip2_t5"])
def test_tied_weights_are_stored_once_and_tied_again(name: str, storage: torch.dtype | None, tmp_path: Path) -> None:
    model = folded(name)
    round_(model, storage or torch.float32)
    save(model, tmp_path / "model", storage_dtype=storage)
    assert sum(t.numel() for t in weights(tmp_path / "model").values()) == num_parameters(model)
    again = load(str(tmp_path / "model"))
    assert num_parameters(again) == num_parameters(model)
    assert torch.equal(logits(again, FAMILIES[name]), logits(model, FAMILIES[name]))


RUN = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("storage", [None, *RUN], ids=str)
@pytest.mark.parametrize("run", RUN, ids=str)
@pytest.mark.parametrize("name", ["llava_siglip", "qwen2_5_vl"])
def test_dtype_in_memory_and_on_disk_are_two_things(
    name: str, run: torch.dtype, storage: torch.dtype | None, tmp_path: Path
) -> None:
    family, model = FAMILIES[name], folded(name, dtype=run)
    round_(model, storage or run)
    assert model.dtype == run
    save(model, tmp_path / "model", storage_dtype=storage)
    short = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    assert stored_dtypes(tmp_path / "model") == {short[storage or run]}
    again = load(str(tmp_path / "model"))
    assert again.dtype == run
    _assert_same_state(again, model)
    assert torch.equal(logits(again, family, run), logits(model, family, run))
    assert torch.equal(generated(again, family, run), generated(model, family, run))


def test_without_rounding_a_narrow_file_changes_the_model(tmp_path: Path) -> None:
    """The reason for `round_`: it is what makes the test above hold."""
    family, model = FAMILIES["llava_siglip"], folded("llava_siglip")
    save(model, tmp_path / "model", storage_dtype=torch.bfloat16)
    assert not torch.equal(logits(load(str(tmp_path / "model")), family), logits(model, family))


def test_a_storage_dtype_holds_for_one_save_only(tmp_path: Path) -> None:
    model = folded("llama")
    save(model, tmp_path / "narrow", storage_dtype=torch.bfloat16)
    save(model, tmp_path / "full")
    assert stored_dtypes(tmp_path / "full") == {"F32"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_asked_for_at_loading_casts_every_tensor(dtype: str, tmp_path: Path) -> None:
    model = folded("llava_siglip", KINDS["complex"])
    save(model, tmp_path / "model")
    again = load(str(tmp_path / "model"), dtype=dtype)
    _assert_same_state(again, model.to(getattr(torch, dtype)))


def test_round_keeps_dtypes_and_integers_and_is_idempotent() -> None:
    model = nn.BatchNorm1d(3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1.0, 1.00390625, 1 / 3]))  # bf16 has 8 significant bits
    model.num_batches_tracked.fill_(12345)
    round_(model, torch.bfloat16)
    assert model.weight.dtype == torch.float32
    assert model.weight.tolist() == [1.0, 1.0, 0.333984375]
    assert model.num_batches_tracked.item() == 12345
    before = model.weight.clone()
    round_(model, torch.bfloat16)
    assert torch.equal(model.weight, before)


def test_device_map_auto(tmp_path: Path) -> None:
    model = folded("llava_siglip")
    save(model, tmp_path / "model")
    again = load(str(tmp_path / "model"), device_map="auto")
    assert not any(p.is_meta for p in again.parameters())
    _assert_same_state(again.to("cpu"), model)
    assert torch.equal(logits(again, FAMILIES["llava_siglip"]), logits(model, FAMILIES["llava_siglip"]))


def test_weights_offloaded_to_disk_still_load(tmp_path: Path) -> None:
    model, parts = folded("llava_clip"), {"model": "disk", "lm_head": "cpu"}
    save(model, tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=parts, offload_folder=tmp_path / "offload"
    )
    assert all(p.is_meta for layer in light_modules(again).values() for p in layer.parameters())
    difference = logits(again.eval(), FAMILIES["llava_clip"]) - logits(model, FAMILIES["llava_clip"])
    assert difference.abs().max() < 1e-4  # observed: 0.0


@pytest.mark.parametrize("shape", [dict, lambda: {"shard_bytes": 30_000}], ids=["one file", "shards"])
def test_loaded_weights_lie_where_torch_would_put_them(shape: Any, tmp_path: Path) -> None:
    """Products round differently at other addresses: a file is mapped to memory, and a header has any length."""
    folder = saved(tmp_path / "model", "idefics3", **shape())
    dense = tmp_path / "dense"
    FAMILIES["idefics3"].build().save_pretrained(dense)
    for model in (load(str(folder)), _auto("idefics3").from_pretrained(folder), load(str(dense))):
        assert {t.data_ptr() % 64 for t in model.state_dict().values()} == {0}


def test_shards(tmp_path: Path) -> None:
    model = folded("llava_siglip")
    save(model, tmp_path / "model", shard_bytes=30_000)
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    _assert_same_state(load(str(tmp_path / "model")), model)
    save(model, tmp_path / "model")  # one file over many: no shard stays behind
    assert [f.name for f in (tmp_path / "model").glob("*.safetensors")] == ["model.safetensors"]
    _assert_same_state(load(str(tmp_path / "model")), model)


def test_a_reloaded_model_trains(tmp_path: Path) -> None:
    family = FAMILIES["llava_siglip"]
    model = load(str(saved(tmp_path / "model", "llava_siglip"))).train()
    assert all(p.requires_grad for layer in light_modules(model).values() for p in layer.parameters())
    model(**family.inputs()).logits.square().mean().backward()
    layer = light_modules(model)["model.language_model.layers.0.mlp.up_proj"]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_mark_follows_the_layers_that_are_there() -> None:
    model = folded("llama")
    before = model.config.quantization_config.layers
    model.set_submodule("model.layers.0.mlp.up_proj", nn.Linear(32, 48, bias=False))
    mark_(model)
    gone = before.keys() - model.config.quantization_config.layers.keys()
    assert gone == {"model.layers.0.mlp.up_proj"}
