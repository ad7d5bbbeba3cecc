"""Capacity where it counts: one budget of parameters, shared out over FFNs and matrices by what their errors cost.

Let a matrix write y (k,) per token, and let its replacement be wrong by e, relative to y, in a direction that has
nothing to do with the loss. To second order, with the empirical Fisher matrix E[g gᵀ] for the curvature
(g = ∂loss/∂y), the loss grows by

    s e²,    s = ½ Σ_tokens ‖g‖² ‖y‖² / k

and one backward pass over the calibration data measures s for all matrices. Errors have closed forms in the second
moment C of what a matrix reads, so they are known for every size before anything is fitted:

- hidden units (`width`): what the units left out add to the writer's output beyond what the others foretell;
- ranks (`fraction` of low_rank): the eigenvalues of W C Wᵀ left out;
- products, and hypercomplex layers with a companion: no closed form. The curve of the low-rank layer with as many
  parameters stands in for theirs: its shape tells which matrices are easy, its height is not what the fit will reach.

What remains is a knapsack, solved exactly: one of some tens of sizes for every FFN or matrix, Σ s e² minimal, Σ
parameters within the budget. But directions are not random, errors of layers add up, training mends much of them, and
a model that is sure of its answers has gradients near 0 until a large error flips one: s e² then says far too little.
The predicted loss compares allocations and foretells no loss; compare with a rival of one size (docs/log.md does).
"""

import glob
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from hyperfade.algebra import rank_errors
from hyperfade.distill.activations import Batch, second_moments, sensitivities
from hyperfade.distill.knapsack import cheapest
from hyperfade.errors import PlanError
from hyperfade.nn import LightSpec
from hyperfade.recipe import Layer, Region, Replace, Rule
from hyperfade.surgery import (
    FFN,
    Dense,
    contribution_order,
    features,
    human,
    kept_errors,
    kept_units,
    plan,
    spec_of,
    weight_of,
)

_UNITS = 1 << 16  # of the budget's scale: costs are rounded up to one, which 200 matrices notice in the third digit
_LEVELS = 32  # sizes per matrix, evenly spaced by ratio from an eighth of the budget on
_MOMENTS_BYTES = 2 << 30  # of second moments in memory at a time


@dataclass(frozen=True)
class Share:
    """What one FFN (of which hidden units are kept) or one matrix gets.

    sensitivity s: nats per answer token that a relative output error of 1 would add to the loss; error: predicted
    relative output error; loss: s · error².
    """

    name: str
    region: Region
    size: str
    parameters: int
    dense_parameters: int
    sensitivity: float
    error: float
    loss: float


@dataclass(frozen=True)
class Allocation:
    """`replace`: the recipe's choice with the sizes found, one rule per matrix and no budget. `loss`: what all shares
    add to the loss; `uniform_loss`: what the same size everywhere, as large as the budget allows, would add."""

    replace: Replace
    budget: float
    shares: tuple[Share, ...]
    loss: float
    uniform_loss: float

    @property
    def params_ratio(self) -> float:
        """Parameters of all shares over dense, those that stay dense included."""
        return sum(s.parameters for s in self.shares) / sum(s.dense_parameters for s in self.shares)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        fields = {"replace": self.replace.model_dump(mode="json"), "shares": [asdict(share) for share in self.shares]}
        return {"budget": self.budget, "loss": self.loss, "uniform_loss": self.uniform_loss, **fields}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Allocation":
        """What `to_dict` wrote."""
        shares = tuple(Share(**share) for share in fields["shares"])
        return cls(**{**fields, "replace": Replace.model_validate(fields["replace"]), "shares": shares})


@dataclass(frozen=True)
class _Item:
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
        return sum(p.numel() for linear in self.matrices.values() for p in linear.parameters())

    def specs(self, layer: Layer) -> dict[str, LightSpec]:
        return {name: spec_of(layer, linear, self.ffn, name) for name, linear in self.matrices.items()}


@dataclass(frozen=True)
class _Option:
    """One size of an item: what its matrices become (None: they stay dense) and cost."""

    layer: Layer | None
    spec: LightSpec | None
    parameters: int


