"""From dense to hypercomplex before any training, layer by layer, with the compressed prefix in place.

Each FFN is fitted on the inputs it will really see: those that come out of the layers already replaced (as GPTQ and
SVD-LLM do). Only one layer's second moment is in memory at a time; to get it, calibration batches run through the model
up to that layer and no further. `prefix: dense` takes all second moments in one pass over the dense model instead: as
many times faster as the model has layers, with all of them in memory, and blind to the errors of earlier layers.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperfade.algebra import low_rank
from hyperfade.distill.activations import Batch, ExpertMoments, Moment, Run, input_hooks, run, second_moments
from hyperfade.distill.beside import beside
from hyperfade.distill.blockwise import not_held_out, runs_alone, train_block_
from hyperfade.distill.correction import Aim, corrected_writer
from hyperfade.distill.matrices import LayerFit, fit_experts, fit_matrix
from hyperfade.errors import CheckpointError, FitError
from hyperfade.nn import BlendLinear
from hyperfade.processes import is_first
from hyperfade.recipe import Fit as FitRecipe
from hyperfade.surgery import (
    FFN,
    Plan,
    Swap,
    blends,
    contribution_order,
    energy_order,
    matched_low_rank,
    permute_hidden_,
    pruned_error,
    refitted_writer,
    set_alpha_,
)

_ORDER, _WRITER = "hidden_order", "dense_writer"


@torch.no_grad()
def fit_(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    recipe: FitRecipe,
    folder: Path | None = None,
    on_layer: Callable[[LayerFit], None] = lambda layer: None,
    moments: dict[str, Moment] | None = None,
    send: Run = run,
    aim_of: Callable[[str], Aim | None] = lambda ffn: None,
) -> list[LayerFit]:
    """Fit the light branch of every `BlendLinear` that `plan` made in `model`; the model ends at α = 0 as it began,
    but where FFNs keep a part of their hidden units it ends with those alone.

    batches: calibration inputs, keyword arguments of the model's forward (labels are left out). folder: finished FFNs
    are kept there and taken from there, so an interrupted fit continues. Of several processes each gives its own share
    of the batches, and all get the same fit. on_layer is called after each matrix. moments: second moments of inputs by
    matrix, under `prefix: dense` used where they are there and added where they are not, so that several plans for one
    model and the same batches gather them once. send: how a batch reaches the plan's layers. aim_of: what the writer of
    an FFN of that name is aimed at, if not at what the dense one writes.
    Raises `FitError` where an FFN is never reached, activations are not finite, or a part of an FFN's hidden units is
    to be kept and the method gathers no activations that would tell which.
    """
    narrow = [swap.name for swap in plan.swaps if swap.spec.replaced]
    if narrow and recipe.method != "calibrated":
        raise FitError(
            f"{narrow[0]} keeps a part of its FFN's hidden units, and a {recipe.method} fit cannot tell which.",
            "Take fit.method: calibrated, which gathers activations.",
        )
    if recipe.method == "random":
        return [LayerFit(swap.name, swap.spec.label, None, None, 0, 0.0) for swap in plan.swaps]
    swaps = {swap.name: swap for swap in plan.swaps}
    layers = blends(model)
    was_training = model.training
    model.eval()
    results: list[LayerFit] = []
    if recipe.prefix == "corrected" and recipe.method == "calibrated":
        behind = recipe.model_copy(update={"prefix": "compressed"})
        on_disk = folder is not None and all(fit_file(folder, ffn.name).exists() for ffn in plan.ffns)
        # the first batch alone tells the order of use; all of them would take minutes
        with closing(beside(model, plan, batches[:1] if on_disk else batches)) as parts:
            for part, inputs, sends, aims in parts:
                results += fit_(model, part, inputs, behind, folder, on_layer, None, sends, aims)
        missed = swaps.keys() - {layer.name for layer in results}
        if missed:
            raise never_reached(sorted(missed))
        set_alpha_(model, 0.0)
        model.train(was_training)
        return results
    ffns = plan.ffns if recipe.method == "frobenius" else _in_order_of_use(model, plan, batches, send)
    moments = {} if moments is None else moments
    files = {ffn.name: fit_file(folder, ffn.name) for ffn in ffns} if folder else {}
    if recipe.method == "calibrated" and recipe.prefix == "dense":
        finished = {name for ffn in ffns if ffn.name in files and files[ffn.name].exists() for name in ffn.linears}
        missing = {name: layers[name] for name in swaps if name not in finished and name not in moments}
        moments |= second_moments(model, missing, batches, recipe.ridge, recipe.expert_prior, send) if missing else {}
    for ffn in ffns:
        mine = {name: layers[name] for name in ffn.linears if name in swaps}
        file = files.get(ffn.name)
        if file is not None and file.exists():
            fitted = _restore(file, ffn, mine)
        else:
            fitted, order = _fit_ffn(
                *(model, ffn, mine, swaps, batches, recipe, moments if recipe.prefix == "dense" else {}, send),
                aim_of(ffn.name),
            )
            if file is not None and is_first():
                _keep(file, ffn, mine, fitted, order)
        for layer in fitted:
            on_layer(layer)
        results += fitted
    for blend in layers.values():
        blend.alpha = 0.0
    model.train(was_training)
    return results


def _fit_ffn(
    model: nn.Module,
    ffn: FFN,
    mine: dict[str, BlendLinear],
    swaps: dict[str, Swap],
    batches: Sequence[Batch],
    recipe: FitRecipe,
    dense_moments: Mapping[str, Moment],
    send: Run,
    aim: Aim | None,
) -> tuple[list[LayerFit], Tensor | None]:
    """Readers first, on the FFN's input; then the writer, on what it reads with them in place (or in the dense model,
    where `dense_moments` has that), aimed at what the dense one writes unless there is an `aim`; then, where the recipe
    says so, all of them together on that."""

    def moment_of(name: str) -> Moment:
        if name not in dense_moments:
            return second_moments(model, {name: mine[name]}, fitted_on, recipe.ridge, recipe.expert_prior, send)[name]
        moment = dense_moments[name]
        return moment if order is None or name != ffn.writer else _whole(moment)[order][:, order]

    order, lost, rivals = None, 0.0, {}
    trains = recipe.block_epochs > 0 and aim is not None and ffn.writer in mine
    trains = trains and runs_alone(model, ffn, batches, send)
    fitted_on = not_held_out(batches) if trains else batches
    calibrated = recipe.method == "calibrated"
    narrow = ffn.writer in mine and swaps[ffn.writer].spec.replaced is not None
    if not (narrow or ffn.experts) and recipe.basis == "energy" and calibrated and len(mine) == len(ffn.linears) > 1:
        order = energy_order(_whole(moment_of(ffn.writer)))
        permute_hidden_(_linears(mine), ffn, order)
        _copy_biases_(mine)
    whole = {name: blend.dense.weight for name, blend in mine.items()}
    if narrow:
        hidden = _whole(moment_of(ffn.writer))
        if aim is None:  # a corrected writer's rival would need what all units could do about the stream
            rivals[ffn.writer] = low_rank(whole[ffn.writer], matched_low_rank(swaps[ffn.writer]), hidden, ridge=0)
        order, lost = _narrow_(ffn, mine, swaps[ffn.writer].spec.in_features, hidden, recipe)
        del hidden
    results = []
    for group in (ffn.readers, (ffn.writer,)):
        group = [name for name in group if name in mine]
        began = time.perf_counter()
        corrected = None
        if aim is not None and group == [ffn.writer]:
            corrected = corrected_writer(model, ffn.writer, mine[ffn.writer], fitted_on, recipe.ridge, send, aim)
        moment = corrected.moment if corrected else moment_of(group[0]) if calibrated and group else None
        for name in group:
            blend, few = mine[name], {}
            try:
                if ffn.experts:
                    of_each = None if moment is None else _of_experts(moment)
                    error, rival_error, sweeps, few = fit_experts(blend, swaps[name], of_each, recipe)
                else:
                    one = None if moment is None else _whole(moment)
                    weight = corrected.writer if corrected else blend.dense.weight
                    if name not in rivals:
                        wide = weight if corrected else whole[name]
                        rivals[name] = low_rank(wide, matched_low_rank(swaps[name]), one, ridge=0)
                    rival_error, spec = rivals[name].error, swaps[name].spec
                    error, sweeps = fit_matrix(weight, blend.light, spec, rivals[name], one, recipe)
            except FitError as failure:
                raise FitError(f"{name}: {failure.message}", failure.hint) from failure
            if corrected:
                error = corrected.error(blend.light.weight)
                rival_error = None if narrow else corrected.error(rivals[name].dense())
            elif name == ffn.writer:  # what units that are gone did cannot be won back: the two errors add up, exactly
                # so where the writer was refitted, because then what they leave is orthogonal to the units that stay
                error = math.hypot(lost, error * math.sqrt(max(0.0, 1 - lost**2)))
            label, seconds = swaps[name].spec.label, time.perf_counter() - began
            share = corrected.share if corrected else None
            results.append(LayerFit(name, label, error, rival_error, sweeps, seconds, few, share))
            began = time.perf_counter()
        for name in group:
            mine[name].alpha = 1.0
    if trains:
        assert aim is not None
        began = time.perf_counter()
        block = train_block_(model, ffn, mine, batches, send, aim, recipe)
        seconds = results[-1].seconds + time.perf_counter() - began
        results[-1] = replace(
            results[-1], error=block.error, low_rank_error=None, held_out=block.held_out, seconds=seconds
        )
    return results, order


def _linears(mine: dict[str, BlendLinear]) -> dict[str, nn.Linear]:
    return {name: blend.dense for name, blend in mine.items() if isinstance(blend.dense, nn.Linear)}


def _whole(moment: Moment) -> Tensor:
    assert isinstance(moment, Tensor)
    return moment


def _of_experts(moment: Moment) -> ExpertMoments:
    assert isinstance(moment, ExpertMoments)
    return moment


def _narrow_(
    ffn: FFN, mine: dict[str, BlendLinear], count: int, hidden: Tensor, recipe: FitRecipe
) -> tuple[Tensor, float]:
    """Leave the dense branches of `ffn` the `count` hidden units that contribute most, hidden (hidden, hidden) their
    second moment; returns the units, best first, and the writer's relative output error."""
    writer = mine[ffn.writer].dense.weight
    kept = contribution_order(writer, hidden)[:count]
    if recipe.refit_writer:
        refitted, error = refitted_writer(writer, hidden, kept)
    else:
        refitted, error = None, pruned_error(writer, hidden, kept)
    permute_hidden_(_linears(mine), ffn, kept)
    if refitted is not None:
        mine[ffn.writer].dense.weight.copy_(refitted)
    _copy_biases_(mine)
    return kept, error


