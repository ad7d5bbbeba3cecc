"""Fade, then polish: the one training loop.

A step draws its examples by number, sets α, and minimises

    (1 − λ) CE + λ T² KL(teacher ‖ student) + μ · mean reconstruction

over the assistant's tokens. When the fade is over the dense branches are dropped and the rest of the steps polish what
is left. α, λ and the learning rate are pure functions of the optimizer step (`schedule.py`), so a run can stop after
any checkpoint and continue as if nothing had happened.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn

from hyperfade.distill.losses import LossTerms, answer_logits, cross_entropy, kl_divergence, mean_reconstruction
from hyperfade.distill.schedule import alpha_at, kd_weight_at, learning_rate_factor, total_steps
from hyperfade.distill.state import data_order, latest_step, load_state, save_state
from hyperfade.errors import TrainingError
from hyperfade.nn import BlendLinear, light_modules
from hyperfade.recipe import Train
from hyperfade.surgery import blends, drop_dense_

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepReport:
    """One line of metrics.jsonl. Loss terms are means over the step's micro-batches; seconds are per step."""

    step: int
    loss: float
    cross_entropy: float
    kl: float
    reconstruction: float
    alpha: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class Summary:
    """What the training did in this process: `seconds` leaves out what an earlier, interrupted process did."""

    steps: int
    resumed_from: int
    seconds: float


def distill_(
    student: nn.Module,
    teacher: nn.Module,
    num_examples: int,
    batch_of: Callable[[Sequence[int]], Batch],
    train: Train,
    *,
    seed: int,
    folder: Path,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> Summary:
    """Train `student` (swapped, maybe fitted, at any α) until only its light branches are left.

    batch_of turns example numbers into a training batch with labels. folder: states and metrics.jsonl go there; a newer
    state in it is continued from. Parameters with requires_grad outside the light layers train at the dense rate.
    What trains is float32 meanwhile, under autocast where the rest of the model is not. Raises `TrainingError` when the
    loss is not finite; the last state stays as it is.
    """
    _check_trackers(train)
    accelerator = Accelerator(mixed_precision="no", log_with=list(train.trackers) or None, project_dir=str(folder))
    if train.trackers:
        accelerator.init_trackers("hyperfade", config={k: str(v) for k, v in train.model_dump().items()})
    dtypes = _to_float32_(student)
    half = next((dtype for dtype in (p.dtype for p in student.parameters()) if dtype != torch.float32), None)
    autocast_dtype = torch.bfloat16 if train.mixed_precision == "bf16" else half
    optimizer, peaks = _optimizer(student, train)
    steps, first = total_steps(train), latest_step(folder)
    _prepare_branches(student, first, train)
    if first:
        load_state(folder, first, student, optimizer)
    metrics = _open_metrics(folder / "metrics.jsonl", first)
    # the optimizer stays outside `prepare`: its state is saved by name, and a step of it is a step of the schedule
    student_forward = accelerator.prepare(student)
    student.train()
    order = data_order(num_examples, seed, first * train.accumulation * train.batch_size)
    began = time.perf_counter()
    for step in range(first, steps):
        started = time.perf_counter()
        _prepare_branches(student, step, train)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate_factor(step, train)
        sums = torch.zeros(4)
        for _ in range(train.accumulation):
            batch = batch_of(list(islice(order, train.batch_size)))
            terms = _losses(student_forward, teacher, batch, train, blends(student).values(), autocast_dtype)
            loss = terms.total(kd_weight_at(step, train), train.reconstruction_weight)
            sums += torch.stack([loss, terms.cross_entropy, terms.kl, terms.reconstruction]).detach().cpu()
            _check_finite("loss", loss, step, folder)
            accelerator.backward(loss / train.accumulation)
        trained = [p for g in optimizer.param_groups for p in g["params"]]
        norm = accelerator.clip_grad_norm_(trained, train.clip_norm)
        _check_finite("gradient norm", norm, step, folder)
        optimizer.step()
        optimizer.zero_grad()
        report = StepReport(
            step + 1,
            *(sums / train.accumulation).tolist(),
            alpha=alpha_at(step, train),
            learning_rate=optimizer.param_groups[0]["lr"],
            seconds=time.perf_counter() - started,
        )
        on_step(report)
        metrics.write(json.dumps(asdict(report)) + "\n")
        accelerator.log({k: v for k, v in asdict(report).items() if k != "step"}, step=step + 1)
        if (step + 1) % train.checkpoint_every == 0 or step + 1 == steps:
            save_state(folder, step + 1, student, optimizer)
    metrics.close()
    _prepare_branches(student, steps, train)
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    accelerator.end_training()
    student.eval()
    return Summary(steps, first, time.perf_counter() - began)


def _to_float32_(student: nn.Module) -> dict[nn.Parameter, torch.dtype]:
    """Make what trains float32, because steps are smaller than bfloat16 can add; returns the dtypes it had."""
    dtypes = {p: p.dtype for p in student.parameters() if p.requires_grad}
    for parameter in dtypes:
        parameter.data = parameter.data.float()
    return dtypes


def _optimizer(student: nn.Module, train: Train) -> tuple[torch.optim.AdamW, list[float]]:
    """AdamW over the light layers and over whatever else trains, with the two peak learning rates."""
    light = {id(p) for layer in light_modules(student).values() for p in layer.parameters()}
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        ([p for p in trained if id(p) in light], train.learning_rate),
        ([p for p in trained if id(p) not in light], train.dense_learning_rate),
    ]
    groups = [(parameters, peak) for parameters, peak in groups if parameters]
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters, _ in groups], weight_decay=train.weight_decay)
    return optimizer, [peak for _, peak in groups]


