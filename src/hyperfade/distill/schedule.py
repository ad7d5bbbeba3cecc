"""Schedules: pure functions of the optimizer step. Steps count from 0; `fade_steps + polish_steps` is the whole run."""

import math

from hyperfade.recipe import Train


def total_steps(train: Train) -> int:
    """Optimizer steps of fade and polish together."""
    return train.fade_steps + train.polish_steps


def fade_progress(step: int, train: Train) -> float:
    """How far the fade is in `step`: above 0 from the first step, 1 in its last step and ever after."""
    return 1.0 if step >= train.fade_steps else (step + 1) / train.fade_steps


def alpha_at(step: int, train: Train, layer: int = 0, num_layers: int = 1) -> float:
    """α of fading layer number `layer` of `num_layers` in `step`."""
    progress = fade_progress(step, train)
    if train.fade_order == "layer_by_layer":
        progress = min(max(progress * num_layers - layer, 0.0), 1.0)
    if train.fade_shape == "cosine":
        return (1 - math.cos(math.pi * progress)) / 2
    if train.fade_shape == "step":
        return float(progress == 1)
    return progress


def kd_weight_at(step: int, train: Train) -> float:
    """λ: constant, or growing with the fade."""
    return train.kd_weight * (fade_progress(step, train) if train.kd_ramp else 1.0)


def learning_rate_factor(step: int, train: Train) -> float:
    """Linear warm-up over `warmup_fraction` of the steps, then a cosine to zero; multiplies the peak rates."""
    total = total_steps(train)
    warmup = round(train.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2
