"""Hidden units may change places: the function stays, and tensors that someone else shares stay as they are."""

import pytest
import torch
from tiny_models import FAMILIES, logits
from torch import nn

from hyperfade.distill import teacher_of
from hyperfade.surgery import energy_order, find_ffns, permute_hidden_

ALL = pytest.mark.parametrize("name", FAMILIES)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {k: v for k, v in model.named_modules() if isinstance(v, nn.Linear)}


def _permute_all_(model: nn.Module) -> None:
    """Another random order in every FFN that has hidden units."""
    for ffn in find_ffns(model):
        if ffn.readers:
            permute_hidden_(_linears(model), ffn, torch.randperm(model.get_submodule(ffn.writer).in_features))


@ALL
def test_the_model_keeps_its_function(name: str) -> None:
    family = FAMILIES[name]
    model = family.build(dtype=torch.float64)
    before = logits(model, family, torch.float64)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    _permute_all_(model)
    # observed: 3e-15 at the most; RMS norms compute in float32, so that one flipped rounding would be 1e-7
    torch.testing.assert_close(logits(model, family, torch.float64), before, rtol=0, atol=1e-5)
    changed = {k.rpartition(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, weights[k])}
    assert changed == {linear for ffn in find_ffns(model) if ffn.readers for linear in ffn.linears}


def test_rows_and_columns_move_together() -> None:
    """By hand: unit 2 of three comes first."""
    model = nn.ModuleDict({"fc1": nn.Linear(2, 3), "fc2": nn.Linear(3, 2)})
    fc1, fc2 = model["fc1"], model["fc2"]
    w1, b1, w2, b2 = fc1.weight.clone(), fc1.bias.clone(), fc2.weight.clone(), fc2.bias.clone()
    permute_hidden_(_linears(model), find_ffns(model)[0], torch.tensor([2, 0, 1]))
    assert torch.equal(fc1.weight, torch.stack([w1[2], w1[0], w1[1]]))
    assert torch.equal(fc1.bias, torch.stack([b1[2], b1[0], b1[1]]))
    assert torch.equal(fc2.weight, torch.stack([w2[:, 2], w2[:, 0], w2[:, 1]], dim=1))
    assert torch.equal(fc2.bias, b2)


def test_a_twin_that_shares_the_tensors_keeps_its_own() -> None:
    family = FAMILIES["llava_siglip"]
    model = family.build()
    twin = teacher_of(model)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    shared = {k: v.data_ptr() for k, v in model.state_dict().items()}
    assert all(v.data_ptr() == shared[k] for k, v in twin.state_dict().items())
    expected = logits(twin, family)
    _permute_all_(model)
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    assert torch.equal(logits(twin, family), expected)
    touched = {linear for ffn in find_ffns(model) for linear in ffn.linears}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in touched:
            assert tensor.data_ptr() == shared[name], f"{name} was copied without need"


def test_energy_orders_by_falling_second_moment_and_leaves_ties_alone() -> None:
    moment = torch.diag(torch.tensor([1.0, 3.0, 2.0, 3.0])) + 0.5  # off the diagonal: does not count
    assert energy_order(moment).tolist() == [1, 3, 2, 0]