def _prepare_branches(student: nn.Module, step: int, train: Train) -> None:
    """Set every α for `step`; once the fade is over, drop the dense branches."""
    fading = list(blends(student).values())
    if fading and step >= train.fade_steps:
        drop_dense_(student)
        return
    for number, blend in enumerate(fading):
        blend.alpha = alpha_at(step, train, number, len(fading))
        blend.measure_reconstruction = train.reconstruction_weight > 0


def _losses(
    student: Any,
    teacher: Any,
    batch: Batch,
    train: Train,
    fading: Iterable[BlendLinear],
    autocast_dtype: torch.dtype | None,
) -> LossTerms:
    labels = batch.pop("labels")
    # not accelerate's own mixed precision: that is fixed once per process, and recipes in one process may differ
    autocast = torch.autocast(labels.device.type, autocast_dtype or torch.bfloat16, enabled=autocast_dtype is not None)
    with autocast:
        logits, targets = answer_logits(student(**batch).logits, labels)
    kl = torch.zeros((), device=logits.device)
    if train.kd_weight:
        with torch.no_grad(), autocast:
            wanted, _ = answer_logits(teacher(**batch).logits, labels)
        kl = kl_divergence(logits, wanted, train.temperature)
    return LossTerms(
        cross_entropy(logits, targets, train.label_smoothing), kl, mean_reconstruction(fading, logits.device)
    )


def _check_trackers(train: Train) -> None:
    """accelerate passes over a tracker that is not installed without a word."""
    known = {"all", *map(str, get_available_trackers())}
    missing = [tracker for tracker in train.trackers if tracker not in known]
    if missing:
        raise TrainingError(
            f"train.trackers: {', '.join(missing)} is not installed, or unknown to accelerate.",
            f"Install it (pip install {missing[0]}), or leave it out: metrics.jsonl is always written.",
        )


def _check_finite(what: str, value: Any, step: int, folder: Path) -> None:
    if not math.isfinite(value.item()):
        raise TrainingError(
            f"The {what} became {value.item()} in step {step + 1}; "
            f"the state after step {latest_step(folder)} is intact.",
            "Lower train.learning_rate, or use train.mixed_precision: no, in a new output folder.",
        )


def _open_metrics(path: Path, steps: int) -> Any:
    """metrics.jsonl, without lines of steps that a resumed run will take again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                fields = json.loads(line)
            except ValueError:
                continue  # a line cut short by a kill belongs to a step that runs again
            if fields["step"] <= steps:
                kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
    return path.open("a", encoding="utf-8", buffering=1)
