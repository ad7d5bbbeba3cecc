"""The command line: thin commands over the library. They import what is heavy themselves, so `--help` is instant."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hyperfade.errors import DataError, HyperfadeError, OutputError, RecipeError

app = typer.Typer(
    name="hyperfade",
    help="Make vision-language models smaller and faster: dense feed-forward layers fade out, hypercomplex fade in.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="A YAML file, or a recipe that ships: quarter, half, paper, demo.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Change one key, e.g. --set train.polish_steps=500. Repeatable.")
]
DataOption = Annotated[
    str, typer.Option(help="Questions with answers: easy-vqa[:train|:test], a .jsonl file, or datasets:NAME[:SPLIT].")
]
_ANY_LENGTH = 10**9  # tokens: a benchmark leaves the limit to the model
Format = Literal["int8", "int4", "nf4", "fp8"]
Dtype = Literal["float32", "bfloat16", "float16"]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options of every command; `main` reads --debug itself."""


@app.command()
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
    chosen = _recipe(recipe, changes)
    typer.echo("\n".join(plan_lines(plan(skeleton(model), chosen), bits // 8)))
    if chosen.replace.budget is not None:
        typer.echo(
            f"These are the sizes it starts from: compress distributes {chosen.replace.budget:.1%} of the parameters "
            "over layers by measured sensitivity"
        )


@app.command()
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
    pipeline.compress(_recipe(recipe, changes, {k: v for k, v in direct.items() if v is not None}), _say)
    leave()


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder of the dense checkpoint (safetensors), or `embedded`.")],
    recipe: RecipeOption = "quarter",
    output: Annotated[Path | None, typer.Option(help="Overrides the recipe's output folder.")] = None,
    changes: SetOption = None,
) -> None:
    """Fit a model that is larger than memory, straight from its files; no training. Run it again to continue."""
    from hyperfade import convert as streamed

    direct = {"model": source, "output": output}
    streamed.convert(_recipe(recipe, changes, {k: v for k, v in direct.items() if v is not None}), _say)


@app.command("quantize")
def quantize_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, compressed or dense, or `embedded`.")],
    to: Annotated[Format, typer.Option(help="Format of the matrices.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the new checkpoint.", show_default="MODEL-TO")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=0, help="Neighbours that share a scale, 0 for rows.", show_default="64 for int4 and nf4, else 0"
        ),
    ] = None,
    rest: Annotated[
        bool, typer.Option("--rest", help="Attention and the other linears too; never output head and embeddings.")
    ] = False,
) -> None:
    """Round a checkpoint's FFNs to few bits, as torchao or bitsandbytes do; the result loads like any other."""
    from hyperfade.compose.quantize import check_format, quantize_
    from hyperfade.hub import load, load_processor, mark_, save
    from hyperfade.measure import disk_bytes

    check_format(to, group_size)
    folder = output or Path(f"{model.rstrip('/')}-{to}")
    _refuse_existing(folder)
    loaded, processor = load(model), load_processor(model)
    report = quantize_(loaded, to, group_size, rest)
    mark_(loaded)
    save(loaded, folder, processor)
    typer.echo("\n".join([*report.lines(), f"{folder}: {disk_bytes(folder) / 1e6:.2f} MB of weights"]))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Compressed or quantized checkpoint folder.")],
    to: Annotated[
        Literal["dense", "onnx"],
        typer.Option(help="dense: a plain checkpoint, every matrix materialised. onnx: the forward pass, in float32."),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="MODEL-TO")] = None,
) -> None:
    """Write a model for tools that know nothing of hyperfade."""
    from hyperfade.compose.export import densify_, example_of, export_onnx
    from hyperfade.hub import load, load_processor, save, write_folder
    from hyperfade.measure import disk_bytes

    folder = output or Path(f"{model.rstrip('/')}-{to}")
    _refuse_existing(folder)
    processor = load_processor(model)
    if to == "onnx":
        loaded = load(model, "float32")
        write_folder(folder, lambda target: export_onnx(loaded, example_of(loaded, processor), target / "model.onnx"))
        megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        typer.echo(f"{folder / 'model.onnx'}: {megabytes:.2f} MB in float32, whole sequences, without a cache")
        return
    loaded = load(model)
    count = len(densify_(loaded))
    save(loaded, folder, processor)
    before = f", {disk_bytes(Path(model)) / 1e6:.2f} MB before" if Path(model).is_dir() else ""
    typer.echo(f"{folder}: {count} matrices materialised, {disk_bytes(folder) / 1e6:.2f} MB of weights{before}")
    typer.echo("It loads without hyperfade, and saves nothing: neither memory nor time.")


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise OutputError(f"{folder} exists.", "Choose another --output; nothing was touched.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint, results.json, report.md and plots.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Compress the model that ships with hyperfade to a quarter of its FFN parameters, beside two rivals."""
    from hyperfade import pipeline

    pipeline.compress(_recipe("demo", None, {"output": output}), _say)


@app.command()
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


@app.command()
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
    output: Annotated[Path | None, typer.Option(help="Also write the numbers to this JSON file.")] = None,
) -> None:
    """Time models side by side, in one run: prefill and decode of finished checkpoints; or, with --recipe, what a
    model's FFNs would gain on this machine, from its config alone."""
    if recipe is not None:
        _benchmark_ffns(models, _recipe(recipe, changes), tokens, dtype, output)
        return
    if changes:
        raise RecipeError("--set changes a recipe, and none was given.", "Add --recipe, or leave out --set.")
    from dataclasses import asdict

    from hyperfade.data import Collator, open_source
    from hyperfade.hub import load, load_processor
    from hyperfade.measure import compare_speed, device, machine
    from hyperfade.workspace import write_json

    dtype = dtype or "float32"
    loaded: dict[str, Any] = {name: load(name, dtype).to(device()) for name in models}  # pyright: ignore
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
        facts = {"dtype": dtype, "batch_size": batch_size, "new_tokens": new_tokens, "rounds": rounds}
        write_json(output, {"machine": machine(), **facts, "models": {n: asdict(s) for n, s in speeds.items()}})


