"""The plug-in that lets `from_pretrained` load a compressed checkpoint like any other.

config.json of a compressed model holds

    "quantization_config": {"quant_method": "hyperfade", "version": 1, "layers": {name: spec}, "inner": null}

`import hyperfade` registers the method. Before weights are read, the quantizer puts replacement layers into the
skeleton; the weights then fill them by name. Without the import transformers (5.x) only warns of an unknown method and
would fill the missing dense weights at random. So every replaced matrix also leaves an empty tensor under its dense
name, `<layer>.weight` of shape (0,): a reader that expects the dense matrix meets another shape and stops.

The matrices of experts go by the names of the tensors they replace, which therefore are their own dense names. For many
models transformers splits these tensors into one per expert when it saves, and joins them when it loads; it has to
leave alone what was replaced, so those conversions are taken out, and dense experts of the same model keep the names
they have in memory.

`inner` says which linears were quantized after compression, inside replacement layers or beside them:

    "inner": {"quant_method": "torchao", "to": "int4", "group_sizes": {module name: group size, 0 for whole rows}}

`quant_method` is whose numbers they are. Each such module has qdata, scale and maybe zero_point in the weights' file
(`nn/low_bit.py`), and no weight; outside of replacement layers the empty tensor stands under the dense name here too.
"""

import re
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hyperfade.errors import CheckpointError
from hyperfade.formats import Format
from hyperfade.hub.integrity import AGAIN, verify_safetensors
from hyperfade.nn import LightSpec, LowBit, LowBitLinear, bitsandbytes, pack_
from hyperfade.surgery import install_, join_readers_, tensor_names

METHOD = "hyperfade"
VERSION = 1
_KEYS = {"quant_method", "version", "layers", "inner"}