def allocate(model: nn.Module, replace: Replace, batches: Sequence[Batch], ridge: float = 1e-6) -> Allocation:
    """Find the sizes that spend `replace.budget` on `model`, dense as it is, for the least predicted loss.

    batches: calibration inputs with labels (-100 does not count), as for training. The model stays as it was.
    Raises `PlanError` where even the smallest sizes exceed the budget or the start does not fit the model, `FitError`
    where a matrix is never reached, batches have no answers, or numbers are not finite.
    """
    assert replace.budget is not None
    items = _items(model, replace)
    allowed = math.floor(replace.budget * sum(item.dense_parameters for item in items))
    ladders = [_ladder(item, replace.budget) for item in items]
    uniform = _uniform(items, [ladder[0] for ladder in ladders], allowed)
    options = [
        [*ladder, same, _Option(None, None, item.dense_parameters)]
        for item, ladder, same in zip(items, ladders, uniform, strict=True)
    ]
    sensitivity = sensitivities(model, {i.measured: i.matrices[i.measured] for i in items}, batches)
    error_of = _error_curves(model, items, batches, ridge)

    def loss(item: _Item, option: _Option) -> float:
        return sensitivity[item.measured] * error_of[item.name](option) ** 2

    unit = -(-sum(item.dense_parameters for item in items) // _UNITS)
    table = [
        [(-(-option.parameters // unit), loss(item, option)) for option in own]
        for item, own in zip(items, options, strict=True)
    ]
    chosen = [own[i] for own, i in zip(options, cheapest(table, allowed // unit), strict=True)]
    totals = [sum(map(loss, items, sizes)) for sizes in (chosen, uniform)]
    if totals[1] < totals[0]:  # by no more than costs rounded up make a difference
        chosen, totals = uniform, [totals[1], totals[1]]
    shares = tuple(
        Share(
            *(item.name, item.ffn.region, _size(item, option), option.parameters, item.dense_parameters),
            *(sensitivity[item.measured], error_of[item.name](option), loss(item, option)),
        )
        for item, option in zip(items, chosen, strict=True)
    )
    rules = [
        Rule(match=glob.escape(name), layer=option.layer)
        for item, option in zip(items, chosen, strict=True)
        for name in item.matrices
    ]
    sized = replace.model_copy(update={"budget": None, "rules": tuple(rules)})
    return Allocation(sized, replace.budget, shares, totals[0], totals[1])


def _items(model: nn.Module, replace: Replace) -> list[_Item]:
    """What gets a size: what the start would replace."""
    modules, the_plan, items = dict(model.named_modules()), plan(model, replace), []
    for ffn in the_plan.ffns:
        if ffn.experts:
            raise PlanError(
                f"replace.budget cannot be shared out over experts: {ffn.name} has {ffn.experts}.",
                "Give sizes and no budget, or keep them dense: replace.exclude: ['*.experts.*'].",
            )
        layer: Layer = getattr(replace, ffn.region)
        matrices: dict[str, Any] = {swap.name: modules[swap.name] for swap in the_plan.swaps if swap.ffn == ffn.name}
        if layer.width is not None and ffn.readers:
            items.append(_Item(ffn.name, ffn, matrices, ffn.writer, ffn.writer, True, layer))
            continue
        for name, linear in matrices.items():
            reads = next(iter(matrices)) if name in ffn.readers else name
            items.append(_Item(name, ffn, {name: linear}, name, reads, False, layer))
    return items


def _option(item: _Item, share: float) -> _Option | None:
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
    return _Option(sized, specs[item.measured], sum(spec.num_parameters for spec in specs.values()))


def _ladder(item: _Item, budget: float) -> list[_Option]:
    """Sizes from about an eighth of the budget on, the smallest first."""
    found = {}
    for share in np.geomspace(budget / 8, 0.999, _LEVELS).tolist():
        option = _option(item, share)
        if option is not None:
            found.setdefault(option.parameters, option)
    if not found:
        raise PlanError(f"{item.name} has no size that is smaller than dense.", "Exclude it: replace.exclude.")
    return [found[count] for count in sorted(found)]


def _uniform(items: list[_Item], smallest: list[_Option], allowed: int) -> list[_Option]:
    """Every item at the same share, the largest that is within the budget (found by halving); where sizes are coarse,
    the first of them one size larger, as far as that goes."""

    def at(share: float) -> list[_Option]:
        return [_option(item, share) or least for item, least in zip(items, smallest, strict=True)]

    def cost(sizes: list[_Option]) -> int:
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


def _error_curves(
    model: nn.Module, items: list[_Item], batches: Sequence[Batch], ridge: float
) -> dict[str, Callable[[_Option], float]]:
    """The predicted error of every item by its name: of matrices on one input, the second moment is taken once."""
    readings: dict[str, list[_Item]] = {}
    for item in items:
        readings.setdefault(item.reads, []).append(item)
    linears = {item.measured: item.matrices[item.measured] for item in items}
    curves = {}
    for names in _chunks({name: 8 * features(linears[name])[0] ** 2 for name in readings}, _MOMENTS_BYTES):
        moments = second_moments(model, {name: linears[name] for name in names}, batches, ridge)
        for name in names:
            moment = moments.pop(name)
            assert isinstance(moment, Tensor)
            for item in readings[name]:
                curves[item.name] = _curve(item, moment)
    return curves


def _curve(item: _Item, moment: Tensor) -> Callable[[_Option], float]:
    weight = weight_of(item.matrices[item.measured])
    if item.narrow:
        order = contribution_order(weight, moment)
        errors = kept_errors(weight[:, order], moment[order][:, order]).tolist()
        return lambda option: errors[option.spec.in_features] if option.spec else 0.0
    k, d = weight.shape
    energies = rank_errors(weight, moment).square().cpu().numpy()

    def error(option: _Option) -> float:
        if option.spec is None:
            return 0.0
        rank = (option.parameters - (k if option.spec.bias else 0)) / (d + k)  # in between for products
        return math.sqrt(np.interp(rank, np.arange(len(energies)), energies))

    return error


def _chunks(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in lists of at most `limit` bytes, or of one name."""
    chunks: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not chunks or size > left:
            chunks.append([])
            left = limit
        chunks[-1].append(name)
        left -= size
    return chunks


def _size(item: _Item, option: _Option) -> str:
    if option.spec is None:
        return "dense"
    if item.narrow:
        return f"{option.spec.in_features} of {features(item.matrices[item.measured])[0]} units"
    return option.spec.label
