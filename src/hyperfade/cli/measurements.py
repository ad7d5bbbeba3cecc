"""Commands that measure: a model's answers, and the time that models or their FFNs take."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hyperfade.cli.shared import DataOption, SetOption, chosen_recipe
from hyperfade.errors import DataError, RecipeError
from hyperfade.formats import Dtype

if TYPE_CHECKING:
    from hyperfade.recipe import Recipe

_ANY_LENGTH = 10**9  # tokens: a benchmark leaves the limit to the model


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, dense or compressed, or `embedded`.")] = "embedded",
    data: Annotated[
        str | None,
        typer.Option(
            help="What to ask, with references: easy-vqa[:train|:test], a .jsonl file, or datasets:NAME[:SPLIT].",
            show_default="easy-vqa:test",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of --data: tasks of lm-evaluation-harness, NAME[,NAME], groups and patterns too."),
    ] = None,
    include: Annotated[Path | None, typer.Option(help="With --tasks: a folder with more tasks, as YAML files.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="With --tasks: write prompts by the chat template.")] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Only this many examples, a seeded sample; of every task the first.", show_default="all"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens; not for --tasks.")] = 16,
    dtype: Annotated[Dtype, typer.Option(help="What the model runs in.")] = "float32",
    on_bad_sample: Annotated[
        Literal["error", "skip"], typer.Option(help="Stop at a bad sample, or count it.")
    ] = "error",
    output: Annotated[Path | None, typer.Option(help="Also write all scores to this JSON file.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Write every answer to this .jsonl file, for comparisons with other models.")
    ] = None,
) -> None:
    """Score a model's greedy answers by task, kind and modality, with 95 % intervals; or run public benchmarks."""
    other = {"--include": include, "--chat": chat} if tasks is None else {"--data": data, "--answers": answers}
    for flag in (flag for flag, given in other.items() if given):
        raise DataError(
            f"{flag} {'needs' if tasks is None else 'cannot be given together with'} --tasks.",
            "Use --data for examples of your own, --tasks for those of lm-evaluation-harness.",
        )
    from hyperfade.hub import load, load_processor
    from hyperfade.measure import device, machine, run_tasks, write_answers
    from hyperfade.measure import evaluate as measure
    from hyperfade.report import harness_lines, quality_lines
    from hyperfade.workspace import write_json

    loaded, processor = load(model, dtype).to(device()), load_processor(model)  # pyright: ignore
    facts: dict[str, Any] = {"machine": machine(), "model": model, "dtype": dtype, "limit": limit}
    if tasks is not None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant to be so
        found = run_tasks(
            loaded, processor, tasks.split(","), include=include, limit=limit, batch_size=batch_size, chat=chat
        )
        facts |= {"chat": chat, "harness": found}
        lines = harness_lines(found)
    else:
        data = data or "easy-vqa:test"
        quality = measure(
            loaded,
            processor,
            data,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            on_bad_sample=on_bad_sample,
            keep_answers=answers is not None,
            on_batch=lambda done, total: typer.echo(f"\r{done}/{total} examples", nl=done >= total, err=True),
        )
        scores = quality.to_dict()
        facts |= {"data": data, "max_new_tokens": max_new_tokens, "quality": scores}
        lines = quality_lines(scores) + [f"left out: {where}: {reason}" for where, reason in quality.skipped]
        if answers is not None:
            write_answers(answers, quality.answers)
    typer.echo("\n".join(lines))
    if output is not None:
        write_json(output, facts)


