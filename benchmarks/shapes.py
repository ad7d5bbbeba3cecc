"""What the speed benchmarks measure: three models at their true shapes, from configs alone, and what their FFNs become.

The configs are transformers' own classes with the published values; `tests/measure/test_benchmarks.py` checks their
parameter counts. No weights are downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from hyperfade.recipe import Layer

# what a matrix becomes, and for each the low-rank layer of the same size
VARIANTS = {
    "paper": Layer(kind="paper"),
    "learned n=4": Layer(kind="learned", n=4),
    "products n=2": Layer(n=2),
    "products n=4": Layer(n=4),
    "products n=8": Layer(n=8),
}
LOW_RANK = {f"low-rank 1/{n}": Layer(kind="low_rank", fraction=1 / n) for n in (2, 4, 8)}
SUITED_RANK = {"low-rank, rank 416": Layer(kind="low_rank", fraction=0.241)}  # at 2048 ↔ 11008: for kernels of few bits
RIVAL = {
    "paper": "low-rank 1/2",
    "learned n=4": "low-rank 1/4",
    "products n=2": "low-rank 1/2",
    "products n=4": "low-rank 1/4",
    "products n=8": "low-rank 1/8",
}


def _qwen(text: dict[str, Any], vocabulary: int, *, tied: bool, vision_ffn: int = 3420) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(
        text_config={"vocab_size": vocabulary, "rope_parameters": rope, "tie_word_embeddings": tied, **text},
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": vision_ffn,
            "num_heads": 16,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=tied,
    )


def qwen_3b() -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-3B-Instruct."""
    text = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
    return _qwen({**text, "num_attention_heads": 16, "num_key_value_heads": 2}, 151936, tied=True)


def qwen_7b() -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B-Instruct."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    return _qwen({**text, "num_attention_heads": 28, "num_key_value_heads": 4}, 152064, tied=False)


def qwen_72b() -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-72B-Instruct; too large to be timed here, so not in `MODELS`."""
    text = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80}
    return _qwen({**text, "num_attention_heads": 64, "num_key_value_heads": 8}, 152064, tied=False, vision_ffn=3456)


def smolvlm_256m() -> SmolVLMConfig:
    """SmolVLM-256M-Instruct."""
    text = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    text |= {"num_key_value_heads": 3, "vocab_size": 49280, "max_position_embeddings": 8192, "rope_theta": 100000.0}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return SmolVLMConfig(
        text_config={"model_type": "llama", **text, "tie_word_embeddings": False},
        vision_config={**vision, "image_size": 512, "patch_size": 16},
        image_token_id=49190,
        scale_factor=4,
        tie_word_embeddings=False,
    )


@dataclass(frozen=True)
class Model:
    """A model at its true shapes: its class, its config, and its published number of parameters."""

    model_class: type[Any]
    config: Callable[[], PretrainedConfig]
    num_parameters: int

    def skeleton(self) -> Any:
        """The model on the meta device: shapes without memory."""
        with torch.device("meta"):
            return self.model_class(self.config())


QWEN_72B = Model(Qwen2_5_VLForConditionalGeneration, qwen_72b, 73_410_777_344)
MODELS = {
    "SmolVLM-256M": Model(SmolVLMForConditionalGeneration, smolvlm_256m, 256_484_928),
    "Qwen2.5-VL-3B": Model(Qwen2_5_VLForConditionalGeneration, qwen_3b, 3_754_622_976),
    "Qwen2.5-VL-7B": Model(Qwen2_5_VLForConditionalGeneration, qwen_7b, 8_292_166_656),
}
