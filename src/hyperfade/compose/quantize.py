"""Few bits on top: the linears inside light layers, and by choice the others, as torchao or bitsandbytes rounds them.

    report = quantize_(model, "int4")          # the FFNs
    report = quantize_(model, "int8", rest=True)

Only rounding happens here, matrix by matrix, to nearest or (int4, `rounding.py`) by what layers read; no training. The
products T_r of a layer are stacked first: one linear holds them all. The mixes (A, P, Q), biases, norms, embeddings and
the output head keep their dtype.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfade.algebra import together
from hyperfade.compose.rounding import moments_in_core, rounded_for
from hyperfade.errors import MissingLibraryError, NothingMatchedError, PlanError
from hyperfade.formats import Format
from hyperfade.nn import (
    ExpertsLowRank,
    ExpertsPHM,
    LowBit,
    LowBitLinear,
    PHMLinear,
    bitsandbytes,
    fitting_group,
    light_modules,
    low_bit_modules,
    pack_,
)
from hyperfade.nn.int4 import two_to_a_byte
from hyperfade.nn.low_bit import SMALLEST_GROUP
from hyperfade.surgery import find_experts, find_ffns

DEFAULT_GROUP = {"int8": 0, "int4": 64, "nf4": 64, "fp8": 0}  # 0: whole rows
_NF4_GROUPS = (32, 64, 128, 256)
MomentsOf = Callable[[Mapping[str, nn.Module]], Mapping[str, Any]]
"""Modules by name → C (d, d) of what each reads, as `distill.second_moments` gathers it over batches; those that
nothing reaches may be missing."""


@dataclass(frozen=True)
class Quantized:
    """What `quantize_` did. `low_bits` by module name; `left` are (name, why) that keep their dtype; calibration
    did not get to `never_reached`, which are rounded to nearest."""

    to: Format
    group_size: int
    low_bits: dict[str, LowBit]
    left: list[tuple[str, str]]
    bytes_before: int
    bytes_after: int
    calibrated: bool
    never_reached: list[str]

    @property
    def smaller(self) -> dict[int, list[str]]:
        """Matrices whose width the group size does not divide, by the group size that they got (0: whole rows)."""
        found: dict[int, list[str]] = {}
        for name, held in self.low_bits.items():
            if held.group_size != self.group_size:
                found.setdefault(held.group_size, []).append(name)
        return found

    def lines(self) -> list[str]:
        """For people."""
        megabytes = f"{self.bytes_before / 1e6:.2f} MB → {self.bytes_after / 1e6:.2f} MB"
        how = ", calibrated" if self.calibrated else ""
        lines = [f"{self.to} by {_groups(self.group_size)}{how}: {len(self.low_bits)} matrices, {megabytes}"]
        lines += [f"by {_groups(size)}: {_some(names)}" for size, names in self.smaller.items()]
        if self.never_reached:
            lines.append(f"to nearest, as no calibration example gets there: {_some(self.never_reached)}")
        reasons: dict[str, list[str]] = {}
        for name, why in self.left:
            reasons.setdefault(why, []).append(name)
        return lines + [f"left as they are, {why}: {_some(names)}" for why, names in reasons.items()]


@torch.no_grad()
def quantize_(
    model: nn.Module,
    to: Format,
    group_size: int | None = None,
    rest: bool = False,
    *,
    scale_dtype: torch.dtype | None = None,
    moments_of: MomentsOf | None = None,
) -> Quantized:
    """Round the linears of the model's FFNs (light or dense) to `to`; with `rest` all others but the output head too.

    group_size: neighbours in a row that share a scale, 0 for whole rows [default: int4 and nf4 64, others 0]. A width
    that it does not divide gets what `fitting_group` finds, or the matrix stays as it is; the report says which.
    scale_dtype: what int4 keeps its scales in [default: the weights' dtype]. moments_of: calibrates int4; it is asked
    for as many layers at a time as memory holds, in the order of the model, while those before are rounded already.
    `mark_` the model before saving it.
    Raises `MissingLibraryError`, `PlanError` or `NothingMatchedError` before anything is changed; what `moments_of`
    raises leaves the model rounded in part.
    """
    wanted, library = check_format(to, group_size, calibrated=moments_of is not None)
    if low_bit_modules(model):
        raise PlanError("This model is quantized already.", "Quantize the checkpoint it came from.")
    low_bits: dict[str, LowBit] = {}
    left = [(name, "of experts in one tensor") for name in _expert_tensors(model)]
    for name, width in _targets(model, rest).items():
        group = fitting_group(to, width, wanted)
        if group is None:
            why = f"narrower than {SMALLEST_GROUP}" if width < SMALLEST_GROUP else f"no known group divides {width}"
            left.append((name, why))
        else:
            low_bits[name] = LowBit(to, group)
    if not low_bits:
        raise NothingMatchedError(
            f"{type(model).__name__} has no matrix that {to} in {_groups(wanted)} fits.", "Give another group size."
        )
    lights, cores = light_modules(model), {}
    for name in low_bits:
        if isinstance(phm := lights.get(name.removesuffix(".core")), PHMLinear):
            cores[name] = phm
            phm.stack_()
    before = sum(model.get_submodule(name).weight.nbytes for name in low_bits)  # type: ignore[union-attr]
    measured = {name: name.removesuffix(".core") if name in cores else name for name in low_bits}
    in_order = [name for name, _ in model.named_modules() if name in low_bits]
    features = {name: cast(Any, model.get_submodule(measured[name])).in_features for name in in_order}
    never_reached = []
    for names in together(features) if moments_of else [list(low_bits)]:
        modules = {measured[name]: model.get_submodule(measured[name]) for name in names}
        read = dict(moments_of(modules)) if moments_of else {}
        for name in names:
            moments = [read.pop(measured[name])] if measured[name] in read else []
            if moments and name in cores:
                moments = moments_in_core(cores[name], moments[0])
            if moments_of and not moments:
                never_reached.append(name)
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            rounded = _rounded(linear, low_bits[name], library, scale_dtype or linear.weight.dtype, moments)
            model.set_submodule(name, rounded)
    after = sum(tensor.nbytes for layer in low_bit_modules(model).values() for tensor in layer.buffers())
    pack_(model)
    return Quantized(to, wanted, low_bits, left, before, after, moments_of is not None, never_reached)


def check_format(to: Format, group_size: int | None = None, *, calibrated: bool = False) -> tuple[int, Any]:
    """The group size that is meant, and the library that rounds to this format.

    Raises `PlanError` for what does not exist, `MissingLibraryError` for what is not installed.
    """
    if to not in get_args(Format):
        raise PlanError(f"There is no format {to!r}.", f"Choose one of {', '.join(get_args(Format))}.")
    if calibrated and to != "int4":
        raise PlanError(f"Calibrated rounding is for int4, not {to}.", "Leave the data out: rounding to nearest.")
    wanted = DEFAULT_GROUP[to] if group_size is None else group_size
    if wanted and wanted < 32:
        raise PlanError(f"Groups of {wanted} are too small to save anything.", "Give 32 or more, or 0 for whole rows.")
    if to == "fp8" and wanted:
        raise PlanError("fp8 has a scale per row, not per group.", "Leave the group size out.")
    if to == "nf4" and wanted not in _NF4_GROUPS:
        raise PlanError(f"nf4 takes groups of 32, 64, 128 or 256, not {wanted}.", "Give one of these.")
    return wanted, bitsandbytes() if to == "nf4" else _torchao()


def _targets(model: nn.Module, rest: bool) -> dict[str, int]:
    """Names of the linears to round with their input widths; products by the name they have once they are stacked."""
    found: dict[str, int] = {}
    lights = light_modules(model)
    for name, light in lights.items():
        if isinstance(light, PHMLinear) and light.algebra.form == "products" and not light.stacked:
            found[f"{name}.core"] = light.in_features // light.algebra.n
        found |= {f"{name}.{part}": m.in_features for part, m in light.named_modules() if type(m) is nn.Linear}
    dense = [name for ffn in find_ffns(model, with_light=True) if ffn.region != "projector" for name in ffn.linears]
    if rest:
        dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    modules = dict(model.named_modules())
    for name in dense:
        module = modules.get(name)  # None: a tensor of experts
        if type(module) is nn.Linear and module is not head and name not in found:
            found[name] = module.in_features
    return found


def _expert_tensors(model: nn.Module) -> list[str]:
    """What holds the matrices of experts, light or dense, by name."""
    light = [name for name, layer in light_modules(model).items() if isinstance(layer, ExpertsPHM | ExpertsLowRank)]
    return light + [f"{experts.name}.{key}" for experts in find_experts(model) for key in experts.tensors]


def _rounded(
    linear: nn.Linear, held: LowBit, library: Any, scale_dtype: torch.dtype, moments: list[Tensor]
) -> LowBitLinear:
    """A low-bit linear with the numbers that `library` rounds this one's weight to; or, of int4, those that `moments`
    ask for, one for each of as many parts of its rows."""
    weight, bias = linear.weight, linear.bias is not None
    made = LowBitLinear(
        *(linear.in_features, linear.out_features, held, bias), device=weight.device, dtype=weight.dtype
    )
    if bias:
        made.bias = linear.bias
    group = held.group_size or linear.in_features
    if held.to == "nf4":
        data, state = library.functional.quantize_4bit(weight.contiguous(), blocksize=group, quant_type="nf4")
        made.qdata, made.scale = data.view_as(made.qdata), state.absmax.view_as(made.scale)
        return made.train(linear.training)
    if held.to == "int4":
        if moments:
            held_numbers = _calibrated_int4(weight, group, library, scale_dtype, moments)
        else:
            held_numbers = _int4(weight, group, library, scale_dtype)
        made.qdata, made.scale, made.zero_point = held_numbers
        return made.train(linear.training)
    if held.to == "fp8":
        config = library.Float8WeightOnlyConfig(set_inductor_config=False)
    else:
        rows = library.PerGroup(group) if held.group_size else library.PerRow()
        config = library.Int8WeightOnlyConfig(granularity=rows, set_inductor_config=False, version=2)
    copy = nn.Linear(1, 1, bias=False, device="meta")
    copy.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    library.quantize_(copy, config)
    rounded = cast(Any, copy.weight)
    made.qdata, made.scale = rounded.qdata, rounded.scale.view_as(made.scale).float()
    return made.train(linear.training)


def _int4(weight: Tensor, group: int, library: Any, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """qdata, scale and zero point: torchao's asymmetric groups, rounded with the scale as it is
    stored."""
    tensor, width = library.IntxUnpackedToInt8Tensor, weight.shape[1]
    exact = F.pad(weight.detach().float(), (0, -width % group))  # zeros, which never set a group's extremes
    scale, zero_point = _int4_grid(exact, group, library, scale_dtype)
    fixed = {"custom_scale": scale.float(), "custom_zero_point": zero_point - 8}
    four_bits = cast(Any, torch).int4
    again = tensor.from_hp(exact, (1, group), four_bits, intx_choose_qparams_algorithm=None, **fixed)
    return two_to_a_byte(again.qdata[:, :width] + 8), scale.to(weight.dtype), zero_point


def _calibrated_int4(
    weight: Tensor, group: int, library: Any, scale_dtype: torch.dtype, moments: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by what is read: torchao's scales and zero points, and `rounded_for`'s numbers."""

    def grid(columns: Tensor) -> tuple[Tensor, Tensor]:
        return _int4_grid(columns, columns.shape[1], library, scale_dtype)

    rows = weight.detach().chunk(len(moments))
    found = [rounded_for(part, moment, group, grid) for part, moment in zip(rows, moments, strict=True)]
    numbers, scale, zero_point = (
        torch.cat([getattr(part, key) for part in found]).to(weight.device)
        for key in ("numbers", "scale", "zero_point")
    )
    return two_to_a_byte(numbers), scale.to(weight.dtype), zero_point


def _int4_grid(exact: Tensor, group: int, library: Any, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """torchao's scale, as it is stored, and zero point, 0 to 15, of each group of exact (k, d): (k, d / group) each."""
    asymmetric, four_bits = library.MappingType.ASYMMETRIC, cast(Any, torch).int4
    found = library.IntxUnpackedToInt8Tensor.from_hp(exact, (1, group), four_bits, mapping_type=asymmetric)
    return found.scale.clamp_min(torch.finfo(scale_dtype).smallest_normal).to(scale_dtype), found.zero_point + 8


def _torchao() -> Any:
    try:
        return cast(Any, importlib.import_module("torchao.quantization"))
    except ImportError as error:
        raise MissingLibraryError(
            "Rounding to int8, int4 or fp8 needs torchao, which is not installed here.",
            'pip install "hyperfade[low-bit]".',
        ) from error


def _groups(size: int) -> str:
    return f"groups of {size}" if size else "rows"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
