"""Every way to a smaller FFN at the same size, on really pretrained weights, with the same data and steps.

    make reference
    python benchmarks/comparison.py

A cell is a method at a fraction of the FFN parameters with one learning rate. It is an ordinary `hyperfade compress` in
a folder of its own, so a cell that was interrupted goes on where it was, and one that is finished costs nothing. What
it gave is added to the results file at once. `comparison_report.py` writes the page.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agreement import agreement

from hyperfade.measure import machine, paired_difference, read_answers
from hyperfade.pipeline import compress
from hyperfade.recipe import Recipe
from hyperfade.report import read_metrics
from hyperfade.workspace import open_output, read_json, write_json

RESULTS = Path(__file__).parent / "results" / "comparison.json"
FRACTIONS = (0.5, 0.25, 0.125)
NARROW = 0.75  # of its matrices' parameters, what a hypercomplex layer on fewer hidden units keeps

BLOCKS: dict[str, Any] = {"prefix": "corrected", "block_epochs": 5, "samples": 512}  # fewer would be learnt by heart
BUDGET: dict[str, Any] = {"budget_samples": 512}  # the fit gains by more, where more are asked for; a budget only waits
CORRECTED = ("low-rank, whitened", "width by budget", "products on fewer units", "products on fewer units by budget")


def both(layer: Mapping[str, Any], **choice: Any) -> dict[str, Any]:
    """The same layer for language model and vision tower, and what else the choice says."""
    return {"replace": {"language": layer, "vision": layer, **choice}}


def methods(fraction: float) -> dict[str, dict[str, Any]]:
    """By name, what a recipe says to reach `fraction` of the FFN parameters."""
    fewer_units = {"kind": "products", "n": 4, "products": round(16 * NARROW), "width": fraction / NARROW}
    found = {
        "low-rank, whitened": both({"kind": "low_rank", "fraction": fraction}),
        "width pruning": both({"kind": "dense", "width": fraction}) | {"fit": {"refit_writer": False}},
        "width, writer refitted": both({"kind": "dense", "width": fraction}),
        "width by budget": both({"kind": "dense", "width": fraction}, budget=fraction),
        "products": both({"kind": "products", "n": 4, "products": round(16 * fraction)}),
        "generic": both({"kind": "learned", "n": 4, "terms": round(16 * fraction)}),
        "products + companion": both(
            {"kind": "products", "n": 8, "products": round(16 * fraction), "fraction": fraction}
        ),
        "products on fewer units": both(fewer_units),
        "products on fewer units by budget": both(fewer_units, budget=fraction),
    }
    for name in CORRECTED:
        found[f"{name}, corrected"] = found[name] | {"fit": {"prefix": "corrected"}}
        found[f"{name}, by blocks"] = found[name] | {"fit": BLOCKS | (BUDGET if name.endswith("by budget") else {})}
    return found


def paper() -> dict[str, Any]:
    """The paper's recipe as published but for its number of steps: its losses, fade, fit, LoRA, head and rates."""
    published = Recipe.load("paper").model_dump(mode="json", exclude_defaults=True)
    return {key: published[key] for key in ("replace", "fit", "train")}


