"""Size, speed and quality, measured."""

from hyperfade.measure.footprint import disk_bytes, forward_flops, num_parameters, weight_bytes
from hyperfade.measure.machine import device, machine
from hyperfade.measure.quality import Quality, Score, answers, evaluate, is_right, wilson
from hyperfade.measure.speed import Speed, compare_speed

__all__ = [
    "Quality",
    "Score",
    "Speed",
    "answers",
    "compare_speed",
    "device",
    "disk_bytes",
    "evaluate",
    "forward_flops",
    "is_right",
    "machine",
    "num_parameters",
    "weight_bytes",
    "wilson",
]
