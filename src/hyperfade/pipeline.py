"""From a recipe to a finished model: plan, fit, fade, polish, fold, save, reload, measure, report.

    results = compress(Recipe.load("demo"))

Every stage leaves its result in the output folder and is skipped where it is there already, so the same call continues
an interrupted run. Rivals of the recipe go through the same stages with the same data and budget.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperfade.compose.lora import add_lora_, merge_lora_
from hyperfade.compose.quantize import check_format, quantize_
from hyperfade.data import Collator, Source, fingerprint, named_when_slow, open_source
from hyperfade.distill import (
    Allocation,
    Batches,
    CachedTeacher,
    LayerFit,
    StepReport,
    allocate,
    answers_only,
    autocast_dtype,
    cache_teacher,
    digest,
    distill_,
    fit_,
    latest_step,
    read_faults,
    teacher_of,
    total_steps,
    unshare_,
)
from hyperfade.errors import DataError, FitError, NothingMatchedError, PlanError
from hyperfade.hub import (
    card,
    load,
    load_processor,
    mark_,
    metric_label,
    resolve,
    round_,
    save,
    score_text,
    skeleton,
    takes_images,
    tasks_of,
    verify_checkpoint,
)
from hyperfade.measure import (
    Quality,
    Speed,
    check_tasks,
    compare_speed,
    device,
    disk_bytes,
    evaluate,
    forward_flops,
    machine,
    num_parameters,
    write_answers,
)
from hyperfade.processes import is_first, join, share_of, wait
from hyperfade.recipe import Fit, Recipe, Train
from hyperfade.report import allocation_lines, fault_text, plan_lines, read_metrics, write_report
from hyperfade.surgery import blends, join_readers_, plan, swap_
from hyperfade.workspace import Variant, open_output, read_json, variants, write_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What all variants share: processor, data, and how examples become batches."""

    recipe: Recipe
    processor: Any
    source: Source
    collator: Collator
    keeps_logits: bool
    """Whether the model can leave out logits that nobody asks for."""

    def dense(self) -> Any:
        """The model to compress, fresh from its checkpoint."""
        return self._placed(load(self.recipe.model, self.recipe.dtype))

    def finished(self, variant: Variant) -> Any:
        """A variant's saved model, loaded as a user would."""
        return self._placed(load(str(variant.model)))

    def _placed(self, model: Any) -> Any:
        if self.recipe.attention:
            model.set_attn_implementation(self.recipe.attention)
        return model.to(device())

    def training_batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The training batch of the examples with these numbers, on the device."""
        batch = self._usable(self.collator.training_batch, numbers)
        if self.keeps_logits:
            batch = answers_only(batch)
        return {key: value.to(device()) for key, value in batch.items()}

    def prompt_batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The prompts of the examples with these numbers, on the device, in the recipe's dtype."""
        batch = self._usable(self.collator.prompt_batch, numbers)
        dtype = getattr(torch, self.recipe.dtype)
        return {k: v.to(device(), dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}

    def _usable(self, collate: Callable[..., dict[str, Tensor]], numbers: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these examples; where all of them are bad and may be skipped, of the next ones."""
        for shift in range(len(self.source)):
            try:
                with named_when_slow():
                    return collate([self.source[(i + shift) % len(self.source)] for i in numbers])
            except DataError:
                if self.recipe.data.on_bad_sample == "error":
                    raise
        raise DataError(f"No sample of {self.source.name} can be used.", "Mend the data; the report lists the reasons.")

    def length_of(self, train: Train) -> Callable[[int], int] | None:
        """How long an example is, in characters, where batches shall be of like length."""

        def characters(number: int) -> int:
            return sum(len(str(message["content"])) for message in self.source[number].messages)

        return characters if train.group_by_length else None

    def calibration_batches(self, fit: Fit) -> list[dict[str, Tensor]]:
        """Batches of a seeded sample of training examples; of several processes, this one's share of them."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        chosen = torch.randperm(len(self.source), generator=generator)[: fit.samples].tolist()
        batches = [chosen[i : i + fit.batch_size] for i in range(0, len(chosen), fit.batch_size)]
        if len(batches) < join().num_processes:
            raise FitError(
                f"fit.samples {fit.samples} in batches of {fit.batch_size} are {len(batches)} calibration batches for "
                f"{join().num_processes} processes.",
                "Lower fit.batch_size, or raise fit.samples.",
            )
        return [self.training_batch(batch) for batch in share_of(batches)]


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
    built = {variant.name: _build(variant, task, say) for variant in variants(recipe)}
    if not is_first():
        return {}
    results = _measure(task, built, say)
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
        _matched_parameters(model, variant.train)
    processor, data = load_processor(recipe.model), recipe.data
    source = open_source(data.train, needs_images=takes_images(model.config), on_bad=data.on_bad_sample)
    # What is wrong with the evaluation is known now, not after training.
    evaluation = open_source(data.evaluation, on_bad=data.on_bad_sample)
    check_tasks(evaluation, limit=data.evaluation_limit, seed=recipe.seed)
    collator = Collator(processor, max_tokens=data.max_tokens, on_bad=data.on_bad_sample)
    return Task(recipe, processor, source, collator, "logits_to_keep" in signature(model.forward).parameters)


def _build(variant: Variant, task: Task, say: Say) -> dict[str, Any]:
    """Make one variant's checkpoint; returns facts about how it was made (in the first process)."""
    facts_file = variant.work / "built.json"
    if facts_file.exists() and variant.model.exists():
        say(f"[{variant.name}] finished earlier: {variant.model}")
        return read_json(facts_file)
    variant.work.mkdir(parents=True, exist_ok=True)
    recipe, train = task.recipe, variant.train
    torch.manual_seed(recipe.seed)
    student = task.dense()
    batches = _calibration(variant, task)
    allocation = _allocation(variant, student, batches, say)
    the_plan = plan(student, allocation.replace if allocation else variant.replace)
    for line in plan_lines(the_plan):
        say(f"[{variant.name}] {line}")
    dense_parameters = num_parameters(student)
    teacher = _teacher(variant, student, task, say)
    student.requires_grad_(False)
    swap_(student, the_plan)
    layers = fit_(student, the_plan, batches, variant.fit, variant.work / "fit", _fit_line(variant, say))
    del batches  # nothing else needs their memory
    _choose_trained_(student, train)
    lengths = f"{train.fade_steps} steps of fade, {train.polish_steps} of polish"
    say(f"[{variant.name}] training: {lengths}; metrics in {variant.work}")
    if latest_step(variant.work):
        say(f"[{variant.name}] continuing after step {latest_step(variant.work)}")
    distill_(
        student,
        teacher,
        len(task.source),
        task.training_batch,
        train,
        seed=recipe.seed,
        folder=variant.work,
        on_step=_training_line(variant.name, train, say),
        on_fault=lambda fault: say(f"[{variant.name}] {fault_text(asdict(fault))}"),
        length_of=task.length_of(train),
    )
    if not is_first():
        return {}
    if train.lora_rank:
        merge_lora_(student)
    join_readers_(student)  # as loading does: in bfloat16 the joint products round differently
    mark_(student)
    storage = getattr(torch, recipe.save_dtype or recipe.dtype)
    round_(student, storage)
    params_ratio = num_parameters(student) / dense_parameters
    quantized = _quantized_(student, variant, task, storage, say)
    save(student, variant.model, task.processor, storage_dtype=storage)
    bit_equal = _reload_bit_equal(student, task.finished(variant), task)
    if not bit_equal:
        say(f"[{variant.name}] WARNING: {variant.model} does not load bit-equal to the model that was saved")
    facts = {
        "layers": [asdict(layer) for layer in layers],
        "fit_seconds": sum(layer.seconds for layer in layers),
        "training": {
            "steps": total_steps(train),
            "seconds": sum(m["seconds"] for m in read_metrics(variant.work)),
            "faults": [asdict(fault) for fault in read_faults(variant.work / "metrics.jsonl")],
        },
        "reload_bit_equal": bit_equal,
        "ffn_params_ratio": allocation.params_ratio if allocation else the_plan.ffn_params_ratio,
        "params_ratio": params_ratio,
        "quantized": quantized,
        "kept_dense": [list(pair) for pair in the_plan.kept],
        "allocation": allocation and allocation.to_dict(),
    }
    write_json(facts_file, facts)
    return facts


def _quantized_(student: Any, variant: Variant, task: Task, storage: torch.dtype, say: Say) -> dict[str, Any] | None:
    """Round the finished student as the recipe says; what was done, or None."""
    wanted = task.recipe.quantize
    if wanted is None:
        return None
    # scales are stored like the weights they scale
    report = quantize_(student, wanted.to, wanted.group_size, wanted.rest, scale_dtype=storage)
    mark_(student)
    for line in report.lines():
        say(f"[{variant.name}] {line}")
    return {
        "to": report.to,
        "group_size": report.group_size,
        "matrices": len(report.low_bits),
        "smaller_groups": {str(size): names for size, names in report.smaller.items()},
        "left": [list(pair) for pair in report.left],
        "bytes": {"before": report.bytes_before, "after": report.bytes_after},
    }


def _allocation(variant: Variant, student: Any, batches: list[dict[str, Tensor]], say: Say) -> Allocation | None:
    """What replace.budget comes to, measured on the dense model or found in the work folder; None without a budget."""
    if variant.replace.budget is None:
        return None
    file = variant.work / "allocation.json"
    if not file.exists():
        say(f"[{variant.name}] measuring what errors of every FFN cost, on {variant.fit.samples} training samples")
        measured = allocate(student, variant.replace, batches, variant.fit.ridge)
        if is_first():
            write_json(file, measured.to_dict())
    wait()
    found = Allocation.from_dict(read_json(file))
    for line in allocation_lines(found.to_dict()):
        say(f"[{variant.name}] {line}")
    return found


def _teacher(variant: Variant, model: Any, task: Task, say: Say) -> nn.Module | CachedTeacher:
    """A twin of the dense `model`, or its answers on disk, of which missing ones are computed now."""
    train, num_examples = variant.train, len(task.source)
    if train.teacher == "live" or not train.kd_weight:
        return teacher_of(model)
    folder = train.teacher_folder or task.recipe.output / "teacher"
    say(f"[{variant.name}] the teacher's answers are kept in {folder}")
    unrelated = ("_name_or_path", "transformers_version")
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in unrelated}
    depends_on = {
        "model": digest(model.state_dict()),
        "config": json.dumps(config, sort_keys=True, default=str),
        "data": fingerprint(task.source),
        "batch": digest(task.training_batch(range(min(2, num_examples)))),  # the processor shows in it
        "attention": task.recipe.attention,
    }
    batches = Batches(num_examples, train.batch_size, task.recipe.seed, task.length_of(train))
    return cache_teacher(
        model,
        batches.drawn(total_steps(train) * train.accumulation),
        task.training_batch,
        folder,
        depends_on,
        top_k=train.teacher_top_k,
        temperature=train.temperature,
        batch_size=train.batch_size,
        autocast_dtype=autocast_dtype(model, train),
        on_part=lambda done, total: say(f"[{variant.name}] teacher: {done} of {total} examples answered"),
    )


def _calibration(variant: Variant, task: Task) -> list[dict[str, Tensor]]:
    return task.calibration_batches(variant.fit) if variant.fit.method == "calibrated" else []


def _choose_trained_(student: Any, train: Train) -> None:
    """Decide what has gradients: the light layers do, `train_also` and LoRA are added."""
    if train.lora_rank:
        add_lora_(student, train.lora_rank, train.lora_alpha)
    for parameter in _matched_parameters(student, train):
        unshare_(parameter)
        parameter.requires_grad_(True)
    if train.gradient_checkpointing:
        student.gradient_checkpointing_enable()
        student.enable_input_require_grads()


def _matched_parameters(model: Any, train: Train) -> list[nn.Parameter]:
    """The dense parameters that `train_also` names; a tied one goes by each of its names."""
    fading = {f"{name}.dense.{part}" for name in blends(model) for part in ("weight", "bias")}
    names = {n: p for n, p in model.named_parameters(remove_duplicate=False) if ".light." not in n and n not in fading}
    found: dict[int, nn.Parameter] = {}
    for pattern in train.train_also:
        matched = [parameter for name, parameter in names.items() if fnmatchcase(name, pattern)]
        if not matched:
            raise NothingMatchedError(
                f"train.train_also: {pattern!r} matches no parameter.", f"Parameters look like {next(iter(names))}."
            )
        found |= {id(parameter): parameter for parameter in matched}
    return list(found.values())


def _reload_bit_equal(model: Any, reloaded: Any, task: Task) -> bool:
    """Whether the saved model, loaded again, gives the very same logits and greedy answers."""
    batch = task.prompt_batch(range(min(8, len(task.source))))
    with torch.inference_mode():
        logits = torch.equal(model(**batch).logits, reloaded(**batch).logits)
        options = {"do_sample": False, "max_new_tokens": task.recipe.data.max_new_tokens}
        return logits and torch.equal(model.generate(**batch, **options), reloaded.generate(**batch, **options))


def _measure(task: Task, built: dict[str, dict[str, Any]], say: Say) -> dict[str, Any]:
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
        for asked, own in tasks_of(qualities[name]).items():
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
        {task: scored["scores"][scored["headline"]]["value"] for task, scored in tasks_of(quality).items()}
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


def _fit_line(variant: Variant, say: Say) -> Callable[[LayerFit], None]:
    def line(layer: LayerFit) -> None:
        if layer.error is not None and layer.low_rank_error is not None:
            say(
                f"[{variant.name}] fit {layer.name}: {layer.label}, error {layer.error:.4f} "
                f"(low-rank of the same size {layer.low_rank_error:.4f}), {layer.seconds:.1f} s"
            )

    return line


def _training_line(name: str, train: Train, say: Say) -> Callable[[StepReport], None]:
    steps, recent = total_steps(train), []

    def line(report: StepReport) -> None:
        recent.append(report.seconds)
        del recent[:-20]
        if report.step % train.log_every == 0 or report.step == steps:
            left = round((steps - report.step) * sum(recent) / len(recent))
            say(
                f"[{name}] step {report.step}/{steps}  α {report.alpha:.2f}  loss {report.loss:.4f}  "
                f"(ce {report.cross_entropy:.4f}, kl {report.kl:.4f}, reconstruction {report.reconstruction:.4f})  "
                f"{report.seconds:.2f} s/step  {left // 60}:{left % 60:02d} left"
            )

    return line
