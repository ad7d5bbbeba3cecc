"""What only an accelerator can show: HYPERFADE_TEST_ACCELERATOR=1 python -m pytest tests/gpu tests/nn/test_kernel.py

Everything else is tested on the processor, where numbers repeat bit by bit.
"""

import pytest
import torch

from hyperfade.hub import EMBEDDED_FOLDER, load
from hyperfade.measure import device
from hyperfade.nn import PHMLinear, light_modules
from hyperfade.pipeline import compress
from hyperfade.recipe import Recipe

pytestmark = pytest.mark.skipif(device().type == "cpu", reason="needs an accelerator and HYPERFADE_TEST_ACCELERATOR=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A small run of the shipped model with what runs on the device: fit by a budget, fade, a teacher's answers kept on
    disk, LoRA, a rival."""
    recipe = Recipe.parse(
        {
            "model": str(EMBEDDED_FOLDER),
            "output": str(tmp_path_factory.mktemp("gpu") / "run"),
            "replace": {"language": {"n": 4, "width": 0.5}, "vision": {"n": 4}, "budget": 0.25},
            "fit": {"samples": 16, "batch_size": 8, "sweeps": 2},
            "train": {"fade_steps": 2, "polish_steps": 2, "batch_size": 4, "teacher": "cached", "lora_rank": 2},
            "data": {"evaluation_limit": 64, "max_new_tokens": 4},
            "rivals": {"low_rank": {"replace": {"language": {"kind": "low_rank", "fraction": 0.25}, "vision": None}}},
        }
    )
    results = compress(recipe)
    assert results["reload_bit_equal"]
    return recipe


def test_a_compressed_model_answers_on_the_device_as_on_the_processor(finished: Recipe) -> None:
    here, there = (load(str(finished.output / "model"), dtype="float32").to(place) for place in ("cpu", device()))
    assert any(isinstance(layer, PHMLinear) for layer in light_modules(there).values())
    ids = torch.arange(5, 12)[None]
    with torch.inference_mode():
        expected = here.model.language_model(input_ids=ids).last_hidden_state
        found = there.model.language_model(input_ids=ids.to(device())).last_hidden_state.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
