"""The sizes that a budget can choose from: what gets one size, and what it becomes and costs at each."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from hyperfade.errors import PlanError
from hyperfade.nn import LightSpec
from hyperfade.recipe import Layer, Replace
from hyperfade.surgery import FFN, Dense, features, human, kept_units, plan, spec_of

_LEVELS = 32  # sizes per matrix, evenly spaced by ratio from an eighth of the budget on


@dataclass(frozen=True)
class Item:
    """What gets one size: all matrices of an FFN (narrow: of which hidden units are kept), or one matrix.

    measured: the matrix whose output errors count, the FFN's writer or the one itself; reads: a matrix on its input.
    """

    name: str
    ffn: FFN
    matrices: dict[str, Dense]
    measured: str
    reads: str
    narrow: bool
    layer: Layer

    @property
    def dense_parameters(self) -> int:
        """Of all its matrices, biases included."""
        return sum(p.numel() for linear in self.matrices.values() for p in linear.parameters())

    def specs(self, layer: Layer) -> dict[str, LightSpec]:
        """What its matrices become as `layer`, by name."""
        return {name: spec_of(layer, linear, self.ffn, name) for name, linear in self.matrices.items()}


@dataclass(frozen=True)
class Option:
    """One size of an item: what its matrices become (None: they stay dense) and cost."""

    layer: Layer | None
    spec: LightSpec | None
    parameters: int


def items_of(model: nn.Module, replace: Replace) -> list[Item]:
    """What gets a size: what the start would replace."""
    modules, the_plan, items = dict(model.named_modules()), plan(model, replace), []
    for ffn in the_plan.ffns:
        layer: Layer = getattr(replace, ffn.region)
        matrices: dict[str, Any] = {swap.name: modules[swap.name] for swap in the_plan.swaps if swap.ffn == ffn.name}
        if layer.width is not None and ffn.readers:
            items.append(Item(ffn.name, ffn, matrices, ffn.writer, ffn.writer, True, layer))
            continue
        for name, linear in matrices.items():
            reads = next(iter(matrices)) if name in ffn.readers else name
            items.append(Item(name, ffn, {name: linear}, name, reads, False, layer))
    return items


def _option_at(item: Item, share: float) -> Option | None:
    """The item at about this share of its dense parameters; None where it cannot be so, or would not shrink."""
    layer, change = item.layer, {}
    if item.narrow:
        assert layer.width is not None
        at_start = sum(spec.num_parameters for spec in item.specs(layer).values()) / item.dense_parameters
        hidden = features(item.matrices[item.measured])[0]
        wanted = layer.model_copy(update={"width": layer.width * share / at_start})
        change = {"width": kept_units(wanted, hidden) / hidden}
    elif layer.fraction is not None:
        change = {"fraction": share}
    elif layer.kind == "products":  # anything else has nothing but a width, and no hidden units here
        change = {"products": max(1, math.floor(share * (layer.n or 0) ** 2))}
    sized = layer.model_copy(update=change)
    try:
        specs = item.specs(sized)
    except PlanError:
        return None
    return Option(sized, specs[item.measured], sum(spec.num_parameters for spec in specs.values()))


def sizes_of(item: Item, budget: float) -> list[Option]:
    """Sizes from about an eighth of the budget on, the smallest first."""
    found = {}
    for share in np.geomspace(budget / 8, 0.999, _LEVELS).tolist():
        option = _option_at(item, share)
        if option is not None:
            found.setdefault(option.parameters, option)
    if not found:
        raise PlanError(f"{item.name} has no size that is smaller than dense.", "Exclude it: replace.exclude.")
    return [found[count] for count in sorted(found)]


def same_share(items: list[Item], smallest: list[Option], allowed: int) -> list[Option]:
    """Every item at the same share, the largest that is within the budget (found by halving); where sizes are coarse,
    the first of them one size larger, as far as that goes."""

    def at(share: float) -> list[Option]:
        return [_option_at(item, share) or least for item, least in zip(items, smallest, strict=True)]

    def cost(sizes: list[Option]) -> int:
        return sum(size.parameters for size in sizes)

    best, low, high = smallest, 0.0, 1.0
    if cost(best) > allowed:
        raise PlanError(
            f"Even the smallest sizes hold {human(cost(best))} parameters, replace.budget allows {human(allowed)}.",
            "Raise the budget, or name layers that can be smaller.",
        )
    for _ in range(30):
        share = (low + high) / 2
        sizes = at(share)
        if cost(sizes) <= allowed:
            low, best = share, sizes
        else:
            high = share
    for i, larger in enumerate(at(high)):
        wider = [*best[:i], larger, *best[i + 1 :]]
        if cost(wider) <= allowed:
            best = wider
    return best


def size_text(item: Item, option: Option) -> str:
    """A size for reading."""
    if option.spec is None:
        return "dense"
    if item.narrow:
        return f"{option.spec.in_features} of {features(item.matrices[item.measured])[0]} units"
    return option.spec.label