def cells(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, what identifies it, recipe fields) of every cell asked for, in the order of use."""
    for fraction in args.fractions:
        for method, fields in methods(fraction).items():
            if args.methods and method not in args.methods:
                continue
            for rate in args.learning_rates:
                yield (
                    f"{method} at {fraction:g}, rate {rate:g}",
                    {"method": method, "fraction": fraction},
                    fields | {"train": {"fade_steps": 0, "polish_steps": args.steps, "learning_rate": rate}},
                )
    if not args.methods or "paper" in args.methods:
        fields = paper()
        fade = round(0.7 * args.steps)
        fields["train"] |= {"fade_steps": fade, "polish_steps": args.steps - fade, "accumulation": 1}
        # at its temperature of 4 the likeliest tokens are not enough; and hidden states are not in its loss
        fields["train"] |= {"teacher": "live", "hidden_weight": 0.0}
        yield "paper", {"method": "paper", "fraction": None}, fields


def recipe(name: str, fields: Mapping[str, Any], args: argparse.Namespace) -> Recipe:
    """The whole recipe of a cell: what all of them share, and its own part."""
    shared_train = {"checkpoint_every": args.checkpoint_every, "temperature": 1, "group_by_length": True}
    teacher_folder = args.teacher_folder or args.output / "teacher"
    shared_train |= {"teacher": args.teacher, "teacher_folder": str(teacher_folder)}  # the same batches for all
    shared_train |= {"hidden_weight": args.hidden_weight}
    fit = {"samples": args.calibration, "batch_size": args.batch_size, "prefix": "dense", "sweeps": 6}
    fit |= fields.get("fit", {})
    fit["samples"] = max(fit["samples"], args.calibration)  # by blocks: more than that, where more are asked for
    return Recipe.parse(
        {
            "model": str(args.model),
            "output": str(args.output / name.replace(" ", "-").replace(",", "")),
            "dtype": "bfloat16",
            "attention": args.attention,
            "replace": fields["replace"],
            "fit": fit,
            "train": shared_train | fields["train"] | {"batch_size": args.batch_size, "mixed_precision": "bf16"},
            "data": {
                "train": str(args.data / "train.jsonl"),
                "evaluation": str(args.data / "test.jsonl"),
                "evaluation_limit": args.examples,
                "max_new_tokens": 16,
            },
        },
        where=name,
    )


def summary(folder: Path, results: Mapping[str, Any], rate: float | None) -> dict[str, Any]:
    """What is kept of a cell: scores with intervals, paired differences from the dense model, cost, size and speed."""
    answers = {name: read_answers(folder / "answers" / f"{name}.jsonl") for name in ("dense", "compressed")}
    details = results["quality"]["details"]
    return {
        "learning_rate": rate,
        "scores": {
            task: {
                "headline": own["headline"],
                **own["scores"],
                "against_dense": vars(paired_difference(answers["compressed"], answers["dense"], task=task)),
            }
            for task, own in details["compressed"]["tasks"].items()
        },
        "retention": results["quality"]["retention_by_task"],
        "loss_after": statistics.mean(m["loss"] for m in read_metrics(folder / "work")[-10:]),
        "fit_seconds": results["fit_seconds"],
        "train_seconds": results["training"]["seconds"],
        "ffn_params_ratio": results["ffn_params_ratio"],
        "parameters": results["parameters"]["compressed"],
        "disk_bytes": results["disk_bytes"]["compressed"],
        "prefill_speedup": [results["prefill_speedup"], *results["speed"]["prefill_speedup_range"]],
        "decode_speedup": [results["decode_speedup"], *results["speed"]["decode_speedup_range"]],
        "reload_bit_equal": results["reload_bit_equal"],
    }


def run_cell(name: str, fields: Mapping[str, Any], args: argparse.Namespace) -> tuple[Recipe, dict[str, Any]]:
    """Compress, with the dense model's answers taken over from the first cell that had them."""
    made = recipe(name, fields, args)
    open_output(made)
    _take_over(args.output / "dense", made.output)
    results = compress(made, lambda line: print(line, flush=True))
    _hand_over(made.output, args.output / "dense")
    return made, results


_DENSE = ("answers/dense.jsonl", "work/quality-dense.json")  # in a cell's folder; the second comes after the first


def _take_over(kept: Path, folder: Path) -> None:
    """Copy the dense model's answers to a cell's folder, unless they are there."""
    if kept.exists() and not all((folder / part).exists() for part in _DENSE):
        for part in _DENSE:
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            partial = (folder / part).with_suffix(".partial")
            shutil.copyfile(kept / Path(part).name, partial)
            partial.replace(folder / part)


