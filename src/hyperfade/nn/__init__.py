"""The layers: hypercomplex, low-rank, narrow, those of experts, and the blend that fades one into the other."""

from hyperfade.nn.blend import BlendLinear
from hyperfade.nn.compiled import compile_
from hyperfade.nn.experts import ExpertsLinear, ExpertsLowRank, ExpertsPHM, Groups
from hyperfade.nn.joint import JointReading
from hyperfade.nn.low_bit import LowBit, LowBitLinear, bitsandbytes, fitting_group, low_bit_modules
from hyperfade.nn.low_rank import LowRankLinear
from hyperfade.nn.mixture import ArrangedExperts, RoutedExperts
from hyperfade.nn.narrow import NarrowLinear
from hyperfade.nn.phm import PHMLinear, keep_derived_, pack_
from hyperfade.nn.spec import Light, LightSpec, light_modules

__all__ = [
    "ArrangedExperts",
    "BlendLinear",
    "ExpertsLinear",
    "ExpertsLowRank",
    "ExpertsPHM",
    "Groups",
    "JointReading",
    "Light",
    "LightSpec",
    "LowBit",
    "LowBitLinear",
    "LowRankLinear",
    "NarrowLinear",
    "PHMLinear",
    "RoutedExperts",
    "bitsandbytes",
    "compile_",
    "fitting_group",
    "keep_derived_",
    "light_modules",
    "low_bit_modules",
    "pack_",
]
