"""The low-bit linear: what a quantizer makes of an `nn.Linear`, as plain tensors that a checkpoint can hold.

    W[k, g] = (qdata[k, g] − zero_point[k, g]) · scale[k, g]         g: a group of neighbours in a row, or the row

    to      qdata                     scale        numbers come from
    int8    int8 (k, d)               float32      torchao, symmetric
    int4    two to a byte (k, d/2)    model's      torchao, with zero_point int8
    fp8     float8_e4m3fn (k, d)      float32      torchao
    nf4     two to a byte (k, d/2)    float32      bitsandbytes, whose table replaces the integers

torchao's own tensors are not kept in the module: in eager mode they are up to 60 times slower on a CPU than torch's
kernels for the same numbers, its packed int4 depends on the processor, and a plain state dict needs no second library
to be read. With few tokens in bfloat16 on a CPU, int8 and int4 run in torch's kernels and wait for their own bytes
only; everywhere else W is rebuilt for the call.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfade.errors import MissingLibraryError
from hyperfade.formats import Format
from hyperfade.nn.int4 import GROUPS, for_the_kernel, from_the_kernel, one_to_a_byte, two_to_a_byte

SMALLEST_GROUP = 32  # below, the scales weigh more than the bits they save
_MOST_KERNEL_ROWS = {"int8": 16, "int4": 96}  # with more, rebuilding W once is faster
_KERNEL_STEP = 16  # int8 widths that are no multiples of it make torch's kernel read beyond the end


@dataclass(frozen=True)
class LowBit:
    """How a matrix is held. group_size: neighbours in a row that share a scale, 0 for the whole row; the last group of
    an int4 row may be shorter."""

    to: Format
    group_size: int = 0


def fitting_group(to: Format, width: int, wanted: int) -> int | None:
    """The group of at most `wanted` for rows of `width` numbers (0 asks for whole rows); None where none fits.

    The largest that divides the width; for int4 and nf4 of those that kernels know. Where none of these divides, int4
    takes the one with the fewest bits and lets the last group of a row be shorter, int8 takes whole rows, and nf4 none:
    bitsandbytes reads other groups wrongly on a CPU.
    """
    if not wanted:
        return 0
    if to == "int8":
        return max((group for group in range(SMALLEST_GROUP, wanted + 1) if width % group == 0), default=0)
    known = [group for group in GROUPS if group <= wanted]
    dividing = [group for group in known if width % group == 0]
    if dividing:
        return max(dividing)
    if to == "nf4" or width < SMALLEST_GROUP:
        return None
    return min(known, key=lambda group: -(-width // group) * (4 * group + 24))  # scale and zero point take 24 bits


class LowBitLinear(nn.Module):
    """y = W x + bias with W in few bits. Input (..., in_features), output (..., out_features), any floating dtype.

    Gradients flow to the input and the bias, not to W.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        held: LowBit,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.held = in_features, out_features, held
        groups = -(-in_features // held.group_size) if held.group_size else 1
        halved = held.to in ("int4", "nf4")
        kinds = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
        width = (in_features + 1) // 2 if halved else in_features
        empty = torch.empty(out_features, width, dtype=kinds.get(held.to, torch.uint8), device=device)
        scale_dtype = dtype if held.to == "int4" else torch.float32
        self.qdata: Tensor
        self.scale: Tensor
        self.zero_point: Tensor | None
        self.register_buffer("qdata", empty)
        self.register_buffer("scale", torch.empty(out_features, groups, dtype=scale_dtype, device=device))
        zero = torch.empty(out_features, groups, dtype=torch.int8, device=device) if held.to == "int4" else None
        self.register_buffer("zero_point", zero)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.block: int | None = None  # rows in a block, where qdata and scale are as the CPU kernel reads them
        self.parts = 1  # calls that the rows of W are packed for: products of a layer may have one each

    @property
    def weight(self) -> Tensor:
        """W (out_features, in_features), rebuilt at every access."""
        return self.rebuilt(self.scale.dtype if self.bias is None else self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_kernel(x, x.numel() // self.in_features, self.parts):
            return F.linear(x, self.rebuilt(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        rows = x.reshape(-1, self.in_features)
        made = [self.by_kernel(rows, part, self.parts) for part in range(self.parts)]
        y = made[0] if len(made) == 1 else torch.cat(made, 1)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def in_kernel(self, x: Tensor, rows: int, parts: int = 1) -> bool:
        """Whether torch has a kernel for inputs like x that runs so many parts of W's rows one by one, and it is the
        faster way for so many rows of x."""
        to, outputs = self.held.to, self.out_features // parts
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.requires_grad:
            return False
        if not 0 < rows <= _MOST_KERNEL_ROWS.get(to, 0):
            return False
        if to == "int4":
            return self.block is not None and (parts == self.parts or (self.parts == 1 and outputs % self.block == 0))
        return not (self.held.group_size or self.in_features % _KERNEL_STEP or outputs % _KERNEL_STEP)

    def by_kernel(self, rows: Tensor, part: int = 0, parts: int = 1) -> Tensor:
        """rows (M, in_features) times one of the parts of W's rows: (M, out_features / parts), where `in_kernel` says
        so."""
        if self.held.to == "int8":
            qdata, scale = (tensor.chunk(parts)[part] for tensor in (self.qdata, self.scale))
            return torch.ops.aten._weight_int8pack_mm(rows.contiguous(), qdata, scale.flatten().to(rows.dtype))
        if parts == self.parts:
            qdata, scale = self.qdata[part], self.scale[part]
        else:  # whole blocks out of the one layout; scales lie by groups, so theirs are copied
            qdata, scale = self.qdata[0].chunk(parts)[part], self.scale[0].chunk(parts, 1)[part].contiguous()
        missing = len(scale) * self.held.group_size - self.in_features
        rows = F.pad(rows, (0, missing)) if missing else rows.contiguous()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, qdata, self.held.group_size, scale)

    def rebuilt(self, dtype: torch.dtype) -> Tensor:
        """W (out_features, in_features) in `dtype`."""
        shape = (self.out_features, self.in_features)
        if self.held.to == "nf4":
            functional = bitsandbytes().functional
            state = functional.QuantState(
                absmax=self.scale.flatten(),
                shape=torch.Size(shape),
                code=functional.get_4bit_type("nf4", device=self.qdata.device),
                blocksize=self.held.group_size,
                quant_type="nf4",
                dtype=dtype,
            )
            return functional.dequantize_4bit(self.qdata.view(-1, 1), state)
        if self.block is not None:
            numbers = from_the_kernel(self.qdata, self.block)  # (parts, d, k / parts)
            scale, zero = self.scale.to(dtype).unsqueeze(2).unbind(4)  # (parts, groups, 1, k / parts)
            grouped = numbers.unflatten(1, (scale.shape[1], -1)).to(dtype)
            exact = grouped.sub_(8).mul_(scale).add_(zero).flatten(1, 2)[:, : self.in_features]
            return exact.transpose(1, 2).reshape(self.out_features, self.in_features)
        numbers = self.qdata if self.held.to != "int4" else one_to_a_byte(self.qdata, self.in_features)
        grouped = _whole_groups(numbers, self.held.group_size).unflatten(1, (self.scale.shape[1], -1)).to(dtype)
        if self.zero_point is not None:
            grouped = grouped - self.zero_point.unsqueeze(2)
        return (grouped * self.scale.to(dtype).unsqueeze(2)).flatten(1)[:, : self.in_features]

    @torch.no_grad()
    def pack_(self) -> None:
        """Lay int4 out as the CPU kernel reads it, if it takes these groups and this shape in bfloat16."""
        usable = self.held.to == "int4" and self.scale.dtype == torch.bfloat16 and self.held.group_size in GROUPS
        if self.block is not None or not usable or self.qdata.device.type != "cpu":
            return
        assert self.zero_point is not None
        numbers = _whole_groups(one_to_a_byte(self.qdata, self.in_features), self.held.group_size)
        found = for_the_kernel(numbers.unflatten(0, (self.parts, -1)))
        if found is None:
            return
        zero = (8 - self.zero_point) * self.scale
        if torch.equal(_zero_point(self.scale, zero), self.zero_point):  # a scale may be too small to divide by
            self.qdata, self.block = found
            both = torch.stack([self.scale, zero], 2).unflatten(0, (self.parts, -1))
            self.scale, self.zero_point = both.transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def unpack_(self) -> None:
        """Undo `pack_`, exactly."""
        if self.block is not None:
            self.qdata, self.scale, self.zero_point = self._plain()
            self.block = None

    def _plain(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.block is not None
        numbers = from_the_kernel(self.qdata, self.block).transpose(1, 2).flatten(0, 1)[:, : self.in_features]
        scale, zero = self.scale.transpose(1, 2).flatten(0, 1).unbind(2)
        scale, zero = scale.contiguous(), zero.contiguous()
        return two_to_a_byte(numbers), scale, _zero_point(scale, zero)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.block is not None:
            for name, tensor in zip(("qdata", "scale", "zero_point"), self._plain(), strict=True):
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack_()
        super()._load_from_state_dict(*args, **kwargs)
        self.pack_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LowBitLinear":
        """Devices change, and the dtype of what is computed in; what float8 and float32 hold is not for .to(dtype)."""
        self.unpack_()
        kinds = {torch.float8_e4m3fn: torch.uint8, torch.float32: torch.int32}
        guarded = [name for name in ("qdata", "scale") if self.held.to != "int4" and getattr(self, name).dtype in kinds]
        before = {name: getattr(self, name).dtype for name in guarded}
        for name in guarded:
            setattr(self, name, getattr(self, name).view(kinds[before[name]]))
        super()._apply(fn, recurse)
        for name in guarded:
            setattr(self, name, getattr(self, name).view(before[name]))
        self.pack_()
        return self

    def extra_repr(self) -> str:
        held = self.held
        groups = f"groups of {held.group_size}" if held.group_size else "rows"
        return f"{self.in_features}, {self.out_features}, {held.to} by {groups}, bias={self.bias is not None}"


def _whole_groups(numbers: Tensor, group_size: int) -> Tensor:
    """(k, d) with zeros behind, until d is a multiple of the group size."""
    missing = -numbers.shape[1] % group_size if group_size else 0
    return F.pad(numbers, (0, missing)) if missing else numbers


def _zero_point(scale: Tensor, zero: Tensor) -> Tensor:
    """The integer z of zero = (8 − z) · scale."""
    return (8 - (zero.float() / scale.float()).round()).to(torch.int8)


def bitsandbytes() -> Any:
    """The library. Raises `MissingLibraryError` where it is not installed."""
    try:
        return cast(Any, importlib.import_module("bitsandbytes"))
    except ImportError as error:
        raise MissingLibraryError(
            "nf4 needs bitsandbytes, which is not installed here; int8, int4 and fp8 do not.",
            "pip install bitsandbytes, or quantize to int4.",
        ) from error


def low_bit_modules(model: nn.Module) -> dict[str, LowBitLinear]:
    """The low-bit linears inside `model` by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBitLinear)}
