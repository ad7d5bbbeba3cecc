"""From dense to hypercomplex before any training, layer by layer, with the compressed prefix in place.

Each FFN is fitted on the inputs it will really see: those that come out of the layers already replaced (as GPTQ and
SVD-LLM do). Only one layer's second moment is in memory at a time; to get it, calibration batches run through the model
up to that layer and no further.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperfade.algebra import SecondMoment, conditioned, fit, low_rank, ridge_
from hyperfade.errors import FitError
from hyperfade.nn import BlendLinear, LowRankLinear, PHMLinear
from hyperfade.recipe import Fit as FitRecipe
from hyperfade.surgery import FFN, Plan, Swap, blends, energy_order, matched_low_rank, permute_hidden_

Batch = dict[str, Tensor]
_ORDER = "hidden_order"


@dataclass(frozen=True)
class LayerFit:
    """How one matrix came out: relative output errors (weight errors for the Frobenius fit; None for a random start).

    low_rank_error is that of the whitened low-rank layer with as many parameters. seconds of the first matrix on an
    input hold the calibration passes that gathered its second moment.
    """

    name: str
    label: str
    error: float | None
    low_rank_error: float | None
    sweeps: int
    seconds: float


@torch.no_grad()
def fit_(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    recipe: FitRecipe,
    folder: Path | None = None,
    on_layer: Callable[[LayerFit], None] = lambda layer: None,
) -> list[LayerFit]:
    """Fit the light branch of every `BlendLinear` that `plan` made in `model`; the model ends at α = 0 as it began.

    batches: calibration inputs, keyword arguments of the model's forward (labels are left out). folder: finished FFNs
    are kept there and taken from there, so an interrupted fit continues. on_layer is called after each matrix.
    Raises `FitError` where an FFN is never reached, or activations are not finite.
    """
    if recipe.method == "random":
        return [LayerFit(swap.name, swap.spec.label, None, None, 0, 0.0) for swap in plan.swaps]
    swaps = {swap.name: swap for swap in plan.swaps}
    layers = blends(model)
    was_training = model.training
    model.eval()
    results: list[LayerFit] = []
    ffns = plan.ffns if recipe.method == "frobenius" else _in_order_of_use(model, plan, batches)
    for ffn in ffns:
        mine = {name: layers[name] for name in ffn.linears if name in swaps}
        file = folder / f"{ffn.name}.safetensors" if folder else None
        if file is not None and file.exists():
            fitted = _restore(file, ffn, mine)
        else:
            fitted, order = _fit_ffn(model, ffn, mine, swaps, batches, recipe)
            if file is not None:
                _keep(file, mine, fitted, order)
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
) -> tuple[list[LayerFit], Tensor | None]:
    """Readers first, on the FFN's input; then, with them in place, the writer on what it then reads."""
    order = None
    calibrated = recipe.method == "calibrated"
    if recipe.basis == "energy" and calibrated and len(mine) == len(ffn.linears) > 1:
        order = energy_order(_second_moment(model, ffn, mine[ffn.writer], batches, ridge=0))
        permute_hidden_({name: blend.dense for name, blend in mine.items()}, ffn, order)
        for blend in mine.values():
            if blend.dense.bias is not None and blend.light.bias is not None:
                blend.light.bias.copy_(blend.dense.bias)
    results = []
    for group in (ffn.readers, (ffn.writer,)):
        group = [name for name in group if name in mine]
        began = time.perf_counter()
        moment = _second_moment(model, ffn, mine[group[0]], batches, recipe.ridge) if calibrated and group else None
        for name in group:
            results.append(_fit_matrix(mine[name], swaps[name], moment, recipe, began))
            began = time.perf_counter()
        for name in group:
            mine[name].alpha = 1.0
    return results, order


