"""Checkpoints of models whose experts were replaced: bit-equal, also where transformers renames and divides experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_experts import MODELS, inputs, logits, tiny
from torch import Tensor

from hyperfade.compose.export import densify_
from hyperfade.compose.quantize import quantize_
from hyperfade.hub import fold_, load, mark_, save, skeleton
from hyperfade.nn import light_modules
from hyperfade.recipe import Layer, Replace, Rule
from hyperfade.surgery import plan, set_alpha_, swap_

KINDS = {
    "products": Layer(n=4),
    "terms": Layer(kind="learned", n=2, terms=2, companion_rank=2),
    "low_rank": Layer(kind="low_rank", fraction=0.3),
}


def folded(name: str, layer: Layer = KINDS["products"], exclude: tuple[str, ...] = ()) -> Any:
    model = tiny(name)
    rules = (Rule(match="*", layer=None), Rule(match="*.experts.*", layer=layer))
    swap_(model, plan(model, Replace(vision=None, rules=rules, exclude=exclude)))
    set_alpha_(model, 1.0)
    fold_(model)
    return model


@torch.no_grad()
def generated(model: Any, name: str) -> Tensor:
    batch = inputs(model, name)
    batch.pop("moe_mm_token_type_ids", None)
    return model.generate(**batch, do_sample=False, max_new_tokens=4, min_new_tokens=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_mixture_comes_back_bit_equal_and_writes_the_same(name: str, kind: str, tmp_path: Path) -> None:
    model = folded(name, KINDS[kind])
    save(model, tmp_path / "model")
    again = load(str(tmp_path / "model"))
    assert torch.equal(logits(again, name), logits(model, name))
    assert torch.equal(generated(again, name), generated(model, name))
    specs = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["layers"]
    assert specs.keys() == light_modules(model).keys()
    assert all(fields["experts"] == 4 for fields in specs.values())
    save(again, tmp_path / "again")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    bones = skeleton(str(tmp_path / "model"))
    assert {k: v.shape for k, v in bones.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("exclude", ["*.down_proj", "*.layers.1.*"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_experts_of_which_a_part_stays_dense_come_back_too(name: str, exclude: str, tmp_path: Path) -> None:
    model = folded(name, exclude=(exclude,))
    save(model, tmp_path / "model")
    assert torch.equal(logits(load(str(tmp_path / "model")), name), logits(model, name))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_vl_moe", "ernie4_5_vl_moe"])
def test_a_reader_without_us_meets_an_empty_tensor_and_stops(name: str, tmp_path: Path) -> None:
    model = folded(name)
    save(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    fields = json.loads(file.read_text())
    assert fields.pop("quantization_config")
    file.write_text(json.dumps(fields))
    with pytest.raises(RuntimeError):
        type(model).from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_vl_moe", "llama4"])
def test_exported_dense_the_experts_are_what_transformers_knows(name: str, tmp_path: Path) -> None:
    model = folded(name)
    save(model, tmp_path / "light")
    loaded = load(str(tmp_path / "light"))
    assert densify_(loaded) == list(light_modules(model))
    tiny(name).save_pretrained(tmp_path / "plain")
    save(loaded, tmp_path / "dense")
    plain, dense = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "dense"))
    assert {key: tensor.shape for key, tensor in plain.items()} == {key: tensor.shape for key, tensor in dense.items()}
    off = (logits(load(str(tmp_path / "dense")), name) - logits(model, name)).abs().max()
    assert off < 1e-5  # seen 1e-6


def test_few_bits_leave_experts_and_say_so(tmp_path: Path) -> None:
    model = tiny("llama4")
    swap_(model, plan(model, Replace(language=Layer(n=2), vision=None, exclude=("*.1.*.experts.*",))))
    set_alpha_(model, 1.0)
    fold_(model)
    report = quantize_(model, "int8")
    mark_(model)
    held = [f"model.layers.{i}.feed_forward.experts.{key}" for i in (0, 1) for key in ("gate_up_proj", "down_proj")]
    assert report.left == [(name, "of experts in one tensor") for name in held]
    assert "left as they are, of experts in one tensor" in report.lines()[-1]
    assert all("shared_expert" in name for name in report.low_bits)
    save(model, tmp_path / "model")
    assert torch.equal(logits(load(str(tmp_path / "model")), "llama4"), logits(model, "llama4"))