def _benchmark_ffns(models: list[str], chosen: Any, tokens: str, dtype: Dtype | None, output: Path | None) -> None:
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
    )
    facts = machine()
    place = facts["processor"] if facts["accelerator"] == "none" else facts["accelerator"]
    typer.echo(f"{models[0]}, {kind}, {place}, {facts['threads']} threads")
    typer.echo("\n".join(ffn_lines(found)))
    if output is not None:
        from dataclasses import asdict

        write_json(output, {"machine": facts, "dtype": kind, "ffns": [asdict(ffn) for ffn in found]})


@app.command()
def recipe(
    name: Annotated[
        str, typer.Argument(help="A YAML file, or a recipe that ships: quarter, half, paper, demo.")
    ] = "quarter",
    keys: Annotated[bool, typer.Option("--keys", help="List every key with its meaning and default instead.")] = False,
) -> None:
    """Print a complete recipe, defaults included, to start your own from; or every key with its meaning."""
    from hyperfade.recipe import Recipe
    from hyperfade.recipe.keys import describe

    typer.echo("\n".join(describe()) if keys else Recipe.load(name).to_yaml())


def _recipe(source: str, changes: list[str] | None, direct: dict[str, Any] | None = None) -> Any:
    """The recipe with --set changes and direct options applied."""
    from hyperfade.recipe import Recipe, read_yaml

    loaded = Recipe.load(source)
    fields = loaded.model_dump()
    for change in changes or []:
        key, equals, text = change.partition("=")
        *path, last = key.split(".")
        section = fields
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not equals:
            raise RecipeError(f"--set {change}: the value is missing.", "Write --set section.key=value.")
        if not isinstance(section, dict):
            raise RecipeError(
                f"--set {change}: there is no section {'.'.join(path)!r}.", "Write --set section.key=value."
            )
        section[last] = read_yaml(text, f"--set {change}: {text!r}")
    return Recipe.parse({**fields, **(direct or {})}, where=source)


def _say(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()


def main() -> None:
    """Run a command; an error of ours is two lines, and Ctrl-C says how to go on."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]  # it may stand anywhere
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for loader in ("torchao", "torch.utils._pytree"):  # on import torchao names every GPU kernel that a CPU lacks
        logging.getLogger(loader).setLevel(logging.ERROR)
    try:
        app()
    except HyperfadeError as error:
        if debug:
            raise
        typer.echo(f"Error: {error.message}\n{error.hint}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # typer turns Ctrl-C into an exit with 130
            raise
        typer.echo("\nStopped. Run the same command again to continue from the last checkpoint.", err=True)
        sys.exit(130)
