"""From a checkpoint on disk to a compressed one, without the model in memory: fit FFN by FFN, write shard by shard.

    convert(Recipe.load("quarter").model_copy(update={"model": "folder", "output": Path("runs/mine")}))

The plan is made from the config alone, on the meta device. Then every FFN is read, fitted and kept in work/fit, and the
new checkpoint's files are written one after the other from those fits and from what is copied. So memory holds what one
FFN's fit takes, then one file. What is finished is not done again: the same call goes on where an earlier one ended.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hyperfade.distill import LayerFit, fit_file, fit_streamed
from hyperfade.errors import CheckpointError, OutputError, PlanError, ProcessError, RecipeError
from hyperfade.hub import (
    Stored,
    StoredTensor,
    card_head,
    cast,
    clear_write_errors,
    load_processor,
    mark_,
    resolve,
    skeleton,
    stored,
    takes_images,
    usual_modes_,
)
from hyperfade.measure import device, machine
from hyperfade.processes import join
from hyperfade.recipe import Recipe
from hyperfade.report import fit_progress, plan_lines
from hyperfade.surgery import Plan, install_, plan
from hyperfade.task import Say, Task, open_task
from hyperfade.workspace import Variant, open_output, read_json, variants, write_json

_UNCHANGED = "Choose another --output, or delete that folder if you are done with it."


def convert(recipe: Recipe, say: Say = print, *, shard_bytes: int = 10**9) -> dict[str, Any]:
    """Carry out the fit of `recipe`, no training; returns what fit.json holds. `say` gets one line at a time.

    shard_bytes: size of the files of weights, which a single larger tensor may exceed.
    Raises a `HyperfadeError` that names the cause; what was finished stays, and the same call goes on from there.
    """
    model, the_plan, source, task = _checked(recipe)
    variant, facts_file = variants(recipe)[0], recipe.output / "fit.json"
    continued = _claim(recipe, source, variant, shard_bytes)
    if variant.model.exists():
        shutil.rmtree(variant.work / "fit", ignore_errors=True)  # of a run that ended right here
        say(f"Finished earlier: {variant.model}")
        return read_json(facts_file)
    say(f"{'Continuing' if continued else 'Converting'} {recipe.model} → {variant.model}")
    say("It is fitted and not trained: the recipe's train, data.evaluation and rivals play no part.")
    for line in [*plan_lines(the_plan), *_left_out_lines(source)]:
        say(line)
    fits = _fits(recipe, the_plan, source, task, variant, say)
    with clear_write_errors(recipe.output):
        install_(model, {swap.name: swap.spec for swap in the_plan.swaps})
        mark_(model)
        _write_weights(_contents(model, the_plan, source, variant), recipe, variant, shard_bytes, say)
        facts = {
            "machine": machine(),
            "recipe": json.loads(recipe.model_dump_json()),
            "takes_images": takes_images(model.config),
            "layers": [asdict(layer) for layer in fits],
            "fit_seconds": sum(layer.seconds for layer in fits),
            "ffn_params_ratio": the_plan.ffn_params_ratio,
            "params_ratio": the_plan.params_ratio,
            "kept_dense": [list(pair) for pair in the_plan.kept],
        }
        _write_rest(model, recipe, variant, facts, say)
        write_json(facts_file, facts)
        usual_modes_(variant.work / "model")
        os.rename(variant.work / "model", variant.model)
        shutil.rmtree(variant.work / "fit")
    say(f"Model: {variant.model}")
    return facts


def _checked(recipe: Recipe) -> tuple[PreTrainedModel, Plan, Stored, Task | None]:
    """The model on the meta device, its plan, its stored tensors, and the data of a calibrated fit; what does not fit
    is refused before a folder exists."""
    if join().num_processes > 1:
        raise ProcessError("convert is the work of one process, and there are several.", "Start it without torchrun.")
    folder = Path(resolve(recipe.model))
    if not folder.is_dir():
        raise CheckpointError(
            f"{recipe.model} is no folder here.", f"Download the checkpoint first: hf download {recipe.model}"
        )
    for key, wanted in (("quantize", recipe.quantize), ("replace.budget", recipe.replace.budget)):
        if wanted is not None:
            raise RecipeError(
                f"{key} needs the whole model in memory, and convert never has it there.",
                f"Leave out {key}, or take it away from a recipe that ships: --set {key}=null.",
            )
    if recipe.fit.method == "random":
        raise RecipeError("fit.method random needs a training, which convert has none of.", "Take another fit.method.")
    model = skeleton(recipe.model, getattr(torch, recipe.dtype))
    if getattr(model.config, "quantization_config", None) is not None:
        raise PlanError(
            f"{recipe.model} is compressed or quantized already.", "Give the dense checkpoint it came from."
        )
    the_plan, source = plan(model, recipe), stored(folder, model)
    for swap in the_plan.swaps:
        if swap.spec.experts:
            raise PlanError(
                f"{swap.name} holds the matrices of {swap.spec.experts} experts, and convert takes one by one.",
                'Keep experts dense, --set replace.exclude=["*.experts.*"], or take compress.',
            )
        for part, _ in model.get_submodule(swap.name).named_parameters():
            tensor = source.by_name.get(f"{swap.name}.{part}")
            if tensor is None or not tensor.key.endswith(part):
                raise CheckpointError(
                    f"{swap.name}.{part} is no tensor of its own in {folder}: transformers makes it of others.",
                    "Load the model and save it again, or keep the matrix dense: replace.exclude.",
                )
    return model, the_plan, source, open_task(recipe, model) if recipe.fit.method == "calibrated" else None


def _claim(recipe: Recipe, source: Stored, variant: Variant, shard_bytes: int) -> bool:
    """Make the output folder or recognise it as this conversion's; True where there is earlier work to continue.

    Raises `OutputError` where it belongs to another recipe, or the source is no longer what it was.
    """
    folder = Path(resolve(recipe.model))
    files = {tensor.file for tensor in source.tensors.values()} | set(folder.glob("*.json"))
    now: dict[str, Any] = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}
    now["shard_bytes"] = shard_bytes
    continued, known = open_output(recipe), variant.work / "source.json"
    if not known.exists():
        write_json(known, now)
    before = read_json(known)
    if before != now:
        then = before if isinstance(before, dict) else {}
        changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        raise OutputError(f"{', '.join(changed)} of {folder} changed since {recipe.output} was begun.", _UNCHANGED)
    return continued


def _left_out_lines(source: Stored) -> list[str]:
    if not source.left_out:
        return []
    return [f"{len(source.left_out)} tensors that the model has no place for are left out, e.g. {source.left_out[0]}"]


def _fits(recipe: Recipe, plan: Plan, source: Stored, task: Task | None, variant: Variant, say: Say) -> list[LayerFit]:
    """Fit every FFN, on what the calibration batches of `task` give it where there is one."""
    dtype = getattr(torch, recipe.dtype)
    model, batches, fit = skeleton(recipe.model, dtype, device()), [], variant.fit
    exact = model._keep_in_fp32_modules_strict or ()

    def read(name: str) -> Tensor:
        if name not in source.by_name:
            raise CheckpointError(
                f"{name} is no tensor of its own in {resolve(recipe.model)}: transformers makes it of others.",
                "Take fit.method: frobenius, which needs FFN weights only.",
            )
        wanted = torch.float32 if any(part in name for part in exact) else dtype
        return cast(source.by_name[name].read(), wanted).to(device())

    if task is not None:
        if recipe.attention:
            model.set_attn_implementation(recipe.attention)
        model.config.get_text_config().use_cache = False  # keys and values of all batches would wait in memory
        for name, buffer in model.named_buffers():
            if name in source.by_name:
                buffer.data = read(name).to(buffer.dtype)
        if fit.prefix == "corrected":
            own = ", and no FFN trains by itself (fit.block_epochs)" if fit.block_epochs else ""
            say(f"fit.prefix corrected needs the dense model in memory: compressed takes its place{own}")
            fit = fit.model_copy(update={"prefix": "compressed", "block_epochs": 0})
        batches = task.calibration_batches(fit)
        say(f"calibrating on {sum(len(batch['input_ids']) for batch in batches)} examples, FFN by FFN")
    with clear_write_errors(recipe.output):
        return fit_streamed(model, plan, batches, fit, variant.work / "fit", read, fit_progress(plan, say))


def _contents(model: PreTrainedModel, plan: Plan, source: Stored, variant: Variant) -> dict[str, StoredTensor | None]:
    """Where every tensor of the new checkpoint comes from, by its key; None for the empty one that stands under the
    name of a matrix that is gone. `model` has the replacement layers in place, on the meta device."""
    contents: dict[str, StoredTensor | None] = dict(source.tensors)
    for swap in plan.swaps:
        names = [f"{swap.name}.{part}" for part in ("weight", "bias") if f"{swap.name}.{part}" in source.by_name]
        for name in names:
            del contents[source.by_name[name].key]
        key, file = source.by_name[names[0]].key, fit_file(variant.work / "fit", swap.ffn)
        contents[key] = None
        for part, like in model.get_submodule(swap.name).state_dict().items():
            contents[key.removesuffix("weight") + part] = StoredTensor(file, f"{swap.name}/{part}", like)
    return contents


def _write_weights(
    contents: dict[str, StoredTensor | None], recipe: Recipe, variant: Variant, shard_bytes: int, say: Say
) -> None:
    """Write the files that are not there yet, and the index if there are several."""
    runs, storage = getattr(torch, recipe.dtype), getattr(torch, recipe.save_dtype or recipe.dtype)

    def tensor_of(key: str, get: Callable[[StoredTensor], Tensor]) -> Tensor:
        held = contents[key]
        return torch.empty(0, dtype=storage) if held is None else cast(cast(get(held), runs), storage).contiguous()

    shapes = {key: tensor_of(key, lambda held: held.like).to("meta") for key in sorted(contents)}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    folder, partial = variant.work / "model", variant.work / "shard.partial"
    folder.mkdir(exist_ok=True)
    for number, (name, keys) in enumerate(split.filename_to_tensors.items(), start=1):
        if not (folder / name).exists():
            # no name for them: they would still be there while the next file's are read
            save_file({key: tensor_of(key, StoredTensor.read) for key in keys}, partial, metadata={"format": "pt"})
            os.replace(partial, folder / name)
        say(f"weights: file {number} of {len(split.filename_to_tensors)} is written")
    if split.is_sharded:
        parameters = sum(tensor.numel() for tensor in shapes.values())
        index = {"metadata": {"total_parameters": parameters, **split.metadata}, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _write_rest(model: PreTrainedModel, recipe: Recipe, variant: Variant, facts: dict[str, Any], say: Say) -> None:
    """Write what stands beside the weights, then ask whether they are what the model would load."""
    source, folder = Path(resolve(recipe.model)), variant.work / "model"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        known = (source / "generation_config.json").is_file()
        (GenerationConfig.from_pretrained(source) if known else model.generation_config).save_pretrained(folder)
    if any("token" in file.name or "processor" in file.name for file in source.iterdir()):
        load_processor(recipe.model).save_pretrained(folder)
    else:
        say(f"{source} has neither tokenizer nor processor; nor has the new checkpoint.")
    text = (
        f"{card_head(facts, 'converted')}\nThe weights were fitted ({recipe.fit.method}), not trained, not measured.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    stored(folder, model)
