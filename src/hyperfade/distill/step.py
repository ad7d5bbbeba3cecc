"""What one optimizer step computes: the gradients of

    (1 − λ) CE + λ T² KL(teacher ‖ student) + μ · mean reconstruction + η · hidden states' error

the first two over the assistant's tokens of its examples, the last over all of theirs. However the examples are
divided, over processes and, where memory is short, over parts, every part's means are weighted by its answer tokens,
the last by all its tokens, so that the sum is the same. (Not quite: reconstruction is a ratio of whole batches, and
divided it is the weighted mean of the parts' ratios; a part without an answer is left out, hidden states and all.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hyperfade.data.collate import IGNORED
from hyperfade.distill.cached import CachedTeacher
from hyperfade.distill.divide import Reached
from hyperfade.distill.losses import (
    LossTerms,
    answer_logits,
    cross_entropy,
    hidden_error,
    kl_divergence,
    mean_reconstruction,
)
from hyperfade.distill.schedule import kd_weight_at
from hyperfade.distill.state import seed_step
from hyperfade.errors import TrainingError
from hyperfade.processes import join, share_of, sum_
from hyperfade.recipe import Train
from hyperfade.surgery import blends

Batch = dict[str, Tensor]
BatchOf = Callable[[Sequence[int]], Batch]


@dataclass(frozen=True)
class Objective:
    """What is minimised, on what. teacher: a model, or its cached answers. autocast_dtype None: no autocast. reached:
    of a divided student."""

    student: Any
    teacher: Any
    batch_of: BatchOf
    train: Train
    seed: int
    autocast_dtype: torch.dtype | None
    reached: Reached | None = None


def autocast_dtype(model: nn.Module, train: Train) -> torch.dtype | None:
    """What forward passes run in: bfloat16 where the recipe says so, else what of the model is not float32, or None."""
    half = next((p.dtype for p in model.parameters() if p.dtype != torch.float32), None)
    return torch.bfloat16 if train.mixed_precision == "bf16" else half


def gradients_(objective: Objective, numbers: Sequence[int], step: int, parts: int) -> Tensor | None:
    """Leave the gradients of `step` (from 0) in what trains; returns loss, cross-entropy, KL, reconstruction
    and hidden states' error (5,).

    numbers: the step's examples, those of all its micro-batches, of all processes. Every micro-batch is taken in
    `parts` parts. Returns None, with gradients to be thrown away, where memory ran out in some process. A divided
    student cannot go on then, nor where a process has nothing to compute: raises `TrainingError`.
    """
    train, size = objective.train, objective.train.batch_size
    trained = [parameter for parameter in objective.student.parameters() if parameter.requires_grad]
    divided = objective.reached is not None
    device = trained[0].device
    seed_step(objective.seed, step, join().process_index)
    sums, exhausted = torch.zeros(5, device=device), False
    for first in range(0, len(numbers), size):
        share = share_of(numbers[first : first + size])
        pieces = [piece for piece in _divided(share, parts) if piece]
        batches = [objective.batch_of(piece) for piece in pieces]
        counts = torch.tensor([_num_tokens(batch) for batch in batches], dtype=torch.float64).view(-1, 2)
        totals = counts.sum(0)
        sum_([totals])
        shares = counts / totals / train.accumulation
        for batch, piece, (weight, share_of_tokens) in zip(batches, pieces, shares.tolist(), strict=True):
            if divided and not weight > 0:
                raise TrainingError(f"Examples {piece} of step {step + 1} have no answers.", "Leave them out.")
            if exhausted or not weight > 0:  # not a number, where no process has an answer
                continue
            try:
                terms = losses(objective, batch, piece)
                terms = replace(terms, hidden=share_of_tokens / weight * terms.hidden)
                loss = weight * terms.total(kd_weight_at(step, train), train.reconstruction_weight, train.hidden_weight)
                loss.backward()
            except torch.OutOfMemoryError as error:
                if divided:  # the others wait for this one in the middle of a pass
                    raise TrainingError(
                        f"Memory ran out in step {step + 1}.",
                        "Set train.gradient_checkpointing: true, lower train.batch_size and raise train.accumulation, "
                        "or take more processes; then run in a new output folder.",
                    ) from error
                exhausted = True
            else:
                named = terms.cross_entropy, terms.kl, terms.reconstruction, terms.hidden
                parts_of_it = torch.stack(named).detach()
                sums += torch.cat([loss.detach()[None], weight * parts_of_it])
            del batch
    out_of_memory = torch.tensor([float(exhausted)], device=device)
    sum_([out_of_memory])
    if out_of_memory.item():
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return None
    if objective.reached is not None:
        objective.reached.leave_out_others_(trained)
    else:
        _sum_gradients_(trained)
    sum_([sums])
    return sums.cpu()


def losses(objective: Objective, batch: Batch, numbers: Sequence[int]) -> LossTerms:
    """The losses of one batch: cross-entropy and KL are means over its answer tokens, hidden states' over all."""
    train, dtype = objective.train, objective.autocast_dtype
    labels = batch["labels"]
    inputs, autocast = _inputs(batch), _autocast(batch, dtype)
    if train.hidden_weight:
        inputs["output_hidden_states"] = True
    with autocast:
        given = objective.student(**inputs)
    logits, targets = answer_logits(given.logits, labels)
    kl = hidden = torch.zeros((), device=logits.device)
    if train.kd_weight and isinstance(objective.teacher, CachedTeacher):
        kl = objective.teacher.kl(numbers, logits, targets)
    elif train.kd_weight or train.hidden_weight:
        with torch.no_grad(), autocast:
            wanted = objective.teacher(**inputs)
        if train.kd_weight:
            kl = kl_divergence(logits, answer_logits(wanted.logits, labels)[0], train.temperature)
        if train.hidden_weight:
            hidden = hidden_error(_hidden_states(given), _hidden_states(wanted), batch.get("attention_mask"))
    ce = cross_entropy(logits, targets, train.label_smoothing)
    return LossTerms(ce, kl, mean_reconstruction(blends(objective.student).values(), logits.device), hidden)


