"""The plan: pure, exact in its counts, the paper's numbers from a config alone, and an error for every misfit."""

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, num_parameters
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from hyperfade.errors import AlgebraError, AllExcludedError, NothingMatchedError, PlanError
from hyperfade.recipe import Layer, Recipe, Replace, Rule
from hyperfade.surgery import Plan, drop_dense_, human, matched_low_rank, plan, swap_

ALL = pytest.mark.parametrize("name", FAMILIES)
CHOICES = {
    "default": Replace(),
    "everything": Replace(
        language=Layer(kind="learned", n=2, terms=3),
        vision=Layer(kind="complex", terms=3),
        projector=Layer(kind="low_rank", fraction=0.3),
    ),
    "companion": Replace(language=Layer(n=4, companion_rank=2), vision=None),
}


def _labels(the_plan: Plan) -> dict[str, str]:
    return {swap.name: swap.spec.label for swap in the_plan.swaps}


@ALL
@pytest.mark.parametrize("choice", CHOICES)
def test_counts_are_those_of_the_model_before_and_after(name: str, choice: str) -> None:
    model = FAMILIES[name].build()
    the_plan = plan(model, CHOICES[choice])
    replaced_before = sum(p.numel() for s in the_plan.swaps for p in model.get_submodule(s.name).parameters())
    assert the_plan.parameters_before == num_parameters(model)
    swap_(model, the_plan)
    drop_dense_(model)
    assert the_plan.parameters_after == num_parameters(model)
    replaced_after = sum(p.numel() for s in the_plan.swaps for p in model.get_submodule(s.name).parameters())
    assert the_plan.saved_parameters == replaced_before - replaced_after > 0
    assert the_plan.ffn_params_ratio == pytest.approx(replaced_after / replaced_before, rel=1e-12)
    assert the_plan.params_ratio == pytest.approx(num_parameters(model) / the_plan.parameters_before, rel=1e-12)
    assert the_plan.bytes(2) == (2 * the_plan.parameters_before, 2 * num_parameters(model))


