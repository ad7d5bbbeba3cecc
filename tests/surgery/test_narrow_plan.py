"""Plans with a width or a fraction: which units count where, what it adds up to, and what is refused."""

import pytest
import torch
from tiny_models import FAMILIES, num_parameters
from torch import nn

from hyperfade.errors import PlanError
from hyperfade.nn import LightSpec, NarrowLinear
from hyperfade.recipe import Kind, Layer, Replace, Rule
from hyperfade.report import plan_lines
from hyperfade.surgery import Plan, drop_dense_, find_ffns, plan, swap_

NARROW = {
    "dense": Layer(kind="dense", width=0.5),
    "products": Layer(n=4, width=0.5),
    "low_rank": Layer(kind="low_rank", fraction=0.5, width=0.7),
    "filled": Layer(n=4, fraction=0.6, width=0.75),
}


class _Wide(nn.Module):
    """An FFN as wide as real ones, on the meta device."""

    def __init__(self, hidden: int, features: int = 64) -> None:
        super().__init__()
        with torch.device("meta"):
            self.fc1, self.fc2 = nn.Linear(features, hidden), nn.Linear(hidden, features)


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("name", FAMILIES)
def test_readers_write_as_many_units_as_the_writer_reads_and_all_else_is_as_wide_as_before(
    name: str, kind: str
) -> None:
    model = FAMILIES[name].meta()
    the_plan = plan(model, Replace(language=NARROW[kind], vision=NARROW[kind]))
    specs = {swap.name: swap.spec for swap in the_plan.swaps}
    assert len(the_plan.ffns) == sum(ffn.region in ("language", "vision") for ffn in find_ffns(model))
    for ffn in the_plan.ffns:
        hidden = model.get_submodule(ffn.writer).in_features
        kept = specs[ffn.writer].in_features
        assert 0 < kept < hidden
        assert kept % 4 == 0 or kind in ("dense", "low_rank")
        for linear in ffn.linears:
            dense, spec = model.get_submodule(linear), specs[linear]
            assert spec.replaced == spec.dense_features == (dense.in_features, dense.out_features)
            expected = (kept, dense.out_features) if linear == ffn.writer else (dense.in_features, kept)
            assert (spec.in_features, spec.out_features) == expected


@pytest.mark.parametrize(
    ("layer", "hidden", "kept"),
    [
        (Layer(kind="dense", width=0.5), 1024, 512),
        (Layer(kind="dense", width=0.33), 1024, 336),  # 337.9 to the nearest multiple of 8
        (Layer(kind="dense", width=0.001), 1024, 8),
        (Layer(kind="dense", width=0.9999), 1024, 1016),
        (Layer(kind="dense", width=0.9999), 3420, 3416),  # Qwen2.5-VL's tower: no multiple of 8
        (Layer(n=16, width=0.33), 1024, 336),
        (Layer(n=16, width=0.32), 1024, 320),
        (Layer(n=3, width=0.5), 960, 480),  # a multiple of 24
        (Layer(kind="octonion", terms=3, width=0.5), 72, 32),  # hidden / 32 is 2, and 36 are not octonions
        (Layer(kind="quaternion", terms=3, width=0.3), 40, 12),
        (Layer(kind="complex", terms=2, width=0.5), 10, 4),
        (Layer(kind="dense", width=0.5), 10, 5),
    ],
    ids=str,
)
def test_as_many_units_stay_as_are_fast_and_the_algebra_divides(layer: Layer, hidden: int, kept: int) -> None:
    features = 24 if layer.n == 3 else 64
    specs = [swap.spec for swap in plan(_Wide(hidden, features), Replace(language=layer)).swaps]
    assert [specs[0].out_features, specs[1].in_features] == [kept, kept]


def test_a_width_that_can_keep_no_fast_number_of_units_is_refused() -> None:
    with pytest.raises(
        PlanError, match=r"fc1: a width keeps a multiple of 16 hidden units, and there are 16"
    ) as caught:
        plan(_Wide(16), Replace(language=Layer(n=16, width=0.5)))
    assert "smaller n" in caught.value.hint