@torch.no_grad()
def check_hidden_states(model: Any, batch: Batch, dtype: torch.dtype | None) -> None:
    """Raises `TrainingError` where `model` gives no hidden states, which `train.hidden_weight` needs: one forward pass.
    batch: as for training; dtype: of its autocast, None for none."""
    with _autocast(batch, dtype):
        _hidden_states(model(**_inputs(batch), output_hidden_states=True))


def _hidden_states(output: Any) -> Sequence[Tensor]:
    """Those of the language model: of an encoder-decoder, the decoder's; BLIP-2 keeps its language model's output."""
    of_language = getattr(output, "language_model_outputs", None) or output
    names = "hidden_states", "decoder_hidden_states"
    for states in (getattr(of_language, name, None) for name in names):
        if states:
            return states
    raise TrainingError(
        f"train.hidden_weight needs hidden states, and {type(output).__name__} has none.",
        "Set train.hidden_weight: 0.",
    )


def _inputs(batch: Batch) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}


def _autocast(batch: Batch, dtype: torch.dtype | None) -> torch.autocast:
    # not accelerate's own mixed precision: that is fixed once per process, and recipes in one process may differ
    return torch.autocast(batch["labels"].device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def _sum_gradients_(trained: Sequence[nn.Parameter]) -> None:
    """Sum gradients over processes. What no process's examples reach keeps none, as with one process."""
    if join().num_processes == 1:
        return
    reached = torch.tensor([float(parameter.grad is not None) for parameter in trained])
    sum_([reached])
    for parameter, processes in zip(trained, reached.tolist(), strict=True):
        if parameter.grad is None and processes:
            parameter.grad = torch.zeros_like(parameter)
    sum_([parameter.grad for parameter in trained if parameter.grad is not None])


def _divided(numbers: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Examples, not rows of tensors: what a processor makes of images need not have one row per example."""
    edges = [len(numbers) * part // parts for part in range(parts + 1)]
    return [numbers[low:high] for low, high in pairwise(edges)]


def _num_tokens(batch: Batch) -> tuple[int, int]:
    """Tokens of answers, and all that are no padding (without mask and ids, those of answers again); none of either
    without an answer."""
    answers, mask = int((batch["labels"][:, 1:] != IGNORED).sum()), batch.get("attention_mask")
    if not answers:
        return 0, 0
    if mask is not None:
        return answers, int(mask.sum())
    return answers, batch["input_ids"].numel() if "input_ids" in batch else answers
