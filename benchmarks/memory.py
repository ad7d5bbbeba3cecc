"""What a training holds on each device, by arithmetic from configs alone: python benchmarks/memory.py

Writes the table of docs/launching.md. Counted are weights, gradients and AdamW's moments, and what `train.shard`
gathers while a layer runs; not activations, which depend on the data (with gradient checkpointing two bytes per token,
layer and hidden unit, and one layer's own), nor what a device's libraries take.

    frozen weights    2 bytes, bfloat16; as long as both are whole, student and teacher share them
    what trains       16 bytes: weight, gradient and two moments in float32
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from report_pieces import table
from shapes import MODELS, QWEN_72B
from torch import nn

from hyperfade.distill.divide import layers_of
from hyperfade.recipe import Recipe
from hyperfade.surgery import plan

PAGE = Path(__file__).parents[1] / "docs" / "launching.md"
BEGIN, END = "<!-- memory:begin (benchmarks/memory.py writes this part) -->", "<!-- memory:end -->"
FROZEN, TRAINED, WEIGHT = 2, 16, 4  # bytes; the last is a trained weight alone
AT_ONCE = 2  # layers gathered at a time: the one that runs, and the next
RUNS = {"Qwen2.5-VL-7B": (MODELS["Qwen2.5-VL-7B"], (1, 2, 4, 8)), "Qwen2.5-VL-72B": (QWEN_72B, (1, 8, 16, 32, 64))}
TOKENS = 8192  # of a process in one forward pass, for the activations


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: all, those that are replaced, what takes their place; of language layers, and of one."""

    whole: int
    dense: int
    trained: int
    layers: int
    layers_dense: int
    layers_trained: int
    number: int
    hidden: int

    @property
    def layer(self) -> int:
        """Parameters of one language layer."""
        return self.layers // self.number


def sizes(model: nn.Module, recipe: Recipe) -> Sizes:
    """Of a model on the meta device, and what `recipe` makes of it."""
    chosen, layers = plan(model, recipe), layers_of(model)
    within = [swap for swap in chosen.swaps if any(swap.name.startswith(f"{name}.") for name in layers)]
    return Sizes(
        whole=chosen.parameters_before,
        dense=sum(swap.dense_parameters for swap in chosen.swaps),
        trained=sum(swap.spec.num_parameters for swap in chosen.swaps),
        layers=sum(p.numel() for layer in layers.values() for p in layer.parameters()),
        layers_dense=sum(swap.dense_parameters for swap in within),
        layers_trained=sum(swap.spec.num_parameters for swap in within),
        number=len(layers),
        hidden=model.get_input_embeddings().weight.shape[1],  # type: ignore[operator]
    )


def copies_bytes(size: Sizes, *, cached: bool) -> int:
    """Of a process that holds everything: with a live teacher all the time, with a cached one after the fade."""
    return FROZEN * (size.whole - size.dense * cached) + TRAINED * size.trained


def parts_bytes(size: Sizes, processes: int, *, cached: bool) -> int:
    """Of a process with `train.shard`: with a live teacher in the fade, with a cached one after it."""
    outside = FROZEN * (size.whole - size.layers) + WEIGHT * (size.trained - size.layers_trained)
    student = FROZEN * (size.layers - size.layers_dense * cached) + TRAINED * size.trained
    teacher = 0 if cached else FROZEN * size.layers
    rest = FROZEN * (size.layers - size.layers_dense) + 2 * WEIGHT * size.layers_trained  # gradients are whole as well
    gathered = AT_ONCE * max(rest // size.number, 0 if cached else FROZEN * size.layer)
    return outside + (student + teacher) // processes + gathered


def rows() -> Iterator[list[str]]:
    """The table's lines."""
    recipe = Recipe.load("quarter")
    for name, (model, processes) in RUNS.items():
        size = sizes(model.skeleton(), recipe)
        kept = FROZEN * size.number * TOKENS * size.hidden
        for number in processes:
            found = [copies_bytes(size, cached=cached) for cached in (False, True)]
            if number > 1:
                found = [parts_bytes(size, number, cached=cached) for cached in (False, True)]
            how = "whole" if number == 1 else f"{number} parts"
            yield [name, how, *(f"{value / 1e9:.1f} GB" for value in (*found, kept))]


def page(text: str) -> str:
    """The page with its table made anew."""
    head = ["model", "each process holds", "live teacher, fade", "cached teacher, polish", "activations, about"]
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(head, list(rows()))}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
