"""A tiny config of any model type, by rule: every known size of its default config becomes a small one.

    config = shrunk("llava")

Text is 32 wide, vision 16, audio 16, a Q-Former 24, with FFNs of 48, 40, 40 and 56 units: no two regions have the same
widths, so a count cannot be right by accident. Families whose defaults contradict each other get their fields from
`overrides.py` on top.
"""

import re
from typing import Any

from families.overrides import OVERRIDES
from transformers import CONFIG_MAPPING, PretrainedConfig

VOCAB = 128
IMAGE, PATCH = 16, 4
_SIDES = (  # first match on a config's path decides; what matches none is text
    ("audio", re.compile(r"audio")),
    ("qformer", re.compile(r"qformer|perceiver|resampler")),
    ("vision", re.compile(r"vision|visual|vit|sam|vq")),
)
_WIDTH = {"text": 32, "vision": 16, "audio": 16, "qformer": 24}
_HIDDEN = {"text": 48, "vision": 40, "audio": 40, "qformer": 56}
_HEADS = {"text": 4, "vision": 2, "audio": 2, "qformer": 2}

# fields of a config → their small value on a side, or one for all sides; the first pattern that matches the name wins
_RULES: tuple[tuple[str, dict[str, int] | int], ...] = (
    (
        r"(decoder_|conf_)?num_(hidden_|decoder_)?layers|depth|n_layers?|(en|de)coder_layers|layers|decoder_num_layers",
        2,
    ),
    (r"num_(global|lstm|residual)_layers|(resampler_)?depth|num_res_blocks|aligner_num_add_layers", 1),
    (r"first_k_dense_replace|interleave_moe_layer_step|decoder_sparse_step", 1),
    (r"index_n_heads|num_sliding_attention_heads|(swa_)?num_attention_heads", _HEADS),
    (r"(num_|swa_num_|linear_num_)(key_value|kv|key)_heads", {side: max(n // 2, 1) for side, n in _HEADS.items()}),
    (r"linear_num_value_heads|linear_num_heads|mamba_num_heads|resampler_(n_)?heads", 2),
    (r"(conf_|encoder_|decoder_)?(num_)?(attention_)?heads|n_heads?", _HEADS),
    (r"hidden_size|d_model|embed_dim|n_embd|dim|hidden_dim|word_embed_proj_dim|decoder_hidden_size", _WIDTH),
    (r"(encoder_|decoder_)?(intermediate_size|ffn_dim)(_mlp)?|d_ff|mlp_dim|n_inner|dense_intermediate_size", _HIDDEN),
    (r"moe_intermediate_size|expert_dim", 24),
    (r"share_expert_dim|(moe_)?shared(_experts?)?_intermediate_size", 36),
    (
        r"(head_dim|d_kv|(swa|global|v|qk_nope|index|linear(_key|_value)?|mamba|resampler)_head_dim|resampler_dim_head)",
        8,
    ),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim|query_pre_attn_scalar", 16),
    (r"(q|kv)_lora_rank|laurel_rank|hc_lowrank|loop_gate_rank", 16),
    (r"out_hidden_size|output_dim|text_hidden_size|adapter_out_dim|projector_output_dim|moe_hidden_size", 32),
    (r"projection_dim|image_text_hidden_size|image_token_embed_dim", 32),
    (r"encoder_hidden_size|vision_hidden_size|projection_hidden_size|patch_embed_hidden_size", 16),
    (r"projector_hidden_size|alignment_intermediate_size|projection_(hidden_dim|intermediate_size)", 64),
    (r"merged_hidden_size", 72),
    (r"hidden_size_per_layer_input|ple_embed_dim|output_channels|latent_channels|codebook_dim|base_channels", 16),
    (r"(unpadded_)?vocab_size(_per_layer_input)?", VOCAB),
    (r"num_embeddings|codebook_size", 32),
    (r"image_size|resolution", IMAGE),
    (r"patch_size", PATCH),
    (r"(original_)?max_position_embeddings|max_source_positions|max_2d_position_embeddings|seq_len", 256),
    (r"num_position_embeddings|num_patches", (IMAGE // PATCH) ** 2),
    (r"position_embedding_size|max_num_patches|pos_emb_(height|width)", 16),
    (r"(n_routed|num|num_local|moe_num)_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k", 2),
    (r"n_shared_experts|moe_num_shared_experts", 1),
    (r"image_seq_length|video_seq_length|mm_tokens_per_image|num_image_tokens", (IMAGE // PATCH) ** 2),
    (r"num_query_tokens|latent_query_num|resampler_(n|num)_latents", 4),
    (r"index_topk|sliding_window(_size)?|attention_chunk_size", 64),
    (r"scale|window_size|chunk_size|ssm_state_size|block_multiple_of", 8),
    (r"n_groups?", 1),
)
_COMPILED = tuple((re.compile(pattern), small) for pattern, small in _RULES)


def shrunk(model_type: str) -> PretrainedConfig:
    """The tiny config of this model type."""
    config_class = CONFIG_MAPPING[model_type]
    fields = _small(config_class().to_dict(), "text", {})
    _merge(fields, OVERRIDES.get(model_type, {}))
    return config_class(**fields)


def _small(fields: dict[str, Any], side: str, tokens: dict[int, int]) -> dict[str, Any]:
    kept = _kept_layers(fields)
    small: dict[str, Any] = {}
    for key, value in fields.items():
        if key in ("transformers_version", "id2label", "label2id", "architectures", "dtype", "torch_dtype"):
            continue
        if key == "per_layer_config" and value:
            places = {index: place for place, index in enumerate(kept[1])} if kept else {}
            small[key] = {places[int(i)]: _small(own, side, tokens) for i, own in value.items() if int(i) in places}
        elif isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            inner = next((name for name, pattern in _SIDES if pattern.search(key)), side)
            small[key] = _small(value, inner, tokens)
        elif isinstance(value, dict) and "mrope_section" in value:
            small[key] = value | {"mrope_section": [1, 1, 2]}
        elif isinstance(value, list) and key.startswith(("patch_size", "image_size")) and len(value) == 2:
            small[key] = [PATCH if "patch" in key else IMAGE] * 2
        elif isinstance(value, list) and kept and len(value) == kept[0]:
            small[key] = [value[i] for i in kept[1]]
        elif isinstance(value, list) and re.search(r"(indexes|indices|idxs|_layers|layer_ids)$", key) and value:
            small[key] = [1]
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = _number(key, value, side, tokens)
        else:
            small[key] = value
    if kept:
        small[kept[2]] = len(kept[1])
    return small


def _number(key: str, value: int, side: str, tokens: dict[int, int]) -> int:
    if re.search(r"token_(id|index)$|_id$", key) and value >= VOCAB:
        return tokens.setdefault(value, VOCAB - 2 - len(tokens))
    for pattern, small in _COMPILED:
        if pattern.fullmatch(key):
            return min(value, small[side] if isinstance(small, dict) else small)
    return value


def _kept_layers(fields: dict[str, Any]) -> tuple[int, list[int], str] | None:
    """(layers before, those that stay, the field that counts them): one of each kind, two at least, four at most."""
    for counter in ("num_hidden_layers", "num_layers", "depth"):
        number = fields.get(counter)
        if isinstance(number, int) and number > 2:
            lists = [v for v in fields.values() if isinstance(v, list) and len(v) == number]
            kinds = list(zip(*lists, strict=True)) if lists else [()] * number
            first = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i][:4]
            first += [i for i in range(number) if i not in first][: max(0, 2 - len(first))]
            return number, sorted(first), counter
    return None


def _merge(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and str(key).endswith(("_config", "encoder")) and isinstance(fields.get(key), dict):
            _merge(fields[key], value)
        else:
            fields[key] = value
