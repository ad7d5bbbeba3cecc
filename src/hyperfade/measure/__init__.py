"""Size, speed and quality, measured."""

from hyperfade.measure.footprint import disk_bytes, forward_flops, num_parameters, weight_bytes
from hyperfade.measure.layers import FFNSpeed, LayerTime, compare_ffns, ffn_lines
from hyperfade.measure.machine import device, machine
from hyperfade.measure.quality import Quality, Score, answers, evaluate, is_right, wilson
from hyperfade.measure.roofline import Ceilings, ceilings
from hyperfade.measure.speed import Ratio, Speed, compare_speed, speedup, time_alternately

__all__ = [
    "Ceilings",
    "FFNSpeed",
    "LayerTime",
    "Quality",
    "Ratio",
    "Score",
    "Speed",
    "answers",
    "ceilings",
    "compare_ffns",
    "compare_speed",
    "device",
    "disk_bytes",
    "evaluate",
    "ffn_lines",
    "forward_flops",
    "is_right",
    "machine",
    "num_parameters",
    "speedup",
    "time_alternately",
    "weight_bytes",
    "wilson",
]
