"""Tiny random mixtures of experts: four experts in each of two layers, of every layout that transformers has."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import randomize_
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from families.inputs import batch_of
from families.trial import build

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LLAMA: dict[str, Any] = {"intermediate_size_mlp": 40, "interleave_moe_layer_step": 1, "head_dim": 8}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
_OSS: dict[str, Any] = {"layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_type": "default"}}
TEXT: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM._from_config(Qwen3MoeConfig(**_TEXT, **_QWEN)),
    "mixtral": lambda: MixtralForCausalLM._from_config(MixtralConfig(**_TEXT, **_EXPERTS)),
    "gpt_oss": lambda: GptOssForCausalLM._from_config(  # interleaved, transposed, with biases
        GptOssConfig(**_TEXT, **_EXPERTS, head_dim=8, **_OSS)
    ),
    "llama4": lambda: Llama4ForCausalLM._from_config(  # transposed, all tokens for every expert
        Llama4TextConfig(**_TEXT, **_LLAMA, **{**_EXPERTS, "num_experts_per_tok": 1})
    ),
}
VISION = ("qwen3_vl_moe", "ernie4_5_vl_moe", "aria", "muse_spark")
MODELS = (*TEXT, *VISION)


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model, in evaluation mode, frozen; the same weights at every call."""
    if name in VISION:
        return build(name).to(dtype)
    torch.manual_seed(0)
    model = TEXT[name]()
    randomize_(model, 0)
    for parameter in model.parameters():
        if parameter.dim() == 3:  # of experts: as large as if each stood alone
            parameter.data *= parameter.shape[-1] ** 0.5
    return model.to(dtype).eval().requires_grad_(False)


def inputs(model: Any, name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two rows of words with padding, or one prompt with its image."""
    if name not in VISION:
        ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        return {"input_ids": ids, "attention_mask": mask}
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch_of(model, name).items()}
    if name == "ernie4_5_vl_moe":  # its vision experts take what these say is of an image
        batch["moe_mm_token_type_ids"] = (batch["input_ids"] == model.config.image_token_id).int()
    return batch


@torch.no_grad()
def logits(model: Any, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the model makes of its inputs."""
    return model(**inputs(model, name, dtype)).logits
