"""The arithmetic of docs/launching.md: its counts are those of a swapped model, its table is what the script writes."""

import sys
from pathlib import Path

from tiny_models import FAMILIES

from hyperfade.recipe import Recipe
from hyperfade.surgery import blends, plan, swap_

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import memory


def test_sizes_are_those_of_a_swapped_model() -> None:
    recipe, family = Recipe.load("quarter"), FAMILIES["llava_siglip"]
    found, model = memory.sizes(family.meta(), recipe), family.build()
    assert found.whole == sum(p.numel() for p in model.parameters())
    assert found.layers == sum(p.numel() for n, p in model.named_parameters() if "language_model.layers" in n)
    assert (found.number, found.hidden) == (3, 32)
    model.requires_grad_(False)
    swap_(model, plan(model, recipe))
    for parts, dense, trained in (
        (blends(model), found.dense, found.trained),
        ({n: b for n, b in blends(model).items() if "language" in n}, found.layers_dense, found.layers_trained),
    ):
        assert dense == sum(p.numel() for blend in parts.values() for p in blend.dense.parameters())
        assert trained == sum(p.numel() for blend in parts.values() for p in blend.light.parameters())


def test_parts_get_smaller_down_to_what_every_process_holds() -> None:
    size = memory.sizes(FAMILIES["llava_siglip"].meta(), Recipe.load("quarter"))
    for cached in (False, True):
        held = [memory.parts_bytes(size, processes, cached=cached) for processes in (1, 2, 4, 10**9)]
        assert held == sorted(held, reverse=True)
        assert held[-1] > 2 * (size.whole - size.layers)
        divided = 16 * size.trained + 2 * (size.layers - size.layers_dense if cached else 2 * size.layers)
        assert held[0] - held[-1] == divided
        assert held[0] - held[1] == divided - divided // 2


def test_the_page_holds_the_table_that_the_script_writes() -> None:
    text = memory.PAGE.read_text(encoding="utf-8")
    assert memory.page(text) == text