def _fit_matrix(blend: BlendLinear, swap: Swap, moment: Tensor | None, recipe: FitRecipe, began: float) -> LayerFit:
    try:
        rival = low_rank(blend.dense.weight, matched_low_rank(swap), moment, ridge=0)
        error, sweeps = rival.error, 0
        if swap.spec.algebra is None:
            assert type(blend.light) is LowRankLinear
            blend.light.load_fit_(rival)
        else:
            assert type(blend.light) is PHMLinear
            best = fit(
                blend.dense.weight,
                swap.spec.algebra,
                moment,
                sweeps=recipe.sweeps,
                companion_rank=swap.spec.rank,
                ridge=0,
            )
            blend.light.load_fit_(best)
            error, sweeps = best.error, len(best.errors) - 1
    except FitError as failure:
        raise FitError(f"{swap.name}: {failure.message}", failure.hint) from failure
    return LayerFit(swap.name, swap.spec.label, error, rival.error, sweeps, time.perf_counter() - began)


class _Reached(Exception):
    """Raised inside a forward pass once the wanted layer has its input: the rest of the pass is not needed."""


def _second_moment(model: nn.Module, ffn: FFN, layer: nn.Module, batches: Sequence[Batch], ridge: float) -> Tensor:
    """C (d, d) of the inputs of `layer`, a part of `ffn`, over all batches, with the ridge that all fits on it share;
    padding of the text does not count."""
    moment: SecondMoment | None = None
    mask: Tensor | None = None

    def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal moment
        x = args[0].flatten(0, -2)  # some families (OPT) flatten it themselves
        if mask is not None and len(x) == mask.numel():
            x = x[mask.flatten().bool()]
        if moment is None:
            moment = SecondMoment(x.shape[-1], x.device)
        moment.add_(x)
        raise _Reached

    with _hooks({layer: collect}):
        for batch in batches:
            mask = batch.get("attention_mask") if ffn.region in ("language", "other") else None
            _run(model, batch)
    if moment is None:
        raise FitError(f"No calibration batch reaches {ffn.name}.", "Give calibration data with images and text.")
    try:
        second_moment = moment.mean()
        conditioned(second_moment, len(second_moment), 0, second_moment.device)  # finite?
    except FitError as failure:
        name = next(name for name, module in model.named_modules() if module is layer)
        raise FitError(f"{name}: {failure.message}", failure.hint) from failure
    return ridge_(second_moment, ridge)


def _in_order_of_use(model: nn.Module, plan: Plan, batches: Sequence[Batch]) -> list[FFN]:
    """The plan's FFNs in the order one forward pass meets them: the order that gives every layer its prefix."""
    if not batches:
        raise FitError(
            "A calibrated fit needs calibration batches, got none.", "Give data, or take fit.method: frobenius."
        )
    met: list[str] = []
    by_first_layer = {next(name for name in f.linears if name in {s.name for s in plan.swaps}): f for f in plan.ffns}
    layers = blends(model)
    with _hooks({layers[name]: lambda module, args, name=name: met.append(name) for name in by_first_layer}):
        _run(model, batches[0])
    missed = [f.name for name, f in by_first_layer.items() if name not in met]
    if missed:
        raise FitError(
            f"Calibration never reaches {', '.join(missed[:3])}{' …' if missed[3:] else ''}.",
            "Give data that uses it (images for a vision tower), or exclude it: replace.exclude.",
        )
    return [by_first_layer[name] for name in dict.fromkeys(met)]


@contextmanager
def _hooks(hooks: Mapping[Any, Callable[[nn.Module, Any], None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, batch: Batch) -> None:
    with suppress(_Reached):
        model(**{key: value for key, value in batch.items() if key != "labels"})


def _keep(file: Path, mine: dict[str, BlendLinear], fitted: list[LayerFit], order: Tensor | None) -> None:
    """One finished FFN on disk: its light branches, the order of its hidden units, its errors."""
    tensors = {f"{n}/{k}": v.contiguous() for n, blend in mine.items() for k, v in blend.light.state_dict().items()}
    if order is not None:
        tensors[_ORDER] = order
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={"fits": json.dumps([asdict(layer) for layer in fitted])})
    partial.rename(file)


def _restore(file: Path, ffn: FFN, mine: dict[str, BlendLinear]) -> list[LayerFit]:
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
        fitted = [LayerFit(**fields) for fields in json.loads(opened.metadata()["fits"])]
    order = tensors.pop(_ORDER, None)
    if order is not None:
        permute_hidden_({name: blend.dense for name, blend in mine.items()}, ffn, order)
    for name, blend in mine.items():
        state = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        blend.light.load_state_dict(state)
        blend.alpha = 1.0
    return fitted
