"""Quantized checkpoints: bit for bit in another process, small on disk, refused where they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folded import KINDS, edit_json, folded, stored_dtypes, weights
from safetensors.torch import load_file, save_file
from test_fresh_process import WITH, WITHOUT, python
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM

from hyperfade.compose.quantize import quantize_
from hyperfade.errors import CheckpointError
from hyperfade.hub import load, mark_, save, skeleton
from hyperfade.nn import low_bit_modules

pytest.importorskip("torchao")
GENERATED = {"do_sample": False, "use_cache": True, "min_new_tokens": 8, "max_new_tokens": 8}


def _quantized(name: str, kind: str, to: Any, group: int | None, dtype: torch.dtype, rest: bool = False) -> Any:
    """A tiny model with all FFNs replaced and rounded. Its widths are small, so most matrices take int8 only."""
    model = folded(name, KINDS[kind], dtype)
    quantize_(model, to, group, rest)
    mark_(model)
    return model


CASES = [
    ("llama", "products", "int8", None, torch.bfloat16, True),
    ("llama", "learned", "int4", None, torch.bfloat16, True),
    ("llava_siglip", "companion", "fp8", None, torch.float32, False),
    ("qwen2_5_vl", "low_rank", "int8", None, torch.float32, True),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind", "to", "group", "dtype", "rest"), CASES)
def test_a_reload_is_bit_equal(
    name: str, kind: str, to: Any, group: int | None, dtype: torch.dtype, rest: bool, tmp_path: Path
) -> None:
    model, inputs = _quantized(name, kind, to, group, dtype, rest), FAMILIES[name].inputs(dtype)
    save(model, tmp_path / "model", storage_dtype=dtype, shard_bytes=20_000)
    again = load(str(tmp_path / "model"))
    assert low_bit_modules(again).keys() == low_bit_modules(model).keys()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    save(again, tmp_path / "second")
    first, second = weights(tmp_path / "model"), weights(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor.view(torch.uint8), second[n].view(torch.uint8)) for n, tensor in first.items())
    shapes = {n: p.shape for n, p in model.state_dict().items()}
    assert {n: p.shape for n, p in skeleton(str(tmp_path / "model")).state_dict().items()} == shapes


@torch.no_grad()
def test_another_process_gives_the_same(tmp_path: Path) -> None:
    """The embedded model's family, products stacked and rounded; without hyperfade nothing comes back."""
    model = _quantized("llava_siglip", "products", "int8", None, torch.float32, rest=True)
    inputs = FAMILIES["llava_siglip"].inputs()
    save(model, tmp_path / "llava-int8")
    save_file(inputs, tmp_path / "inputs.safetensors")
    python(WITH, tmp_path / "llava-int8", tmp_path / "inputs.safetensors", tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    assert torch.equal(out["logits"], model(**inputs).logits)
    assert torch.equal(out["tokens"], model.generate(**inputs, **GENERATED))
    dense = FAMILIES["llama"].build()
    quantize_(dense, "int8")
    mark_(dense)
    save(dense, tmp_path / "llama-int8")
    lines = python(WITHOUT, tmp_path / "llava-int8", tmp_path / "llama-int8").splitlines()
    assert lines == ["refused"] * 4


def test_the_file_holds_few_bits(tmp_path: Path) -> None:
    model = _quantized("llama", "learned", "int4", None, torch.bfloat16)
    save(model, tmp_path / "model")
    stored = weights(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj"
    assert stored[f"{name}.core.qdata"].shape == (24, 24)  # k/n by t·d/n/2
    assert stored[f"{name}.core.qdata"].dtype == torch.uint8
    assert stored[f"{name}.core.scale"].dtype == torch.bfloat16
    assert f"{name}.core.weight" not in stored
    assert stored[f"{name}.weight"].numel() == 0
    inner = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["inner"]
    assert inner["quant_method"] == "torchao"
    assert inner["to"] == "int4"
    assert inner["group_sizes"][f"{name}.core"] == 64  # of which 48 are there
    assert stored_dtypes(tmp_path / "model") == {"BF16", "U8", "I8"}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save(_quantized("llama", "products", "int8", None, torch.float32), tmp_path / "model")
    config, name = tmp_path / "model" / "config.json", "model.layers.0.mlp.up_proj"

    def groups(fields: Any) -> Any:
        return fields["quantization_config"]["inner"]["group_sizes"]

    edit_json(config, lambda fields: groups(fields).update({f"{name}.cores": 0}))
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"cores in int8"):
            read(str(tmp_path / "model"))
    edit_json(config, lambda fields: [groups(fields).pop(f"{name}.{own}") for own in ("cores", "core")])
    with pytest.raises(CheckpointError, match=r"no weights for model\.layers\.0\.mlp\.up_proj"):
        load(str(tmp_path / "model"))


def test_nf4_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    model = _quantized("llama", "learned", "nf4", 32, torch.float32, rest=True)
    save(model, tmp_path / "model")
    inputs = FAMILIES["llama"].inputs()
    with torch.no_grad():
        assert torch.equal(load(str(tmp_path / "model"))(**inputs).logits, model(**inputs).logits)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(Exception, match="nf4 needs bitsandbytes"):
        load(str(tmp_path / "model"))
