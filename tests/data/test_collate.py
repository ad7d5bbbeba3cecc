"""Batches and their masks, on processors of four families and a text-only tokenizer."""

import copy
import importlib.util
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_processors import NAMES, Family, family, text_only_tokenizer
from transformers import AutoProcessor

from hyperfade.data import Collator, Example, open_source
from hyperfade.errors import DataError

IMAGE = {"type": "image"}
EMBEDDED = Path(importlib.util.find_spec("hyperfade").submodule_search_locations[0]) / "assets" / "easy-vqa-llava"


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def example(
    *turns: tuple[str, list | str], where: str = "train.jsonl line 1", size: tuple[int, int] = (40, 24)
) -> Example:
    messages = tuple(
        {"role": role, "content": content if isinstance(content, list) else [text(content)]} for role, content in turns
    )
    number = sum(part == IMAGE for message in messages for part in message["content"])
    return Example(messages, tuple(Image.new("RGB", size, (i, 80, 9)) for i in range(number)), where, ("",))


ONE = example(("user", [IMAGE, text("What color is the shape?")]), ("assistant", "blue"))
SYSTEM = example(("system", "You are a helpful assistant."), ("user", [IMAGE, text("Who?")]), ("assistant", "a circle"))
TEXT = example(("user", "How many circles?"), ("assistant", "two red\n\nthree, yes"))
MULTI = example(
    ("user", [IMAGE, text("What is shown?")]),
    ("assistant", "a red circle"),
    ("user", [text("And here: "), IMAGE, IMAGE]),
    ("assistant", "yes and no"),
    ("user", "How many?"),
    ("assistant", "three"),
)


def answers(sample: Example) -> list[str]:
    return [m["content"][0]["text"] for m in sample.messages if m["role"] == "assistant"]


def expected_labels(of: Family, sample: Example) -> str:
    given = answers(sample)
    ends = [of.end if of.middle_end is None else of.middle_end] * (len(given) - 1) + [of.end]
    return "".join(of.lead + answer + end for answer, end in zip(given, ends, strict=True))


def decoded_labels(collator: Collator, batch: dict[str, torch.Tensor], row: int) -> str:
    labels = batch["labels"][row]
    return collator._tokenizer.decode(labels[labels != -100])


def without_padding(batch: dict[str, torch.Tensor], row: int) -> list[int]:
    return batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()


def check_rows(of: Family, samples: list[Example]) -> None:
    """Labels are the answers; prompt and last answer make up the whole; padding is on the right side."""
    collator = Collator(of.processor, max_tokens=2000)
    whole, prompts = collator.training_batch(samples), collator.prompt_batch(samples)
    assert whole["labels"].shape == whole["input_ids"].shape == whole["attention_mask"].shape
    assert "labels" not in prompts
    image_id = collator._tokenizer.convert_tokens_to_ids(of.image_token)
    assert not (whole["labels"] == image_id).any()
    for row, sample in enumerate(samples):
        assert decoded_labels(collator, whole, row) == expected_labels(of, sample)
        labels, ids = whole["labels"][row], whole["input_ids"][row]
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        assert (labels[whole["attention_mask"][row] == 0] == -100).all()
        # The prompt for generation is, id by id, what the last answer was trained to follow.
        last = int((labels != -100).nonzero().max())
        prompt = without_padding(prompts, row)
        assert prompt == ids[: len(prompt)].tolist()
        assert (labels[len(prompt) : last + 1] != -100).all()
        assert labels[len(prompt) - 1] == -100
        assert whole["attention_mask"][row][0] == 1
        assert prompts["attention_mask"][row][-1] == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "samples",
    [[ONE], [SYSTEM], [TEXT], [MULTI], [ONE, MULTI, SYSTEM], [TEXT, ONE], [ONE, TEXT, MULTI]],
    ids=["one", "system", "text", "multi", "mixed lengths", "one without image first", "one without image"],
)
def test_labels_are_the_answers_and_their_ends(name: str, samples: list[Example]) -> None:
    check_rows(family(name), samples)


