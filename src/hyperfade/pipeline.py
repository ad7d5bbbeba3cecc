"""From a recipe to a finished model: plan, fit, fade, polish, fold, save, reload, measure, report.

    results = compress(Recipe.load("demo"))

Every stage leaves its result in the output folder and is skipped where it is there already, so the same call continues
an interrupted run. Rivals of the recipe go through the same stages with the same data and budget.
"""

from pathlib import Path
from typing import Any

from hyperfade.build import build, matched_parameters
from hyperfade.compose.quantize import check_format
from hyperfade.data import open_source
from hyperfade.errors import PlanError
from hyperfade.hub import card, resolve, skeleton, verify_checkpoint
from hyperfade.measure import check_tasks
from hyperfade.processes import is_first, wait
from hyperfade.recipe import Recipe
from hyperfade.report import write_report
from hyperfade.results import measure
from hyperfade.surgery import plan
from hyperfade.task import Say, Task, open_task
from hyperfade.workspace import open_output, variants, write_json


def compress(recipe: Recipe, say: Say = print) -> dict[str, Any]:
    """Carry out `recipe`; returns what results.json holds. `say` gets one line at a time.

    Several processes call it alike, with an output folder that all of them see: the first writes, speaks and measures;
    the others return an empty dictionary once the models are trained.
    Raises a `HyperfadeError` that names the cause; what was finished stays, and the same call goes on from there.
    """
    task = _checked(recipe)
    if not is_first():
        say = _silent
    continued = open_output(recipe) if is_first() else True
    wait()
    say(f"{'Continuing' if continued else 'Compressing'} {recipe.model} → {recipe.output}")
    built = {variant.name: build(variant, task, say) for variant in variants(recipe)}
    if not is_first():
        return {}
    results = measure(task, built, say)
    write_json(recipe.output / "results.json", results)
    for variant in variants(recipe):
        (variant.model / "README.md").write_text(card(results, variant.name), encoding="utf-8")
    write_report(recipe.output)
    say(f"Model: {recipe.output / 'model'}")
    say(f"Results: {recipe.output / 'results.json'}, for reading: {recipe.output / 'report.md'}")
    return results


def _silent(line: str) -> None:
    """What the other processes say: nothing."""


def _checked(recipe: Recipe) -> Task:
    """Model, plans and data, looked at as far as that needs no weights: what does not fit is refused before a folder
    exists."""
    if Path(resolve(recipe.model)).is_dir():
        verify_checkpoint(Path(resolve(recipe.model)))
    model = skeleton(recipe.model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise PlanError(
            f"{recipe.model} is compressed or quantized already.", "Give the dense checkpoint it came from."
        )
    if recipe.quantize is not None:
        check_format(recipe.quantize.to, recipe.quantize.group_size)
    for variant in variants(recipe):
        plan(model, variant.replace)
        matched_parameters(model, variant.train)
    task, data = open_task(recipe, model), recipe.data
    # What is wrong with the evaluation is known now, not after training.
    evaluation = open_source(data.evaluation, on_bad=data.on_bad_sample)
    check_tasks(evaluation, limit=data.evaluation_limit, seed=recipe.seed)
    return task
