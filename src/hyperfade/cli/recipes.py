"""Commands that follow a recipe: what it would do, the model that it makes, and the recipe itself."""

from pathlib import Path
from typing import Annotated

import typer

from hyperfade.cli.shared import RecipeOption, SetOption, chosen_recipe, say
from hyperfade.errors import RecipeError
from hyperfade.formats import Format


def inspect(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, hub name, config.json file, or `embedded`.")
    ] = "embedded",
    recipe: RecipeOption = "quarter",
    changes: SetOption = None,
    bits: Annotated[int, typer.Option(min=8, help="Bits per parameter for the byte counts (a multiple of 8).")] = 16,
) -> None:
    """Print what a recipe would replace, and what it saves. Needs the model's config only, and changes nothing."""
    from hyperfade.hub import skeleton
    from hyperfade.report import plan_lines
    from hyperfade.surgery import plan

    if bits % 8:
        raise RecipeError(f"--bits {bits} is not a multiple of 8.", "Give 8, 16 or 32.")
    chosen = chosen_recipe(recipe, changes)
    typer.echo("\n".join(plan_lines(plan(skeleton(model), chosen), bits // 8)))
    if chosen.replace.budget is not None:
        typer.echo(
            f"These are the sizes it starts from: compress distributes {chosen.replace.budget:.1%} of the parameters "
            "over layers by measured sensitivity"
        )


def compress(
    recipe: RecipeOption = "quarter",
    model: Annotated[
        str | None, typer.Option(help="Overrides the recipe's model: folder, hub name or `embedded`.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Overrides the recipe's output folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe's seed.")] = None,
    quantize: Annotated[
        Format | None, typer.Option(help="Few bits on top: round the finished FFNs to this format.")
    ] = None,
    changes: SetOption = None,
) -> None:
    """Compress a model: fit, fade, polish, save, measure. Run it again to continue after an interruption.

    For several GPUs: torchrun --nproc-per-node GPUS -m hyperfade compress ..."""
    from hyperfade import pipeline
    from hyperfade.processes import leave

    direct = {"model": model, "output": output, "seed": seed, "quantize": quantize}
    pipeline.compress(chosen_recipe(recipe, changes, {k: v for k, v in direct.items() if v is not None}), say)
    leave()


def convert(
    source: Annotated[str, typer.Argument(help="Folder of the dense checkpoint (safetensors), or `embedded`.")],
    recipe: RecipeOption = "quarter",
    output: Annotated[Path | None, typer.Option(help="Overrides the recipe's output folder.")] = None,
    changes: SetOption = None,
) -> None:
    """Fit a model that is larger than memory, straight from its files; no training. Run it again to continue."""
    from hyperfade import convert as streamed

    direct = {"model": source, "output": output}
    streamed.convert(chosen_recipe(recipe, changes, {k: v for k, v in direct.items() if v is not None}), say)


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint, results.json, report.md and plots.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Compress the model that ships with hyperfade to a quarter of its FFN parameters, beside two rivals."""
    from hyperfade import pipeline

    pipeline.compress(chosen_recipe("demo", None, {"output": output}), say)


def recipe(
    name: Annotated[
        str,
        typer.Argument(help="A YAML file, or one that ships: half, quarter, eighth (also with -width), paper, demo."),
    ] = "quarter",
    keys: Annotated[bool, typer.Option("--keys", help="List every key with its meaning and default instead.")] = False,
) -> None:
    """Print a complete recipe, defaults included, to start your own from; or every key with its meaning."""
    from hyperfade.recipe import Recipe
    from hyperfade.recipe.keys import describe

    typer.echo("\n".join(describe()) if keys else Recipe.load(name).to_yaml())
