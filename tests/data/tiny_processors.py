"""Processors of several model families, built offline: real classes and formats, tiny tokenizers and images.

The chat templates keep what matters in each family's own: its turn marks, its spacing, its end token, how it strips
texts, and what the generation prompt is.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

_CORPUS = [
    "user assistant system USER ASSISTANT User Assistant model human",
    "What is shown in the picture? What color is the shape? How many circles are there?",
    "a red circle. a blue triangle and a green rectangle, yes no two three",
    "You are a helpful assistant.\n\nQuestion: Answer:\n",
] * 4


def byte_level(specials: list[str], **names: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Qwen, SmolLM, Llama 3): spaces belong to the word after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def sentence_piece(specials: list[str], **names: Any) -> PreTrainedTokenizerFast:
    """A BPE in the manner of SentencePiece (Llama 2, Gemma): ▁ for spaces, and <s> put first by the tokenizer."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens, *specials], show_progress=False
    )
    tokenizer.train_from_iterator([*_CORPUS, "\n"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **names)


@dataclass(frozen=True)
class Family:
    """A processor and what is to be expected of it."""

    processor: Any
    end: str
    """The text after an answer that belongs to it."""
    image_token: str
    lead: str = ""
    """White space between the generation prompt and an answer; part of the answer."""
    middle_end: str | None = None
    """The end of an answer that is not the last, if another."""


# LLaVA-1.5: no end token at all, a space after each turn.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto',"
    " 'text') %}{{ content['text'] + ' ' }}{% endfor %}{% else %}{% for content in message['content'] |"
    " selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Qwen2-VL: a default system message, a line break after the end token.
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a"
    " helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Idefics3 and SmolVLM: the generation prompt ends in a colon, the answer begins with a space.
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Gemma 3: writes <bos> itself, folds the system message into the user's, strips texts, insists on roles in turn.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + (first if loop.first else '') }}{% for item in message['content'] %}{% if item['type'] == 'image' %}"
    "{{ '<start_of_image>' }}{% else %}{{ item['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _llava() -> Family:
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer = sentence_piece(["<image>", "<pad>"], pad_token="<pad>", additional_special_tokens=["<image>"])
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return Family(processor, end="</s>", image_token="<image>", lead=" ", middle_end="")


class _Qwen2VLProcessorWithoutVideo(Qwen2VLProcessor):
    """Its video processor needs torchvision, which tests do without."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return (
            None
            if argument_name == "video_processor"
            else super().check_argument_for_proper_class(argument_name, argument)
        )


def _qwen() -> Family:
    specials = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_level(
        [*specials, "<|endoftext|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials,
    )
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    processor = _Qwen2VLProcessorWithoutVideo(image_processor, tokenizer, None, chat_template=QWEN_TEMPLATE)
    return Family(processor, end="<|im_end|>", image_token="<|image_pad|>")


def _idefics3() -> Family:
    specials = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
    specials += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = byte_level(
        [*specials, "<|endoftext|>"],
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials,
    )
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)
    return Family(processor, end="<end_of_utterance>", image_token="<image>", lead=" ")


def _gemma3() -> Family:
    specials = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<pad>"]
    tokenizer = sentence_piece(
        specials,
        pad_token="<pad>",
        additional_special_tokens=specials[:2],
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    image_processor = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = Gemma3Processor(image_processor, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=4)
    return Family(processor, end="<end_of_turn>", image_token="<image_soft_token>")


_BUILDERS = {"llava": _llava, "qwen2_vl": _qwen, "idefics3": _idefics3, "gemma3": _gemma3}
NAMES = tuple(_BUILDERS)


@cache
def family(name: str) -> Family:
    try:
        return _BUILDERS[name]()
    except ImportError as error:
        # Transformers 5.17 wants torchvision for the image processor of Idefics3, later versions Pillow alone.
        pytest.skip(str(error))


@cache
def text_only_tokenizer() -> PreTrainedTokenizerFast:
    """A text model's tokenizer: ChatML written for plain strings, and no padding token."""
    specials = ["<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(specials, eos_token="<|im_end|>", additional_special_tokens=specials[:1])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer
