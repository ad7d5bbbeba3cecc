"""Smaller layers and fewer bits together: what each costs in quality, and what it saves in bytes and time.

    make reference
    python benchmarks/stacking.py --text wikitext-2            # quality and bytes, cell by cell
    python benchmarks/stacking.py --text wikitext-2 --speed    # minutes; wants a machine that does nothing else
    python benchmarks/quantization_report.py

A cell is a model, dense or with all its FFNs replaced, in bfloat16 or with its FFNs rounded (int4 to nearest, and
calibrated). The model that ships is
trained as in the demo and answers questions; SmolLM2-135M is compressed as in `perplexity.py`, and scored by
its perplexity. Rounding is what `hyperfade quantize` does. Checkpoints stay in the output folder, and a cell that is in
the results file is not run again. Speeds are measured in one go, in rounds that take every method of a format in turn.
"""

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import RESULTS as COMPARISON
from comparison import both
from perplexity import compressed, perplexity, sequences
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hyperfade.compose.quantize import quantize_
from hyperfade.data import Collator, open_source
from hyperfade.distill import second_moments
from hyperfade.hub import EMBEDDED, fold_, load, load_processor, mark_, save
from hyperfade.measure import compare_speed, disk_bytes, evaluate, machine, weight_bytes
from hyperfade.nn import light_modules, low_bit_modules
from hyperfade.pipeline import compress
from hyperfade.recipe import Recipe
from hyperfade.surgery import blends, find_ffns
from hyperfade.workspace import read_json, write_json

RESULTS = COMPARISON.with_name("stacking.json")
MODELS = ("embedded", "language")
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "products n=4": {"kind": "products", "n": 4},
    "products n=2": {"kind": "products", "n": 2},
    "terms n=4": {"kind": "learned", "n": 4, "terms": 4},
    "recipe quarter": Recipe.load("quarter").model_dump(mode="json", exclude_defaults=True)["replace"]["language"],
    "low-rank 1/4": {"kind": "low_rank", "fraction": 0.25},
}
FORMATS = ("bf16", "int8", "int4")
CALIBRATED = "int4, calibrated"  # runs as int4 does: timed once
SAMPLES = 128  # questions, or sequences, of its calibration


def place(args: argparse.Namespace, model: str, method: str, to: str) -> Path:
    """The checkpoint of a cell."""
    return args.output / model / method.replace(" ", "-").replace("/", "-") / to


def make_embedded(method: str, folder: Path) -> None:
    """The model that ships, compressed as `make demo` does it."""
    layer = METHODS[method]
    if layer is None:
        save(load(EMBEDDED, "bfloat16"), folder, load_processor(EMBEDDED))
        return
    recipe = Recipe.load("demo").model_dump(mode="json", exclude_defaults=True)
    recipe |= both(layer) | {"output": str(folder.parent / "run"), "rivals": {}, "save_dtype": "bfloat16"}
    recipe["data"] |= {"evaluation_limit": 64}
    compress(Recipe.parse(recipe, where=method), lambda line: print(line, flush=True))
    (folder.parent / "run" / "model").rename(folder)


def make_language(args: argparse.Namespace, method: str, folder: Path, moments: dict[str, Tensor]) -> None:
    """SmolLM2-135M without the vision tower that `make reference` gives it, compressed as in `perplexity.py`."""
    layer = METHODS[method]
    if layer is None:
        whole: Any = load(args.model, "bfloat16")
        alone: Any = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=torch.bfloat16)
        alone.load_state_dict(
            {f"model.{name}": tensor for name, tensor in whole.model.language_model.state_dict().items()}
            | {"lm_head.weight": whole.lm_head.weight}
        )
        save(alone, folder, load_processor(args.model).tokenizer)
        return
    dense = str(checkpoint(args, "language", "dense", "bf16", moments))
    settings = argparse.Namespace(**vars(args) | {"model": dense})
    model, _ = compressed(both(layer), sequences(dense, args.text, args.test), settings, moments)
    if blends(model):
        fold_(model)
    mark_(model)
    save(model, folder, load_processor(dense))


def quality(args: argparse.Namespace, name: str, model: Any, folder: Path) -> dict[str, float]:
    """Exact match with its interval, or perplexity."""
    if name == "language":
        return {"perplexity": perplexity(model, sequences(str(folder), args.text, args.test)["test"])}
    processor = load_processor(str(folder))
    found = evaluate(model, processor, "easy-vqa:test", limit=args.examples, max_new_tokens=4).overall
    return {"exact_match": found.value, "low": found.low, "high": found.high}


def ffn_matrices(model: Any) -> list[nn.Module]:
    """What stands for the matrices of all FFNs, or these themselves where nothing replaces them; projectors aside."""
    dense = {n for ffn in find_ffns(model, with_light=True) if ffn.region != "projector" for n in ffn.linears}
    return [model.get_submodule(name) for name in dense | light_modules(model).keys() | low_bit_modules(model).keys()]


def ffn_bytes(model: Any) -> int:
    """What the matrices of all FFNs take in memory."""
    return weight_bytes(nn.ModuleList(ffn_matrices(model)))


def checkpoint(args: argparse.Namespace, name: str, method: str, to: str, moments: dict[str, Tensor]) -> Path:
    """The folder of a cell's checkpoint, made where it is missing: in whole, or from that in bfloat16."""
    folder, whole = place(args, name, method, to), place(args, name, method, "bf16")
    if not whole.exists():
        whole.parent.mkdir(parents=True, exist_ok=True)
        if name == "embedded":
            make_embedded(method, whole)
        else:
            make_language(args, method, whole, moments)
    if not folder.exists():
        model: Any = load(str(whole), "bfloat16")
        batches = calibration(args, name, whole) if to == CALIBRATED else None
        rounded = quantize_(
            *(model, "int8" if to == "int8" else "int4", None if to == "int8" else args.group),
            moments_of=None if batches is None else partial(second_moments, model, batches=batches, ridge=0),
        )
        print("\n".join(rounded.lines()), flush=True)
        mark_(model)
        save(model, folder, load_processor(str(whole)))
    return folder


