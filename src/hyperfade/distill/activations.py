"""What a model's layers read, and what it costs if they write something else: second moments of their inputs and
sensitivities of the loss to their outputs, over calibration batches, gathered by hooks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfade.algebra import SecondMoment, conditioned, ridge_, shrunk
from hyperfade.distill.losses import answer_logits
from hyperfade.errors import FitError
from hyperfade.nn import Groups
from hyperfade.processes import join, sum_
from hyperfade.surgery import region_of

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class ExpertMoments:
    """What every expert of a module reads. means: C (d, d) each, shrunk towards their average as if `prior_tokens` of
    it had come as well; num_tokens: those that were routed to each."""

    means: list[Tensor]
    num_tokens: list[int]
    prior_tokens: float


Moment = Tensor | ExpertMoments
Run = Callable[[nn.Module, Batch], None]
"""How a batch gets to the layers that a fit looks at; `run` sends it through the whole model."""


class Reached(Exception):
    """Raised inside a forward pass once everything wanted has its input: the rest of the pass is not needed."""


def second_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    ridge: float,
    expert_prior: float = 0.1,
    send: Run | None = None,
    *,
    alone: bool = False,
    reached_only: bool = False,
) -> dict[str, Moment]:
    """C (d, d), float64, of the inputs of every one of `layers` (by name), over all batches in one pass over them, with
    `ridge` on the diagonal; padding of the text does not count. Of matrices of experts one for each, and the average of
    all counts for `expert_prior` · d tokens in it. Of several processes each gives its own batches, and all get the
    moments over all of them; not where the calling one is `alone` in this. send: how a batch reaches the layers
    [default: `run`].

    All of them are in memory at a time. Raises `FitError` where a layer is never reached (with `reached_only` it is
    left out) or its inputs are not finite.
    """
    moments: dict[str, list[SecondMoment]] = {}  # one, or one for each expert
    met: set[str] = set()
    mask: Tensor | None = None

    def collect(name: str, args: tuple[Tensor, *tuple[Groups, ...]]) -> None:
        x, *groups = args
        parts = _by_expert(x.flatten(0, -2), groups[0], _real(name, mask)) if groups else [real_rows(name, x, mask)]
        own = moments.setdefault(name, [])
        own += [SecondMoment(x.shape[-1], x.device) for _ in range(len(parts) - len(own))]
        for moment, part in zip(own, parts, strict=True):
            moment.add_(part)
        met.add(name)
        if len(met) == len(layers):
            raise Reached

    with input_hooks({module: lambda _, args, name=name: collect(name, args) for name, module in layers.items()}):
        for batch in batches:
            mask = batch.get("attention_mask")
            met.clear()
            (send or run)(model, batch)
    if join().num_processes > 1 and not alone:
        for name, module in layers.items():
            weight = module.weight
            assert isinstance(weight, Tensor)
            number = len(weight) if weight.dim() == 3 else 1
            fresh = [SecondMoment(weight.shape[-1], weight.device) for _ in range(number if name not in moments else 0)]
            for moment in moments.setdefault(name, fresh):
                moment.merge_(sum_)
    results: dict[str, Moment] = {}
    for name, module in layers.items():
        tokens = [moment.num_tokens for moment in moments.get(name, [])]
        if not any(tokens) and reached_only:
            continue
        if not any(tokens):
            raise FitError(f"No calibration batch reaches {name}.", "Give calibration data with images and text.")
        weight = module.weight
        assert isinstance(weight, Tensor)
        prior = expert_prior * weight.shape[-1]
        try:
            means = shrunk(moments[name], prior) if weight.dim() == 3 else [moments[name][0].mean()]
            for mean in means:
                conditioned(mean, len(mean), 0, mean.device)  # finite?
        except FitError as failure:
            raise FitError(f"{name}: {failure.message}", failure.hint) from failure
        means = [ridge_(mean, ridge) for mean in means]
        results[name] = ExpertMoments(means, tokens, prior) if weight.dim() == 3 else means[0]
    return results


def real_rows(name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (tokens, d) of x (..., d), read or written by the module `name`, that are no padding by the batch's
    attention `mask`; some families (OPT) flatten x themselves, and a vision tower has no padding."""
    x, real = x.flatten(0, -2), _real(name, mask)
    return x if real is None or len(x) != len(real) else x[real]


