"""What a replacement layer is built from, as a value that fits into a checkpoint's config.json."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hyperfade.algebra import Algebra
from hyperfade.errors import CheckpointError, HyperfadeError
from hyperfade.nn.low_rank import LowRankLinear
from hyperfade.nn.phm import PHMLinear


@dataclass(frozen=True)
class LightSpec:
    """A replacement for a dense (out_features, in_features) matrix: hypercomplex, or (algebra None) low-rank.

    rank: of the low-rank layer, or of the hypercomplex layer's companion (0 for none).
    """

    in_features: int
    out_features: int
    bias: bool
    algebra: Algebra | None
    rank: int = 0

    @classmethod
    def of(cls, layer: PHMLinear | LowRankLinear) -> "LightSpec":
        """The spec that would build `layer` again."""
        widths = layer.in_features, layer.out_features, layer.bias is not None
        if isinstance(layer, PHMLinear):
            return cls(*widths, layer.algebra, layer.companion.rank if layer.companion else 0)
        return cls(*widths, None, layer.rank)

    def build(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PHMLinear | LowRankLinear:
        """A fresh layer of this kind."""
        like = {"device": device, "dtype": dtype}
        if self.algebra is None:
            return LowRankLinear(self.in_features, self.out_features, self.rank, self.bias, **like)
        return PHMLinear(self.in_features, self.out_features, self.algebra, self.bias, self.rank, **like)

    @property
    def num_parameters(self) -> int:
        """Numbers the layer trains, its bias included."""
        low_rank = self.rank * (self.in_features + self.out_features)
        light = self.algebra.num_parameters(self.in_features, self.out_features) if self.algebra else 0
        return light + low_rank + (self.out_features if self.bias else 0)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per token."""
        low_rank = self.rank * (self.in_features + self.out_features)
        return low_rank + (self.algebra.multiply_adds(self.in_features, self.out_features) if self.algebra else 0)

    @property
    def label(self) -> str:
        """A short name for tables, e.g. `products n=4 R=4`."""
        if self.algebra is None:
            return f"low-rank q={self.rank}"
        a = self.algebra
        companion = f" + rank {self.rank}" if self.rank else ""
        return f"{a.name.replace('_', '-')} n={a.n} {'t' if a.form == 'terms' else 'R'}={a.size}{companion}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any], where: str) -> "LightSpec":
        """The spec written by `to_dict`. Raises `CheckpointError` for anything else."""
        try:
            algebra = fields["algebra"]
            spec = cls(**{**fields, "algebra": None if algebra is None else _algebra(algebra)})
            widths_fit = spec.in_features > 0 and spec.out_features > 0
            if not (widths_fit and spec.rank >= (0 if algebra else 1) and isinstance(spec.bias, bool)):
                raise ValueError(f"impossible values in {spec}")
            with torch.device("meta"):
                spec.build()
        except (KeyError, TypeError, ValueError, RuntimeError, HyperfadeError) as error:
            raise CheckpointError(
                f"Layer {where} is described wrongly: {error!r}.", "Save the checkpoint again."
            ) from error
        return spec


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


def light_modules(model: nn.Module) -> dict[str, PHMLinear | LowRankLinear]:
    """The replacement layers inside `model` by module name; a PHM layer's companion is part of it, not one more."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PHMLinear | LowRankLinear) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found
