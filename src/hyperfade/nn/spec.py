"""What a replacement layer is built from, as a value that fits into a checkpoint's config.json."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hyperfade.algebra import Algebra
from hyperfade.errors import CheckpointError, HyperfadeError
from hyperfade.nn.experts import ExpertsLowRank, ExpertsPHM
from hyperfade.nn.low_rank import LowRankLinear
from hyperfade.nn.narrow import NarrowLinear
from hyperfade.nn.phm import PHMLinear

Light = PHMLinear | LowRankLinear | NarrowLinear | ExpertsPHM | ExpertsLowRank
"""A layer that takes a dense matrix's place, or that of the matrices of experts."""


@dataclass(frozen=True)
class LightSpec:
    """A replacement for a dense (out_features, in_features) matrix: hypercomplex, or (algebra None) low-rank.

    rank: of the low-rank layer, or of the hypercomplex layer's companion (0 for none). replaced: (in, out) of the dense
    matrix where the FFN keeps a part of its hidden units only, so that the layer is narrower than the matrix; None
    where it is as wide. A narrower layer may also be dense: algebra None, rank 0. stacked: the products lie under
    one another in a core, as quantizers need them. experts: how many matrices of this shape it stands for, each on the
    tokens of its expert; None for a matrix by itself.
    """

    in_features: int
    out_features: int
    bias: bool
    algebra: Algebra | None
    rank: int = 0
    replaced: tuple[int, int] | None = None
    stacked: bool = False
    experts: int | None = None

    @classmethod
    def of(cls, layer: Light) -> "LightSpec":
        """The spec that would build `layer` again."""
        widths = layer.in_features, layer.out_features, layer.bias is not None
        if isinstance(layer, ExpertsPHM):
            rank = layer.companion.rank if layer.companion else 0
            return cls(*widths, layer.algebra, rank, experts=layer.num_experts)
        if isinstance(layer, ExpertsLowRank):
            return cls(*widths, None, layer.rank, experts=layer.num_experts)
        if isinstance(layer, PHMLinear):
            rank = layer.companion.rank if layer.companion else 0
            return cls(*widths, layer.algebra, rank, layer.replaced, layer.stacked)
        return cls(*widths, None, layer.rank if isinstance(layer, LowRankLinear) else 0, layer.replaced)

    @property
    def dense_features(self) -> tuple[int, int]:
        """(in, out) of the dense matrix."""
        return self.replaced or (self.in_features, self.out_features)

    @property
    def dense(self) -> bool:
        """Whether the layer is a dense one, of fewer hidden units."""
        return self.algebra is None and not self.rank

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Light:
        """A fresh layer of this kind."""
        like = {"device": device, "dtype": dtype}
        if self.experts:
            shape = self.experts, self.in_features, self.out_features
            if self.algebra is None:
                return ExpertsLowRank(*shape, self.rank, self.bias, **like)
            return ExpertsPHM(*shape, self.algebra, self.bias, self.rank, **like)
        if self.dense:
            layer = NarrowLinear(self.in_features, self.out_features, self.bias, **like)
        elif self.algebra is None:
            layer = LowRankLinear(self.in_features, self.out_features, self.rank, self.bias, **like)
        else:
            layer = PHMLinear(self.in_features, self.out_features, self.algebra, self.bias, self.rank, **like)
            if self.stacked:
                layer.stack_()
        layer.replaced = self.replaced
        return layer

    @property
    def num_parameters(self) -> int:
        """Numbers the layer trains, its bias included; of experts, of all of them."""
        low_rank = self.rank * (self.in_features + self.out_features)
        light = self.algebra.num_parameters(self.in_features, self.out_features) if self.algebra else 0
        dense = self.in_features * self.out_features if self.dense else 0
        return (self.experts or 1) * (light + low_rank + dense + (self.out_features if self.bias else 0))

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per token; of experts, of the one that the token goes to."""
        if self.dense:
            return self.in_features * self.out_features
        low_rank = self.rank * (self.in_features + self.out_features)
        return low_rank + (self.algebra.multiply_adds(self.in_features, self.out_features) if self.algebra else 0)

    @property
    def label(self) -> str:
        """A short name for tables, e.g. `products n=4 R=4`."""
        width = "" if self.replaced is None else f" {self.in_features}→{self.out_features}"
        if self.dense:
            return f"dense{width}"
        if self.algebra is None:
            return f"low-rank q={self.rank}{width}"
        a = self.algebra
        companion = f" + rank {self.rank}" if self.rank else ""
        return f"{a.name.replace('_', '-')} n={a.n} {'t' if a.form == 'terms' else 'R'}={a.size}{companion}{width}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `replaced`, `stacked` and `experts` only where they say something."""
        fields = asdict(self)
        replaced, rest = fields.pop("replaced"), {key: fields.pop(key) for key in ("stacked", "experts")}
        said = {} if replaced is None else {"replaced": list(replaced)}
        return fields | said | {key: value for key, value in rest.items() if value}

    @classmethod
    def from_dict(cls, fields: dict[str, Any], where: str) -> "LightSpec":
        """The spec written by `to_dict`. Raises `CheckpointError` for anything else."""
        try:
            algebra, replaced = fields["algebra"], fields.get("replaced")
            values = {
                "algebra": None if algebra is None else _algebra(algebra),
                "replaced": None if replaced is None else tuple(replaced),
            }
            spec = cls(**{**fields, **values})
            stacks = spec.algebra is not None and spec.algebra.form == "products"
            if not (_widths_fit(spec) and spec.rank >= 0 and isinstance(spec.bias, bool)) or (
                spec.stacked is not (spec.stacked is True and stacks)
                or not (spec.experts is None or _possible_experts(spec))
            ):
                raise ValueError(f"impossible values in {spec}")
            with torch.device("meta"):
                spec.build()
        except (KeyError, TypeError, ValueError, RuntimeError, HyperfadeError) as error:
            raise CheckpointError(
                f"Layer {where} is described wrongly: {error!r}.", "Save the checkpoint again."
            ) from error
        return spec


def _possible_experts(spec: LightSpec) -> bool:
    """Whether experts are a number of layers that are as wide as their matrices and whole."""
    return type(spec.experts) is int and spec.experts > 0 and spec.replaced is None and not spec.stacked


def _widths_fit(spec: LightSpec) -> bool:
    """Whether the widths are possible: as wide as the dense matrix, or narrower on one of its two sides."""
    own = (spec.in_features, spec.out_features)
    if spec.replaced is None:
        return min(own) > 0 and not spec.dense
    whole_in, whole_out = spec.replaced
    return (0 < own[0] < whole_in and own[1] == whole_out) or (own[0] == whole_in and 0 < own[1] < whole_out)


def _algebra(fields: dict[str, Any]) -> Algebra:
    """The algebra with these fields. Its own class method makes it, so that what cannot exist is refused."""
    given = Algebra(**fields)
    makers = {"learned": Algebra.learned, "products": Algebra.products}
    if given.name in makers:
        made = makers[given.name](given.n, given.size)
    else:
        made = Algebra.named(given.name, given.size, given.n)
    if made != given:
        raise ValueError(f"{given} does not exist, {made} does")
    return made


def light_modules(model: nn.Module) -> dict[str, Light]:
    """The replacement layers inside `model` by module name; a PHM layer's companion is part of it, not one more."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Light) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found
