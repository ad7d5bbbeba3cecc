"""For tools that know nothing of us: a plain dense checkpoint, or ONNX.

densify_(model)                                    every W materialised; loads without hyperfade, saves nothing
export_onnx(model, batch, folder / "model.onnx")   the light layers as they are, in one graph
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyperfade.data import Collator, open_source
from hyperfade.errors import MissingLibraryError, NothingMatchedError, PlanError
from hyperfade.hub import takes_images
from hyperfade.nn import Light, LowBitLinear, light_modules, low_bit_modules
from hyperfade.surgery import close_experts_

_INT32, _BOOL = 6, 9  # as ONNX numbers its types


@torch.no_grad()
def densify_(model: PreTrainedModel) -> list[str]:
    """Put an `nn.Linear` with the materialised W in the place of every light and every low-bit layer; their names.
    Experts become the tensors again that they were.

    Hidden units that a narrow FFN lacks come back as zeros at the end, so the model has its dense config's widths.
    Raises `NothingMatchedError` where the model has no such layer.
    """
    lights = light_modules(model)
    layers: dict[str, Light | LowBitLinear] = {**lights}
    inside = tuple(f"{name}." for name in lights)
    layers |= {name: layer for name, layer in low_bit_modules(model).items() if not name.startswith(inside)}
    if not layers:
        raise NothingMatchedError(f"{type(model).__name__} is dense already.", "Use the checkpoint as it is.")
    closed = close_experts_(model)
    for name, layer in layers.items():
        if name not in closed:
            model.set_submodule(name, _dense(layer))
    if closed and hasattr(model, "_weight_conversions"):
        del model._weight_conversions  # which left these tensors out
    marks = ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config"))
    for owner, mark in marks:
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.is_quantized = False  # type: ignore[assignment]
    return list(layers)


def _dense(layer: Light | LowBitLinear) -> nn.Linear:
    weight, bias = layer.weight, layer.bias
    d, k = weight.shape[1], weight.shape[0]
    if isinstance(layer, Light) and layer.replaced is not None:
        d, k = layer.replaced
    linear = nn.Linear(d, k, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    linear.weight.zero_()
    linear.weight[: weight.shape[0], : weight.shape[1]] = weight
    if bias is not None:
        linear.bias.zero_()
        linear.bias[: len(bias)] = bias
    return linear.requires_grad_(False)


class _Logits(nn.Module):
    """A model as a function of some of its inputs, by position, to logits."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), use_cache=False).logits


def example_of(model: PreTrainedModel, processor: Any) -> dict[str, Tensor]:
    """Inputs to trace the model with: two short sequences, or one question about an image."""
    if not takes_images(model.config):
        ids = torch.arange(1, 17).view(2, 8)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = Collator(processor, max_tokens=10**9).prompt_batch([open_source("easy-vqa:test")[0]])
    return {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in batch.items()}


def _all_true(values: Any) -> Any:
    """What torch's exporter has no translation for: families check with it that an image fits its place in the text."""
    ops = importlib.import_module("onnxscript").opset18
    return ops.Cast(ops.ReduceMin(ops.Cast(values, to=_INT32), keepdims=0), to=_BOOL)


@torch.no_grad()
def export_onnx(model: PreTrainedModel, batch: dict[str, Tensor], file: Path) -> None:
    """Write the forward pass as an ONNX graph (no cache): the inputs of `batch` → logits (batch, tokens, vocabulary).

    The number of sequences and of tokens may change; an image's size may not. Weights lie beside `file`, in
    `<file>.data`. Raises `MissingLibraryError` where torch's exporter lacks its libraries, `PlanError` where it fails.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingLibraryError(
            f"ONNX export needs {' and '.join(missing)}, not installed here.", 'pip install "hyperfade[onnx]".'
        )
    names = list(batch)
    sequences, tokens = torch.export.Dim("sequences"), torch.export.Dim("tokens")
    text = {"input_ids", "attention_mask"}
    shapes = tuple({0: sequences, 1: tokens} if name in text and "pixel_values" not in batch else {} for name in names)
    try:
        program = torch.onnx.export(
            _Logits(model, names).eval(),
            tuple(batch.values()),
            dynamo=True,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=(shapes,),
            custom_translation_table={torch.ops.aten._is_all_true.default: _all_true},
            optimize=not low_bit_modules(model),  # it would write few bits out as floats where they are small
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise PlanError(
            f"torch cannot export {type(model).__name__} to ONNX: {str(error).strip().splitlines()[0]}",
            "Export --to dense, for another exporter.",
        ) from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: most of the file otherwise
    program.save(file, external_data=True)