def _copy_biases_(mine: dict[str, BlendLinear]) -> None:
    """Hidden units have moved: so do the biases of the light branches."""
    for blend in mine.values():
        if blend.dense.bias is not None and blend.light.bias is not None:
            blend.light.bias.copy_(blend.dense.bias)


def _in_order_of_use(model: nn.Module, plan: Plan, batches: Sequence[Batch], send: Run) -> list[FFN]:
    """The plan's FFNs in the order one forward pass meets them: the order that gives every layer its prefix."""
    if not batches:
        raise FitError(
            "A calibrated fit needs calibration batches, got none.", "Give data, or take fit.method: frobenius."
        )
    met: list[str] = []
    by_first_layer = {next(name for name in f.linears if name in {s.name for s in plan.swaps}): f for f in plan.ffns}
    layers = blends(model)
    with input_hooks({layers[name]: lambda module, args, name=name: met.append(name) for name in by_first_layer}):
        send(model, batches[0])
    missed = [f.name for name, f in by_first_layer.items() if name not in met]
    if missed:
        raise never_reached(missed)
    return [by_first_layer[name] for name in dict.fromkeys(met)]


def never_reached(ffns: list[str]) -> FitError:
    """The error that names FFNs which no calibration input gets to."""
    return FitError(
        f"Calibration never reaches {', '.join(ffns[:3])}{' …' if ffns[3:] else ''}.",
        "Give data that uses it (images for a vision tower), or exclude it: replace.exclude.",
    )


