"""The layers: hypercomplex, low-rank, narrow, and the blend that fades one into the other."""

from hyperfade.nn.blend import BlendLinear
from hyperfade.nn.joint import JointReading
from hyperfade.nn.low_rank import LowRankLinear
from hyperfade.nn.narrow import NarrowLinear
from hyperfade.nn.phm import PHMLinear, keep_derived_
from hyperfade.nn.spec import Light, LightSpec, light_modules

__all__ = [
    "BlendLinear",
    "JointReading",
    "Light",
    "LightSpec",
    "LowRankLinear",
    "NarrowLinear",
    "PHMLinear",
    "keep_derived_",
    "light_modules",
]