def _parameters_by_hand(layer: Layer, d: int, k: int, bias: bool) -> int:
    """A layer of (d, k) features, written out."""
    own = k if bias else 0
    if layer.kind == "dense":
        return own + d * k
    if layer.kind == "low_rank":
        return own + max(1, int(layer.fraction * d * k) // (d + k)) * (d + k)
    n = layer.n
    products = n * d * k // n**2 + 2 * n * n  # T, and P and Q
    rank = int(layer.fraction * d * k - products) // (d + k) if layer.fraction else 0
    return own + products + rank * (d + k)


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("name", ["llava_siglip", "qwen2_5_vl", "blip2_t5"])
def test_counts_are_a_hand_computation_and_those_of_the_finished_model(name: str, kind: str) -> None:
    model, layer = FAMILIES[name].build(), NARROW[kind]
    the_plan = plan(model, Replace(language=layer, vision=layer))
    before = after = 0
    step = 4 if layer.n else 1
    for ffn in the_plan.ffns:
        for linear in ffn.linears:
            dense = model.get_submodule(linear)
            d, k, bias = dense.in_features, dense.out_features, dense.bias is not None
            before += d * k + (k if bias else 0)
            if linear == ffn.writer:
                d = round(layer.width * d / step) * step
            else:
                k = round(layer.width * k / step) * step
            after += _parameters_by_hand(layer, d, k, bias)
    assert the_plan.ffn_params_ratio == pytest.approx(after / before, rel=1e-12)  # observed 3e-16
    swap_(model, the_plan)
    drop_dense_(model)
    assert num_parameters(model) == the_plan.parameters_after == the_plan.parameters_before - before + after
    narrow = [type(model.get_submodule(swap.name)) is NarrowLinear for swap in the_plan.swaps]
    assert set(narrow) == {kind == "dense"}


def test_multiply_adds_and_labels_are_those_of_the_narrow_layer() -> None:
    dense = LightSpec(32, 24, True, None, 0, (32, 48))
    assert (dense.multiply_adds, dense.num_parameters, dense.label) == (32 * 24, 32 * 24 + 24, "dense 32→24")
    swaps = {s.name: s for s in plan(FAMILIES["llama"].meta(), Replace(language=Layer(n=4, width=0.5))).swaps}
    down = swaps["model.layers.0.mlp.down_proj"]
    assert (down.spec.label, down.dense_multiply_adds) == ("products n=4 R=4 24→32", 48 * 32)


def test_the_printed_plan_shows_the_dense_features_beside_what_stays() -> None:
    lines = plan_lines(plan(FAMILIES["llama"].meta(), Replace(language=NARROW["dense"])))
    (row,) = (line.split() for line in lines if "up_proj" in line)
    assert row[:8] == ["language", "up_proj", "32", "→", "48", "3", "dense", "32→24"]


EVERY_OTHER = Layer(kind="dense", width=0.25)


@pytest.mark.parametrize(
    "choice",
    [
        Replace(language=NARROW["dense"], rules=(Rule(match="*.1.mlp.up_proj", layer=EVERY_OTHER),)),
        Replace(language=NARROW["dense"], rules=(Rule(match="*.1.mlp.down_proj", layer=None),)),
        Replace(language=NARROW["dense"], rules=(Rule(match="*.1.mlp.gate_proj", layer=Layer(n=4)),)),
        Replace(language=Layer(n=4), rules=(Rule(match="*.1.mlp.down_proj", layer=NARROW["dense"]),)),
        Replace(language=None, rules=(Rule(match="*.1.mlp.down_proj", layer=NARROW["dense"]),)),
        Replace(language=NARROW["products"], exclude=("*.1.mlp.up_proj",)),
    ],
    ids=["another width", "kept dense", "no width", "one with a width", "that one only", "excluded"],
)
def test_an_ffn_whose_matrices_disagree_on_its_units_is_named(choice: Replace) -> None:
    with pytest.raises(PlanError, match=r"^model\.layers\.1\.mlp: .*different numbers of hidden units") as caught:
        plan(FAMILIES["llama"].meta(), choice)
    assert "whole FFN" in caught.value.hint


def test_matrices_of_one_width_may_become_different_kinds() -> None:
    rules = (Rule(match="*.down_proj", layer=NARROW["products"]), Rule(match="*.0.mlp.*", layer=None))
    the_plan = plan(FAMILIES["llama"].meta(), Replace(language=NARROW["dense"], rules=rules))
    labels = {swap.name.partition("mlp.")[2]: swap.spec.label for swap in the_plan.swaps}
    assert labels == {"gate_proj": "dense 32→24", "up_proj": "dense 32→24", "down_proj": "products n=4 R=4 24→32"}
    assert len(the_plan.kept) == 3


@pytest.mark.parametrize("name", ["paligemma", "idefics3", "blip2_opt"])
def test_a_projector_of_one_matrix_loses_products_in_place_of_hidden_units(name: str) -> None:
    model = FAMILIES[name].meta()

    def of(layer: Layer) -> Plan:
        return plan(model, Replace(language=None, vision=None, projector=layer))

    single = {ffn.name for ffn in find_ffns(model) if ffn.region == "projector" and not ffn.readers}
    with_width, without = (
        {swap.name: swap.spec for swap in the_plan.swaps if swap.ffn in single}
        for the_plan in (of(Layer(n=4, width=0.5)), of(Layer(n=4, products=2)))
    )
    assert with_width == without != {}
    assert all(spec.replaced is None for spec in with_width.values())
    beside = plan(model, Replace(language=None, vision=Layer(n=4), projector=NARROW["dense"]))
    assert {name for name, reason in beside.kept if "kind 'dense' has a width only" in reason} == single


# --- a fraction -------------------------------------------------------------------------------------------------------

KINDS: tuple[Kind, ...] = ("products", "learned", "quaternion")


@pytest.mark.parametrize("width", [None, 0.5])
@pytest.mark.parametrize("fraction", [0.4, 0.55, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fraction_is_filled_up_with_a_companion(kind: Kind, fraction: float, width: float | None) -> None:
    size = {"n": 4} if kind == "products" else {"n": 4, "terms": 2} if kind == "learned" else {"terms": 3}
    layer = Layer(kind=kind, fraction=fraction, width=width, **size)
    for swap in plan(FAMILIES["llava_siglip"].meta(), Replace(language=layer, vision=layer)).swaps:
        d, k = swap.spec.in_features, swap.spec.out_features
        own = swap.spec.num_parameters - (k if swap.spec.bias else 0)
        assert fraction * d * k - (d + k) < own <= fraction * d * k
        assert swap.spec.algebra is not None


def test_a_fraction_smaller_than_the_layer_itself_names_the_matrix_and_the_way_out() -> None:
    layer = Layer(n=4, fraction=0.25)  # n = 4 is a quarter, and P and Q come to it
    with pytest.raises(PlanError, match=r"mlp\.gate_proj \(48, 32\): its products alone take 0\.271") as caught:
        plan(FAMILIES["llama"].meta(), Replace(language=layer))
    assert caught.value.hint == "Raise the fraction, or ask for fewer terms or products."
    assert "fraction is 0.25" in caught.value.message
