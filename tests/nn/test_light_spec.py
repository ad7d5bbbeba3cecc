"""Specs through JSON and back, and the search for light layers."""

import json

import pytest
import torch
from torch import nn

from hyperfade.algebra import Algebra, LowRankFit
from hyperfade.errors import CheckpointError
from hyperfade.nn import BlendLinear, LightSpec, LowRankLinear, NarrowLinear, PHMLinear, light_modules

SPECS = [
    LightSpec(8, 16, True, Algebra.named("paper", terms=3)),
    LightSpec(16, 8, False, Algebra.named("octonion")),
    LightSpec(8, 16, False, Algebra.named("z2", terms=2, n=4), 3),
    LightSpec(9, 6, True, Algebra.learned(3, 5), 2),
    LightSpec(8, 16, True, Algebra.products(4, 7)),
    LightSpec(8, 16, True, None, 3),
    LightSpec(8, 12, True, None, 0, (8, 16)),
    LightSpec(12, 8, False, Algebra.products(4), 2, (16, 8)),
    LightSpec(12, 8, False, None, 2, (16, 8)),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_specs_survive_json(spec: LightSpec) -> None:
    fields = json.loads(json.dumps(spec.to_dict()))
    assert LightSpec.from_dict(fields, "layer 0") == spec


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_a_layer_and_its_spec_agree(spec: LightSpec) -> None:
    layer = spec.build(dtype=torch.bfloat16)
    assert LightSpec.of(layer) == spec
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert spec.num_parameters == sum(p.numel() for p in layer.parameters())
    assert layer(torch.randn(2, spec.in_features).bfloat16()).shape == (2, spec.out_features)


def test_labels_are_short_names() -> None:
    assert [spec.label for spec in SPECS] == [
        "complex n=2 t=3",
        "octonion n=8 t=8",
        "z2 n=4 t=2 + rank 3",
        "learned n=3 t=5 + rank 2",
        "products n=4 R=7",
        "low-rank q=3",
        "dense 8→12",
        "products n=4 R=4 + rank 2 12→8",
        "low-rank q=2 12→8",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"in_features": 0},
        {"in_features": -8},
        {"in_features": "8"},
        {"out_features": 9},
        {"bias": "yes"},
        {"rank": -1},
        {"rank": None},
        {"rank": 1.5},
        {"algebra": []},
        {"algebra": None, "rank": 0},
        {"surprise": 1},
        {"algebra": {"name": "products"}},
    ],
    ids=str,
)
def test_wrong_fields_are_refused(change: dict) -> None:
    fields = LightSpec(8, 16, True, Algebra.products(4), 2).to_dict() | change
    with pytest.raises(CheckpointError, match=r"model\.layers\.3"):
        LightSpec.from_dict(fields, "model.layers.3")


@pytest.mark.parametrize(
    "change",
    [
        {"n": 0},
        {"n": 1},
        {"n": 3},
        {"n": 4.5},
        {"size": 0},
        {"size": 17},
        {"size": "4"},
        {"form": "terms"},
        {"name": "sedenion"},
        {"name": "paper"},
        {"name": []},
        {"learned": False},
        {"surprise": 1},
    ],
    ids=str,
)
def test_algebras_that_do_not_exist_are_refused(change: dict) -> None:
    fields = LightSpec(8, 16, True, Algebra.products(4), 2).to_dict()
    fields["algebra"] |= change
    with pytest.raises(CheckpointError):
        LightSpec.from_dict(fields, "layer")


@pytest.mark.parametrize(
    "replaced",
    [(8, 12), (8, 15), (4, 20), (9, 17), (7, 16), (8, 16), (0, 16), (8,), (8, 20, 1), ("8", "20"), 8, "16", [None, 20]],
    ids=str,
)
def test_a_layer_cannot_replace_a_matrix_that_is_no_wider_on_one_side_alone(replaced) -> None:
    """Wider than it, narrower on both sides, or just as wide: (8, 16) is the layer itself."""
    for algebra, rank in ((None, 0), (None, 2), (Algebra.products(4), 0)):
        fields = LightSpec(8, 16, True, algebra, rank, (8, 20)).to_dict()
        assert LightSpec.from_dict(fields, "layer").dense_features == (8, 20)
        with pytest.raises(CheckpointError, match="Layer up is described wrongly"):
            LightSpec.from_dict(fields | {"replaced": replaced}, "up")


def test_a_dense_layer_as_wide_as_its_matrix_is_none() -> None:
    fields = LightSpec(8, 16, True, None).to_dict()
    assert "replaced" not in fields
    with pytest.raises(CheckpointError):
        LightSpec.from_dict(fields, "layer")


def test_a_spec_from_before_there_were_widths_still_reads() -> None:
    fields = {"in_features": 8, "out_features": 16, "bias": True, "algebra": None, "rank": 3}
    spec = LightSpec.from_dict(fields, "layer")
    assert spec == LightSpec(8, 16, True, None, 3)
    assert (spec.replaced, spec.dense_features, spec.to_dict()) == (None, (8, 16), fields)


@pytest.mark.parametrize("fields", [{}, None, [], "spec", {"in_features": 8}], ids=str)
def test_what_is_no_spec_is_refused(fields) -> None:
    with pytest.raises(CheckpointError):
        LightSpec.from_dict(fields, "layer")


def test_reading_a_spec_takes_no_memory() -> None:
    """2¹⁸ × 2¹⁸ would be 64 GiB at a quarter of float32."""
    big = LightSpec(2**18, 2**18, False, Algebra.products(4))
    assert LightSpec.from_dict(big.to_dict(), "big") == big


def test_light_modules_lists_layers_but_no_companions() -> None:
    algebra = Algebra.products(4)
    model = nn.ModuleDict(
        {
            "first": PHMLinear(8, 8, algebra, companion_rank=2),
            "second": LowRankLinear(8, 8, 2),
            "third": nn.Linear(8, 8),
            "nested": nn.Sequential(BlendLinear(nn.Linear(8, 8), PHMLinear(8, 8, algebra)), PHMLinear(8, 8, algebra)),
        }
    )
    assert list(light_modules(model)) == ["first", "second", "nested.0.light", "nested.1"]
    assert list(light_modules(model["first"])) == [""]
    assert light_modules(nn.Linear(2, 2)) == {}


def test_low_rank_layer_is_two_linears() -> None:
    layer, x = LowRankLinear(8, 6, 3, bias=True), torch.randn(2, 4, 8)
    assert type(layer.reduce) is type(layer.expand) is nn.Linear
    expected = x @ layer.reduce.weight.T @ layer.expand.weight.T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weight, layer.expand.weight @ layer.reduce.weight)
    factors = LowRankFit(torch.randn(6, 3).double(), torch.randn(3, 8).double(), 0.0)
    layer.load_fit_(factors)
    torch.testing.assert_close(layer.weight, factors.dense().float())
    assert "rank=3" in repr(layer)


def test_a_narrow_layer_is_one_linear_under_another_name() -> None:
    layer, x = LightSpec(8, 12, True, None, 0, (8, 16)).build(), torch.randn(2, 4, 8)
    assert type(layer) is NarrowLinear
    assert list(layer.state_dict()) == ["core.weight", "core.bias"]
    assert (layer.weight is layer.core.weight, layer.bias is layer.core.bias) == (True, True)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
    assert light_modules(nn.ModuleDict({"up": layer})) == {"up": layer}
