"""The plug-in's own decisions on single vLLM layers: what is refused, by which words, and what a share of a bias is."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod

from hyperfade.algebra import Algebra
from hyperfade.compose.quantize import quantize_
from hyperfade.errors import CheckpointError, ServingError
from hyperfade.nn import LightSpec, LowBit
from hyperfade.serve.plugin import EngineConfig

FC1, FC2 = "model.layers.0.mlp.fc1", "model.layers.0.mlp.fc2"
SPECS = {FC1: LightSpec(16, 24, True, Algebra.products(4)), FC2: LightSpec(24, 16, True, Algebra.products(4))}


@pytest.fixture(autouse=True)
def _engine() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def column(config: EngineConfig, name: str = FC1, rank: int = 0, ranks: int = 1, width: int = 24) -> Any:
    options = {"bias": True, "params_dtype": torch.float32, "quant_config": config, "prefix": name}
    return ColumnParallelLinear(16, width, **options, tp_rank=rank, tp_size=ranks)


def stored(spec: LightSpec) -> tuple[Any, dict[str, Tensor]]:
    """A layer with random weights, and what a checkpoint holds for it."""
    layer = spec.build()
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer, {**layer.state_dict(), "weight": torch.empty(0)}


def fill(linear: Any, tensors: dict[str, Tensor]) -> None:
    for path, tensor in tensors.items():
        parameter = linear.get_parameter(path)
        parameter.weight_loader(parameter, tensor)
    linear.quant_method.process_weights_after_loading(linear)


@torch.inference_mode()
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_holds_half_of_every_block_and_of_the_bias(rank: int) -> None:
    layer, tensors = stored(SPECS[FC1])
    linear = column(EngineConfig(SPECS), rank=rank, ranks=2)
    fill(linear, tensors)
    x = torch.randn(5, 16)
    own = layer(x).view(5, 4, 2, 3)[:, :, rank].flatten(1)
    torch.testing.assert_close(linear(x)[0], own)
    assert linear.light["fc1"].T.numel() == layer.T.numel() // 2


def test_a_linear_that_the_checkpoint_did_not_replace_stays_dense() -> None:
    config = EngineConfig(SPECS)
    assert type(config.get_quant_method(column(config), "model.layers.1.mlp.fc1")) is UnquantizedLinearMethod


def rounded(to: Any) -> tuple[EngineConfig, Any, dict[str, Tensor]]:
    """The config of a checkpoint with fc1 in few bits, the layer, and what the checkpoint holds for it."""
    holder = nn.Module()
    holder.fc1 = stored(SPECS[FC1])[0]
    low_bits = quantize_(holder, to, 0 if to == "int8" else 32).low_bits
    assert list(low_bits) == ["fc1.core"]
    specs = {FC1: LightSpec.of(holder.fc1)}
    config = EngineConfig(specs, {f"{FC1}.core": low_bits["fc1.core"]})
    return config, holder.fc1, {**holder.fc1.state_dict(), "weight": torch.empty(0)}


@torch.inference_mode()
def test_few_bits_inside_a_layer_are_those_of_the_checkpoint() -> None:
    config, layer, tensors = rounded("int8")
    linear = column(config)
    fill(linear, tensors)
    x = torch.randn(5, 16)
    assert torch.equal(linear(x)[0], layer(x))
    core = linear.light["fc1"].core
    assert (core.qdata.dtype, core.scale.dtype) == (torch.int8, torch.float32)


@torch.inference_mode()
def test_a_dense_matrix_in_few_bits_is_served_as_well() -> None:
    holder = nn.ModuleDict({"fc1": nn.Linear(16, 24)})
    low_bits = quantize_(holder, "int8", rest=True).low_bits
    config = EngineConfig({}, {FC1: low_bits["fc1"]})
    linear = column(config)
    fill(linear, {**holder["fc1"].state_dict(), "weight": torch.empty(0)})
    x = torch.randn(5, 16)
    torch.testing.assert_close(linear(x)[0], holder["fc1"](x))


def test_few_bits_are_not_cut() -> None:
    with pytest.raises(ServingError, match=r"mlp\.fc1 is in int8, and matrices in few bits are not cut"):
        column(EngineConfig(SPECS, {f"{FC1}.core": LowBit("int8")}), ranks=2)


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(CheckpointError, match="format version 99"):
        EngineConfig.from_config({"quant_method": "hyperfade", "version": 99, "layers": {}, "inner": None})


def test_shares_of_an_ffn_with_a_dense_partner_are_refused() -> None:
    with pytest.raises(ServingError, match=r"mlp\.fc1 comes in 4 blocks, model\.layers\.0\.mlp\.fc2 in 1"):
        column(EngineConfig({FC1: SPECS[FC1]}), ranks=2)


def test_shares_of_what_is_not_in_an_ffn_are_refused() -> None:
    name = "model.layers.0.self_attn.o_proj"
    with pytest.raises(ServingError, match=r"what .*o_proj is connected with in 1"):
        column(EngineConfig({name: SPECS[FC1]}), name, ranks=2)


def test_widths_of_another_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\(16, 24, True\); vLLM's model has \(16, 32, True\)"):
        column(EngineConfig(SPECS), width=32)


@pytest.mark.parametrize("path", ["Q", "bias"])
def test_missing_weights_are_named(path: str) -> None:
    _, tensors = stored(SPECS[FC1])
    del tensors[path]
    with pytest.raises(CheckpointError, match=rf"no weights for model\.layers\.0\.mlp\.fc1\.{path}"):
        fill(column(EngineConfig(SPECS)), tensors)


@pytest.mark.parametrize(
    ("path", "tensor", "words"),
    [
        ("T", torch.zeros(4, 6, 5), r"fc1\.T .*\(4, 6, 5\); by config.json it has shape \(4, 6, 4\)"),
        ("weight", torch.zeros(24, 16), r"fc1\.weight .*\(24, 16\); by config.json there is none"),
    ],
)
def test_weights_that_do_not_fit_are_refused(path: str, tensor: Tensor, words: str) -> None:
    _, tensors = stored(SPECS[FC1])
    with pytest.raises(CheckpointError, match=words):
        fill(column(EngineConfig(SPECS)), tensors | {path: tensor})


def test_hyperfade_leaves_vllm_alone_until_vllm_asks() -> None:
    script = "import sys, hyperfade.cli, hyperfade.pipeline, hyperfade.serve; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