class HyperfadeConfig(QuantizationConfigMixin):
    """Which modules are replaced by what: `layers` maps module names to the fields of a `LightSpec`.

    Raises `CheckpointError` for a newer version, unknown keys, or a layer that cannot be built.
    """

    def __init__(self, layers: dict[str, dict[str, Any]], version: int = VERSION, inner: Any = None, **unknown: Any):
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue] (transformers takes any name)
        unknown.pop("quant_method", None)
        if type(version) is not int or not 1 <= version <= VERSION:
            raise CheckpointError(
                f"This checkpoint has hyperfade format version {version!r}; this hyperfade reads up to {VERSION}.",
                "Update hyperfade: pip install --upgrade hyperfade.",
            )
        if unknown:
            raise CheckpointError(
                f"quantization_config in config.json has unknown keys: {', '.join(sorted(unknown))}.",
                f"This version knows {', '.join(sorted(_KEYS))}. Update hyperfade, or remove what was added by hand.",
            )
        if not isinstance(layers, dict):
            raise CheckpointError(
                f"`layers` of quantization_config in config.json is {type(layers).__name__}, not an object.",
                "Save the checkpoint again.",
            )
        self.version = version
        self.inner = inner
        self.layers = layers
        self.specs = {name: LightSpec.from_dict(fields, name) for name, fields in layers.items()}
        self.low_bits = low_bits_of(inner)
        self.dense_names = [*self.specs, *(name for name in self.low_bits if not _within(name, self.specs))]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config from plain JSON values; every key counts, none is ignored."""
        for key in ("version", "layers"):
            if key not in config_dict:
                raise CheckpointError(
                    f"quantization_config in config.json has no `{key}`.", "Save the checkpoint again."
                )
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"quant_method": METHOD, "version": self.version, "layers": self.layers, "inner": self.inner}


class HyperfadeQuantizer(HfQuantizer):
    """Swaps the skeleton's dense matrices for the layers that the checkpoint holds weights for."""

    storage_dtype: torch.dtype | None = None  # what weights are saved in; None: what they are

    @property
    def specs(self) -> dict[str, LightSpec]:
        """What the model's replaced matrices are, by module name."""
        assert isinstance(self.quantization_config, HyperfadeConfig)
        return self.quantization_config.specs

    @property
    def low_bits(self) -> dict[str, LowBit]:
        """The quantized linears by module name."""
        assert isinstance(self.quantization_config, HyperfadeConfig)
        return self.quantization_config.low_bits

    @property
    def dense_names(self) -> list[str]:
        """The matrices of the dense model that this one has no weight for."""
        assert isinstance(self.quantization_config, HyperfadeConfig)
        return self.quantization_config.dense_names

    @property
    def dense_tensors(self) -> list[str]:
        """What the dense model calls the weights of these matrices."""
        experts = {name for name, spec in self.specs.items() if spec.experts}
        return [name if name in experts else f"{name}.weight" for name in self.dense_names]

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Leave out the conversions that build or divide tensors of experts where some were replaced."""
        return super().update_weight_conversions(_unconcerned(weight_conversions, self.specs), *args, **kwargs)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to `quantize on load`: compression needs calibration and training."""
        if any(held.to == "nf4" for held in self.low_bits.values()):
            bitsandbytes()
        if not self.pre_quantized:
            raise CheckpointError(
                "A HyperfadeConfig was passed for a dense checkpoint.",
                "Compress it first: hyperfade compress --model ...",
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        verify_safetensors([Path(file) for file in kwargs.get("checkpoint_files") or ()])
        install_(model, self.specs)
        install_low_bit_(model, self.low_bits)
        for name in self.dense_names:
            _mark_initialized(model, name)
        empty = {rf"^{re.escape(name)}$" for name in self.dense_tensors}
        known = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = set(known or ()) | empty
        self.expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Refuse weights of other shapes than the config says, and replaced layers that were left unfilled: those hold
        whatever memory held. Transformers before 5.23 checks neither for a quantized model, and leaves the stored dtype
        to keys that it renames."""
        kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
        for name, tensor in model.state_dict(keep_vars=True).items():
            shape, dtype = self.expected.get(name, (tensor.shape, tensor.dtype))
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensor.shape)} in the checkpoint, {tuple(shape)} by its config.json.",
                    AGAIN,
                )
            if tensor.is_floating_point() and tensor.dtype != dtype and not any(part in name for part in kept):
                tensor.data = tensor.data.to(dtype)
        for name in self.dense_names:
            for part, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):  # meta: offloaded
                    raise CheckpointError(f"The checkpoint holds no weights for {name}.{part}.", AGAIN)
        align_(model)
        join_readers_(model)
        pack_(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """What `save_pretrained` writes: the weights, and the empty tensors under the dense names."""
        state = model.state_dict()
        if any(spec.experts for spec in self.specs.values()):
            own = getattr(model, "_weight_conversions", None)
            if own is None:  # as transformers does for a model that was never loaded
                found = get_model_conversion_mapping(model, add_legacy=False)
                own = [conversion for conversion in found if not isinstance(conversion, PrefixChange)]
            model._weight_conversions = _unconcerned(own, self.specs)  # type: ignore[assignment]  (what saving reverts)
        held = {f"{n}.{part}" for n, low in self.low_bits.items() if low.to != "int4" for part in ("qdata", "scale")}
        if self.storage_dtype is not None:
            stored: dict[tuple[int, torch.Size], Tensor] = {}  # tied tensors stay one, or they would be written twice
            for name, tensor in state.items():
                if tensor.is_floating_point() and name not in held:
                    key = (tensor.data_ptr() or id(tensor), tensor.shape)  # offloaded tensors have no address
                    stored.setdefault(key, tensor.to(self.storage_dtype))
                    state[name] = stored[key]
        dtype = self.storage_dtype or model.dtype
        return state | {name: torch.empty(0, dtype=dtype) for name in self.dense_tensors}, {}

    def is_serializable(self) -> Any:
        """True: weights are plain tensors."""
        return True

    @property
    def is_trainable(self) -> Any:
        """True: the layers train like any other."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the layers are plain tensor operations."""
        return True


def low_bits_of(inner: Any) -> dict[str, LowBit]:
    """The quantized linears that `inner` names. Raises `CheckpointError` for anything but what `inner_of` writes."""
    if inner is None:
        return {}
    try:
        to, group_sizes = inner["to"], inner["group_sizes"]
        found = {name: LowBit(to, size) for name, size in group_sizes.items()}
        sizes = all(type(held.group_size) is int and held.group_size >= 0 for held in found.values())
        if not sizes or to not in get_args(Format) or inner != inner_of(found):
            raise ValueError(f"unknown keys or impossible values in {str(inner)[:200]}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"`inner` of quantization_config in config.json is not understood: {error!r}.",
            "Update hyperfade, or quantize the compressed checkpoint again: hyperfade quantize.",
        ) from error
    return found


def inner_of(low_bits: dict[str, LowBit]) -> dict[str, Any] | None:
    """`inner` as plain JSON values; all matrices are in one format."""
    if not low_bits:
        return None
    to = next(iter(low_bits.values())).to
    method = "bitsandbytes" if to == "nf4" else "torchao"
    return {"quant_method": method, "to": to, "group_sizes": {name: held.group_size for name, held in low_bits.items()}}


def install_low_bit_(model: nn.Module, low_bits: dict[str, LowBit]) -> None:
    """Put fresh low-bit linears in the place of the named linears: a skeleton that a checkpoint's weights fill.

    Raises `CheckpointError` before anything is changed where there is no such linear, or its width has no such groups.
    """
    modules = dict(model.named_modules())
    for name, held in low_bits.items():
        linear = modules.get(name)
        ragged = held.group_size and held.to != "int4"
        if type(linear) is not nn.Linear or (ragged and linear.in_features % held.group_size):
            raise CheckpointError(
                f"config.json has {name} in {held.to} by groups of {held.group_size}; the model has {linear} there.",
                AGAIN,
            )
    for name, held in low_bits.items():
        linear = modules[name]
        assert isinstance(linear, nn.Linear)
        widths, like = (linear.in_features, linear.out_features), linear.weight
        bias = linear.bias is not None
        model.set_submodule(name, LowBitLinear(*widths, held, bias, device=like.device, dtype=like.dtype))


def _unconcerned(conversions: list[Any], specs: dict[str, LightSpec]) -> list[Any]:
    """The conversions of transformers but those that, when loading, build tensors of a module whose experts these specs
    replace."""
    opened = {name.rpartition(".")[0] for name, spec in specs.items() if spec.experts}
    tensors = [tensor for module in opened for tensor in tensor_names(module)]

    def concerns(conversion: Any) -> bool:
        patterns = [pattern.replace(r"\1", ".*") for pattern in conversion.target_patterns]
        return any(re.search(pattern, tensor) for pattern in patterns for tensor in tensors)

    return [one for one in conversions if not (isinstance(one, WeightConverter) and concerns(one))]


def _within(name: str, layers: dict[str, Any]) -> bool:
    """Whether the module is part of one of these layers."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in layers for end in range(1, len(parts)))


def align_(model: nn.Module) -> None:
    """Move weights in CPU memory to addresses divisible by 64 bytes, as torch's own are.

    A safetensors file is mapped to memory as it is, so a tensor may begin anywhere, and matrix products round
    differently there: without this a loaded model is not bit-equal to the one that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _mark_initialized(model: nn.Module, name: str) -> None:
    """Keep transformers from initialising the layer or its parent: `_init_weights` of some families looks for
    `fc1.weight` in an MLP and fails on a layer whose weight has another shape."""
    parent = model.get_submodule(name.rpartition(".")[0])
    for module in (parent, *model.get_submodule(name).modules()):
        module._is_hf_initialized = True  # type: ignore[assignment]


register_quantization_config(METHOD)(HyperfadeConfig)
register_quantizer(METHOD)(HyperfadeQuantizer)
