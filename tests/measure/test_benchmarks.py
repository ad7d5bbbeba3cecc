"""The speed benchmarks' own parts, on tiny models: true parameter counts, shared storage, cells that hold together."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, num_parameters

from hyperfade.hub import fold_
from hyperfade.surgery import plan, set_alpha_, swap_

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import ffn_speed
import model_speed
import whole_models
from model_speed import SpeedCell
from shapes import MODELS, QWEN_72B, RIVAL, VARIANTS, Model
from whole_models import built, compressed, decode, prefill, prompt


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiny models among the benchmarks' own; in float32 one shares the storage of layers 0 and 2."""
    for family in ("smolvlm", "qwen2_5_vl"):
        monkeypatch.setitem(MODELS, family, Model(FAMILIES[family].model_class, FAMILIES[family].config, 0))
    monkeypatch.setitem(whole_models.SHARED_PERIOD, ("qwen2_5_vl", torch.float32), 2)
    monkeypatch.setattr(whole_models, "IMAGE_PIXELS", 16)
    monkeypatch.setattr(model_speed, "ROUNDS", {"smolvlm": 2, "qwen2_5_vl": 2})


@pytest.mark.parametrize("model", [*MODELS.values(), QWEN_72B], ids=[*MODELS, "Qwen2.5-VL-72B"])
def test_models_have_their_published_number_of_parameters(model: Model) -> None:
    assert num_parameters(model.skeleton()) == model.num_parameters


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["smolvlm", "qwen2_5_vl"])
def test_a_built_model_computes_what_its_class_does_with_the_same_weights(name: str) -> None:
    model = built(name, torch.float32)
    plain = FAMILIES[name].build()
    plain.load_state_dict(model.state_dict())
    batch, _ = prompt(model)
    with torch.inference_mode():
        token, _ = prefill(model, batch)
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
        assert torch.equal(token, plain(**batch).logits[:, -1:].argmax(-1))


@pytest.mark.usefixtures("tiny")
def test_layers_share_storage_and_so_do_their_replacements() -> None:
    dense = built("qwen2_5_vl", torch.float32, 2)
    layers = dense.model.language_model.layers
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    assert layers[0].mlp.up_proj.weight is not layers[1].mlp.up_proj.weight
    light, whole = compressed(dense, "qwen2_5_vl", "products n=4", 2)
    mlps = [layer.mlp for layer in light.model.language_model.layers]
    assert mlps[0] is mlps[2]
    assert mlps[0] is not mlps[1]
    assert light.model.language_model.layers[2].self_attn.q_proj.weight is layers[0].self_attn.q_proj.weight
    assert whole.parameters_before == num_parameters(FAMILIES["qwen2_5_vl"].meta())
    # the oracle: the same model swapped without any sharing, with the same weights
    plain = FAMILIES["qwen2_5_vl"].build()
    swap_(plain, plan(FAMILIES["qwen2_5_vl"].meta(), whole_models.replacement("products n=4")))
    set_alpha_(plain, 1.0)
    fold_(plain)
    plain.load_state_dict(light.state_dict())
    batch, _ = prompt(light)
    with torch.inference_mode():
        torch.testing.assert_close(light(**batch).logits, plain(**batch).logits, rtol=0, atol=1e-5)  # observed 1e-6


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["smolvlm", "qwen2_5_vl"])
def test_decoding_leaves_the_cache_as_it_was(name: str) -> None:
    model = built(name, torch.float32)
    with torch.inference_mode():
        token, cache = prefill(model, prompt(model)[0])
        length = cache.get_seq_length()
        decode(model, token, cache, 3)
    assert cache.get_seq_length() == length == prompt(model)[0]["input_ids"].shape[1]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("name", "dtype"), [("smolvlm", "bfloat16"), ("qwen2_5_vl", "float32")])
def test_a_cell_of_whole_models_holds_together(name: str, dtype: str) -> None:
    cell = model_speed.speed_cell(SpeedCell(name, ("products n=4", "low-rank 1/4"), dtype, True, compiled=False))
    assert cell["shared_period"] == (2 if dtype == "float32" else None)
    assert list(cell["models"]) == ["dense", "products n=4", "low-rank 1/4"]
    shares = cell["ffn_share"]
    assert set(shares) == {"prefill language", "prefill vision", "decode language"}
    assert 0 < shares["prefill language"] + shares["prefill vision"] < 1
    light = cell["models"]["products n=4"]
    assert light["parameters"] < cell["models"]["dense"]["parameters"]
    check, ratios = light["amdahl"]["per_token"], light["ffn_speedup"]
    share = shares["decode language"]
    assert check["predicted"] == pytest.approx(1 / (1 - share + share / ratios["decode language"].median), rel=1e-9)
    measured = light["per_token"]["speedup"].median
    assert check["measured_over_predicted"] == pytest.approx(measured / check["predicted"], rel=1e-9)


@pytest.mark.usefixtures("tiny")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_variants_stand_beside_their_own_kind_and_rivals_do_not() -> None:
    cell = model_speed.speed_cell(SpeedCell("smolvlm", ("products n=4", "low-rank 1/4"), "float32", prefill=True))
    assert list(cell["models"]) == ["dense", "products n=4", "products n=4, compiled", "low-rank 1/4"]
    plain, compiled = (cell["models"][f"products n=4{way}"] for way in ("", ", compiled"))
    assert compiled["parameters"] == plain["parameters"]
    assert set(compiled) == set(plain)


@pytest.mark.usefixtures("tiny")
def test_a_cell_without_prefill_times_decoding_only() -> None:
    cell = model_speed.speed_cell(SpeedCell("smolvlm", ("products n=4",), "bfloat16", False, compiled=False))
    assert set(cell["ffn_share"]) == {"decode language"}
    light = cell["models"]["products n=4"]
    assert "first_token" not in light
    assert set(light["amdahl"]) == {"per_token"}


@pytest.mark.usefixtures("tiny")
def test_a_saved_model_loads_and_answers(tmp_path: Path) -> None:
    model_speed.save("smolvlm", "products n=4", tmp_path)
    used = model_speed.use("smolvlm", "products n=4", tmp_path)
    assert used["load_seconds"] > 0
    assert used["peak_bytes"]["imports"] <= used["peak_bytes"]["loaded"] <= used["peak_bytes"]["answered"]


def test_every_variant_has_a_rival_of_its_size_and_misfits_are_named() -> None:
    shapes = {(shape.part, shape.name): shape for shape in ffn_speed.shapes()}
    assert len(shapes) == 5 + 10
    for shape in shapes.values():
        for name in VARIANTS:
            if name in shape.left_out:
                continue
            own, other = (sum(s.spec.num_parameters for s in shape.choices[n]) for n in (name, RIVAL[name]))
            assert 0.95 < other / own <= 1.0  # the largest multiple of 8 that fits; observed 0.964 to 1.000
    tower = shapes["ffn", "1280 → 3420 → 1280, gated"]
    assert list(tower.left_out) == ["products n=8"]
    assert "3420" in tower.left_out["products n=8"]
    assert tower.models == ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B")


def test_cells_have_different_keys() -> None:
    keys = [cell.key for cell in ffn_speed.cells(quick=False)]
    assert len(keys) == len(set(keys)) == 100
    quick = {cell.key for cell in ffn_speed.cells(quick=True)}
    assert quick < set(keys)
    for fast in (True, False):
        assert set(model_speed.all_cells(True, fast)) < set(model_speed.all_cells(False, fast))
    assert set(model_speed.all_cells(False, True)) < set(model_speed.all_cells(False, False))
