"""FFNs alone: the right layers are built, as a model has them, and timed against each other."""

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, randomize_
from torch import nn

from hyperfade.hub import fold_
from hyperfade.measure import LayerTime, compare_ffns, weight_bytes
from hyperfade.measure.layers import copies, describe, distinct_ffns, fill_, last_cache_bytes, lone_ffn, low_rank_swaps
from hyperfade.measure.layers import time_layers as timed
from hyperfade.recipe import Layer, Recipe, Replace, Rule
from hyperfade.surgery import find_ffns, plan, set_alpha_, swap_

ALL = pytest.mark.parametrize("name", FAMILIES)
CPU = torch.device("cpu")


@ALL
def test_a_lone_ffn_computes_what_the_models_own_does(name: str) -> None:
    """The oracle is the model's module, after the same swap and with the same weights."""
    model = FAMILIES[name].build()
    the_plan = plan(FAMILIES[name].meta(), Replace(language=Layer(n=2), vision=Layer(kind="complex")))
    swap_(model, the_plan)
    set_alpha_(model, 1.0)
    fold_(model)
    for ffn, swaps, _ in distinct_ffns(FAMILIES[name].meta(), the_plan):
        alone, inside = lone_ffn(FAMILIES[name].meta(), ffn, swaps, torch.float32, CPU), model.get_submodule(ffn.name)
        linears = {n.removeprefix(ffn.name + "."): model.get_submodule(n) for n in ffn.linears}
        x = torch.randn(3, next(iter(linears.values())).in_features)
        if type(alone) is not type(inside):  # a layer with attention in it: the two matrices with GELU between them
            reader, writer = linears.values()
            alone.readers[0].load_state_dict(reader.state_dict())
            alone.writer.load_state_dict(writer.state_dict())
            expected = writer(nn.functional.gelu(reader(x)))
        else:
            alone.load_state_dict(inside.state_dict())
            expected = inside(x)
        assert torch.equal(alone(x), expected)


@ALL
def test_kinds_count_every_ffn_once_and_what_differs_is_apart(name: str) -> None:
    model = FAMILIES[name].meta()
    every = plan(model, Replace())
    assert sum(count for *_, count in distinct_ffns(model, every)) == len(every.ffns)
    top = plan(model, Replace(rules=(Rule(region="language", last_layers=1, layer=Layer(n=2)),)))
    counts = [count for ffn, _, count in distinct_ffns(model, top) if ffn.region == "language"]
    assert sorted(counts)[0] == 1
    assert sum(counts) == sum(ffn.region == "language" for ffn in top.ffns)


def test_widths_in_words() -> None:
    model = FAMILIES["llava_siglip"].meta()
    words = {ffn.region: describe(model, ffn) for ffn in find_ffns(model)}
    assert words == {"language": "32 → 48 → 32, gated", "vision": "16 → 40 → 16", "projector": "16 → 32 → 32"}


def test_a_low_rank_rival_is_no_larger_and_nearly_as_large() -> None:
    swaps = plan(FAMILIES["qwen2"].meta(), Recipe()).swaps
    for swap, rival in zip(swaps, low_rank_swaps(swaps), strict=True):
        own, other = swap.spec.num_parameters, rival.spec.num_parameters
        assert rival.spec.algebra is None
        assert own - (swap.spec.in_features + swap.spec.out_features) < other <= own


@pytest.mark.parametrize("layer", [Layer(kind="dense", width=0.5), Layer(n=4, width=0.5)], ids=["dense", "products"])
def test_a_narrow_ffn_and_its_low_rank_rival_read_and_write_what_the_dense_one_does(layer: Layer) -> None:
    model = FAMILIES["llava_siglip"].meta()
    for ffn, swaps, _ in distinct_ffns(model, plan(model, Replace(language=layer, vision=layer))):
        own, rival = (lone_ffn(model, ffn, some, torch.float32, CPU) for some in (swaps, low_rank_swaps(swaps)))
        x = torch.randn(3, model.get_submodule(ffn.linears[0]).in_features)
        assert own(x).shape == rival(x).shape == x.shape
        sizes = [sum(p.numel() for p in ffn.parameters()) for ffn in (own, rival)]
        assert 0.7 * sizes[0] < sizes[1] <= sizes[0]  # observed 0.71 to 0.94: ranks are whole


def test_copies_exceed_the_cache_four_times_but_not_the_memory() -> None:
    layer = nn.Linear(100, 10)  # 4,040 bytes
    several = copies(layer, cache_bytes=10_000)
    assert several[0] is layer
    assert len(several) == 10  # ⌈40,000 / 4,040⌉
    assert len({p.data_ptr() for one in several for p in one.parameters()}) == 20
    assert len(copies(layer, cache_bytes=1_000)) == 1
    assert len(copies(layer, cache_bytes=10**9)) == 256
    assert weight_bytes(layer) == 4040
    assert 2**18 <= last_cache_bytes(torch.device("cpu")) <= 2**31


def test_filling_gives_finite_varied_weights_of_a_fresh_layers_size() -> None:
    layer = nn.Sequential(nn.Linear(2048, 1024), nn.LayerNorm(1024)).to(torch.bfloat16)
    randomize_(layer, 1)
    fill_(layer)
    weight = layer[0].weight.float()
    assert weight.std().item() == pytest.approx(2048**-0.5, rel=0.01)  # observed: 0.1 % off
    assert len(weight.unique()) > 1000
    assert torch.equal(layer[1].weight, torch.ones(1024, dtype=torch.bfloat16))
    assert not layer[0].bias.any()


class _Counting(nn.Module):
    """Counts its calls; a product of (M, 4) by (4, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(4, 6, bias=False), 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return self.inner(x)


def test_calls_go_round_all_copies_and_operations_are_counted() -> None:
    first, second = [_Counting() for _ in range(3)], [_Counting()]
    times = timed({"first": first, "second": second}, 4, tokens=5, rounds=(3, 3))
    assert max(c.calls for c in first) - min(c.calls for c in first) <= 3  # the first counts, and warms up
    assert min(c.calls for c in first) > 3
    for time in times.values():
        assert (time.flops, time.weight_bytes, len(time.seconds)) == (2 * 5 * 4 * 6, 4 * 4 * 6, 3)


def test_a_speedup_is_the_median_of_the_rounds_ratios() -> None:
    dense, light = LayerTime((2.0, 4.0, 9.0), 0, 0), LayerTime((1.0, 1.0, 3.0), 0, 0)
    assert light.speedup_over(dense) == (3.0, 2.0, 4.0)  # ratios 2, 4, 3; not 4 / 1, the ratio of the medians
    assert str(light.speedup_over(dense)) == "3.00× (2.00-4.00)"


def test_every_distinct_ffn_of_a_plan_is_compared() -> None:
    model = FAMILIES["smolvlm"].meta()
    seen: list[str] = []
    found = compare_ffns(model, plan(model, Recipe()), torch.float32, CPU, (1, 3), seen.append)
    assert seen == ["vision 16 → 40 → 16", "language 32 → 48 → 32, gated"]
    assert [(f.region, f.count, f.labels) for f in found] == [
        ("vision", 2, ("products n=4 R=4",)),
        ("language", 3, ("products n=4 R=4",)),
    ]
    for ffn in found:
        assert list(ffn.times) == [1, 3]
        dense, light, rival = (ffn.times[3][name] for name in ("dense", "compressed", "low_rank"))
        assert dense.weight_bytes > light.weight_bytes >= rival.weight_bytes
        assert all(seconds > 0 for time in (dense, light, rival) for seconds in time.seconds)
