"""An FFN trained by itself, before all of them train together: block-wise distillation.

A fit takes an FFN matrix by matrix: every reader is to write what the dense one would, whatever becomes of it behind
the activation. What counts is what the FFN adds to the residual stream. So behind the corrected writer
(`correction.py`), whose u and γ these are, the light matrices of an FFN f train together:

    Σ ‖γ ⊙ f(x) − u‖² / ‖o‖²    over tokens, o what the layer gives out in the dense model:

the norm that reads the stream next divides by its size. A step takes one calibration batch and runs nothing but the
FFN, and every token has an aim, where the training of the whole model learns from the tokens of answers alone. Every
eighth batch is held out, and the matrices were fitted without it: what does not lower the error there is undone. BRECQ
(arXiv 2102.05426) reconstructs blocks one by one for quantization, Puzzle (arXiv 2411.19146) distils replacements of
blocks so.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from hyperfade.algebra import relative
from hyperfade.distill.activations import Batch, Run, real_rows
from hyperfade.distill.correction import Aim
from hyperfade.errors import FitError
from hyperfade.nn import BlendLinear
from hyperfade.processes import gathered, numbered, sum_
from hyperfade.recipe import Fit
from hyperfade.surgery import FFN

_HELD_OUT = 8  # every so manyth batch
_WARMUP = 0.05  # of the steps
_LEAST_SIZE = 0.1  # of the median ‖o‖²: no token may outweigh all others because it is next to nothing


@dataclass(frozen=True)
class Block:
    """held_out: the squared error on held-out batches, relative to that before; 1 where training was undone. error:
    what the FFN leaves of its writer's aim less its bias, relative to that, over all calibration tokens by weight."""

    held_out: float
    error: float


@dataclass(frozen=True)
class _Tokens:
    """One batch's: x (1, tokens, d), and what tells its u (tokens, k) and 1 / ‖o‖² (tokens, 1), both float32 and made
    anew each time, because all of them at once would take more memory than everything else here."""

    x: Tensor
    aimed: Callable[[], tuple[Tensor, Tensor]]


def runs_alone(model: nn.Module, ffn: FFN, batches: Sequence[Batch], send: Run) -> bool:
    """Whether `train_block_` can train the FFN on these batches (of several processes: each one's own).

    The module that holds it has to be nothing but the FFN: given what a reader reads, and nothing else, it makes what
    the writer writes, to the last bit. Three batches are the least; float16 is too narrow for gradients.
    """
    module = model.get_submodule(ffn.name)
    own = {id(p) for name in ffn.linears for p in model.get_submodule(name).parameters()}
    required = [p for p in signature(type(module).forward).parameters.values() if p.default is p.empty]
    alone = all(id(parameter) in own for parameter in module.parameters())
    alone = alone and len(required) == 2 and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in required)  # self and x
    for batch in batches[:1] if alone else ():
        x, y = _read_and_written(model, ffn, batch, send)
        made = module(x)
        same = isinstance(made, Tensor) and made.shape == y.shape
        alone = same and x.dtype != torch.float16 and torch.allclose(made, y, rtol=0, atol=0, equal_nan=True)
    return all(gathered(alone)) and numbered(batches)[1] > 2


def not_held_out(batches: Sequence[Batch]) -> list[Batch]:
    """Those of this process's batches that an FFN's matrices are fitted on before it trains."""
    own, number = numbered(batches)
    return [batch for i, batch in own.items() if i not in _held_out(number)]


def _held_out(number: int) -> range:
    """Which of so many batches tell whether training pays."""
    return range(min(_HELD_OUT, number) - 1, number, _HELD_OUT)


