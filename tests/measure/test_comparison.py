"""The comparison's methods have the size they say, and its page is exactly what the kept results give."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hyperfade.recipe import Recipe, Replace
from hyperfade.surgery import plan

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import comparison
import comparison_report as report


def _reference_shapes() -> LlavaForConditionalGeneration:
    """The reference model's widths with two layers a side, without weights."""
    vision = Dinov2Config(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, mlp_ratio=4)
    text = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9)
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


@pytest.mark.parametrize("fraction", comparison.FRACTIONS)
def test_every_method_keeps_as_many_parameters_as_its_fraction_says(fraction: float) -> None:
    model = _reference_shapes()
    for method, fields in comparison.methods(fraction).items():
        ratio = plan(model, Replace.model_validate(fields["replace"])).ffn_params_ratio
        # observed -0.0017 (low-rank at 1/8) to +0.0005 (biases), and +0.001 where n·8 units are the step
        assert ratio == pytest.approx(fraction, abs=0.003), method


def test_the_papers_recipe_is_the_one_that_ships_but_for_its_steps() -> None:
    shipped = Recipe.load("paper")
    own = Recipe.parse(comparison.paper())
    assert own.replace == shipped.replace
    assert own.fit == shipped.fit
    assert own.train == shipped.train


def _cell(method: str, rate: float, loss: float) -> dict[str, Any]:
    return {"method": method, "fraction": 0.5, "learning_rate": rate, "loss_after": loss}


def test_training_loss_alone_chooses_the_learning_rate() -> None:
    cells = {"a": _cell("m", 1e-3, 2.0), "b": _cell("m", 5e-4, 1.0), "c": _cell("other", 1e-3, 3.0)}
    assert [(cell["method"], cell["learning_rate"]) for cell in report.best_rates(cells)] == [
        ("m", 5e-4),
        ("other", 1e-3),
    ]


def test_page_and_readme_are_what_the_kept_results_give() -> None:
    kept = report.kept()
    assert report.page(*kept) == report.PAGE.read_text(encoding="utf-8")
    readme = report.README.read_text(encoding="utf-8")
    assert report.with_comparison(readme, kept[0]) == readme
    assert all(path.is_file() for path in report.PLOTS.values())
