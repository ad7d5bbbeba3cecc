"""What single families need beyond the rules: fields whose defaults are empty or contradict each other when small."""

from typing import Any

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_MROPE_TEXT = {"text_config": {"rope_parameters": _MROPE}}
_MROPE_WIDE = {"text_config": {"rope_parameters": _MROPE, "head_dim": 16}}  # they rotate half of it
_PINPOINTS = {"image_grid_pinpoints": [[16, 16]]}
_EQUAL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
_LAST_LAYER = {"vision_feature_layer": -1}  # so that no layer of the tower is left out
_IMAGE_TOKEN = {"image_token_id": 120}
_MINICPM = _IMAGE_TOKEN | {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}}
_SPATIAL = {"out_hidden_size": 64, "vision_config": {"out_hidden_size": 64}}
_VQ = {"base_channels": 32, "latent_channels": 32, "embed_dim": 32, "num_embeddings": 16, "channel_multiplier": [1, 1]}
_VOCABULARY = {"<image>": 120} | {f"IMGIMG{''.join(chr(65 + int(d)) for d in str(i))}Z": 100 + i for i in range(16)}

OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "image_token_offset": 40,
        "audio_token_offset": 72,
        "audio_config": {"decoder_attention_num_groups": 4},
        "vision_config": _VQ,
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4},
    "blip-2": {"image_token_index": 120},
    "chameleon": {"vq_config": _VQ, "vocabulary_map": _VOCABULARY, "image_token_id": 120},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE}},
    },
    "deepseek_ocr2": {
        "vision_config": {"sam_config": {"downsample_channels": [24, 16]}},
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    },
    "dots3_note": {
        "text_config": _EQUAL_HEADS | {"head_dim": 16, "per_layer_config": {2: {"num_key_value_heads": 4}}},
        "audio_config": {"num_key_value_heads": 2, "adapter_input_size": 16, "conv_output_size": 16},
        "vision_config": {"adapter_in_dim": 16},
    },
    "emu3": {"vq_config": _VQ | {"hidden_size": 32}, "vocabulary_map": _VOCABULARY},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _MROPE, "moe_intermediate_size": [24, 20]}},
    "florence2": {
        "vision_config": {
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 24],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 2,
        }
    },
    "gemma4": {
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        }
    },
    "glm46v": _MROPE_TEXT,
    "glm4v": _MROPE_TEXT,
    "glm4v_moe": _MROPE_WIDE,
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE | {"mrope_section": [2, 3, 3]}, "head_dim": 16}},
    "glmga": {"text_config": {"rope_parameters": _MROPE | {"mrope_section": [2, 3, 3]}, "num_attention_heads": 2}},
    "glm5_next": {"text_config": _EQUAL_HEADS},
    "granite4_vision": _PINPOINTS
    | {"deepstack_layer_map": [[1, 0]], "downsample_rate": "2/4", "vision_config": {"hidden_size": 64}},
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": _MROPE}},
    "instructblip": {"image_token_index": 120},
    "instructblipvideo": {"video_token_index": 120},
    "janus": {"vq_config": _VQ},
    "kimi_k25": {"text_config": _EQUAL_HEADS | {"n_group": 1, "topk_group": 1}},
    "kosmos-2.5": {"vision_config": {"patch_embed_hidden_size": 48}},
    "llama4": {
        "vision_config": {
            "intermediate_size": 64,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        }
    },
    "llava": _LAST_LAYER,
    "llava_next": _PINPOINTS | _LAST_LAYER,
    "llava_next_video": _PINPOINTS | _LAST_LAYER,
    "llava_onevision": _PINPOINTS,
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "mistral4": _EQUAL_HEADS
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
        }
    },
    "mistral_large4": {"text_config": _EQUAL_HEADS},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2], "text_hidden_size": 32}},
    "mllama": {"vision_config": {"vision_output_dim": 32}},
    "muse_glimmer": _SPATIAL,
    "muse_spark": _SPATIAL | {"audio_config": {"hidden_sizes": [8, 8, 16, 16]}},
    "nemotron_h_omni": _IMAGE_TOKEN,
    "paddleocr_vl": _MROPE_TEXT,
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 48, "hidden_size": 32, "num_attention_heads": 4}},
    "pp_formulanet": {
        "vision_config": {
            "post_conv_in_channels": 16,
            "post_conv_mid_channels": 24,
            "post_conv_out_channels": 32,
            "decoder_hidden_size": 32,
        }
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 118, "text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_vl": _MROPE_TEXT,
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}, "vision_config": {"hidden_size": 32}},
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 118,
        "audio_config": {"output_dim": 32, "downsample_hidden_size": 16},
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        }
    },
    "step3p7": {"text_config": {"sliding_window": 64}, "vision_config": {"mlp_ratio": 2.5}},
    "udop": {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [24, 16]}}},
    "video_llava": _LAST_LAYER,
    "vipllava": {"vision_feature_layer": [-2, -1]},
    "vision-encoder-decoder": {
        "encoder": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 40},
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
