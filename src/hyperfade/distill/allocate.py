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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from hyperfade.algebra import rank_errors, together
from hyperfade.distill.activations import Batch, Moment, second_moments, sensitivities
from hyperfade.distill.knapsack import cheapest
from hyperfade.distill.sizes import Item, Option, items_of, same_share, size_text, sizes_of
from hyperfade.recipe import Region, Replace, Rule
from hyperfade.surgery import (
    contribution_order,
    features,
    kept_errors,
    weight_of,
)

_UNITS = 1 << 16  # of the budget's scale: costs are rounded up to one, which 200 matrices notice in the third digit


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


def allocate(
    model: nn.Module,
    replace: Replace,
    batches: Sequence[Batch],
    ridge: float = 1e-6,
    on_batch: Callable[[int, int], None] | None = None,
) -> Allocation:
    """Find the sizes that spend `replace.budget` on `model`, dense as it is, for the least predicted loss.

    batches: calibration inputs with labels (-100 does not count), as for training. on_batch: called after every batch
    of every pass over them with how many are done and of how many. The model stays as it was.
    Raises `PlanError` where even the smallest sizes exceed the budget or the start does not fit the model, `FitError`
    where a matrix is never reached, batches have no answers, or numbers are not finite.
    """
    assert replace.budget is not None
    items = items_of(model, replace)
    allowed = math.floor(replace.budget * sum(item.dense_parameters for item in items))
    ladders = [sizes_of(item, replace.budget) for item in items]
    uniform = same_share(items, [ladder[0] for ladder in ladders], allowed)
    options = [
        [*ladder, same, Option(None, None, item.dense_parameters)]
        for item, ladder, same in zip(items, ladders, uniform, strict=True)
    ]
    readings = dict[str, list[Item]]()
    for item in items:
        readings.setdefault(item.reads, []).append(item)
    linears = {item.measured: item.matrices[item.measured] for item in items}
    gathered = together({name: features(linears[name])[0] for name in readings})
    batches = _Counted(batches, 1 + len(gathered), on_batch) if on_batch else batches
    sensitivity = sensitivities(model, linears, batches)
    error_of = dict[str, Callable[[Option], float]]()
    for names in gathered:
        error_of |= _error_curves(second_moments(model, {n: linears[n] for n in names}, batches, ridge), readings)

    def loss(item: Item, option: Option) -> float:
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
            *(item.name, item.ffn.region, size_text(item, option), option.parameters, item.dense_parameters),
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


class _Counted(Sequence[Batch]):
    """Batches that are gone through `passes` times; `on_batch` is told after each how many are done and of how many."""

    def __init__(self, batches: Sequence[Batch], passes: int, on_batch: Callable[[int, int], None]) -> None:
        self._batches, self._total, self._on_batch, self._done = batches, passes * len(batches), on_batch, 0

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            yield batch
            self._done += 1
            self._on_batch(self._done, self._total)


def _error_curves(
    moments: dict[str, Moment], readings: Mapping[str, Sequence[Item]]
) -> dict[str, Callable[[Option], float]]:
    """The predicted error of every item that reads what these moments are of, by its name."""
    curves = {}
    for name in list(moments):
        moment = moments.pop(name)
        assert isinstance(moment, Tensor)
        curves |= {item.name: _error_curve(item, moment) for item in readings[name]}
    return curves


def _error_curve(item: Item, moment: Tensor) -> Callable[[Option], float]:
    """The item's predicted error at every size."""
    weight = weight_of(item.matrices[item.measured])
    if item.narrow:
        order = contribution_order(weight, moment)
        errors = kept_errors(weight[:, order], moment[order][:, order]).tolist()
        return lambda option: errors[option.spec.in_features] if option.spec else 0.0
    k, d = weight.shape
    energies = rank_errors(weight, moment).square().cpu().numpy()

    def error(option: Option) -> float:
        if option.spec is None:
            return 0.0
        rank = (option.parameters - (k if option.spec.bias else 0)) / (d + k)  # in between for products
        return math.sqrt(np.interp(rank, np.arange(len(energies)), energies))

    return error
