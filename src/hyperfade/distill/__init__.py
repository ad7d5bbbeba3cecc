"""Calibrate and fit, then fade and polish."""

from hyperfade.distill.activations import second_moments
from hyperfade.distill.allocate import Allocation, Share, allocate
from hyperfade.distill.cached import CachedTeacher, cache_teacher, digest
from hyperfade.distill.calibrate import fit_, fit_file
from hyperfade.distill.journal import Fault, Halving, Rollback, StepReport, read_faults, read_steps
from hyperfade.distill.loop import Summary, distill_
from hyperfade.distill.losses import answers_only
from hyperfade.distill.matrices import LayerFit
from hyperfade.distill.order import Batches, data_order
from hyperfade.distill.schedule import alpha_at, fade_progress, kd_weight_at, learning_rate_factor, total_steps
from hyperfade.distill.state import latest_step
from hyperfade.distill.step import autocast_dtype, check_hidden_states
from hyperfade.distill.streamed import fit_streamed
from hyperfade.distill.teacher import teacher_of, unshare_

__all__ = [
    "Allocation",
    "Batches",
    "CachedTeacher",
    "Fault",
    "Halving",
    "LayerFit",
    "Rollback",
    "Share",
    "StepReport",
    "Summary",
    "allocate",
    "alpha_at",
    "answers_only",
    "autocast_dtype",
    "cache_teacher",
    "check_hidden_states",
    "data_order",
    "digest",
    "distill_",
    "fade_progress",
    "fit_",
    "fit_file",
    "fit_streamed",
    "kd_weight_at",
    "latest_step",
    "learning_rate_factor",
    "read_faults",
    "read_steps",
    "second_moments",
    "teacher_of",
    "total_steps",
    "unshare_",
]
