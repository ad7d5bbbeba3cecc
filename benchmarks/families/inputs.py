"""What to feed a tiny model, by the names of what its forward takes: one prompt, with one image where it takes images.

A prompt holds as many image tokens as the model makes of the image. Families that count in another way say so in
`IMAGE_TOKENS`; what no rule provides comes from `EXTRA`.
"""

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
from families.shrink import IMAGE, PATCH
from torch import Tensor, nn

Batch = dict[str, Tensor]
GRID = IMAGE // PATCH  # patches along each side of an image
IMAGE_TOKENS: dict[str, int] = {
    "blip-2": 4,
    "dots3_note": 4,
    "git": 0,
    "instructblip": 4,
    "instructblipvideo": 16,
    "kosmos-2": 4,
    "kosmos-2.5": 4,
    "mllama": 0,
    "udop": 0,
    "video_llama_3": 16,
}
"""Image tokens of the prompt, by model type, where counting what `get_image_features` gives is not the answer."""


def batch_of(model: Any, model_type: str) -> Batch:
    """One prompt of three words behind its image, for `forward` and `generate`."""
    taken = signature(model.forward).parameters
    image = image_of(model, model_type)
    count = IMAGE_TOKENS[model_type] if model_type in IMAGE_TOKENS else _count(model, image) if image else 0
    config = model.config
    own = (getattr(config, key, None) for key in ("image_token_id", "image_token_index", "video_token_index"))
    token = next((own for own in own if own is not None), None)
    places = "image_embeds_position_mask" in taken  # Kosmos tells by a mask instead
    ids = [token if token is not None else 7] * (count if token is not None or places else 0)
    ids = torch.tensor([ids + _words(config)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | image
    if places:
        batch["image_embeds_position_mask"] = torch.arange(ids.shape[1])[None] < count
    if "mm_token_type_ids" in taken:
        batch["mm_token_type_ids"] = (ids == token).long()
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.tensor([[0, 7]])
    if "input_ids" not in taken:
        batch = {key: value for key, value in batch.items() if key not in ("input_ids", "attention_mask")}
    return batch


def words_of(model: Any) -> Batch:
    """The prompt alone."""
    ids = torch.tensor([_words(model.config)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_of(model: Any, model_type: str) -> Batch:
    """The image alone, in its family's own layout or in the one that the forward's names tell."""
    if model_type in _LAYOUTS:
        return _LAYOUTS[model_type]()
    taken = signature(model.forward).parameters
    vision = vision_config(model.config)
    if "flattened_patches" in taken:
        size = 3 * getattr(vision, "patch_size", PATCH) ** 2
        places = torch.cartesian_prod(torch.arange(1, GRID + 1), torch.arange(1, GRID + 1)).float()
        patches = torch.cat([places, _noise(GRID**2, size)], 1)[None]
        return {"flattened_patches": patches}
    if "pixel_values" not in taken:
        return {}
    if "image_grid_thw" in taken:
        frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1)
        pixels = _noise(GRID**2, 3 * frames * getattr(vision, "patch_size", PATCH) ** 2)
        return {"pixel_values": pixels, "image_grid_thw": _THW}
    if "spatial_shapes" in taken:
        return {
            "pixel_values": _noise(1, GRID**2, 3 * PATCH**2),
            "spatial_shapes": torch.tensor([[GRID, GRID]]),
            "pixel_attention_mask": torch.ones(1, GRID**2, dtype=torch.long),
        }
    pixels = _noise(1, 3, IMAGE, IMAGE)
    if "pixel_attention_mask" in taken:  # Idefics: images of a sample are a dimension of their own
        return {"pixel_values": pixels[None]}
    if getattr(model.config, "image_grid_pinpoints", None):  # the whole image and one tile
        return {"pixel_values": _noise(1, 2, 3, IMAGE, IMAGE), "image_sizes": _SIZE}
    if "image_sizes" in taken and "vision_feature_select_strategy" not in taken:
        return {"pixel_values": pixels, "image_sizes": _SIZE}
    return {"pixel_values": pixels}


_THW, _SIZE = torch.tensor([[1, GRID, GRID]]), torch.tensor([[IMAGE, IMAGE]])
_QFORMER = {"qformer_input_ids": torch.tensor([[5, 7]]), "qformer_attention_mask": torch.ones(1, 2, dtype=torch.long)}
_LAYOUTS: dict[str, Callable[[], Batch]] = {
    "deepseek_vl_hybrid": lambda: {
        "pixel_values": _noise(1, 3, IMAGE, IMAGE),
        "high_res_pixel_values": _noise(1, 3, IMAGE, IMAGE),
    },
    "fuyu": lambda: {"image_patches": _noise(1, GRID**2, 3 * PATCH**2)},
    "gemma4": lambda: {
        "pixel_values": _noise(1, GRID**2, 3 * PATCH**2),
        "image_position_ids": torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))[None],
    },
    "granite_docling": lambda: {
        "pixel_values": _noise(1, 1, 3, IMAGE, IMAGE),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    },
    "idefics": lambda: {
        "pixel_values": _noise(1, 1, 3, IMAGE, IMAGE),
        "image_attention_mask": torch.ones(1, 3, 1, dtype=torch.long),
    },
    "inkling2": lambda: {"pixel_values": _noise(GRID**2, 2 * PATCH, 2 * PATCH, 3), "image_grid_thw": _THW},
    "inkling2_loop": lambda: {"pixel_values": _noise(GRID**2, 2 * PATCH, 2 * PATCH, 3), "image_grid_thw": _THW},
    "instructblip": lambda: {"pixel_values": _noise(1, 3, IMAGE, IMAGE)} | _QFORMER,
    "instructblipvideo": lambda: {"pixel_values": _noise(1, 4, 3, IMAGE, IMAGE)} | _QFORMER,
    "kimi_k25": lambda: {"pixel_values": _noise(GRID**2, 3, PATCH, PATCH), "image_grid_thw": _THW},
    "minicpm_ocr": lambda: {
        "pixel_values": _noise(1, 3, PATCH, GRID**2 * PATCH),
        "target_sizes": torch.tensor([[GRID, GRID]]),
    },
    "mllama": lambda: {
        "pixel_values": _noise(1, 1, 4, 3, IMAGE, IMAGE),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
        "cross_attention_mask": torch.ones(1, 3, 1, 4, dtype=torch.long),
    },
    "nemotron_h_omni": lambda: {
        "pixel_values": _noise(GRID**2, 3 * PATCH**2),
        "image_grid_hw": torch.tensor([[GRID, GRID]]),
    },
    "paddleocr_vl": lambda: {"pixel_values": _noise(GRID**2, 3, PATCH, PATCH), "image_grid_thw": _THW},
    "udop": lambda: {"pixel_values": _noise(1, 3, IMAGE, IMAGE), "bbox": torch.rand(1, 3, 4).sort(-1).values},
    "video_llama_3": lambda: {
        "pixel_values": _noise(GRID**2, 3 * PATCH**2),
        "image_grid_thw": _THW,
        "image_merge_sizes": torch.tensor([1]),
    },
}
_LAYOUTS |= dict.fromkeys(("minicpmv4_6", "minicpmv4_7"), _LAYOUTS["minicpm_ocr"])


def vision_config(config: Any) -> Any:
    """The part of a config that describes the vision tower, or the config itself."""
    return next((c for c in (getattr(config, "vision_config", None), getattr(config, "encoder", None)) if c), config)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _words(config: Any) -> list[int]:
    special = set(_special(config.to_dict()))
    return [i for i in (5, 17, 3, 21, 33, 6, 11) if i not in special][:3]


def _special(fields: dict[Any, Any]) -> Iterator[int]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif "token" in str(key) and isinstance(value, int):
            yield value


@torch.no_grad()
def _count(model: nn.Module, image: Batch) -> int:
    """How many tokens the model makes of the image."""
    features = getattr(model, "get_image_features", None)
    if features is None:
        return GRID**2
    taken = signature(features).parameters
    own = {k: v for k, v in image.items() if k in taken} if "args" not in taken else image
    found = whole = features(**own)
    found = getattr(found, "pooler_output", None) if hasattr(found, "last_hidden_state") else found
    found = whole.last_hidden_state if found is None else found
    while isinstance(found, tuple | list) and len(found) == 1:
        found = found[0]
    if isinstance(found, tuple | list):
        return sum(part.shape[:-1].numel() for part in found)
    return found.shape[:-1].numel()
