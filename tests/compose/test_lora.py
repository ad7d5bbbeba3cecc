"""LoRA on the language model's attention: where it goes, that it trains beside the light layers, that nothing stays."""

from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import FAMILIES, logits
from torch import nn

from hyperfade.compose.lora import add_lora_, merge_lora_
from hyperfade.distill import teacher_of
from hyperfade.errors import PlanError
from hyperfade.nn import light_modules
from hyperfade.recipe import Layer, Replace
from hyperfade.surgery import plan, region_of, swap_

# Q-Former attention belongs to the projector; T5 calls its projections q, k and v
WITH_ATTENTION = sorted(set(FAMILIES) - {"blip2_t5"})


def _adapters(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _teach_(model: nn.Module) -> None:
    """Give the adapters something to say: fresh ones are zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_adapters_are_on_the_language_models_query_key_and_value_only(family: str) -> None:
    model = FAMILIES[family].build()
    expected = {
        name
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj")) and region_of(name) == "language"
    }
    add_lora_(model, 2, 4.0)
    assert set(_adapters(model)) == expected
    assert len(expected) == 9  # three layers
    assert not any("vision" in name or "visual" in name for name in expected)


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_merging_keeps_the_function_and_leaves_no_trace(family: str) -> None:
    model = FAMILIES[family].build()
    names, types = list(dict(model.named_parameters())), [type(module) for module in model.modules()]
    before = logits(model, FAMILIES[family])
    add_lora_(model, 2, 4.0)
    assert torch.equal(logits(model, FAMILIES[family]), before)  # fresh adapters are silent
    _teach_(model)
    taught = logits(model, FAMILIES[family])
    merge_lora_(model)
    assert (taught - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, FAMILIES[family]), taught, rtol=0, atol=5e-5)  # observed 7e-6
    assert _adapters(model) == {}
    assert list(dict(model.named_parameters())) == names
    assert [type(module) for module in model.modules()] == types
    assert not any("peft" in type(module).__module__ for module in model.modules())
    assert not hasattr(model, "peft_config")


def test_the_merged_weight_is_w_plus_alpha_over_rank_times_b_a() -> None:
    model = FAMILIES["llama"].build()
    add_lora_(model, 2, 6.0)
    _teach_(model)
    name, layer = next(iter(_adapters(model).items()))
    base, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (base + 6.0 / 2 * b @ a).detach().clone()
    merge_lora_(model)
    torch.testing.assert_close(model.get_submodule(name).weight.detach(), expected, rtol=0, atol=1e-6)  # observed 3e-8


def test_adapters_train_beside_what_already_trains_and_nothing_else_does() -> None:
    model = FAMILIES["llava_siglip"].build()
    model.requires_grad_(False)
    swap_(model, plan(model, Replace(language=Layer(n=4), vision=Layer(n=4))))
    light = {id(parameter) for layer in light_modules(model).values() for parameter in layer.parameters()}
    add_lora_(model, 2, 4.0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in light or "lora_" in name), name


def test_a_teacher_that_shares_the_weights_does_not_see_the_merge() -> None:
    model = FAMILIES["llava_siglip"].build()
    teacher = teacher_of(model)
    before = logits(teacher, FAMILIES["llava_siglip"])
    add_lora_(model, 2, 4.0)
    _teach_(model)
    merge_lora_(model)
    assert torch.equal(logits(teacher, FAMILIES["llava_siglip"]), before)


def test_a_model_without_known_attention_names_is_refused_unchanged() -> None:
    model = FAMILIES["blip2_t5"].build()
    modules = [type(module) for module in model.modules()]
    with pytest.raises(PlanError, match="no attention projections called q_proj") as error:
        add_lora_(model, 2, 4.0)
    assert "train.lora_rank: 0" in error.value.hint
    assert [type(module) for module in model.modules()] == modules