def fit_file(folder: Path, ffn: str) -> Path:
    """Where a finished FFN lies: its light branches in tensors called `<matrix>/<part>`."""
    return folder / f"{ffn}.safetensors"


def _keep(file: Path, ffn: FFN, mine: dict[str, BlendLinear], fitted: list[LayerFit], order: Tensor | None) -> None:
    """One finished FFN on disk: its light branches, which hidden units it has in which order, its errors."""
    tensors = {f"{n}/{k}": v.contiguous() for n, blend in mine.items() for k, v in blend.light.state_dict().items()}
    if order is not None:
        tensors |= {_ORDER: order, _WRITER: mine[ffn.writer].dense.weight.contiguous()}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={"fits": json.dumps([asdict(layer) for layer in fitted])})
    partial.rename(file)


def _restore(file: Path, ffn: FFN, mine: dict[str, BlendLinear]) -> list[LayerFit]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
            fitted = [LayerFit(**fields) for fields in json.loads(opened.metadata()["fits"])]
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file} holds no fit of {ffn.name}: {error}.", "Delete that file, and run the command again."
        ) from error
    order = tensors.pop(_ORDER, None)
    if order is not None:
        permute_hidden_(_linears(mine), ffn, order)
        mine[ffn.writer].dense.weight.copy_(tensors.pop(_WRITER))
    for name, blend in mine.items():
        state = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        blend.light.load_state_dict(state)
        blend.alpha = 1.0
    return fitted
