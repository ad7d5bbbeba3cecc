"""What results.json holds: the quality of every finished model, then the speed of all of them in one run."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hyperfade.hub import metric_label, resolve, score_text, takes_images
from hyperfade.measure import (
    Quality,
    Speed,
    compare_speed,
    disk_bytes,
    evaluate,
    forward_flops,
    machine,
    num_parameters,
    write_answers,
)
from hyperfade.task import Say, Task
from hyperfade.workspace import read_json, variants, write_json


def measure(task: Task, built: dict[str, dict[str, Any]], say: Say) -> dict[str, Any]:
    """Everything results.json holds: quality model by model, then the speed of all of them in one run."""
    recipe = task.recipe
    folders = {variant.name: variant for variant in variants(recipe)}
    models = {"dense": task.dense()} | {name: task.finished(variant) for name, variant in folders.items()}
    qualities = {}
    for name, model in models.items():
        cached = recipe.output / "work" / f"quality-{name}.json"
        if not cached.exists():
            quality = _quality(model, task)
            write_answers(recipe.output / "answers" / f"{name}.jsonl", quality.answers)
            write_json(cached, quality.to_dict())
        qualities[name] = read_json(cached)
        for asked, own in qualities[name]["tasks"].items():
            metric, score = own["headline"], own["scores"][own["headline"]]
            say(f"[{name}] {asked}: {metric_label(metric)} {score_text(metric, score)} of {score['count']}")
    say("Measuring speed: all models in alternating rounds")
    prompt = task.prompt_batch([0])
    speeds = compare_speed(models, prompt)
    dense_folder = Path(resolve(recipe.model))
    if dense_folder.is_dir():
        dense_bytes = disk_bytes(dense_folder)
    else:  # a hub name: what its weights take in the dtype the compressed ones are stored in
        dense_bytes = num_parameters(models["dense"]) * getattr(torch, recipe.save_dtype or recipe.dtype).itemsize
    results = {
        name: _entry(built[name], qualities["dense"], qualities[name], dense_bytes, disk_bytes(v.model), speeds[name])
        for name, v in folders.items()
    }
    own = results.pop("compressed")
    skipped = [*qualities["compressed"]["skipped"]]
    skipped += [[s.where, s.reason] for s in (*task.source.skipped, *task.collator.skipped)]
    return {
        "machine": machine(),
        "recipe": recipe.model_dump(mode="json"),
        "parameters": {name: num_parameters(model) for name, model in models.items()},
        "takes_images": takes_images(models["dense"].config),
        "prompt_tokens": int(prompt["input_ids"].shape[1]),
        "prefill_flops": {name: forward_flops(model, prompt) for name, model in models.items()},
        "dense_speed": asdict(speeds["dense"]),
        **own,
        "skipped": [list(pair) for pair in dict.fromkeys(map(tuple, skipped))],  # every epoch meets a bad sample again
        "rivals": results,
    }


def _quality(model: Any, task: Task) -> Quality:
    data = task.recipe.data
    return evaluate(
        model,
        task.processor,
        data.evaluation,
        limit=data.evaluation_limit,
        max_tokens=data.max_tokens,
        max_new_tokens=data.max_new_tokens,
        on_bad_sample=data.on_bad_sample,
        seed=task.recipe.seed,
        keep_answers=True,
    )


def _entry(
    built: dict[str, Any], dense: dict[str, Any], own: dict[str, Any], dense_bytes: int, own_bytes: int, speed: Speed
) -> dict[str, Any]:
    """One variant's part of results.json."""
    return {
        "quality": _retention(dense, own) | {"details": {"dense": dense, "compressed": own}},
        "ffn_params_ratio": built["ffn_params_ratio"],
        "params_ratio": built["params_ratio"],
        "disk_bytes": {"dense": dense_bytes, "compressed": own_bytes},
        "prefill_speedup": speed.prefill_speedup,
        "decode_speedup": speed.decode_speedup,
        "speed": asdict(speed),
        "reload_bit_equal": built["reload_bit_equal"],
        "fit_seconds": built["fit_seconds"],
        "training": built["training"],
        "layers": built["layers"],
        "kept_dense": built["kept_dense"],
        "quantized": built.get("quantized"),  # older folders lack it
        "allocation": built["allocation"],
    }


def _retention(dense: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What is kept of every task's headline, and the headlines of the task of which least is kept.

    Where the dense model scores 0 there is nothing to keep: None, which counts as more than anything.
    """
    before, after = (
        {task: scored["scores"][scored["headline"]]["value"] for task, scored in quality["tasks"].items()}
        for quality in (dense, own)
    )
    kept = {task: after[task] / value if value else None for task, value in before.items() if task in after}
    least, _ = min(kept.items(), key=lambda item: math.inf if item[1] is None else item[1])
    return {
        "task": least,
        "dense": before[least],
        "compressed": after[least],
        "retention": kept[least],
        "retention_by_task": kept,
    }
