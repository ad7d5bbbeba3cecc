"""One variant's checkpoint: plan, fit, fade, polish, fold, save, reload. What lies in its folder is not made again."""

import json
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperfade.compose.lora import add_lora_, merge_lora_
from hyperfade.compose.quantize import MomentsOf, quantize_
from hyperfade.data import fingerprint
from hyperfade.distill import (
    Allocation,
    Batches,
    CachedTeacher,
    StepReport,
    allocate,
    autocast_dtype,
    cache_teacher,
    check_hidden_states,
    digest,
    distill_,
    fit_,
    latest_step,
    read_faults,
    second_moments,
    teacher_of,
    total_steps,
    unshare_,
)
from hyperfade.errors import NothingMatchedError
from hyperfade.hub import mark_, round_, save
from hyperfade.measure import num_parameters
from hyperfade.processes import is_first, wait
from hyperfade.recipe import Train
from hyperfade.report import (
    allocation_lines,
    batch_progress,
    fault_text,
    fit_progress,
    plan_lines,
    read_metrics,
    time_left,
)
from hyperfade.surgery import blends, join_readers_, plan, swap_
from hyperfade.task import Say, Task
from hyperfade.workspace import Variant, read_json, write_json


def build(variant: Variant, task: Task, say: Say) -> dict[str, Any]:
    """Make one variant's checkpoint; returns facts about how it was made (in the first process)."""
    facts_file = variant.work / "built.json"
    if facts_file.exists() and variant.model.exists():
        say(f"[{variant.name}] finished earlier: {variant.model}")
        return read_json(facts_file)
    if is_first():
        variant.work.mkdir(parents=True, exist_ok=True)
    recipe, train = task.recipe, variant.train
    torch.manual_seed(recipe.seed)
    student = task.dense()
    if train.hidden_weight:  # before a long fit, not after it
        check_hidden_states(student, task.training_batch([0]), autocast_dtype(student, train))
    batches = _calibration(variant, task)
    allocation = _allocation(variant, student, batches, task, say)
    the_plan = plan(student, allocation.replace if allocation else variant.replace)
    for line in plan_lines(the_plan):
        say(f"[{variant.name}] {line}")
    dense_parameters = num_parameters(student)
    teacher = _teacher(variant, student, task, say)
    student.requires_grad_(False)
    swap_(student, the_plan)
    layers = fit_(
        student,
        the_plan,
        batches,
        variant.fit,
        variant.work / "fit",
        fit_progress(the_plan, lambda line: say(f"[{variant.name}] {line}")),
    )
    if variant.fit.prefix == "corrected":
        writers = sum(layer.correction is not None for layer in layers)
        say(f"[{variant.name}] {writers} of {len(the_plan.ffns)} FFNs were aimed at the dense model's residual stream")
    if variant.fit.block_epochs:
        tried = [layer.held_out for layer in layers if layer.held_out is not None]
        gained = sum(held_out < 1 for held_out in tried)
        could_not = len(the_plan.ffns) - len(tried)
        say(
            f"[{variant.name}] FFNs trained by themselves: {gained} gained, {len(tried) - gained} undone, "
            f"{could_not} cannot"
        )
    del batches  # nothing else needs their memory
    choose_trained_(student, train)
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
    moments_of: MomentsOf | None = None
    if wanted.to == "int4" and wanted.calibrated:
        say(f"[{variant.name}] rounding by what layers read on {variant.fit.samples} training samples")
        batches = task.calibration_batches(variant.fit, alone=True)  # others are done by now
        moments_of = partial(second_moments, student.eval(), batches=batches, ridge=0, alone=True, reached_only=True)
    # scales are stored like the weights they scale
    report = quantize_(
        *(student, wanted.to, wanted.group_size, wanted.rest), scale_dtype=storage, moments_of=moments_of
    )
    mark_(student)
    for line in report.lines():
        say(f"[{variant.name}] {line}")
    return {
        "to": report.to,
        "group_size": report.group_size,
        "calibrated": report.calibrated,
        "matrices": len(report.low_bits),
        "smaller_groups": {str(size): names for size, names in report.smaller.items()},
        "never_reached": report.never_reached,
        "left": [list(pair) for pair in report.left],
        "bytes": {"before": report.bytes_before, "after": report.bytes_after},
    }


def _allocation(
    variant: Variant, student: Any, batches: list[dict[str, Tensor]], task: Task, say: Say
) -> Allocation | None:
    """What replace.budget comes to, measured on the dense model or found in the work folder; None without a budget."""
    if variant.replace.budget is None:
        return None
    file = variant.work / "allocation.json"
    if not file.exists():
        fit = variant.fit
        if fit.budget_samples is not None:
            fit = fit.model_copy(update={"samples": fit.budget_samples})
            batches = task.calibration_batches(fit)
        say(f"[{variant.name}] measuring what errors of every FFN cost, on {fit.samples} training samples")
        progress = batch_progress(f"[{variant.name}] measuring", say)
        measured = allocate(student, variant.replace, batches, fit.ridge, progress)
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


def choose_trained_(student: Any, train: Train) -> None:
    """Decide what has gradients: the light layers do, `train_also` and LoRA are added."""
    if train.lora_rank:
        add_lora_(student, train.lora_rank, train.lora_alpha)
    for parameter in matched_parameters(student, train):
        unshare_(parameter)
        parameter.requires_grad_(True)
    if train.gradient_checkpointing:
        student.gradient_checkpointing_enable()
        student.enable_input_require_grads()


def matched_parameters(model: Any, train: Train) -> list[nn.Parameter]:
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


def _training_line(name: str, train: Train, say: Say) -> Callable[[StepReport], None]:
    steps, recent = total_steps(train), []

    def line(report: StepReport) -> None:
        recent.append(report.seconds)
        del recent[:-20]
        if report.step % train.log_every == 0 or report.step == steps:
            left = time_left((steps - report.step) * sum(recent) / len(recent))
            hidden = f", hidden states {report.hidden:.4f}" if train.hidden_weight else ""
            say(
                f"[{name}] step {report.step}/{steps}  α {report.alpha:.2f}  loss {report.loss:.4f}  (ce "
                f"{report.cross_entropy:.4f}, kl {report.kl:.4f}, reconstruction {report.reconstruction:.4f}{hidden})  "
                f"{report.seconds:.2f} s/step  {left}"
            )

    return line