def calibration(args: argparse.Namespace, name: str, whole: Path) -> list[dict[str, Tensor]]:
    """What the rounding may look at: training questions, or validation text."""
    if name == "language":
        text = sequences(str(whole), args.text, args.test)["valid"][:SAMPLES]
        return [{"input_ids": part} for part in text.split(16)]
    source, collator = open_source("easy-vqa:train"), Collator(load_processor(str(whole)), max_tokens=2048)
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:SAMPLES].split(16)
    batches = [collator.training_batch([source[i] for i in part.tolist()]) for part in chosen]
    return [{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]


def cell(args: argparse.Namespace, name: str, method: str, to: str, moments: dict[str, Tensor]) -> dict[str, Any]:
    """What is read back from a checkpoint: its quality and its bytes."""
    folder = checkpoint(args, name, method, to, moments)
    model: Any = load(str(folder), "bfloat16")
    sizes = {"disk_bytes": disk_bytes(folder), "memory_bytes": weight_bytes(model), "ffn_bytes": ffn_bytes(model)}
    return quality(args, name, model, folder) | sizes


def prompt(name: str, folder: Path, text: Path) -> dict[str, Tensor]:
    """A question about an image, or 256 tokens of text."""
    if name == "language":
        ids = sequences(str(folder), text, 1)["test"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = Collator(load_processor(str(folder)), max_tokens=2048).prompt_batch([open_source("easy-vqa:test")[0]])
    return {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}


def speeds(args: argparse.Namespace, name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By format and method; speed-ups are against the dense model of that format. Dense in bfloat16 is in all."""
    moments: dict[str, Tensor] = {}
    folders = {(to, method): checkpoint(args, name, method, to, moments) for to in FORMATS for method in METHODS}
    asked = prompt(name, folders["bf16", "dense"], args.text)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for to in FORMATS:
        names = {method: folders[to, method] for method in METHODS} | {"dense bf16": folders["bf16", "dense"]}
        models = {method: load(str(folder), "bfloat16") for method, folder in names.items()}
        own = compare_speed(models, asked, new_tokens=args.new_tokens, rounds=args.rounds)
        found[to] = {method: asdict(speed) for method, speed in own.items()}
        print(name, to, {m: f"{s.prefill_speedup:.2f} {s.decode_speedup:.2f}" for m, s in own.items()}, flush=True)
    return found


def settings_of(args: argparse.Namespace) -> Mapping[str, Any]:
    """What decides the numbers of a cell."""
    names = ("steps", "batch_size", "learning_rate", "calibration", "test", "examples", "group")
    return {name: getattr(args, name) for name in names}


def arguments(description: str | None, results: Path) -> argparse.ArgumentParser:
    """What decides how the checkpoints are made and scored."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="runs/reference/untrained", help="a LLaVA of SmolLM2-135M; made by make reference")
    add("--text", type=Path, required=True, help="folder with WikiText-2's valid.txt and test.txt")
    add("--output", type=Path, default=Path("runs/stacking"), help="folder of the checkpoints")
    add("--results", type=Path, default=results, help="file that every finished cell is added to")
    add("--only", choices=MODELS, help="one of the two models")
    add("--steps", type=int, default=50, help="optimizer steps of the language model")
    add("--batch-size", type=int, default=4, help="its sequences per step")
    add("--learning-rate", type=float, default=5e-4, help="its peak learning rate")
    add("--calibration", type=int, default=256, help="its sequences of the fit")
    add("--test", type=int, default=96, help="its sequences that are scored")
    add("--attention", default="eager", help="its attention in training")
    add("--examples", type=int, default=2000, help="questions for the model that ships")
    add("--group", type=int, default=64, help="numbers that share a scale in int4")
    return parser


def main() -> None:
    """Measure what the results file lacks; or, with --speed, all speeds."""
    parser = arguments(__doc__, RESULTS)
    add = parser.add_argument
    add("--speed", action="store_true", help="time the checkpoints; those that are missing are made first")
    add("--new-tokens", type=int, default=32, help="tokens decoded in a round")
    add("--rounds", type=int, default=15, help="rounds of timing")
    args = parser.parse_args()
    kept = read_json(args.results) if args.results.exists() else {}
    if kept.setdefault("settings", settings_of(args)) != settings_of(args):
        parser.error(f"{args.results} holds cells of other settings, {kept['settings']}: choose another --results")
    cells = kept.setdefault("cells", {})
    models = [args.only] if args.only else MODELS
    if args.speed:
        kept["speed"] = kept.get("speed", {}) | {"machine": machine()} | {name: speeds(args, name) for name in models}
        write_json(args.results, kept)
        return
    kept["machine"] = machine()
    moments: dict[str, Tensor] = {}
    wanted = list(itertools.product(models, METHODS, (*FORMATS, CALIBRATED)))
    for number, (name, method, to) in enumerate(wanted, 1):
        key = f"{name}|{method}|{to}"
        if key not in cells:
            cells[key] = cell(args, name, method, to, moments)
            write_json(args.results, kept)
        print(f"{number}/{len(wanted)} {key}: {cells[key]}", flush=True)


if __name__ == "__main__":
    main()
