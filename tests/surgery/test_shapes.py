"""FFNs of other makes: gate and up in one, transposed weights, names nobody knows, encoders, experts, audio towers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import randomize_
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from hyperfade.distill import fit_
from hyperfade.errors import CheckpointError
from hyperfade.hub import fold_, load, save, skeleton
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import FFN, blends, find_ffns, permute_hidden_, plan, set_alpha_, swap_

_SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
_IDS = torch.tensor([[5, 9, 3, 7, 11, 4]])


def _made(model: Any) -> Any:
    randomize_(model, 0)
    return model.eval().requires_grad_(False)


def _phi() -> Any:
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return _made(Phi3ForCausalLM(Phi3Config(**_SMALL, **special, vocab_size=64, num_key_value_heads=2)))


def _gpt2() -> Any:
    return _made(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=40, vocab_size=64, n_positions=32)))


def _clip() -> Any:
    text = {**_SMALL, "intermediate_size": 24, "vocab_size": 64}
    vision = {**_SMALL, "image_size": 8, "patch_size": 4}
    return _made(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=_IDS).logits


def test_gate_and_up_in_one_matrix_are_one_reader() -> None:
    found = find_ffns(_phi())
    name = "model.layers.0.mlp"
    assert found[0] == FFN(name, "language", (f"{name}.gate_up_proj",), f"{name}.down_proj", fused=True)
    assert len(found) == 2


def test_hidden_units_of_a_fused_reader_move_with_both_halves() -> None:
    model = _phi()
    before = _logits(model)
    for ffn in find_ffns(model):
        linears = {name: model.get_submodule(name) for name in ffn.linears}
        permute_hidden_(linears, ffn, torch.randperm(40, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(_logits(model), before, atol=1e-5, rtol=1e-5)  # observed: 8e-7


def test_a_fused_ffn_loses_hidden_units_like_one_whose_writer_reads_zeros() -> None:
    """Plain pruning against the dense model with the columns of the lost units at zero."""
    model, reference = _phi(), _phi()
    the_plan = plan(model, Replace(language=Layer(kind="dense", width=0.5)))
    reader, writer = the_plan.swaps[:2]
    assert (reader.spec.dense_features, reader.spec.out_features) == ((16, 80), 2 * writer.spec.in_features)
    swap_(model, the_plan)
    units = {}
    for name, blend in blends(model).items():
        if name.endswith("down_proj"):
            units[name] = blend.dense.weight.clone()
    fit_(model, the_plan, [{"input_ids": _IDS}], Fit(refit_writer=False))
    set_alpha_(model, 1.0)
    for name, whole in units.items():
        kept = (blends(model)[name].dense.weight.T[:, None] == whole.T[None]).all(-1).any(0)
        assert kept.sum() == writer.spec.in_features
        reference.get_submodule(name).weight.mul_(kept)
    torch.testing.assert_close(_logits(model), _logits(reference), atol=1e-5, rtol=1e-5)  # observed: 7e-7


def test_transposed_weights_are_read_the_right_way_round(tmp_path: Path) -> None:
    model = _gpt2()
    before, names = _logits(model), [f"transformer.h.{i}.mlp.{part}" for i in (0, 1) for part in ("c_fc", "c_proj")]
    the_plan = plan(model, Replace(language=Layer(n=4), exclude=("*.1.mlp.c_proj",)))
    assert [s.name for s in the_plan.swaps] == names[:3]
    assert the_plan.swaps[0].spec.dense_features == (16, 40)
    address = model.get_submodule(names[0]).weight.data_ptr()
    swap_(model, the_plan)
    assert blends(model)[names[0]].dense.weight.data_ptr() == address  # the teacher shares it
    torch.testing.assert_close(_logits(model), before, atol=1e-5, rtol=1e-5)  # observed: 0
    fit_(model, the_plan, [{"input_ids": _IDS}], Fit())
    set_alpha_(model, 1.0)
    fold_(model)
    assert type(model.get_submodule(names[3])) is Conv1D
    save(model, tmp_path / "out")
    assert torch.equal(_logits(load(str(tmp_path / "out"))), _logits(model))


class _Odd(nn.Module):
    """An FFN whose names nobody knows, among what is none."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.enter, self.mlp.leave = nn.Linear(8, 24), nn.Linear(24, 8)
        if other:
            self.mlp.experts = nn.Linear(24, 24)
        self.mixer = nn.Module()
        self.mixer.enter, self.mixer.leave = nn.Linear(8, 24), nn.Linear(24, 8)
        self.attn = nn.Module()
        self.attn.fc1, self.attn.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)
        self.pool = nn.Module()
        self.pool.q_proj, self.pool.fc1, self.pool.fc2 = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(24, 8)