@ALL
def test_a_plan_changes_nothing_and_needs_no_memory(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modules = {k: id(v) for k, v in model.named_modules()}
    trains = {k: p.requires_grad for k, p in model.named_parameters()}
    the_plan = plan(model, Recipe())
    assert {k: id(v) for k, v in model.named_modules()} == modules
    assert {k: p.requires_grad for k, p in model.named_parameters()} == trains
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert plan(family.meta(), Recipe()) == the_plan


def _paper_config() -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B, as its config.json has it."""
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "rope_parameters": rope}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def test_the_papers_number_from_the_config_alone() -> None:
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(_paper_config())
    the_plan = plan(model, Recipe.load("paper"))
    language, vision = 3 * 3584 * 18944, 3 * 1280 * 3420  # per layer, biases aside
    saved = 25 * language // 2 + 3 * language // 4 + 32 * vision // 2
    assert the_plan.parameters_before == 8_292_166_656
    assert the_plan.parameters_after == 8_292_166_656 - saved == 5_383_203_840
    assert (human(the_plan.parameters_before), human(the_plan.parameters_after)) == ("8.29 B", "5.38 B")
    terms = {s.name: s.spec.algebra.size for s in the_plan.swaps if s.spec.algebra and s.region == "language"}
    assert sorted({int(n.split("layers.")[1].split(".")[0]) for n, t in terms.items() if t == 3}) == [25, 26, 27]
    assert {s.region for s in the_plan.swaps} == {"language", "vision"}
    assert len(the_plan.swaps) == 28 * 3 + 32 * 3


QUARTER, HALF, THREE = "products n=4 R=4", "products n=2 R=2", "products n=2 R=3"


def _llava_plan(**fields: Any) -> dict[str, str]:
    """What becomes of which layer, named short: `language.2.up_proj`."""
    model = FAMILIES["llava_siglip"].meta()
    labels = _labels(plan(model, Replace(**fields)))
    return {
        n.replace("model.language_model.layers", "language")
        .replace("model.vision_tower.encoder.layers", "vision")
        .replace("model.multi_modal_projector", "projector")
        .replace(".mlp", ""): label
        for n, label in labels.items()
    }


def test_regions_choose_and_null_keeps_dense() -> None:
    found = _llava_plan(language=Layer(n=4), vision=None, projector=Layer(n=2))
    assert {n.split(".")[0] for n in found} == {"language", "projector"}
    assert {label for n, label in found.items() if n.startswith("language")} == {QUARTER}
    assert {label for n, label in found.items() if n.startswith("projector")} == {HALF}


def test_the_last_matching_rule_wins() -> None:
    rules = (
        Rule(match="*.layers.1.*", layer=Layer(n=2)),
        Rule(match="*.1.mlp.up_proj", layer=Layer(n=2, products=3)),
    )
    found = _llava_plan(rules=rules)
    assert found["language.1.up_proj"] == THREE
    assert found["language.1.gate_proj"] == found["vision.1.fc1"] == HALF
    assert found["language.0.up_proj"] == found["vision.0.fc1"] == QUARTER
    assert _llava_plan(rules=rules[::-1])["language.1.up_proj"] == HALF


def test_a_rule_may_be_kept_to_a_region_and_to_its_last_ffns() -> None:
    found = _llava_plan(rules=(Rule(region="vision", layer=Layer(n=2)),))
    assert {n for n, label in found.items() if label == HALF} == {n for n in found if n.startswith("vision")}
    found = _llava_plan(rules=(Rule(region="language", last_layers=2, layer=Layer(n=2)),))
    expected = {f"language.{i}.{m}" for i in (1, 2) for m in ("gate_proj", "up_proj", "down_proj")}
    assert {n for n, label in found.items() if label == HALF} == expected
    found = _llava_plan(rules=(Rule(last_layers=1, layer=Layer(n=2)),))  # of each region, the projector's too
    expected = {f"language.2.{m}" for m in ("gate_proj", "up_proj", "down_proj")} | {"vision.1.fc1", "vision.1.fc2"}
    expected |= {"projector.linear_1", "projector.linear_2"}
    assert {n for n, label in found.items() if label == HALF} == expected


def test_a_rule_with_layer_null_keeps_dense_and_says_so() -> None:
    choice = Replace(rules=(Rule(match="*.layers.0.mlp.*", layer=None),))
    model = FAMILIES["llama"].meta()
    the_plan = plan(model, choice)
    kept = dict(the_plan.kept)
    names = {f"model.layers.0.mlp.{m}" for m in ("gate_proj", "up_proj", "down_proj")}
    assert kept.keys() == names
    assert "rule '*.layers.0.mlp.*'" in kept["model.layers.0.mlp.up_proj"]
    assert [ffn.name for ffn in the_plan.ffns] == ["model.layers.1.mlp", "model.layers.2.mlp"]


def test_a_rule_may_add_what_the_region_keeps_dense() -> None:
    found = _llava_plan(language=None, vision=None, rules=(Rule(match="*.2.mlp.down_proj", layer=Layer(n=2)),))
    assert found == {"language.2.down_proj": HALF}


def test_exclusion_wins_over_rules_and_names_its_reason() -> None:
    choice = Replace(exclude=("*.down_proj",), rules=(Rule(layer=Layer(n=2)),))
    the_plan = plan(FAMILIES["llama"].meta(), choice)
    assert len(the_plan.swaps) == 6
    assert dict(the_plan.kept) == {f"model.layers.{i}.mlp.down_proj": "excluded" for i in range(3)}


def test_small_matrices_stay_dense_and_the_limit_itself_does_not() -> None:
    size = 32 * 48  # language; vision has 16 · 40
    found = _llava_plan(min_weight_elements=size)
    assert {n.split(".")[0] for n in found} == {"language"}
    with pytest.raises(AllExcludedError, match=f"min_weight_elements={size + 1}"):
        _llava_plan(min_weight_elements=size + 1)


class _Plain(nn.Module):
    """No model of any family."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))
        self.head = nn.Linear(8, 4)


def test_patterns_name_linears_of_any_module() -> None:
    model = _Plain()
    the_plan = plan(model, Replace(patterns=("encode.*", "*.2"), other=Layer(n=4)))
    assert _labels(the_plan) == {"encode.0": QUARTER, "encode.2": QUARTER}
    assert {s.region for s in the_plan.swaps} == {"other"}
    assert [s.spec.bias for s in the_plan.swaps] == [True, False]
    swap_(model, the_plan)
    drop_dense_(model)
    assert num_parameters(model) == the_plan.parameters_after


def test_patterns_add_to_the_known_shapes_and_never_take_a_matrix_twice() -> None:
    model = FAMILIES["llama"].build()
    the_plan = plan(model, Replace(language=Layer(n=4), patterns=("*.0.*_proj",), other=Layer(n=2)))
    labels = _labels(the_plan)
    assert len(the_plan.swaps) == len(labels)
    assert labels["model.layers.0.mlp.up_proj"] == QUARTER
    assert labels["model.layers.0.self_attn.q_proj"] == HALF
    swap_(model, the_plan)
    drop_dense_(model)
    assert num_parameters(model) == the_plan.parameters_after


def test_tied_matrices_stay_dense() -> None:
    model = FAMILIES["qwen2"].build()  # its head is its embedding
    the_plan = plan(model, Replace(patterns=("lm_head",), other=Layer(n=2)))
    assert ("lm_head", "sharing its weight with another module") in the_plan.kept
    assert all(s.name != "lm_head" for s in the_plan.swaps)
    swap_(model, the_plan)
    drop_dense_(model)
    assert num_parameters(model) == the_plan.parameters_after


def test_a_module_used_twice_stays_dense() -> None:
    model = _Plain()
    model.again = model.encode[0]
    the_plan = plan(model, Replace(patterns=("encode.*",), other=Layer(n=2)))
    assert _labels(the_plan) == {"encode.2": HALF}


def test_a_dimension_that_does_not_divide_names_the_layer_and_one_that_does() -> None:
    with pytest.raises(AlgebraError) as caught:
        plan(FAMILIES["llava_siglip"].meta(), Replace(language=Layer(n=3), vision=None))
    assert "model.language_model.layers.0.mlp.gate_proj" in caught.value.message
    assert "in_features=32, out_features=48" in caught.value.message
    assert caught.value.hint == "n = 2, 4, 8, 16 would fit."


def test_a_pattern_that_matches_nothing_is_named_beside_what_there_is() -> None:
    with pytest.raises(NothingMatchedError, match=r"'decoder\.\*' matches no nn\.Linear") as caught:
        plan(_Plain(), Replace(patterns=("encode.*", "decoder.*"), other=Layer(n=2)))
    assert "encode.0, encode.2, head" in caught.value.hint
    with pytest.raises(NothingMatchedError, match="encode"):  # a Sequential, not a linear
        plan(_Plain(), Replace(patterns=("encode",), other=Layer(n=2)))


def test_a_model_without_ffns_is_refused_with_the_way_to_name_them() -> None:
    with pytest.raises(NothingMatchedError, match="_Plain has no feed-forward network") as caught:
        plan(_Plain(), Recipe())
    assert "replace.patterns" in caught.value.hint


def test_all_excluded_is_another_error_than_nothing_matched() -> None:
    model = FAMILIES["llama"].meta()
    for choice in (Replace(exclude=("*",)), Replace(language=None), Replace(rules=(Rule(layer=None),))):
        with pytest.raises(AllExcludedError, match="All 9 matching matrices of LlamaForCausalLM stay dense"):
            plan(model, choice)


@pytest.mark.parametrize(
    "layer",
    [
        Layer(n=2, products=4),
        Layer(n=4, companion_rank=16),
        Layer(kind="complex", terms=4),
        Layer(kind="learned", n=2, terms=4),
    ],
    ids=str,
)
def test_a_layer_that_would_not_shrink_is_refused(layer: Layer) -> None:
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp\.gate_proj \(48, 32\) would not shrink") as caught:
        plan(FAMILIES["llama"].meta(), Replace(language=layer))
    assert "1,536" in caught.value.message  # 32 · 48


def test_the_bias_counts_on_both_sides_of_the_comparison() -> None:
    module = nn.Sequential(nn.Linear(4, 8))  # 40 with bias; three quarters of 32 and the bias make 32
    the_plan = plan(module, Replace(patterns=("0",), other=Layer(kind="complex", terms=3)))
    assert (the_plan.parameters_before, the_plan.parameters_after) == (40, 32)


def test_a_low_rank_layer_that_cannot_shrink_is_refused() -> None:
    with pytest.raises(PlanError, match="would not shrink"):  # rank 1 of a (2, 2) matrix has four numbers as well
        plan(nn.Sequential(nn.Linear(2, 2)), Replace(patterns=("0",), other=Layer(kind="low_rank", fraction=0.5)))


@ALL
def test_the_low_rank_rival_has_no_more_parameters_and_one_rank_more_would(name: str) -> None:
    for swap in plan(FAMILIES[name].meta(), Recipe()).swaps:
        s, rank = swap.spec, matched_low_rank(swap)
        budget = s.num_parameters - (s.out_features if s.bias else 0)
        assert 1 <= rank * (s.in_features + s.out_features) <= budget < (rank + 1) * (s.in_features + s.out_features)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (1_234_567, "1.23 M"), (5_383_203_840, "5.38 B"), (2e15, "2000.00 T")],
)
def test_human(count: float, text: str) -> None:
    assert human(count) == text


@pytest.mark.parametrize("choice", [Replace(exclude=("*typo*",)), Replace(rules=(Rule(match="*typo*", layer=None),))])
def test_an_exclusion_or_rule_that_speaks_of_nothing_is_an_error(choice: Replace) -> None:
    with pytest.raises(NothingMatchedError, match="typo"):
        plan(FAMILIES["llama"].meta(), choice)


def test_a_region_without_ffns_is_named() -> None:
    assert plan(FAMILIES["llama"].meta(), Replace()).missing == ("vision",)