def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoint folders (or `embedded`), the first is the reference; with --recipe one model, also a hub "
            "name or a config.json file."
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", help="Before compressing: time the model's FFNs alone, dense and as this recipe's layers."
        ),
    ] = None,
    changes: SetOption = None,
    tokens: Annotated[str, typer.Option(help="With --recipe: tokens in a call, 1 is decoding.")] = "1,8,64,512,2048",
    data: DataOption = "easy-vqa:test",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded per round.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds; medians and quartiles are over rounds.")] = 15,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="What the models run in.", show_default="float32; with --recipe, the recipe's"),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Let torch compile the hypercomplex FFNs; takes seconds before the first round."
        ),
    ] = False,
    keep_derived: Annotated[
        bool,
        typer.Option(
            "--keep-derived",
            help="Let hypercomplex layers keep what they derive of their weights (hyperfade.keep_derived_): memory for "
            "speed.",
        ),
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the numbers to this JSON file.")] = None,
) -> None:
    """Time models side by side, in one run: prefill and decode of finished checkpoints; or, with --recipe, what a
    model's FFNs would gain on this machine, from its config alone."""
    if recipe is not None:
        if keep_derived:
            raise RecipeError(
                "--keep-derived is for finished checkpoints, not for FFNs that --recipe makes up.",
                "Leave out one of them.",
            )
        _benchmark_ffns(models, chosen_recipe(recipe, changes), tokens, dtype, compiled, output)
        return
    if changes:
        raise RecipeError("--set changes a recipe, and none was given.", "Add --recipe, or leave out --set.")
    from hyperfade.data import Collator, open_source
    from hyperfade.hub import load, load_processor
    from hyperfade.measure import compare_speed, device, machine
    from hyperfade.nn import compile_, keep_derived_
    from hyperfade.workspace import write_json

    if compiled and keep_derived:
        raise RecipeError("--compile and --keep-derived: compiled layers keep nothing.", "Leave out one of them.")
    dtype = dtype or "float32"
    loaded: dict[str, Any] = {name: load(name, dtype).to(device()) for name in models}  # pyright: ignore
    if compiled and not [ffn for model in loaded.values() for ffn in compile_(model)]:
        raise RecipeError(
            f"--compile: {', '.join(models)}: no hypercomplex layers to compile.", "Name a compressed checkpoint too."
        )
    if keep_derived and not [layer for model in loaded.values() for layer in keep_derived_(model)]:
        raise RecipeError(
            f"--keep-derived: {', '.join(models)}: no hypercomplex layers that can; few bits and experts cannot.",
            "Name a compressed checkpoint too.",
        )
    source = open_source(data)
    if batch_size > len(source):
        raise DataError(f"{data} has {len(source)} prompts, --batch-size asks for {batch_size}.", "Ask for fewer.")
    prompt = Collator(load_processor(models[0]), max_tokens=_ANY_LENGTH).prompt_batch(
        [source[i] for i in range(batch_size)]
    )
    first = loaded[models[0]]
    prompt = {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) for k, v in prompt.items()}
    speeds = compare_speed(loaded, prompt, new_tokens=new_tokens, rounds=rounds)
    for name, speed in speeds.items():
        typer.echo(
            f"{name}: prefill {1e3 * speed.prefill_seconds:.1f} ms ({speed.prefill_speedup:.2f}×, quartiles "
            f"{speed.prefill_speedup_range[0]:.2f}-{speed.prefill_speedup_range[1]:.2f}), decode "
            f"{1e3 * speed.decode_seconds_per_token:.2f} ms/token ({speed.decode_speedup:.2f}×, quartiles "
            f"{speed.decode_speedup_range[0]:.2f}-{speed.decode_speedup_range[1]:.2f})"
        )
    if output is not None:
        facts = {
            "dtype": dtype,
            "compiled": compiled,
            "keep_derived": keep_derived,
            "batch_size": batch_size,
            "new_tokens": new_tokens,
            "rounds": rounds,
        }
        write_json(output, {"machine": machine(), **facts, "models": {n: asdict(s) for n, s in speeds.items()}})


def _benchmark_ffns(
    models: list[str], chosen: "Recipe", tokens: str, dtype: Dtype | None, compiled: bool, output: Path | None
) -> None:
    """What the FFNs of one model would gain on this machine."""
    import torch

    from hyperfade.hub import skeleton
    from hyperfade.measure import compare_ffns, device, ffn_lines, machine
    from hyperfade.surgery import plan
    from hyperfade.workspace import write_json

    if len(models) > 1:
        raise RecipeError(
            f"--recipe plans one model, {len(models)} were given.",
            "Name one; finished checkpoints are compared without --recipe.",
        )
    try:
        counts = sorted({int(part) for part in tokens.split(",")})
    except ValueError as error:
        raise RecipeError(f"--tokens {tokens}: not numbers.", "Write them like 1,64,512.") from error
    if counts[0] < 1:
        raise RecipeError(f"--tokens {tokens}: a call has at least one token.", "Write them like 1,64,512.")
    model, kind = skeleton(models[0]), dtype or chosen.dtype
    found = compare_ffns(
        model,
        plan(model, chosen),
        getattr(torch, kind),
        device(),
        counts,
        lambda shape: typer.echo(f"timing {shape} ...", err=True),
        compiled=compiled,
    )
    facts = machine()
    place = facts["processor"] if facts["accelerator"] == "none" else facts["accelerator"]
    way = ", hypercomplex FFNs compiled" if compiled else ""
    typer.echo(f"{models[0]}, {kind}, {place}, {facts['threads']} threads{way}")
    typer.echo("\n".join(ffn_lines(found)))
    if output is not None:
        write_json(
            output, {"machine": facts, "dtype": kind, "compiled": compiled, "ffns": [asdict(ffn) for ffn in found]}
        )
