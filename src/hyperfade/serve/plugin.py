"""vLLM's view of a compressed checkpoint: which of its linear layers are replaced, how their weights arrive, what runs.

vLLM builds a model of its own classes, where one linear may hold several matrices of the checkpoint (gate and up lie in
`gate_up_proj`, q, k and v in `qkv_proj`). It asks `EngineConfig` for each linear by name; one with a replaced matrix
gets a `LayerMethod`, all others run as dense ones. The method puts an empty parameter under every name that the
checkpoint may hold, whose loader collects what arrives. As soon as a matrix is complete its layer is built, the very
module that transformers runs (`hyperfade.nn`), and with tensor parallelism cut to this process's share.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper

from hyperfade.errors import CheckpointError, ServingError
from hyperfade.hub import HyperfadeConfig
from hyperfade.hub.integrity import AGAIN
from hyperfade.hub.quantizer import METHOD, install_low_bit_
from hyperfade.nn import LightSpec, LowBit, pack_
from hyperfade.serve.share import Share, check_share, cut, num_blocks
from hyperfade.surgery import join_readers_
from hyperfade.surgery.families import PROJECTOR_SHAPES, SHAPES

_ATTENTION_PARTS = ("q", "k", "v")
_UNWRAPPED_TOWER = re.compile(r"(^|\.)vision_tower\.(?!vision_model\.)")
_TOWER = r"\1vision_tower.vision_model."
"""LLaVA's towers have a module `vision_model` in vLLM, as in checkpoints of older transformers. Present ones name their
weights without it, and vLLM 0.32 stops there, whether the checkpoint is dense or not."""


class EngineConfig(QuantizationConfig):
    """`quantization_config` of a checkpoint's config.json, as vLLM asks for it. `specs`: replaced matrices by name.
    low_bits: quantized linears by name, inside replaced matrices or beside them."""

    def __init__(self, specs: Mapping[str, LightSpec], low_bits: Mapping[str, LowBit] | None = None) -> None:
        super().__init__()
        self.specs, self.low_bits = dict(specs), dict(low_bits or {})
        self.wraps_tower = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EngineConfig":
        """Raises `CheckpointError` for what this version cannot read, `ServingError` for what it cannot serve."""
        read = HyperfadeConfig.from_dict(config)
        experts = [name for name, spec in read.specs.items() if spec.experts]
        if experts:
            raise ServingError(
                f"{experts[0]} holds the matrices of experts, which vLLM would look for in dense tensors.",
                "Run the checkpoint with transformers, or compress with replace.exclude: ['*.experts.*'].",
            )
        return cls(read.specs, read.low_bits)

    def get_name(self) -> Any:
        """What `quant_method` says."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """All that the layers run in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No kernel of our own: every GPU that vLLM runs on."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the names that vLLM's model has for the checkpoint's modules."""
        self.specs = hf_to_vllm_mapper.apply_dict(self.specs)
        self.low_bits = hf_to_vllm_mapper.apply_dict(self.low_bits)

    def get_checkpoint_weight_mapper(self) -> Any:
        """The names that vLLM's model has for the checkpoint's tensors, where its own mapper does not know."""
        known = super().get_checkpoint_weight_mapper()
        return known | WeightsMapper(orig_to_new_regex={_UNWRAPPED_TOWER: _TOWER}) if self.wraps_tower else known

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How the linear called `prefix` is loaded and run; None for what is no linear."""
        if not isinstance(layer, LinearBase):
            return None
        if "vision_tower.vision_model." in prefix and not self.wraps_tower:
            self.wraps_tower = True
            self.specs, self.low_bits = _wrapped(self.specs), _wrapped(self.low_bits)
        parent, _, name = prefix.rpartition(".")
        names = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(name, [name])]
        matrices = {full: self.specs.get(full) for full in names}
        low_bits = {path: held for path, held in self.low_bits.items() if any(_inside(path, full) for full in names)}
        if not any(matrices.values()) and not low_bits:
            return UnquantizedLinearMethod()
        return LayerMethod(matrices, {full: n for first in names for full, n in self.partners(first).items()}, low_bits)

    def partners(self, name: str) -> dict[str, int]:
        """The matrices that share hidden units with `name`, itself included, and their blocks. What else is connected
        is taken for dense."""
        for readers, writer in SHAPES + PROJECTOR_SHAPES:
            for child in (*readers, writer):
                if readers and name.endswith(f".{child}"):
                    holder = name.removesuffix(child)
                    return {holder + other: num_blocks(self.specs.get(holder + other)) for other in (*readers, writer)}
        return {name: num_blocks(self.specs.get(name)), f"what {name} is connected with": 1}


class LayerMethod(LinearMethodBase):
    """One linear of vLLM that holds `matrices` of the checkpoint, by name; None is one that stayed dense. low_bits: the
    quantized linears among them and in them."""

    def __init__(
        self, matrices: Mapping[str, LightSpec | None], partners: dict[str, int], low_bits: dict[str, LowBit]
    ) -> None:
        self.specs = dict(matrices)
        self.partners, self.low_bits = partners, low_bits
        self.arrived: dict[str, dict[str, Tensor]] = {name: {} for name in matrices}

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Check that the checkpoint's layers fit `layer`, and make ready for their weights.

        Raises `CheckpointError` where they do not fit, `ServingError` where tensor parallelism would not be exact.
        """
        self.dtype, self.share = params_dtype, self._share_of(layer)
        ranks = self.share.ranks if self.share and self.share.side == "out" else 1
        self.skeletons: dict[str, Any] = {}
        for (name, spec), outputs in zip(self.specs.items(), output_partition_sizes, strict=True):
            expected = (input_size, outputs * ranks, layer.has_bias)
            if spec is not None and (*spec.dense_features, spec.bias) != expected:
                raise CheckpointError(
                    f"{name} replaces a matrix with (in, out, bias) = {(*spec.dense_features, spec.bias)}; vLLM's "
                    f"model has {expected} there.",
                    AGAIN,
                )
            own = self.skeletons[name] = self._skeleton(name, expected[:2])
            if self.share:
                check_share(name, own.out_features if ranks > 1 else own.in_features, self.partners, self.share)
        self.expected = {name: own.state_dict() for name, own in self.skeletons.items()}
        self.widths = [own.out_features // ranks for own in self.skeletons.values()]
        if self.widths != output_partition_sizes:  # an FFN with fewer hidden units: the bias is made to this
            layer.output_size = layer.output_size_per_partition = sum(self.widths)
        layer.weight_loader = self.load_bias  # and with this
        self.without_bias = set(self.specs) if layer.has_bias else set()
        layer.light = nn.ModuleDict()
        self._expect_(layer)

    def _skeleton(self, name: str, widths: tuple[int, int]) -> Any:
        """The module that the checkpoint holds weights for in the place of a matrix, its bias left out."""
        spec, like = self.specs[name], {"device": "meta", "dtype": self.dtype}
        own = replace(spec, bias=False).build(**like) if spec else nn.Linear(*widths, bias=False, **like)
        held = {f"own{path.removeprefix(name)}": low for path, low in self.low_bits.items() if _inside(path, name)}
        if held and self.share:
            raise ServingError(
                f"Tensor parallelism over {self.share.ranks}: {name} is in {next(iter(held.values())).to}, and "
                "matrices in few bits are not cut.",
                "Serve with --tensor-parallel-size 1, or the checkpoint before it was quantized.",
            )
        holder = nn.ModuleDict({"own": own})
        install_low_bit_(holder, held)
        return holder["own"]

    def _share_of(self, layer: Any) -> Share | None:
        """The share of this process, None where it holds the whole layer."""
        if layer.tp_size == 1 or not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            return None
        side = "in" if isinstance(layer, RowParallelLinear) else "out"
        whole = layer.gather_output if side == "out" else not layer.input_is_parallel
        if isinstance(layer, QKVParallelLinear) or (whole and max(self.partners.values()) > 1):
            raise ServingError(
                f"Tensor parallelism over {layer.tp_size}: {layer.prefix} is not part of a feed-forward network, and "
                "its replacement cannot be split.",
                "Serve with --tensor-parallel-size 1.",
            )
        return Share(side, layer.tp_rank, layer.tp_size)

    def _expect_(self, layer: Any) -> None:
        """Put an empty parameter under every name that the checkpoint may hold for this linear."""
        paths = {"weight"}  # of a dense matrix, or the empty tensor under a replaced one's name
        for name, spec in self.specs.items():
            paths |= set(self.expected[name])
            if spec is not None and spec.bias:
                paths.add(_bias_path(spec))
        for path in paths - {"bias"}:  # vLLM makes that one itself
            module = layer
            *parents, leaf = path.split(".")
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            parameter: Any = nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)
            parameter.weight_loader = partial(self.load, layer, path)
            module.register_parameter(leaf, parameter)
        self.roots = {path.partition(".")[0] for path in paths} - {"weight", "bias"}

    def load(
        self, layer: Any, path: str, parameter: nn.Parameter, tensor: Tensor, part: str | int | None = None
    ) -> None:
        """Keep a tensor of the checkpoint; the last one of a matrix completes its layer. part: which of the matrices,
        as vLLM numbers them."""
        name = self._name(part)
        spec, arrived = self.specs[name], self.arrived[name]
        if spec is not None and path == _bias_path(spec):
            self.load_bias(layer.bias, tensor, part)
            return
        expected = self.expected[name]
        if path == "weight" and path not in expected and not tensor.numel():
            return  # what keeps other readers from taking the checkpoint for a dense one
        if path not in expected or expected[path].shape != tensor.shape:
            described = f"it has shape {tuple(expected[path].shape)}" if path in expected else "there is none"
            raise CheckpointError(
                f"{name}.{path} in the checkpoint has shape {tuple(tensor.shape)}; by config.json {described}.", AGAIN
            )
        like = {"dtype": expected[path].dtype, "device": parameter.device}
        arrived[path] = torch.empty_like(tensor, **like).copy_(tensor)
        if arrived.keys() == expected.keys():
            light = self.skeletons.pop(name)
            light.load_state_dict(arrived, assign=True)
            pack_(light)
            layer.light[_key(name)] = (cut(light, self.share) if self.share else light).requires_grad_(False)
            arrived.clear()

    def load_bias(self, parameter: nn.Parameter, tensor: Tensor, part: str | int | None = None) -> None:
        """Write this process's share of a matrix's bias to its place in the linear's."""
        name = self._name(part)
        if self.share is not None and self.share.side == "out":
            tensor = self.share.of(tensor, 0, num_blocks(self.specs[name]))
        parameter.data.split(self.widths)[list(self.specs).index(name)].copy_(tensor)
        self.without_bias.discard(name)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises `CheckpointError` where a matrix did not get all of its weights."""
        missing = [f"{name}.{min(self.expected[name].keys() - self.arrived[name].keys())}" for name in self.skeletons]
        missing += [f"{name}.bias" for name in sorted(self.without_bias)]
        if missing:
            raise CheckpointError(f"The checkpoint holds no weights for {missing[0]}.", AGAIN)
        for root in self.roots:
            delattr(layer, root)
        join_readers_(layer.light)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) → (..., sum of the matrices' outputs)."""
        outputs = [layer.light[_key(name)](x) for name in self.specs]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias

    def _name(self, part: str | int | None) -> str:
        """The matrix that vLLM means by a part of a linear."""
        index = _ATTENTION_PARTS.index(part) if isinstance(part, str) else part or 0
        return list(self.specs)[index]


def _wrapped(by_name: Mapping[str, Any]) -> dict[str, Any]:
    """The same by the names that vLLM's towers have."""
    return {_UNWRAPPED_TOWER.sub(_TOWER, name): value for name, value in by_name.items()}


def _inside(path: str, name: str) -> bool:
    """Whether a module is the one called `name`, or part of it."""
    return path == name or path.startswith(f"{name}.")


def _key(name: str) -> str:
    """What a matrix is called within its linear."""
    return name.rpartition(".")[2]


def _bias_path(spec: LightSpec) -> str:
    """Where a layer of this kind keeps its bias."""
    if spec.algebra is not None:
        return "bias"
    return "expand.bias" if spec.rank else "core.bias"