@torch.no_grad()
def train_block_(
    model: nn.Module,
    ffn: FFN,
    layers: dict[str, BlendLinear],
    batches: Sequence[Batch],
    send: Run,
    aim: Aim,
    recipe: Fit,
) -> Block:
    """Train the light branches of `layers`, which are what of `ffn` is replaced, each at α = 1, with its writer among
    them, for `recipe.block_epochs`; they are float32 meanwhile. The FFN `runs_alone`.

    Of several processes each gives its own batches, and all get the same. Raises `FitError` where numbers are not
    finite.
    """
    module, (own_batches, number) = model.get_submodule(ffn.name), numbered(batches)
    held_out = _held_out(number)
    tokens = {i: _tokens(model, ffn, batch, send, aim) for i, batch in own_batches.items()}
    gamma, bias = 1.0 if aim.scale is None else aim.scale.float(), layers[ffn.writer].bias
    offset = 0.0 if bias is None else gamma * bias.float()

    def error(own: _Tokens) -> Tensor:
        u, weight = own.aimed()
        return (weight * (gamma * module(own.x)[0].float() - u).square()).sum()

    def wanted(own: _Tokens) -> Tensor:
        u, weight = own.aimed()
        return (weight * (u - offset).square()).sum()

    def total(of_each: Callable[[_Tokens], Tensor], numbers: Collection[int]) -> float:
        """Over these batches, whichever process has them."""
        found = torch.zeros(1, dtype=torch.float64)
        for i in tokens.keys() & numbers:
            found += of_each(tokens[i]).double().cpu()
        sum_([found])
        return found.item()

    everywhere, trained_on = range(number), [i for i in range(number) if i not in held_out]
    whole = total(wanted, everywhere)
    if not math.isfinite(whole + total(error, everywhere)):
        raise FitError(
            f"{ffn.name}: what it reads, or what its layer gives out, is not finite.",
            "Check the model's activations in this dtype.",
        )
    before = total(error, held_out)
    parameters = [p for layer in layers.values() for p in layer.light.parameters()]
    start = [parameter.detach().clone() for parameter in parameters]
    try:
        with _float32(parameters):
            _descend_(parameters, trained_on, tokens, lambda own: number / (whole or 1) * error(own), recipe)
        after = total(error, held_out)
    except BaseException:
        _put_back_(parameters, start)
        raise
    if not after < before:
        _put_back_(parameters, start)
    return Block(after / before if after < before else 1.0, relative(total(error, everywhere), whole))


def _put_back_(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _descend_(
    parameters: Sequence[nn.Parameter],
    numbers: Sequence[int],
    tokens: Mapping[int, _Tokens],
    loss: Callable[[_Tokens], Tensor],
    recipe: Fit,
) -> None:
    """AdamW on the loss, batch by batch of these numbers, warmed up, then along a cosine to zero."""
    steps = recipe.block_epochs * len(numbers)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0)
    generator, order = torch.Generator().manual_seed(0), list[int]()
    for step in range(steps):
        order = order or torch.randperm(len(numbers), generator=generator).tolist()
        own = tokens.get(numbers[order.pop()])
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        if own is not None:  # else it is another process's
            with torch.enable_grad(), _autocast(own.x):
                gradients = list(torch.autograd.grad(loss(own), parameters))
        sum_(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        progress = step / steps
        rate = min(1.0, (progress + 1 / steps) / _WARMUP) * (1 + math.cos(math.pi * progress)) / 2
        optimizer.param_groups[0]["lr"] = recipe.block_learning_rate * rate
        optimizer.step()


def _autocast(x: Tensor) -> torch.autocast:
    """What a model of the dtype of x trains under."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16)


@contextmanager
def _float32(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that train, float32 where they were bfloat16: steps are smaller than that can add."""
    before = [(parameter.dtype, parameter.requires_grad) for parameter in parameters]
    for parameter in parameters:
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, (dtype, trains) in zip(parameters, before, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(trains)


def _tokens(model: nn.Module, ffn: FFN, batch: Batch, send: Run, aim: Aim) -> _Tokens:
    mask = batch.get("attention_mask")
    x, _ = _read_and_written(model, ffn, batch, send)

    def aimed() -> tuple[Tensor, Tensor]:
        u, o = (real_rows(ffn.name, part(batch), mask) for part in (aim.added, aim.out))
        size = o.float().square().sum(-1, keepdim=True)
        least = _LEAST_SIZE * size.median() if len(size) else 0.0
        return u.float(), torch.where(size > 0, 1 / size.clamp_min(least), 0.0)

    return _Tokens(real_rows(ffn.name, x, mask)[None], aimed)


def _read_and_written(model: nn.Module, ffn: FFN, batch: Batch, send: Run) -> tuple[Tensor, Tensor]:
    """What the FFN's first reader reads of a batch, and what its writer writes."""
    read, written = list[Any](), list[Any]()
    reader, writer = (model.get_submodule(name) for name in (ffn.readers[0], ffn.writer))
    handles = [
        reader.register_forward_pre_hook(lambda _, args: read.append(args[0])),
        writer.register_forward_hook(lambda _, args, output: written.append(output)),
    ]
    try:
        send(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return read[0], written[0]