def _real(name: str, mask: Tensor | None) -> Tensor | None:
    return mask.flatten().bool() if mask is not None and region_of(name) == "language" else None


def _by_expert(x: Tensor, groups: Groups, real: Tensor | None) -> list[Tensor]:
    """The rows of x (S, d) that each expert reads, without those of padding tokens, where `real` speaks of tokens."""
    expert = groups.expert
    if real is not None and len(real) == groups.num_tokens:
        kept = real[groups.token]
        x, expert = x[kept], expert[kept]
    return list(x.split(torch.bincount(expert, minlength=len(groups.ends)).tolist()))


@contextmanager
def input_hooks(hooks: Mapping[nn.Module, Callable[[nn.Module, Any], None]]) -> Iterator[None]:
    """Forward pre-hooks for the time of a with block."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model: nn.Module, batch: Batch) -> None:
    """One forward pass, as far as the hooks let it go; labels are left out."""
    with suppress(Reached):
        model(**{key: value for key, value in batch.items() if key != "labels"})


def sensitivities(model: nn.Module, linears: Mapping[str, nn.Module], batches: Sequence[Batch]) -> dict[str, float]:
    """s of every one of `linears` (by name), in nats per answer token: ½ Σ_tokens ‖g‖² ‖y‖² / k, y without its bias.

    Of several processes each gives its own batches. One forward and one backward pass per batch, with no gradients of
    parameters. Nothing attends to padding, so its g is 0 and it does not count. Raises `FitError` where a matrix is
    never reached, or there is nothing to answer.
    """
    sums, answers = dict.fromkeys(linears, 0.0), 0
    met: set[str] = set()
    start = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)  # the graphs hang on it

    def watch(name: str, linear: Any, args: Any, output: Tensor) -> Tensor:
        met.add(name)
        plain = output.detach() if linear.bias is None else output.detach() - linear.bias
        sizes, width = plain.float().square().sum(-1), output.shape[-1]

        def add(gradient: Tensor) -> None:
            sums[name] += (gradient.float().square().sum(-1) * sizes).sum().item() / (2 * width)

        output = output + start
        output.register_hook(add)
        return output

    handles = [linear.register_forward_hook(partial(watch, name)) for name, linear in linears.items()]
    try:
        with _evaluated(model), torch.enable_grad():
            for batch in batches:
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                logits, targets = answer_logits(model(**inputs).logits, batch["labels"])
                answers += len(targets)
                loss = F.cross_entropy(logits, targets, reduction="sum")
                if loss.requires_grad:  # a batch without images reaches no vision tower
                    torch.autograd.grad(loss, start)
    finally:
        for handle in handles:
            handle.remove()
    totals = torch.tensor([answers, *sums.values(), *(name in met for name in linears)], dtype=torch.float64)
    sum_([totals])
    answers, reached = totals[0].item(), totals[1 + len(linears) :].tolist()
    sums = dict(zip(linears, totals[1 : 1 + len(linears)].tolist(), strict=True))
    for name, processes in zip(linears, reached, strict=True):
        if not processes:
            raise FitError(f"No calibration batch reaches {name}.", "Give calibration data with images and text.")
        if not math.isfinite(sums[name]):
            raise FitError(f"{name}: its gradients are not finite.", "Check the model's activations in this dtype.")
    if not answers:
        raise FitError("Calibration batches have no answers to measure a loss on.", "Give training examples.")
    return {name: value / answers for name, value in sums.items()}


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with no gradients of parameters, for the time of a with block."""
    was_training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_(True)
