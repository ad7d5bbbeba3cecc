"""The small helpers around loading: names, configs, skeletons, classes, processors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folded import folded, saved
from tiny_models import FAMILIES, logits, num_parameters
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast, T5Config

from hyperfade.errors import CheckpointError, NothingMatchedError
from hyperfade.hub import (
    EMBEDDED,
    EMBEDDED_FOLDER,
    load,
    load_config,
    load_processor,
    resolve,
    skeleton,
    takes_images,
)
from hyperfade.hub.checkpoint import auto_class
from hyperfade.nn import light_modules
from hyperfade.recipe import Recipe
from hyperfade.surgery import find_ffns, plan


def test_only_the_name_embedded_is_special() -> None:
    assert resolve(EMBEDDED) == str(EMBEDDED_FOLDER)
    assert EMBEDDED_FOLDER.name == "easy-vqa-llava"
    for name in ("Embedded", "./embedded", "org/embedded", "/some/folder", ""):
        assert resolve(name) == name


@pytest.mark.skipif(not EMBEDDED_FOLDER.is_dir(), reason="the embedded model is not in this checkout")
def test_the_embedded_model_loads_and_can_be_planned() -> None:
    model = load(EMBEDDED)
    assert not model.training
    assert takes_images(load_config(EMBEDDED))
    assert {ffn.region for ffn in find_ffns(model)} == {"language", "vision", "projector"}
    assert plan(model, Recipe()) == plan(skeleton(EMBEDDED), Recipe())
    assert load_processor(EMBEDDED).tokenizer.eos_token_id is not None


@pytest.mark.parametrize("name", FAMILIES)
def test_the_class_follows_from_the_config(name: str) -> None:
    family = FAMILIES[name]
    config = family.config()
    assert takes_images(config) == (family.image is not None)
    assert auto_class(config) is (AutoModelForImageTextToText if family.image else AutoModelForCausalLM)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_file_alone_gives_the_skeleton_of_the_model(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    family.config().save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "any-name.json")
    config = load_config(str(tmp_path / "any-name.json"))
    assert type(config) is type(family.config())
    bones = skeleton(str(tmp_path / "any-name.json"))
    assert type(bones) is family.model_class
    assert all(t.is_meta for t in (*bones.parameters(), *bones.buffers()))
    assert plan(bones, Recipe()) == plan(family.build(), Recipe())


def test_a_skeleton_of_a_model_larger_than_memory(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    bones = skeleton(str(tmp_path / "config.json"))
    assert num_parameters(bones) == 405_853_388_800  # Llama 3.1 405B
    assert all(t.is_meta for t in (*bones.parameters(), *bones.buffers()))


@pytest.mark.parametrize("name", ["llama", "llava_siglip"])
def test_the_skeleton_of_a_compressed_model_is_compressed(name: str, tmp_path: Path) -> None:
    model = folded(name)
    folder = saved(tmp_path / "model", name)
    for source in (folder, folder / "config.json"):
        bones = skeleton(str(source))
        assert list(light_modules(bones)) == list(light_modules(model))
        assert num_parameters(bones) == num_parameters(model)
        with pytest.raises(NothingMatchedError):
            plan(bones, Recipe())


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such-model"}', "\xff"])
def test_a_config_file_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(str(tmp_path / "config.json"))


def test_a_dense_model_loads_like_a_compressed_one(tmp_path: Path) -> None:
    family = FAMILIES["llava_clip"]
    model = family.build()
    model.save_pretrained(tmp_path)
    again = load(str(tmp_path))
    assert not again.training
    assert not light_modules(again)
    assert torch.equal(logits(again, family), logits(model, family))
    assert load(str(tmp_path), "bfloat16").dtype == torch.bfloat16


def _tokenizer() -> Any:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1, "circle": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_text_only_folder_has_a_tokenizer_for_processor(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", processor=_tokenizer())
    processor = load_processor(str(folder))
    assert isinstance(processor, PreTrainedTokenizerFast)
    assert processor("red circle green").input_ids == [1, 2, 0]


def test_a_folder_without_processor_is_an_error_not_a_guess(tmp_path: Path) -> None:
    for name in ("llama", "llava_siglip"):
        folder = saved(tmp_path / name, name)
        with pytest.raises(CheckpointError, match=str(folder)):
            load_processor(str(folder))


def test_an_encoder_decoder_without_images_has_no_class_here() -> None:
    assert not takes_images(T5Config())
