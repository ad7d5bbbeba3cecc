"""How big: parameters, bytes, floating-point operations."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hyperfade.nn import low_bit_modules


def num_parameters(model: nn.Module) -> int:
    """Parameters, shared ones counted once; what is held in few bits counts like any other."""
    held = sum(layer.in_features * layer.out_features for layer in low_bit_modules(model).values())
    return held + sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers in memory, shared ones counted once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def disk_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a checkpoint folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@torch.no_grad()
def forward_flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Floating-point operations of one forward pass (a multiply-add is two), counted by torch."""
    low_bit = (torch.ops.aten._weight_int8pack_mm, torch.ops.aten._weight_int4pack_mm_for_cpu)
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(low_bit, _product_flops))
    with counter:
        model(**batch)
    return counter.get_total_flops()


def _product_flops(x: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    """Of x (tokens, d) times a (k, d) matrix in few bits, whatever its layout: torch does not count its own kernels."""
    return 2 * x.numel() * out_shape[-1]
