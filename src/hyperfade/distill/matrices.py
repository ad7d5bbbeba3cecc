"""One matrix, or those of a module's experts, from dense to light.

Experts are fitted one by one, each on the tokens that were routed to it. Some are hardly ever chosen, and a second
moment C_e from N_e < d tokens does not even have full rank. So each leans on the average C̄ = Σ N_e C_e / Σ N_e,

    C_e ← (N_e C_e + κ C̄) / (N_e + κ),    κ = fit.expert_prior · d

as if κ tokens of an average expert had come as well (`benchmarks/expert_speed.py` compares weights). An expert that met
none is fitted on C̄ alone; what is left where nothing was routed anywhere is the Frobenius fit, C = 1, which is
`fit.method: frobenius`. Experts that met fewer than κ tokens, and so are fitted on the average more than on their own,
are named in `LayerFit.few_tokens`.
"""

import math
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from hyperfade.algebra import LowRankFit, energy, fit, in_float64, low_rank
from hyperfade.distill.activations import ExpertMoments
from hyperfade.errors import FitError
from hyperfade.nn import (
    BlendLinear,
    ExpertsLinear,
    ExpertsLowRank,
    ExpertsPHM,
    Light,
    LightSpec,
    LowRankLinear,
    NarrowLinear,
    PHMLinear,
)
from hyperfade.recipe import Fit as FitRecipe
from hyperfade.surgery import Swap, matched_low_rank


@dataclass(frozen=True)
class LayerFit:
    """How one matrix came out: relative output errors (weight errors for the Frobenius fit; None for a random start).

    low_rank_error is that of the whitened low-rank layer with as many parameters. Where an FFN keeps a part of its
    hidden units, a reader's error is that of the rows that stay, and the writer's holds what leaving others out costs.
    correction: how far a writer was corrected for what lies before it, from 0 to 1; None where it was aimed at the
    dense one's output. With one, errors are relative to what it was aimed at, and where units are gone no rival's is
    known.
    held_out: with `fit.block_epochs`, what is left of a corrected writer's squared error on batches held out once its
    FFN has trained by itself, 1 where that was undone. Its error is that of the whole FFN then, each token by the size
    of its stream (`blockwise.py`), no rival's is known, and those of readers stay as they were before.
    seconds of the first matrix on an input hold the calibration passes that gathered its second moment. Errors of
    experts are over all of them, each by its tokens and on the moment it was fitted on; few_tokens: experts that
    calibration hardly reached, by number, with the tokens that each met.
    """

    name: str
    label: str
    error: float | None
    low_rank_error: float | None
    sweeps: int
    seconds: float
    few_tokens: dict[str, int] = field(default_factory=dict)
    correction: float | None = None
    held_out: float | None = None


def fit_matrix(
    weight: Tensor,
    light: Light | nn.Module,
    spec: LightSpec,
    rival: LowRankFit,
    moment: Tensor | None,
    recipe: FitRecipe,
) -> tuple[float, int]:
    """Fill the light layer of one matrix (k, d); returns its relative error, and the sweeps it took."""
    if spec.dense:
        assert type(light) is NarrowLinear
        light.core.weight.copy_(weight)
        return 0.0, 0
    if spec.algebra is None:
        assert type(light) is LowRankLinear
        own = rival if spec.replaced is None else low_rank(weight, spec.rank, moment, ridge=0)
        light.load_fit_(own)
        return own.error, 0
    assert type(light) is PHMLinear
    best = fit(weight, spec.algebra, moment, sweeps=recipe.sweeps, companion_rank=spec.rank, ridge=0)
    light.load_fit_(best)
    return best.error, len(best.errors) - 1


def fit_experts(
    blend: BlendLinear, swap: Swap, moments: ExpertMoments | None, recipe: FitRecipe
) -> tuple[float, float, int, dict[str, int]]:
    """Fill the light branch of the matrices of experts; returns its relative error and the low-rank rival's over all
    routed tokens (over all weights without moments), the most sweeps, and `few_tokens`."""
    dense, light, spec = blend.dense, blend.light, replace(swap.spec, experts=None)
    assert isinstance(dense, ExpertsLinear)
    assert isinstance(light, ExpertsPHM | ExpertsLowRank)
    tokens = [1] * dense.num_experts if moments is None else moments.num_tokens
    lost = rival_lost = whole = 0.0
    most_sweeps = 0
    for number, count in enumerate(tokens):
        weight = dense.expert(number).weight
        moment = None if moments is None else moments.means[number]
        try:
            rival = low_rank(weight, matched_low_rank(swap), moment, ridge=0)
            error, sweeps = fit_matrix(weight, light.expert(number), spec, rival, moment, recipe)
        except FitError as failure:
            raise FitError(f"expert {number}: {failure.message}", failure.hint) from failure
        share = count * energy(in_float64(weight), moment)
        lost, rival_lost, whole = lost + share * error**2, rival_lost + share * rival.error**2, whole + share
        most_sweeps = max(most_sweeps, sweeps)
    few = {} if moments is None else {str(e): n for e, n in enumerate(tokens) if n < moments.prior_tokens}
    if not whole:
        return 0.0, 0.0, most_sweeps, few
    return math.sqrt(lost / whole), math.sqrt(rival_lost / whole), most_sweeps, few
