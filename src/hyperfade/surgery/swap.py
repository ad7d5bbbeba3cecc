"""Changing the model: everything is checked first, then modules are replaced in place."""

from collections.abc import Iterable

import torch
from torch import nn

from hyperfade.errors import FitError, PlanError
from hyperfade.nn import BlendLinear, ExpertsLinear, JointReading, LightSpec, PHMLinear
from hyperfade.surgery.experts import open_experts_, opened_experts
from hyperfade.surgery.families import SHAPES, Dense, dense_matrices, features, is_dense, weight_of
from hyperfade.surgery.plan import Plan


def swap_(model: nn.Module, plan: Plan) -> None:
    """Put a `BlendLinear` at α = 0 in the place of every matrix of `plan`: the model computes what it did before.

    Where a plan keeps a part of an FFN's hidden units, `narrow_` chooses which; until then its light branches are
    narrower than the dense ones, and only α = 0 can run.

    Raises `PlanError` or `FitError` before anything is changed where a matrix is missing, has another shape, or holds
    NaN or infinite values.
    """
    modules, matrices = dict(model.named_modules()), dense_matrices(model)
    for swap in plan.swaps:
        linear = matrices.get(swap.name)
        if linear is None or not is_dense(linear):
            found = type(modules[swap.name]).__name__ if swap.name in modules else "missing"
            raise PlanError(
                f"{swap.name} is {found}, the plan expects {'experts' if swap.spec.experts else 'an nn.Linear'}.",
                "Make the plan from this very model.",
            )
        given, expected = _shape(linear), (*swap.spec.dense_features, swap.spec.bias, swap.spec.experts)
        if given != expected:
            raise PlanError(
                f"{swap.name} has (in, out, bias, experts) = {given}, the plan expects {expected}.",
                "Make the plan from this model.",
            )
        if not torch.isfinite(linear.weight).all():
            raise FitError(f"The weight of {swap.name} holds NaN or infinite values.", "Check the checkpoint.")
    _open_(model, {swap.name: swap.spec for swap in plan.swaps})
    for swap in plan.swaps:
        linear = _as_linear(model.get_submodule(swap.name))
        light = swap.spec.build(device=linear.weight.device, dtype=linear.weight.dtype)
        if linear.bias is not None and light.bias is not None:
            light.bias.data.copy_(linear.bias.data[..., : swap.spec.out_features])
        light.train(linear.training)
        model.set_submodule(swap.name, BlendLinear(linear, light))
    for mixture in opened_experts(model).values():
        for kept in mixture.children():
            if isinstance(kept, ExpertsLinear) and not kept.weight.is_contiguous():  # as it will be saved
                kept.weight = torch.nn.Parameter(kept.weight.detach().contiguous(), kept.weight.requires_grad)
    _leave_fast_paths_(model, [swap.name for swap in plan.swaps])


def _shape(linear: Dense) -> tuple[int, int, bool, int | None]:
    """(in, out, bias, experts) of a dense matrix, or of those of experts."""
    number = linear.num_experts if isinstance(linear, ExpertsLinear) else None
    return (*features(linear), linear.bias is not None, number)


def _open_(model: nn.Module, specs: dict[str, LightSpec]) -> None:
    """Open every module of experts that holds one of the named matrices."""
    open_experts_(model, {name.rpartition(".")[0] for name, spec in specs.items() if spec.experts})


def _as_linear(module: nn.Module) -> nn.Linear | ExpertsLinear:
    """The `nn.Linear`, or the experts, itself; of a `Conv1D` one that shares its storage."""
    if isinstance(module, nn.Linear | ExpertsLinear):
        return module
    d, k = features(module)
    linear = nn.Linear(d, k, device="meta").train(module.training)
    linear.weight, linear.bias = nn.Parameter(weight_of(module).detach()), module.bias  # type: ignore[assignment]
    return linear


def _leave_fast_paths_(model: nn.Module, names: Iterable[str]) -> None:
    """Make PyTorch's own encoders call the layers of these names: in inference they would pass `linear1.weight` to one
    fused kernel and never ask what is there instead."""
    around = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."} | {""}
    for module in map(model.get_submodule, around):
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # what it asks before it takes the kernel
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # padded input as the kernel wants it


def install_(model: nn.Module, specs: dict[str, LightSpec]) -> None:
    """Put fresh replacement layers in the place of the named matrices: a skeleton that a checkpoint's weights fill.

    Raises `PlanError` before anything is changed where a name is missing or a shape differs.
    """
    modules, matrices = dict(model.named_modules()), dense_matrices(model)
    for name, spec in specs.items():
        linear = matrices.get(name)
        expected = (*spec.dense_features, spec.bias, spec.experts)
        if linear is None or _shape(linear) != expected:
            raise PlanError(
                f"The checkpoint replaces {name} with (in, out, bias, experts) = {expected}; {type(model).__name__} "
                f"has {linear or modules.get(name, 'no such module')} there.",
                "Load it with the class that config.json names under `architectures`.",
            )
    _open_(model, specs)
    for name, spec in specs.items():
        weight = matrices[name].weight
        model.set_submodule(name, spec.build(device=weight.device, dtype=weight.dtype))
    _leave_fast_paths_(model, specs)


def blends(model: nn.Module) -> dict[str, BlendLinear]:
    """The fading layers of a swapped model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BlendLinear)}


def set_alpha_(model: nn.Module, alpha: float) -> None:
    """Set α of every fading layer: 0 is the dense model, 1 the light one. Raises `PlanError` outside [0, 1]."""
    if not 0 <= alpha <= 1:
        raise PlanError(f"alpha={alpha} is outside [0, 1].", "0 is all dense, 1 is all hypercomplex.")
    for blend in blends(model).values():
        blend.alpha = float(alpha)


def drop_dense_(model: nn.Module) -> None:
    """Replace every fading layer by its light branch. Raises `PlanError` where there is none."""
    found = blends(model)
    if not found:
        raise PlanError(f"{type(model).__name__} has no fading layers.", "Call hyperfade.swap_(model, plan) first.")
    for name, blend in found.items():
        model.set_submodule(name, blend.light)


def join_readers_(model: nn.Module) -> None:
    """Let the gate and the up of every gated FFN run as one where both are products-form layers of one shape."""
    pairs = [readers for readers, _ in SHAPES if len(readers) == 2]
    for module in model.modules():
        for names in pairs:
            first, second = (getattr(module, name, None) for name in names)
            if isinstance(first, PHMLinear) and isinstance(second, PHMLinear) and _alike(first, second):
                JointReading(first, second)


def _alike(first: PHMLinear, second: PHMLinear) -> bool:
    by_products = first.algebra.form == "products" and not (first.stacked or second.stacked)
    return by_products and first.algebra == second.algebra and first.components.shape == second.components.shape
