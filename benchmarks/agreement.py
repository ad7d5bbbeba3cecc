"""How far a model's next tokens are the dense model's, on test answers: of a cell before its training, and after it.

Every position of an answer is predicted with the true tokens before it, so a model that is not trained yet has a score
too, and a few examples tell models apart. What a user sees, the scores of whole answers, is measured after training.
"""

import random
from typing import Any

import torch
from torch import Tensor

from hyperfade.data import open_source
from hyperfade.distill import Allocation, answers_only, fit_
from hyperfade.distill.losses import answer_logits, kl_divergence
from hyperfade.hub import skeleton
from hyperfade.measure import device
from hyperfade.recipe import Recipe
from hyperfade.surgery import plan, set_alpha_, swap_
from hyperfade.task import Task, open_task
from hyperfade.workspace import read_json, variants

EXAMPLES = 144
_ROWS = 16  # in a batch


def agreement(recipe: Recipe) -> dict[str, dict[str, float]]:
    """`before` and `after` the training of the finished run of `recipe`: the KL from the dense model in nats per answer
    token, and the share of answer tokens that both give most likely."""
    task = open_task(recipe, skeleton(recipe.model))
    batches = _batches(task)
    dense = _predictions(task.dense(), batches)
    (own,) = variants(recipe)
    found = {}
    for name, model in (("before", _fitted(task)), ("after", task.finished(own))):
        predictions = _predictions(model, batches)
        same = (predictions.argmax(-1) == dense.argmax(-1)).float().mean().item()
        found[name] = {"kl": kl_divergence(predictions, dense, 1.0).item(), "same_token": same}
    return found


def _batches(task: Task) -> list[dict[str, Tensor]]:
    """The same examples of the test set for every cell, those of like length together."""
    source = open_source(task.recipe.data.evaluation)
    rows = random.Random(task.recipe.seed).sample(range(len(source)), min(EXAMPLES, len(source)))
    rows.sort(key=lambda row: sum(len(str(message["content"])) for message in source[row].messages))
    batches = []
    for first in range(0, len(rows), _ROWS):
        batch = answers_only(task.collator.training_batch([source[row] for row in rows[first : first + _ROWS]]))
        dtype = getattr(torch, task.recipe.dtype)
        batches.append({k: v.to(device(), dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()})
    return batches


@torch.inference_mode()
def _predictions(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Float32 logits of every answer token: (tokens, vocabulary)."""
    model.eval()
    parts = []
    for batch in batches:
        given = {name: part for name, part in batch.items() if name != "labels"}
        parts.append(answer_logits(model(**given).logits, batch["labels"])[0])
    return torch.cat(parts)


def _fitted(task: Task) -> Any:
    """The model as the fit left it, from what lies in the run's work folder."""
    (own,) = variants(task.recipe)
    torch.manual_seed(task.recipe.seed)
    model, allocated = task.dense(), own.work / "allocation.json"
    replaced = Allocation.from_dict(read_json(allocated)).replace if allocated.exists() else own.replace
    chosen = plan(model, replaced)
    swap_(model, chosen)
    one_batch = task.calibration_batches(own.fit.model_copy(update={"samples": 1}))  # shows the order of use
    fit_(model, chosen, one_batch, own.fit, own.work / "fit")
    set_alpha_(model, 1.0)
    return model
