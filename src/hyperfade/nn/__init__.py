"""The layers: hypercomplex, low-rank, and the blend that fades one into the other."""

from hyperfade.nn.blend import BlendLinear
from hyperfade.nn.joint import JointReading
from hyperfade.nn.low_rank import LowRankLinear
from hyperfade.nn.phm import PHMLinear, keep_derived_
from hyperfade.nn.spec import LightSpec, light_modules

__all__ = ["BlendLinear", "JointReading", "LightSpec", "LowRankLinear", "PHMLinear", "keep_derived_", "light_modules"]
