"""Size, speed and quality, measured."""

from hyperfade.measure.comparison import Answer, paired_difference, read_answers, write_answers
from hyperfade.measure.footprint import disk_bytes, forward_flops, num_parameters, weight_bytes
from hyperfade.measure.harness import run_tasks
from hyperfade.measure.intervals import Score, bootstrap, wilson
from hyperfade.measure.layers import FFNSpeed, LayerTime, compare_ffns, ffn_lines
from hyperfade.measure.machine import device, machine
from hyperfade.measure.quality import Quality, TaskQuality, answers, by_task, check_tasks, evaluate, score_answers
from hyperfade.measure.roofline import Ceilings, ceilings
from hyperfade.measure.scores import METRICS, TASKS, Metric, is_right, statistics
from hyperfade.measure.speed import Ratio, Speed, compare_speed, speedup, time_alternately

__all__ = [
    "METRICS",
    "TASKS",
    "Answer",
    "Ceilings",
    "FFNSpeed",
    "LayerTime",
    "Metric",
    "Quality",
    "Ratio",
    "Score",
    "Speed",
    "TaskQuality",
    "answers",
    "bootstrap",
    "by_task",
    "ceilings",
    "check_tasks",
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
    "paired_difference",
    "read_answers",
    "run_tasks",
    "score_answers",
    "speedup",
    "statistics",
    "time_alternately",
    "weight_bytes",
    "wilson",
    "write_answers",
]
