"""Tiny random models of many families, made from configs: seconds on a CPU, no download, fixed weights.

    family = FAMILIES["llava_siglip"]
    model = family.build()               # evaluation mode, float32, the same weights at every call
    logits = model(**family.inputs()).logits

Every weight is random, biases and norms included, and large enough that each layer shows in the logits. All FFN widths
are divisible by 8. Language, vision and projector have different widths, so that a count cannot be right by accident.
`meta()` gives the same model without memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

VOCAB, IMAGE_TOKEN, PROMPT = 96, 90, (5, 17, 3)
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_SPECIAL,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}


@dataclass(frozen=True)
class Family:
    """How to make a family's tiny model and what to feed it."""

    model_class: type[PreTrainedModel]
    config: Callable[[], PretrainedConfig]
    image: Callable[[], dict[str, Tensor]] | None = None
    num_image_tokens: int = 0

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        """The model, in evaluation mode."""
        model = self.model_class._from_config(self.config(), dtype=dtype)  # .to(dtype) would round rotary angles too
        randomize_(model, seed)
        return model.eval()

    def meta(self) -> Any:
        """The model on the meta device: shapes without memory."""
        with torch.device("meta"):
            return self.model_class(self.config())

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """One prompt with its image (if the family takes one), for `forward` and `generate`."""
        ids = torch.tensor([[IMAGE_TOKEN] * self.num_image_tokens + list(PROMPT)])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        image = self.image() if self.image else {}
        if "image_grid_thw" in image:
            batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
        return batch | {k: v.to(dtype) if v.is_floating_point() else v for k, v in image.items()}


@torch.no_grad()
def randomize_(model: nn.Module, seed: int) -> None:
    """Give every parameter random values: matrices keep their input's scale, biases and norms are off their start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


def _pixels(*shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(1))}


def _qwen_image() -> dict[str, Tensor]:
    """One 16×16 image: 4×4 patches of 2 frames × 3 colours × 4×4 pixels, merged 2×2 to four tokens."""
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _llava(vision: str) -> LlavaConfig:
    return LlavaConfig(
        vision_config={"model_type": vision, **_VISION, "projection_dim": 16},
        text_config={"model_type": "llama", **_TEXT},
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if vision == "clip_vision_model" else "full",
    )


def _idefics(config_class: type[Any]) -> Any:
    return config_class(
        vision_config=_VISION, text_config={"model_type": "llama", **_TEXT}, image_token_id=IMAGE_TOKEN, scale_factor=2
    )


def _qwen2_vl() -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": _QWEN_ROPE},
        vision_config={**_QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 3},
        **_QWEN_TOKENS,
    )


def _qwen2_5_vl() -> Qwen2_5_VLConfig:
    vision = {"hidden_size": 16, "intermediate_size": 40, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": _QWEN_ROPE},
        vision_config={**_QWEN_VISION, **vision, "window_size": 16},
        **_QWEN_TOKENS,
    )


def _qwen3_vl() -> Qwen3VLConfig:
    vision = {"hidden_size": 16, "intermediate_size": 40, "out_hidden_size": 32, "num_position_embeddings": 16}
    return Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 8, "rope_parameters": _QWEN_ROPE},
        vision_config={**_QWEN_VISION, **vision, "deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    )


def _paligemma() -> PaliGemmaConfig:
    return PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        text_config={"model_type": "gemma", **_TEXT, "head_dim": 8},
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )


def _blip2(language: str) -> Blip2Config:
    opt = {
        "model_type": "opt",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        **_SPECIAL,
    }
    t5 = {
        "model_type": "t5",
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_ff": 48,
        "d_kv": 8,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    qformer = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return Blip2Config(
        vision_config=_VISION,
        qformer_config=qformer,
        text_config={"opt": opt, "t5": t5}[language],
        num_query_tokens=4,
        image_text_hidden_size=16,
        image_token_index=IMAGE_TOKEN,
    )


FAMILIES: dict[str, Family] = {
    "llava_siglip": Family(
        LlavaForConditionalGeneration, lambda: _llava("siglip_vision_model"), _pixels(1, 3, 8, 8), num_image_tokens=4
    ),
    "llava_clip": Family(
        LlavaForConditionalGeneration, lambda: _llava("clip_vision_model"), _pixels(1, 3, 8, 8), num_image_tokens=4
    ),
    "idefics3": Family(
        Idefics3ForConditionalGeneration, lambda: _idefics(Idefics3Config), _pixels(1, 1, 3, 8, 8), num_image_tokens=1
    ),
    "smolvlm": Family(
        SmolVLMForConditionalGeneration, lambda: _idefics(SmolVLMConfig), _pixels(1, 1, 3, 8, 8), num_image_tokens=1
    ),
    "qwen2_vl": Family(Qwen2VLForConditionalGeneration, _qwen2_vl, _qwen_image, num_image_tokens=4),
    "qwen2_5_vl": Family(Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl, _qwen_image, num_image_tokens=4),
    "qwen3_vl": Family(Qwen3VLForConditionalGeneration, _qwen3_vl, _qwen_image, num_image_tokens=4),
    "paligemma": Family(PaliGemmaForConditionalGeneration, _paligemma, _pixels(1, 3, 8, 8), num_image_tokens=4),
    "blip2_opt": Family(Blip2ForConditionalGeneration, lambda: _blip2("opt"), _pixels(1, 3, 8, 8), num_image_tokens=4),
    "blip2_t5": Family(Blip2ForConditionalGeneration, lambda: _blip2("t5"), _pixels(1, 3, 8, 8), num_image_tokens=4),
    "llama": Family(LlamaForCausalLM, lambda: LlamaConfig(**_TEXT)),
    "qwen2": Family(Qwen2ForCausalLM, lambda: Qwen2Config(**_TEXT, tie_word_embeddings=True)),
}


def num_parameters(model: nn.Module) -> int:
    """The plain sum over all parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def logits(model: Any, family: Family, dtype: torch.dtype = torch.float32) -> Tensor:
    """The model's logits on the family's inputs; an encoder-decoder gets two tokens to decode."""
    batch = family.inputs(dtype)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.tensor([[0, 7]])
    return model(**batch).logits


@torch.no_grad()
def generated(model: Any, family: Family, dtype: torch.dtype = torch.float32) -> Tensor:
    """Eight greedy tokens with a KV cache, no early end."""
    return model.generate(**family.inputs(dtype), do_sample=False, use_cache=True, min_new_tokens=8, max_new_tokens=8)