def test_an_mlp_is_found_by_its_shape_where_its_names_are_unknown() -> None:
    assert find_ffns(_Odd()) == (FFN("mlp", "language", ("mlp.enter",), "mlp.leave"),)


def test_matrices_around_other_matrices_are_no_ffn() -> None:
    assert find_ffns(_Odd(other=True)) == ()


def test_a_vision_model_by_itself_is_vision_and_both_sides_of_clip_are_told_apart() -> None:
    vit = ViTForImageClassification(ViTConfig(**_SMALL, image_size=8, patch_size=4))
    assert [(ffn.region, len(ffn.readers)) for ffn in find_ffns(vit)] == [("vision", 1)] * 2
    assert [ffn.region for ffn in find_ffns(_clip())] == ["language"] * 2 + ["vision"] * 2 + ["projector"]


def test_both_sides_of_an_encoder_decoder_are_language() -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=2)
    found = find_ffns(T5ForConditionalGeneration(config))
    assert [ffn.region for ffn in found] == ["language"] * 5
    assert {ffn.name.split(".")[0] for ffn in found} == {"encoder", "decoder"}


def test_a_model_of_neither_kind_loads_as_the_class_its_config_names(tmp_path: Path) -> None:
    model = _clip()
    swap_(model, plan(model, Replace(language=Layer(n=2), vision=Layer(n=4))))
    fold_(model)
    save(model, tmp_path / "clip")
    batch = {"input_ids": _IDS, "pixel_values": torch.randn(1, 3, 8, 8)}
    loaded: Any = load(str(tmp_path / "clip"))
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits_per_image, model(**batch).logits_per_image)
    assert type(skeleton(str(tmp_path / "clip"))) is CLIPModel


def test_a_class_that_transformers_does_not_have_is_named(tmp_path: Path) -> None:
    model = _clip()
    save(model, tmp_path / "clip")
    file = tmp_path / "clip" / "config.json"
    file.write_text(file.read_text().replace('"CLIPModel"', '"MyModel"'))
    with pytest.raises(CheckpointError, match="MyModel"):
        load(str(tmp_path / "clip"))


class _Listening(nn.Module):
    """A language FFN and one of an audio tower."""

    def __init__(self) -> None:
        super().__init__()
        for tower in ("audio_tower", "model"):
            self.add_module(tower, nn.Module())
            part = self.get_submodule(tower)
            part.fc1, part.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)


def test_an_audio_tower_is_left_alone_until_a_pattern_names_it() -> None:
    model = _Listening()
    the_plan = plan(model, Replace(language=Layer(n=2)))
    assert [s.name for s in the_plan.swaps] == ["model.fc1", "model.fc2"]
    assert {name for name, _ in the_plan.kept} == {"audio_tower.fc1", "audio_tower.fc2"}
    asked = Replace(language=None, patterns=("audio_tower.fc1",), other=Layer(n=2))
    assert [s.name for s in plan(model, asked).swaps] == ["audio_tower.fc1"]


@pytest.mark.parametrize("padded", [False, True])
def test_pytorchs_own_encoder_calls_what_took_its_matrices_place(padded: bool) -> None:
    """In inference it has a kernel that reads `linear1.weight` itself."""
    layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True)
    model = _made(nn.TransformerEncoder(layer, 2))
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False, False, False, True, True]])
    options = {"src_key_padding_mask": mask} if padded else {}
    with torch.no_grad():
        dense = model(x, **options)
        swap_(model, plan(model, Replace(language=Layer(n=2))))
        swapped = model(x, **options)
        set_alpha_(model, 1.0)
        light = model(x, **options)
    with torch.enable_grad():
        asked = model(x.clone().requires_grad_(), **options)
    torch.testing.assert_close(swapped[~mask], dense[~mask], atol=1e-5, rtol=1e-5)  # observed: 9e-7
    torch.testing.assert_close(light[~mask], asked[~mask], atol=1e-5, rtol=1e-5)  # observed: 1e-6; the kernel: 3.5
    assert (light - swapped)[~mask].abs().max() > 0.1