def _hand_over(folder: Path, kept: Path) -> None:
    """Keep the dense model's answers for the other cells, both files at once; another process may have been faster."""
    if kept.exists():
        return
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".dense-") as beside:
        copied = Path(beside) / "dense"
        copied.mkdir()
        for part in _DENSE:
            shutil.copyfile(folder / part, copied / Path(part).name)
        try:
            os.rename(copied, kept)
        except OSError:
            if not kept.exists():
                raise


def arguments(description: str, results: Path, output: Path) -> argparse.ArgumentParser:
    """The options that every benchmark on the reference model has."""
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=Path("runs/reference/model"), help="the dense model; made by make reference")
    add("--data", type=Path, default=Path("runs/reference/data"), help="folder with train.jsonl and test.jsonl")
    add("--output", type=Path, default=output, help="folder of the cells' own folders")
    add("--results", type=Path, default=results, help="file that every finished cell is added to")
    add("--steps", type=int, default=60, help="optimizer steps of every cell")
    add("--batch-size", type=int, default=16, help="samples per step")
    add("--calibration", type=int, default=128, help="samples of the fit")
    add("--examples", type=int, default=450, help="test examples of the evaluation")
    add("--attention", default="eager", help="attention of all models: eager is faster on a CPU, sdpa on a GPU")
    add("--checkpoint-every", type=int, default=50, help="steps after which a cell can go on; a state is ~0.7 GB")
    add("--teacher", choices=("cached", "live"), default="cached", help="live: a GPU has time for it")
    add("--hidden-weight", type=float, default=0.0, help="of hidden states' error; needs --teacher live")
    add("--teacher-folder", type=Path, help="where a cached teacher's answers lie [default: OUTPUT/teacher]")
    return parser


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all cells of a results file have in common."""
    names = ("steps", "batch_size", "calibration", "examples", "attention")
    settings = {name: getattr(args, name) for name in names}
    unusual = {"teacher": "cached", "hidden_weight": 0.0}
    return settings | {name: getattr(args, name) for name, usual in unusual.items() if getattr(args, name) != usual}


def run(
    wanted: Iterable[tuple[str, dict[str, Any], dict[str, Any]]],
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
) -> None:
    """Run every cell of `wanted` that the results file lacks: (name, what identifies it, recipe fields).

    Several processes may share the output folder, if each has cells, a results file and a folder for a cached teacher
    of its own; `side_by_side.py` starts them so.
    """
    settings = settings_of(args)

    def read() -> dict[str, Any]:
        kept = read_json(args.results) if args.results.exists() else {}
        if kept.setdefault("settings", settings) != settings:
            parser.error(f"{args.results} holds cells of other settings, {kept['settings']}: choose another --results")
        return {"cells": {}} | kept

    for name, identity, fields in wanted:
        if name in read()["cells"]:
            continue
        print(f"== {name}", flush=True)
        made, results = run_cell(name, fields, args)
        cell = summary(made.output, results, fields["train"].get("learning_rate"))
        cell |= {"agreement": agreement(made), "machine": machine()}
        kept = read()
        details = results["quality"]["details"]["dense"]
        kept["dense"] = {
            "scores": {t: {"headline": own["headline"], **own["scores"]} for t, own in details["tasks"].items()},
            "parameters": results["parameters"]["dense"],
            "disk_bytes": results["disk_bytes"]["dense"],
        }
        kept["cells"][name] = identity | cell
        write_json(args.results, kept)
        print(json.dumps(cell["agreement"] | {"retention": cell["retention"]}), flush=True)


def main() -> None:
    """Run every cell that the results file lacks."""
    parser = arguments(__doc__ or "", RESULTS, Path("runs/comparison"))
    add = parser.add_argument
    add("--fractions", type=float, nargs="+", default=FRACTIONS, help="shares of the FFN parameters that stay")
    add("--methods", nargs="+", help=f"only these: {', '.join([*methods(0.5), 'paper'])}")
    add("--learning-rates", type=float, nargs="+", default=[5e-5], help="candidates, the same for every method")
    args = parser.parse_args()
    run(cells(args), args, parser)


if __name__ == "__main__":
    main()
