"""Layers of experts against one layer per expert, whose W comes from torch.kron."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kron_oracle import TOLERANCE, kron_weight
from torch import Tensor

from hyperfade.algebra import Algebra
from hyperfade.errors import AlgebraError, CheckpointError
from hyperfade.nn import BlendLinear, ExpertsLinear, ExpertsLowRank, ExpertsPHM, Groups, LightSpec, PHMLinear
from hyperfade.nn.experts import grouped

ALGEBRAS = {
    "products": Algebra.products(4),
    "many products": Algebra.products(2, 3),
    "learned": Algebra.learned(4, 3),
    "quaternion": Algebra.named("quaternion"),
    "paper": Algebra.named("paper"),
}
EXPERT = torch.tensor([0, 0, 1, 3, 3, 3, 3])  # nobody goes to the third of four


def groups() -> Groups:
    return Groups.of(EXPERT, torch.arange(7), 4, 7)


def filled(layer: Any) -> Any:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def by_rows(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every row times its expert's W, and the sum of absolute products."""
    rows = torch.stack([weights[e] @ row.double() for e, row in zip(EXPERT.tolist(), x, strict=True)])
    size = torch.stack([weights[e].abs() @ row.double().abs() for e, row in zip(EXPERT.tolist(), x, strict=True)])
    return rows if bias is None else rows + bias.double()[EXPERT], size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "k"), [(24, 16), (16, 48), (32, 64)])
@pytest.mark.parametrize("name", ALGEBRAS)
def test_every_row_meets_its_experts_kron_sum(name: str, d: int, k: int, dtype: torch.dtype) -> None:
    for bias, rank in ((False, 0), (True, 3)):
        layer = filled(ExpertsPHM(4, d, k, ALGEBRAS[name], bias, rank, dtype=dtype))
        x = torch.randn(7, d, dtype=dtype)
        with torch.no_grad():
            y = layer(x, groups())
        expected, size = by_rows(x, [kron_weight(layer.expert(e)) for e in range(4)], layer.bias)
        assert (y.double() - expected).abs().max() < TOLERANCE[dtype] * size.max()  # seen 3e-16, 1.2e-7, 4e-3
        assert y.dtype == dtype


def test_no_weight_is_built_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: PHMLinear) -> Tensor:
        raise AssertionError("W was built")

    monkeypatch.setattr(PHMLinear, "weight", property(forbidden))
    for algebra in ALGEBRAS.values():
        ExpertsPHM(4, 16, 32, algebra)(torch.randn(7, 16), groups())


@pytest.mark.parametrize("shape", [(24, 16), (6, 5)])  # torch's grouped product takes the first alone
def test_grouped_products_and_their_gradients(shape: tuple[int, int]) -> None:
    x = torch.randn(7, shape[0], requires_grad=True)
    weight = torch.randn(4, shape[1], shape[0], requires_grad=True)
    own = torch.stack([weight[e] @ row for e, row in zip(EXPERT.tolist(), x, strict=True)])
    upstream = torch.randn_like(own)
    y = grouped(x, weight, groups().ends)
    torch.testing.assert_close(y, own, atol=1e-5, rtol=0)  # seen 2e-6
    for mine, oracle in zip(
        torch.autograd.grad(y, (x, weight), upstream), torch.autograd.grad(own, (x, weight), upstream), strict=True
    ):
        torch.testing.assert_close(mine, oracle, atol=1e-5, rtol=0)  # seen 5e-7


@pytest.mark.parametrize("name", ALGEBRAS)
def test_gradients_of_every_parameter(name: str) -> None:
    layer = filled(ExpertsPHM(4, 8, 12, ALGEBRAS[name], True, 2, dtype=torch.float64))
    x = torch.randn(7, 8, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, groups()))

    assert torch.autograd.gradcheck(run, values)


def test_no_rows_and_autocast() -> None:
    layer = ExpertsPHM(4, 16, 32, ALGEBRAS["products"], True)
    nobody = Groups.of(EXPERT[:0], EXPERT[:0], 4, 0)
    assert layer(torch.randn(0, 16), nobody).shape == (0, 32)
    x = torch.randn(7, 16)
    exact = layer(x, groups())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, groups())
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 0.02 * exact.norm()  # seen 0.004


def test_one_expert_is_a_view_and_a_fresh_layer_is_as_large_as_a_linear() -> None:
    layer = ExpertsPHM(64, 128, 64, ALGEBRAS["products"])
    assert abs(layer.weight.std() * (3 * 128) ** 0.5 - 1) < 0.05  # seen 1e-4
    layer.expert(2).T.zero_()
    assert not layer.T[2].any()
    assert layer.T[1].any()
    low_rank = ExpertsLowRank(3, 8, 12, 2, bias=True)
    one = low_rank.expert(1)
    torch.testing.assert_close(one.weight, low_rank.weight[1])
    assert one.bias is not None
    with pytest.raises(AlgebraError, match="in_features=9"):
        ExpertsPHM(4, 9, 16, ALGEBRAS["products"])


def test_a_blend_of_experts_ends_in_its_branches() -> None:
    dense = ExpertsLinear(torch.nn.Parameter(torch.randn(4, 16, 8)))
    blend = BlendLinear(dense, ExpertsLowRank(4, 8, 16, 3))
    x = torch.randn(7, 8)
    assert torch.equal(blend(x, groups()), dense(x, groups()))
    blend.alpha = 1.0
    assert torch.equal(blend(x, groups()), blend.light(x, groups()))
    blend.alpha, blend.measure_reconstruction = 0.5, True
    mixed = (dense(x, groups()) + blend.light(x, groups())) / 2
    torch.testing.assert_close(blend(x, groups()), mixed)
    assert blend.reconstruction is not None


def test_a_spec_builds_what_it_counts_and_reads_what_it_wrote() -> None:
    for algebra in (*ALGEBRAS.values(), None):
        spec = LightSpec(16, 32, True, algebra, 2, experts=5)
        layer = spec.build()
        assert sum(p.numel() for p in layer.parameters()) == spec.num_parameters
        assert spec.num_parameters == 5 * replace(spec, experts=None).num_parameters
        assert LightSpec.of(layer) == spec == LightSpec.from_dict(spec.to_dict(), "here")
    for wrong in ({"experts": 0}, {"experts": True}, {"experts": "4"}, {"split": True}, {"replaced": [32, 32]}):
        fields = LightSpec(16, 32, True, ALGEBRAS["products"], experts=5).to_dict() | wrong
        with pytest.raises(CheckpointError, match="here is described wrongly"):
            LightSpec.from_dict(fields, "here")
