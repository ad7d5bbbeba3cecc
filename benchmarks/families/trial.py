"""One family's trial: plan, swap, forward, backward, fold, save, reload bit-equal, generate, on a tiny random model.

    outcome = attempt("llava")

Every check compares with what the dense or the faded model gave; the first that fails ends the trial, and its name and
message are the reason. Where a family's forward cannot be fed an image by rule, its words go through the language side
and its image through the vision tower alone.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from families.expected import expected
from families.inputs import Batch, batch_of, words_of
from families.shrink import shrunk
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from hyperfade.hub import fold_, load, save
from hyperfade.hub.quantizer import align_
from hyperfade.nn import light_modules
from hyperfade.recipe import Layer, Replace
from hyperfade.surgery import Plan, blends, dense_matrices, find_experts, find_ffns, plan, set_alpha_, swap_

NAMES: dict[str, str] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
"""Model type → class, of all that answer in text about images."""
HALF = Layer(n=2)
EVERYTHING = Replace(language=HALF, vision=HALF, projector=HALF)
DENSE_TOO = "transformers does not give the dense model back"
WORDS_ONLY: dict[str, str] = {
    "emu3": "words alone: images become words through a VQ-VAE, which has no FFN",
    "gemma4_unified": "words alone: its default config has no vision tower",
    "granite4_vision": "words alone: its image features enter inner layers, in a layout that no rule makes",
    "inkling_mm_model": "words alone: its images are cut in a layout that no rule makes",
    "molmo2": "words alone: its image pooling takes indices that no rule makes",
}
"""Families whose forward gets words alone, with the reason."""


@dataclass(frozen=True)
class Outcome:
    """What came of a trial. reason: what failed, or what was left out; empty where nothing was.

    ffns: region → (number of FFNs, their parameters); experts: how many modules hold experts as tensors; reached: how
    many of the replaced matrices the forward pass met, of how many.
    """

    model_type: str
    class_name: str
    passed: bool
    reason: str
    ffns: dict[str, tuple[int, int]]
    experts: int
    reached: tuple[int, int]


class TrialError(Exception):
    """A check that failed, by name."""


def build(model_type: str, seed: int = 0) -> Any:
    """The tiny model of a family, in evaluation mode; every weight is random, biases and norms included."""
    model = getattr(transformers, NAMES[model_type])._from_config(shrunk(model_type))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval().requires_grad_(False)  # like a student; torch rounds by whether weights can have gradients


def skeleton(model_type: str) -> Any:
    """The tiny model without memory."""
    with torch.device("meta"):
        return getattr(transformers, NAMES[model_type])(shrunk(model_type))


def counts(model: Any) -> dict[str, tuple[int, int]]:
    """Region → (number of FFNs, their parameters); modules of experts count for themselves, as `experts`."""
    found: dict[str, tuple[int, int]] = {}
    matrices = dense_matrices(model)
    for ffn in find_ffns(model):
        part = "experts" if ffn.experts else ffn.region
        number, parameters = found.get(part, (0, 0))
        own = sum(p.numel() for linear in ffn.linears for p in matrices[linear].parameters())
        found[part] = (number + 1, parameters + own)
    return found


def attempt(model_type: str, folder: Path | None = None) -> Outcome:
    """Try everything on one family."""
    ffns, experts, reached, batch = {}, 0, (0, 0), {}
    try:
        with _named("build"):
            model = build(model_type)
        ffns, experts = counts(model), len(find_experts(model))
        with _named("inputs"):
            batch = words_of(model) if model_type in WORDS_ONLY else batch_of(model, model_type)
        with _named("forward of the dense model"):
            dense = _logits(model, batch)
        with _named("plan"):
            implied = expected(model_type, model.config)
            _check(ffns == implied, f"found {ffns}, the config implies {implied}")
            the_plan = plan(model, EVERYTHING)
        reached = _fade(model, the_plan, batch, dense)
        with tempfile.TemporaryDirectory() as temporary:
            _fold_and_reload(model, the_plan, batch, folder or Path(temporary))
        return Outcome(model_type, NAMES[model_type], True, WORDS_ONLY.get(model_type, ""), ffns, experts, reached)
    except TrialError as error:
        reason = str(error)
        if reason.startswith("reload") and not _dense_reloads(model_type, batch):
            reason = f"{DENSE_TOO}, so {reason}"
        return Outcome(model_type, NAMES[model_type], False, reason, ffns, experts, reached)


def _dense_reloads(model_type: str, batch: Batch) -> bool:
    """Whether transformers alone gives the dense model back, bit-equal."""
    model = build(model_type)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval().requires_grad_(False)
    align_(loaded)
    return torch.equal(_logits(loaded, batch), _logits(model, batch))


def _fade(model: Any, the_plan: Plan, batch: Batch, dense: Tensor) -> tuple[int, int]:
    """Swap; nothing changes at α = 0, gradients reach every layer on the path at α = ½, and α = 1 shows."""
    with _named("swap"):
        swap_(model, the_plan)
    met: Counter[str] = Counter()
    hooks = [b.register_forward_hook(lambda *_, name=name: met.update([name])) for name, b in blends(model).items()]
    with _named("forward at α = 0"):
        _check(torch.equal(_logits(model, batch), dense), "the logits changed")
    for hook in hooks:
        hook.remove()
    with _named("backward at α = ½"):
        set_alpha_(model, 0.5)
        model(**batch).logits.float().square().mean().backward()
        for name in met:
            light = blends(model)[name].light
            _check(all(p.grad is not None for p in light.parameters()), f"no gradient in {name}")
            light.zero_grad()
    set_alpha_(model, 1.0)
    return len(met), len(blends(model))


def _fold_and_reload(model: Any, the_plan: Plan, batch: Batch, folder: Path) -> None:
    """Fold, save, load as a user would: bit-equal in logits and in what it generates."""
    with _named("forward at α = 1"):
        faded = _logits(model, batch)
        _check(bool(torch.isfinite(faded).all()), "logits are not finite")
    with _named("fold"):
        fold_(model)
        _check(light_modules(model).keys() == {swap.name for swap in the_plan.swaps}, "layers are missing")
        _check(sum(p.numel() for p in model.parameters()) == the_plan.parameters_after, "the plan counted otherwise")
        _check(torch.equal(_logits(model, batch), faded), "the logits changed")
    with _named("save"):
        save(model, folder)
    with _named("reload"):
        loaded = load(str(folder))
        _check(type(loaded) is type(model), f"it loads as {type(loaded).__name__}")
        _check(torch.equal(_logits(loaded, batch), faded), "the logits changed")
    with _named("generate"):
        _check(torch.equal(_generated(loaded, batch), _generated(model, batch)), "the answers differ")


@torch.no_grad()
def _logits(model: Any, batch: Batch) -> Tensor:
    return model(**batch).logits


@torch.no_grad()
def _generated(model: Any, batch: Batch) -> Tensor:
    prompt = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    return model.generate(**prompt, do_sample=False, max_new_tokens=4, min_new_tokens=4)


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise TrialError(otherwise)


@contextmanager
def _named(step: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a `TrialError` that names the step: a trial has to come to an end."""
    try:
        yield
    except TrialError as error:
        raise TrialError(f"{step}: {error}") from error
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise TrialError(f"{step}: {said[:200]}") from error
