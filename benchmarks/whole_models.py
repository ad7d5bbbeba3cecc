"""Whole models at their true shapes with cheap random weights, dense and compressed, for the speed benchmarks."""

import copy
import re
from typing import Any

import torch
from accelerate import init_empty_weights
from shapes import LOW_RANK, MODELS, SUITED_RANK, VARIANTS
from torch import Tensor, nn

from hyperfade.hub import fold_
from hyperfade.measure.layers import fill_
from hyperfade.recipe import Recipe, Replace
from hyperfade.surgery import Plan, plan, set_alpha_, swap_

# For what does not fit beside its compressed forms: with period 7, language layers i, i + 7, i + 14 ... share storage.
# A layer is far larger than any cache, so every token still reads every layer's weights from memory.
SHARED_PERIOD = {
    ("Qwen2.5-VL-7B", torch.bfloat16): 7,
    ("Qwen2.5-VL-7B", torch.float32): 4,
    ("Qwen2.5-VL-3B", torch.float32): 9,
}
QUESTION_TOKENS, IMAGE_PIXELS = 32, 448  # of a side; SmolVLM's config fixes its own
_LAYER = re.compile(r"(.*language_model\.layers\.)(\d+)(\..*)")


def replacement(variant: str) -> Replace:
    """What a variant replaces: language and vision FFNs alike; `paper` is the shipped recipe."""
    if variant == "paper":
        return Recipe.load("paper").replace
    layer = (VARIANTS | LOW_RANK | SUITED_RANK)[variant]
    return Replace(language=layer, vision=layer)


def built(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    period: int | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """The dense model with random weights, in evaluation mode; every `period`-th language layer shares its storage."""
    made = MODELS[name]
    with init_empty_weights():  # weights on meta, buffers (rotary angles) as they are
        model = made.model_class(made.config())
    real: dict[str, nn.Parameter] = {}
    for full, parameter in list(model.named_parameters()):
        home = _home(full, period)
        if home not in real:
            real[home] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False)
        parent, _, leaf = full.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = real[home]
    model.tie_weights()
    fill_(model)
    model.config.dtype = dtype
    return model.to(device).eval()


def twin(dense: Any) -> Any:
    """A copy of the modules around the same weights."""
    return copy.deepcopy(dense, {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())})


def compressed(dense: Any, name: str, variant: str, period: int | None = None) -> tuple[Any, Plan]:
    """A model with the variant's FFNs that shares everything else with `dense`, which was built with the same period;
    and the plan of the true model."""
    whole = plan(MODELS[name].skeleton(), replacement(variant))
    light = twin(dense)
    specs = {swap.name: swap.spec for swap in whole.swaps}
    first: dict[Any, str] = {}  # FFNs with the same storage and the same replacement share it again
    owners: dict[str, str] = {}
    for ffn in whole.ffns:
        kind = (_home(ffn.name + ".", period), *(specs.get(linear) for linear in ffn.linears))
        owners[ffn.name] = first.setdefault(kind, ffn.name)
    own = tuple(swap for swap in whole.swaps if owners[swap.ffn] == swap.ffn)
    swap_(light, Plan(own, whole.ffns, whole.parameters_before, whole.kept, whole.missing))
    set_alpha_(light, 1.0)
    fold_(light)
    for ffn, owner in owners.items():
        if owner != ffn:
            light.set_submodule(ffn, light.get_submodule(owner))
    light.requires_grad_(False)
    return light.eval(), whole


def prompt(model: Any) -> tuple[dict[str, Tensor], int]:
    """A question of 32 tokens about one image, 448 × 448 pixels for Qwen2.5-VL and the config's size for SmolVLM; and
    the number of patches that the vision tower sees."""
    generator, dtype = torch.Generator().manual_seed(1), model.dtype
    config, vision = model.config, model.config.vision_config
    question = torch.randint(5, min(1000, config.text_config.vocab_size), (QUESTION_TOKENS,), generator=generator)
    if config.model_type == "qwen2_5_vl":
        side = IMAGE_PIXELS // vision.patch_size
        patches, tokens = side**2, (side // vision.spatial_merge_size) ** 2
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        image = {"pixel_values": torch.randn(patches, width, generator=generator).to(dtype)}
        image["image_grid_thw"] = torch.tensor([[1, side, side]])
    else:
        patches = (vision.image_size // vision.patch_size) ** 2
        tokens = patches // config.scale_factor**2
        pixels = torch.randn(1, 1, 3, vision.image_size, vision.image_size, generator=generator)
        image = {"pixel_values": pixels.to(dtype)}
    ids = torch.cat([torch.full((tokens,), config.image_token_id), question])[None]
    if "image_grid_thw" in image:
        image["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}, patches


def prefill(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """The first new token (1, 1) and the filled cache."""
    output = model(**batch, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def decode(model: Any, token: Tensor, cache: Any, new_tokens: int) -> None:
    """Decode greedily from `token` (batch, 1), then set the cache back to where it was."""
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    cache.crop(-new_tokens)


def _home(name: str, period: int | None) -> str:
    """The parameter whose storage this one uses."""
    match = _LAYER.fullmatch(name)
    return f"{match[1]}{int(match[2]) % period}{match[3]}" if match and period else name
