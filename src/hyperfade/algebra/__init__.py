"""The numbers: named and learned algebras, the one layout, and dense weights → components."""

from hyperfade.algebra.bases import NAMED, Algebra, BilinearFactors
from hyperfade.algebra.fit import Fit, fit
from hyperfade.algebra.kron import blocks, kron_sum, rearranged
from hyperfade.algebra.low_rank import LowRankFit, low_rank, rank_errors, rank_for, square_root, tail_errors
from hyperfade.algebra.moments import (
    SecondMoment,
    conditioned,
    energy,
    in_float64,
    output_error,
    relative,
    ridge_,
    shrunk,
    solve_psd,
    together,
)

__all__ = [
    "NAMED",
    "Algebra",
    "BilinearFactors",
    "Fit",
    "LowRankFit",
    "SecondMoment",
    "blocks",
    "conditioned",
    "energy",
    "fit",
    "in_float64",
    "kron_sum",
    "low_rank",
    "output_error",
    "rank_errors",
    "rank_for",
    "rearranged",
    "relative",
    "ridge_",
    "shrunk",
    "solve_psd",
    "square_root",
    "tail_errors",
    "together",
]
