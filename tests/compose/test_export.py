"""Exports: a dense checkpoint that needs no hyperfade, and an ONNX graph; both compute what the model computes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES

from hyperfade.compose.export import densify_, export_onnx
from hyperfade.compose.quantize import quantize_
from hyperfade.errors import MissingLibraryError, NothingMatchedError
from hyperfade.hub import fold_, save
from hyperfade.nn import low_bit_modules
from hyperfade.recipe import Layer, Replace
from hyperfade.surgery import plan, swap_

WITHOUT = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
folder, given, out, kind = sys.argv[1:]
model = {"llama": AutoModelForCausalLM}.get(kind, AutoModelForImageTextToText).from_pretrained(folder).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(given)).logits.contiguous()}, out)
assert not any(name.startswith("hyperfade") for name in sys.modules)
"""
LAYERS = {
    "products": Layer(n=4),
    "complex": Layer(kind="complex"),
    "companion": Layer(n=4, companion_rank=2),
    "low-rank": Layer(kind="low_rank", fraction=0.4),
}


@torch.no_grad()
def _light(name: str, layer: Layer) -> Any:
    """A tiny model with replaced FFNs, biases in them that are not zero."""
    model = FAMILIES[name].build()
    swap_(model, plan(model, Replace(language=layer, vision=layer)))
    fold_(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), [("llama", "complex"), ("llava_siglip", "companion")])
def test_the_dense_checkpoint_loads_without_hyperfade(name: str, kind: str, tmp_path: Path) -> None:
    model, inputs = _light(name, LAYERS[kind]), FAMILIES[name].inputs()
    wanted = model(**inputs).logits
    dense = FAMILIES[name].build()
    names = densify_(model)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    assert names
    save(model, tmp_path / "dense")
    save_file(inputs, tmp_path / "inputs")
    command = [sys.executable, "-c", WITHOUT, tmp_path / "dense", tmp_path / "inputs", tmp_path / "out", name]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    logits = load_file(tmp_path / "out")["logits"]
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()  # observed 4e-7
    with pytest.raises(NothingMatchedError, match="dense already"):
        densify_(model)


@torch.no_grad()
def test_hidden_units_that_are_gone_come_back_as_zeros() -> None:
    layer = Layer(kind="dense", width=0.5)
    model, inputs = _light("qwen2_5_vl", layer), FAMILIES["qwen2_5_vl"].inputs()
    wanted = model(**inputs).logits
    densify_(model)
    up = model.model.language_model.layers[0].mlp.up_proj
    assert up.weight.shape == (48, 32)
    assert up.weight[24:].abs().max() == 0
    assert torch.allclose(model(**inputs).logits, wanted, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["products", "low-rank", None])
def test_onnx_gives_the_same_logits_for_any_number_of_tokens(kind: str | None, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime: Any = pytest.importorskip("onnxruntime")
    model = FAMILIES["llama"].build() if kind is None else _light("llama", LAYERS[kind])
    ids = torch.arange(1, 13).view(2, 6)
    export_onnx(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for shape in ((2, 6), (1, 9), (3, 2)):
        ids = torch.arange(1, 1 + shape[0] * shape[1]).view(shape)
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
        wanted = model(input_ids=ids).logits
        assert logits.shape == wanted.shape
        assert (torch.from_numpy(logits) - wanted).abs().max() < 1e-4 * wanted.abs().max()  # observed 3e-7
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert 0.9 * weights < (tmp_path / "model.onnx.data").stat().st_size < 1.01 * weights  # W is not in it
    assert (tmp_path / "model.onnx").stat().st_size < 400_000


@torch.no_grad()
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_onnx_of_an_image_model_keeps_few_bits(to: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("torchao")
    runtime: Any = pytest.importorskip("onnxruntime")
    model, inputs = _light("llava_siglip", Layer(kind="learned", n=2, terms=3)), FAMILIES["llava_siglip"].inputs()
    quantize_(model, to)
    export_onnx(model, inputs, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    given = {node.name for node in session.get_inputs()}  # a mask of ones may have been left out
    (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in given})
    wanted = model(**inputs).logits
    assert (torch.from_numpy(logits) - wanted).abs().max() < 1e-4 * wanted.abs().max()  # observed 5e-7
    held = sum(tensor.nbytes for layer in low_bit_modules(model).values() for tensor in layer.buffers())
    rest = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "model.onnx.data").stat().st_size < 1.05 * (held + rest)


def test_a_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match="onnx and onnxscript"):
        export_onnx(FAMILIES["llama"].build(), {}, tmp_path / "model.onnx")
