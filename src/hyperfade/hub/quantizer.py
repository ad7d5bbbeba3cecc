"""The plug-in that lets `from_pretrained` load a compressed checkpoint like any other.

config.json of a compressed model holds

    "quantization_config": {"quant_method": "hyperfade", "version": 1, "layers": {name: spec}, "inner": null}

`import hyperfade` registers the method. Before weights are read, the quantizer puts replacement layers into the
skeleton; the weights then fill them by name. Without the import transformers (5.x) only warns of an unknown method and
would fill the missing dense weights at random. So every replaced matrix also leaves an empty tensor under its dense
name, `<layer>.weight` of shape (0,): a reader that expects the dense matrix meets another shape and stops.

`inner` is the slot for a second quantizer's config. Its checkpoints are written by a later version; this one refuses
them instead of guessing.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hyperfade.errors import CheckpointError
from hyperfade.hub.integrity import AGAIN, verify_safetensors
from hyperfade.nn import LightSpec
from hyperfade.surgery import install_, join_readers_

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
        if inner is not None:
            raise CheckpointError(
                "This checkpoint was quantized after compression (quantization_config.inner is set).",
                "This version of hyperfade does not read such checkpoints. Update hyperfade.",
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

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to `quantize on load`: compression needs calibration and training."""
        if not self.pre_quantized:
            raise CheckpointError(
                "A HyperfadeConfig was passed for a dense checkpoint.",
                "Compress it first: hyperfade compress --model ...",
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        verify_safetensors([Path(file) for file in kwargs.get("checkpoint_files") or ()])
        install_(model, self.specs)
        for name in self.specs:
            _mark_initialized(model, name)
        empty = {rf"^{re.escape(name)}\.weight$" for name in self.specs}
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
        for name in self.specs:
            for part, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):  # meta: offloaded
                    raise CheckpointError(f"The checkpoint holds no weights for {name}.{part}.", AGAIN)
        align_(model)
        join_readers_(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """What `save_pretrained` writes: the weights, and the empty tensors under the dense names."""
        state = model.state_dict()
        if self.storage_dtype is not None:
            stored: dict[tuple[int, torch.Size], Tensor] = {}  # tied tensors stay one, or they would be written twice
            for name, tensor in state.items():
                if tensor.is_floating_point():
                    key = (tensor.data_ptr() or id(tensor), tensor.shape)  # offloaded tensors have no address
                    stored.setdefault(key, tensor.to(self.storage_dtype))
                    state[name] = stored[key]
        dtype = self.storage_dtype or model.dtype
        return state | {f"{name}.weight": torch.empty(0, dtype=dtype) for name in self.specs}, {}

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