@pytest.mark.parametrize("name", NAMES)
def test_image_placeholders_are_expanded_and_images_processed(name: str) -> None:
    of = family(name)
    batch = Collator(of.processor, max_tokens=2000).training_batch([ONE, MULTI])
    image_id = of.processor.tokenizer.convert_tokens_to_ids(of.image_token)
    per_image = int((batch["input_ids"][0] == image_id).sum())
    assert per_image > 1
    assert int((batch["input_ids"][1] == image_id).sum()) == 3 * per_image
    assert batch["pixel_values"].is_floating_point()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_goes_through_the_processor_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image_processor = family(name).processor.image_processor
    calls, process = [], type(image_processor).preprocess
    monkeypatch.setattr(
        type(image_processor), "preprocess", lambda self, *a, **k: calls.append(1) or process(self, *a, **k)
    )
    Collator(family(name).processor, max_tokens=2000).training_batch([ONE, MULTI])
    assert len(calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_processor_is_left_as_it_was(name: str) -> None:
    processor = family(name).processor
    tokenizer, side = processor.tokenizer, processor.tokenizer.padding_side
    Collator(processor, max_tokens=2000).prompt_batch([ONE])
    assert processor.tokenizer is tokenizer
    assert tokenizer.padding_side == side


# A word keeps clear of control tokens, and of white space at its ends, which templates may strip.
WORDS = st.text(st.characters(exclude_characters="<>|[]▁", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
SENTENCES = st.lists(WORDS.map(str.strip).filter(bool), min_size=1, max_size=4).map(" ".join)
QUESTIONS = st.lists(st.one_of(st.just(IMAGE), SENTENCES.map(text)), max_size=3).flatmap(
    lambda parts: SENTENCES.map(lambda last: [*parts, text(last)])
)
CONVERSATIONS = st.lists(st.tuples(QUESTIONS, SENTENCES), min_size=1, max_size=3).map(
    lambda turns: example(*[turn for q, a in turns for turn in (("user", q), ("assistant", a))], size=(16, 16))
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(samples=st.lists(CONVERSATIONS, min_size=1, max_size=3))
def test_labels_are_right_for_any_conversation(name: str, samples: list[Example]) -> None:
    check_rows(family(name), samples)


def test_text_only_tokenizer_without_padding_token() -> None:
    tokenizer = text_only_tokenizer()
    chat = example(("user", "What?"), ("assistant", "yes"), ("user", "How many?"), ("assistant", "two circles"))
    check_rows(Family(tokenizer, end="<|im_end|>", image_token="<|im_start|>"), [chat, TEXT])
    assert tokenizer.pad_token is None, "the caller's tokenizer must not change"


def test_text_only_tokenizer_refuses_images() -> None:
    with pytest.raises(DataError, match=r"^train.jsonl line 1: .*reads text only"):
        Collator(text_only_tokenizer(), max_tokens=100).training_batch([ONE])


def test_template_may_live_with_the_tokenizer() -> None:
    processor = copy.deepcopy(family("qwen2_vl").processor)
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    collator = Collator(processor, max_tokens=500)
    assert decoded_labels(collator, collator.training_batch([ONE]), 0) == "blue<|im_end|>"


def test_processor_without_template_is_refused() -> None:
    processor = copy.deepcopy(family("qwen2_vl").processor)
    processor.chat_template = None
    with pytest.raises(DataError, match=r"_Qwen2VLProcessorWithoutVideo has no chat template"):
        Collator(processor, max_tokens=500)


def test_template_that_rewrites_history_is_refused() -> None:
    processor = copy.deepcopy(family("qwen2_vl").processor)
    processor.chat_template = processor.chat_template.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(DataError, match=r"^train.jsonl line 1: the chat template writes answer 1 differently"):
        Collator(processor, max_tokens=500).training_batch([ONE])


def _bad(where: str, kind: str, folder: Path) -> tuple[Example, str]:
    """A bad sample, and how its error reads."""
    (folder / "truncated.png").write_bytes(Path(folder / "good.png").read_bytes()[:120])
    (folder / "notes.png").write_text("not an image")
    asked = [IMAGE, text("What color?")]
    plain = example(("user", asked), ("assistant", "blue"), where=where)
    bad = {
        "empty": (example(("user", asked), ("assistant", " \n"), where=where), "an assistant message is empty"),
        "role": (example(("user", asked), ("critic", "blue"), where=where), "unknown role 'critic'"),
        "long": (example(("user", [*asked, text("x" * 900)]), ("assistant", "blue"), where=where), "max_tokens is 300"),
        "placeholder": (
            example(("user", [*asked, text("<|image_pad|>")]), ("assistant", "blue"), where=where),
            "1 images belong into a text with 2 placeholders",
        ),
        "merged": (example(("user", asked), ("assistant", "\n\nblue"), where=where), "merge"),
        "shape": (
            example(("user", asked), ("assistant", "blue"), where=where, size=(1000, 2)),
            "Qwen2VLProcessorWithoutVideo cannot use the sample",
        ),
        "too few": (Example(plain.messages, (), where, ("",)), "place 1 images, and 0 are given"),
        "missing": (Example(plain.messages, (folder / "none.png",), where, ("",)), "none.png does not exist"),
        "truncated": (
            Example(plain.messages, (folder / "truncated.png",), where, ("",)),
            "truncated.png cannot be read",
        ),
        "no image": (Example(plain.messages, (folder / "notes.png",), where, ("",)), "notes.png cannot be read"),
        "bytes": (Example(plain.messages, (b"GIF89a?",), where, ("",)), "an embedded image cannot be read"),
    }
    return bad[kind]


BAD = (
    "empty",
    "role",
    "long",
    "placeholder",
    "merged",
    "shape",
    "too few",
    "missing",
    "truncated",
    "no image",
    "bytes",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.effect_noise((40, 24), 50).save(tmp_path / "good.png")
    return tmp_path


def _merging_qwen() -> object:
    """Qwen's processor with a tokenizer that joins line breaks, as the real one does."""
    processor = copy.deepcopy(family("qwen2_vl").processor)
    processor.tokenizer.add_tokens(["\n\n\n"])
    return processor


@pytest.mark.parametrize("kind", BAD)
def test_bad_sample_raises_and_names_its_place(kind: str, folder: Path) -> None:
    sample, message = _bad("train.jsonl line 17", kind, folder)
    with pytest.raises(DataError) as caught:
        Collator(_merging_qwen(), max_tokens=300).training_batch([ONE, sample])
    assert caught.value.message.startswith("train.jsonl line 17: ")
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("kind", BAD)
def test_bad_sample_is_skipped_and_noted(kind: str, folder: Path) -> None:
    sample, message = _bad("train.jsonl line 17", kind, folder)
    collator = Collator(_merging_qwen(), max_tokens=300, on_bad="skip")
    batch = collator.training_batch([ONE, sample, SYSTEM])
    assert [(skipped.where, message in skipped.reason) for skipped in collator.skipped] == [
        ("train.jsonl line 17", True)
    ]
    assert collator.kept == [ONE, SYSTEM]
    alone = Collator(_merging_qwen(), max_tokens=300).training_batch([ONE, SYSTEM])
    assert batch.keys() == alone.keys()
    assert all(torch.equal(batch[key], alone[key]) for key in batch)


def test_prompts_skip_what_is_too_long() -> None:
    long = example(("user", [IMAGE, text("x" * 900)]), ("assistant", "blue"), where="line 2")
    collator = Collator(family("qwen2_vl").processor, max_tokens=300, on_bad="skip")
    assert len(collator.prompt_batch([ONE, long, SYSTEM])["input_ids"]) == 2
    assert collator.kept == [ONE, SYSTEM]
    with pytest.raises(DataError, match=r"^line 2: the sample has"):
        Collator(family("qwen2_vl").processor, max_tokens=300).prompt_batch([ONE, long])


def test_nothing_left_is_an_error_even_when_skipping() -> None:
    empty = example(("user", "Why?"), ("assistant", ""), where="line 3")
    collator = Collator(family("llava").processor, max_tokens=300, on_bad="skip")
    with pytest.raises(DataError, match=r"None of the 1 samples .* line 3: an assistant message is empty"):
        collator.training_batch([empty])


def test_roles_that_the_template_refuses_are_named() -> None:
    twice = example(("user", "What?"), ("user", "Well?"), ("assistant", "yes"), where="line 4")
    with pytest.raises(DataError, match=r"^line 4: the chat template refuses messages of user, user.*must alternate"):
        Collator(family("gemma3").processor, max_tokens=300).training_batch([twice])


def test_64_samples_cost_little_beyond_the_processor() -> None:
    collator = Collator(family("llava").processor, max_tokens=300)
    samples = [ONE, SYSTEM] * 32
    collator.training_batch(samples)
    start = time.perf_counter()
    collator.training_batch(samples)
    assert time.perf_counter() - start < 1.0  # observed 0.03 s on 2 busy cores


@pytest.mark.skipif(not EMBEDDED.exists(), reason="the example model is not there")
def test_embedded_model_on_its_own_data() -> None:
    of = Family(AutoProcessor.from_pretrained(EMBEDDED), end=" </s>", image_token="<image>")
    source = open_source("easy-vqa:test")
    check_rows(of, [source[0], source[11], source[102]])
