"""How many FFNs each family has, and of how many parameters: from its config by arithmetic, not from its modules.

    expected("llava", config)  →  {"language": (2, 9216), "vision": (2, 2672), "projector": (1, 1600)}

Most families have a gated language FFN without biases and a vision FFN of two biased matrices; `_LANGUAGE`, `_VISION`
and `_PROJECTOR` hold what differs. A module of experts counts as one FFN, in a part of its own: `_EXPERTS`.
"""

from collections.abc import Callable
from typing import Any

from families.formulas import (
    Part,
    deep_merger,
    experts,
    gated,
    gated_vit,
    glm,
    lin,
    llava,
    merger,
    mlp,
    none,
    one,
    pixtral,
    qformer,
    routed,
    shared_alone,
    shuffled,
    text,
    towers,
    ungated,
    vit,
)

Rule = Callable[[Any], Part]  # of the whole config


def expected(model_type: str, config: Any) -> dict[str, Part]:
    """Region → (number of FFNs, their parameters); regions without FFNs are left out."""
    parts = {
        "language": _LANGUAGE.get(model_type, gated)(config),
        "vision": _VISION.get(model_type, vit)(config),
        "projector": _PROJECTOR.get(model_type, none)(config),
        "other": _OTHER.get(model_type, none)(config),
        "experts": _EXPERTS.get(model_type, none)(config),
    }
    return {region: part for region, part in parts.items() if part[0]}


def _florence_vision(c: Any) -> Part:
    v = c.vision_config
    sizes = [2 * depth * mlp(e, int(e * v.mlp_ratio)) for depth, e in zip(v.depths, v.embed_dim, strict=True)]
    return 2 * sum(v.depths), sum(sizes)


def _both_sides(c: Any) -> Part:
    t = c.text_config
    return t.encoder_layers + t.decoder_layers, sum(
        n * mlp(t.d_model, i) for n, i in ((t.encoder_layers, t.encoder_ffn_dim), (t.decoder_layers, t.decoder_ffn_dim))
    )


def _ernie_projector(c: Any) -> Part:
    v = c.vision_config
    space = v.hidden_size * v.spatial_merge_size**2
    time = space * v.temporal_merge_size
    return 3, mlp(space, space) + lin(time, space) + lin(space, space) + lin(space, text(c).hidden_size)


def _granite(c: Any) -> Part:
    v, out = c.vision_config, c.vision_config.out_hidden_size
    paths = [v.hidden_size * v.scale_factor**2, v.hidden_size * (v.scale_factor // 2) ** 2]
    deep = len(v.deepstack_visual_indexes)
    own = sum(d * out + deep * (lin(d, out) + lin(out, out)) for d in paths)
    return len(paths) * (1 + deep) + 1, own + out * out


def _granite4(c: Any) -> Part:
    """A Q-Former's FFNs and a matrix into the language model, for each pair of layers and each of four offsets."""
    q, v = c.qformer_config, c.vision_config.hidden_size
    number = len(c.deepstack_layer_map) + 4
    own = q.num_hidden_layers * mlp(q.hidden_size, q.intermediate_size) + lin(v, text(c).hidden_size)
    return number * (q.num_hidden_layers + 1), number * own


def _idefics2(c: Any) -> Part:
    t, p = text(c), c.perceiver_config
    resampler = p.resampler_depth * 3 * t.hidden_size * 4 * t.hidden_size
    inner = t.intermediate_size
    return 1 + p.resampler_depth, 2 * c.vision_config.hidden_size * inner + inner * t.hidden_size + resampler


def _lfm2(c: Any) -> Part:
    t = text(c)
    inner = -(-int(2 * t.intermediate_size / 3) // t.block_multiple_of) * t.block_multiple_of
    return t.num_hidden_layers, t.num_hidden_layers * 3 * t.hidden_size * inner


def _projected(c: Any) -> Part:
    v, h = c.vision_config.hidden_size, c.projector_hidden_size
    return 1, lin(4 * v, h) + lin(h, text(c).hidden_size)


def _minimax(c: Any) -> Part:
    v, h, t = c.vision_config.hidden_size, c.projector_hidden_size, text(c).hidden_size
    return 2, lin(v, h) + lin(h, t) + lin(4 * t, h) + lin(h, t)


def _swiglu_projector(c: Any) -> Part:
    """The second matrix reads half of what the first writes, gated by the other half."""
    wide = getattr(c, "alignment_intermediate_size", None) or text(c).hidden_size
    patches = c.vision_config.hidden_size * c.downsample_factor**2
    return 1, lin(patches, wide) + lin(wide // 2, text(c).hidden_size)


def _hybrid(c: Any) -> Part:
    t, v, high = text(c).hidden_size, c.vision_config.hidden_size, c.high_res_vision_config.output_channels * 4
    return 3, lin(v, t // 2) + lin(high, t // 2) + lin(t, t)


def _idefics_text(c: Any) -> Part:
    layers = c.num_hidden_layers + c.num_hidden_layers // c.cross_layer_interval
    return layers, layers * 3 * c.hidden_size * c.intermediate_size


def _decoder(c: Any) -> Part:
    return c.decoder.num_hidden_layers, c.decoder.num_hidden_layers * mlp(
        c.decoder.hidden_size, c.decoder.intermediate_size
    )


def _nemotron(c: Any) -> Part:
    """Ungated and without biases: FFN layers, and the shared expert of expert layers."""
    t = text(c)
    dense, sparse = (t.layers_block_type.count(kind) for kind in ("mlp", "moe"))
    return dense + sparse, 2 * t.hidden_size * (
        dense * t.intermediate_size + sparse * t.moe_shared_expert_intermediate_size
    )


def _window(c: Any) -> Part:
    """MiniCPM: four patches of the tower, through a wider FFN, back to one; then four of those to text."""
    v = c.vision_config
    h, wide = 4 * v.hidden_size, 4 * v.intermediate_size
    return 2, lin(h, wide) + lin(wide, v.hidden_size) + lin(h, h) + lin(h, text(c).hidden_size)


def _t5gemma(c: Any) -> Part:
    parts = [gated(c.encoder.text_config), gated(c.decoder)]
    return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


def _audio(c: Any) -> Part:
    a = c.audio_config
    return a.encoder_layers, a.encoder_layers * mlp(a.d_model, a.encoder_ffn_dim)


def _inkling(c: Any) -> Part:
    v = c.vision_config
    wide = v.projection_hidden_dim
    return 1, 4 * v.hidden_size * wide + wide * v.text_hidden_size


def _kosmos(c: Any) -> int:
    return text(c).embed_dim


def _llama4(c: Any) -> Part:
    """The pixel shuffle's two matrices, and the one into the language model, without biases."""
    v = c.vision_config
    own = v.intermediate_size * v.projector_input_dim + v.projector_output_dim**2
    return 2, own + v.vision_output_dim * text(c).hidden_size


def _muse(c: Any) -> Part:
    h = c.projector_hidden_size
    return 2, c.out_hidden_size * h + h * h + h * text(c).hidden_size


def _kimi(c: Any) -> Part:
    merged = c.vision_config.hidden_size * c.vision_config.merge_kernel_size[0] * c.vision_config.merge_kernel_size[1]
    return 1, lin(merged, merged) + lin(merged, text(c).hidden_size)


def _evolla(c: Any) -> Part:
    """The protein encoder's layers, and the resampler's FFNs without biases."""
    p, wide = c.protein_encoder_config, c.protein_encoder_config.hidden_size * c.resampler_ff_mult
    own = p.num_hidden_layers * mlp(p.hidden_size, p.intermediate_size)
    return p.num_hidden_layers + c.resampler_depth, own + c.resampler_depth * 2 * p.hidden_size * wide


def _dots_audio(c: Any) -> Part:
    """Gated and biased in every layer, and the adapter to text."""
    a = c.audio_config
    h, i, out = a.hidden_size, a.intermediate_size, a.adapter_out_dim
    own = a.num_hidden_layers * (3 * h * i + 2 * i + h)
    return a.num_hidden_layers + 1, own + lin(a.adapter_input_size, out) + lin(out, out)


def _muse_audio(c: Any) -> Part:
    return 2 * len(c.audio_config.hidden_sizes), 2 * sum(mlp(h, 4 * h) for h in c.audio_config.hidden_sizes)


def _dots_experts(c: Any) -> Part:
    v, (number, own) = c.vision_config, routed(c)
    sparse = v.mlp_layer_types.count("sparse")
    return number + sparse, own + sparse * v.num_local_experts * 3 * v.hidden_size * v.moe_intermediate_size


def _ernie_experts(c: Any) -> Part:
    """Two modules in a sparse layer: of words and of images."""
    t, sparse = text(c), text(c).mlp_layer_types.count("sparse")
    return 2 * sparse, sparse * t.moe_num_experts * 3 * t.hidden_size * sum(t.moe_intermediate_size)


def _nemotron_experts(c: Any) -> Part:
    t = text(c)
    sparse = t.layers_block_type.count("moe")
    return sparse, sparse * t.n_routed_experts * 2 * t.hidden_size * t.moe_intermediate_size


_EXPERTS: dict[str, Rule] = {
    **dict.fromkeys(
        ("aria", "deepseek_ocr2", "glm4v_moe", "glm5_next", "hy_v4_vl", "inkling2", "inkling2_loop"), routed
    ),
    **dict.fromkeys(("inkling_mm_model", "kimi_k25", "llama4", "minimax_m3_vl", "mistral4", "mistral_large4"), routed),
    **dict.fromkeys(("muse_spark", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen4_exp"), routed),
    **dict.fromkeys(("step3p7", "unlimited_ocr"), routed),
    "dots3_note": _dots_experts,
    "ernie4_5_vl_moe": _ernie_experts,
    "nemotron_h_omni": _nemotron_experts,
}
_OTHER: dict[str, Rule] = {
    "dots3_note": _dots_audio,
    "evolla": _evolla,
    "muse_spark": _muse_audio,
    "qwen2_5_omni_thinker": _audio,
    "qwen3_omni_moe_thinker": _audio,
}
_LANGUAGE: dict[str, Rule] = {
    "aria": lambda c: experts(c, text(c).intermediate_size * text(c).moe_num_shared_experts, 0),
    **dict.fromkeys(("blip", "blip-2", "git", "instructblip", "instructblipvideo", "fuyu"), ungated),
    **dict.fromkeys(("apertus1p5", "cosmos3_edge"), lambda c: (gated(c)[0], gated(c)[1] * 2 // 3)),
    "dots3_note": lambda c: experts(c, text(c).shared_experts_intermediate_size),
    "ernie4_5_vl_moe": lambda c: experts(c, text(c).moe_intermediate_size[0] * text(c).moe_num_shared_experts),
    "florence2": _both_sides,
    **dict.fromkeys(
        ("glm5_next", "hy_v4_vl", "mistral_large4", "deepseek_ocr2", "unlimited_ocr"),
        lambda c: experts(c, text(c).moe_intermediate_size * text(c).n_shared_experts),
    ),
    **dict.fromkeys(  # these count their dense layers
        ("glm4v_moe", "kimi_k25"),
        lambda c: experts(c, text(c).moe_intermediate_size * text(c).n_shared_experts, text(c).first_k_dense_replace),
    ),
    "evolla": lambda c: (  # some layers adapt to proteins by an ungated FFN more
        c.num_hidden_layers + c.aligner_num_add_layers,
        c.num_hidden_layers * 3 * c.hidden_size * c.intermediate_size
        + c.aligner_num_add_layers * 2 * c.hidden_size**2 * c.aligner_ffn_mult,
    ),
    "idefics": _idefics_text,
    "lfm2_vl": _lfm2,
    "minimax_m3_vl": lambda c: experts(c, text(c).shared_intermediate_size, 0),
    **dict.fromkeys(("muse_spark", "inkling_mm_model"), none),
    "mistral4": lambda c: experts(c, c.moe_intermediate_size * c.n_shared_experts, 0),
    **dict.fromkeys(("qwen3_5_moe", "qwen4_exp"), lambda c: shared_alone(c, text(c).shared_expert_intermediate_size)),
    "nemotron_h_omni": _nemotron,
    **dict.fromkeys(("inkling2", "inkling2_loop", "qwen3_omni_moe_thinker", "qwen3_vl_moe"), none),
    "kosmos-2": lambda c: (text(c).layers, text(c).layers * mlp(text(c).embed_dim, text(c).ffn_dim)),
    "kosmos-2.5": lambda c: (text(c).layers, text(c).layers * mlp(text(c).embed_dim, text(c).ffn_dim)),
    "pp_formulanet": lambda c: (
        text(c).decoder_layers,
        text(c).decoder_layers * mlp(text(c).d_model, text(c).decoder_ffn_dim),
    ),
    "pix2struct": lambda c: (text(c).num_layers, text(c).num_layers * 3 * text(c).hidden_size * text(c).d_ff),
    "step3p7": lambda c: experts(c, text(c).share_expert_dim),
    "t5gemma2": _t5gemma,
    "udop": lambda c: (
        c.num_layers + c.num_decoder_layers,
        (c.num_layers + c.num_decoder_layers) * 2 * c.d_model * c.d_ff,
    ),
    "vision-encoder-decoder": _decoder,
}
_VISION: dict[str, Rule] = {
    **dict.fromkeys(("apertus1p5", "chameleon", "emu3", "fuyu", "mistral4", "udop"), none),
    "deepseek_ocr2": lambda c: (
        towers(c.vision_config.sam_config)[0] + gated(c.vision_config.encoder_config)[0],
        towers(c.vision_config.sam_config)[1] + gated(c.vision_config.encoder_config)[1],
    ),
    **dict.fromkeys(("evolla", "gemma4_unified", "inkling_mm_model"), none),
    "dots3_note": lambda c: (  # of the dense layers
        c.vision_config.mlp_layer_types.count("dense"),
        gated_vit(c, bias=False)[1] // 2 * c.vision_config.mlp_layer_types.count("dense"),
    ),
    "gemma4": lambda c: gated_vit(c, bias=False),
    "deepseek_vl_hybrid": lambda c: towers(c.vision_config, c.high_res_vision_config),
    **dict.fromkeys(
        ("exaone4_5", "glm5_next", "glm_ocr", "hyperclovax_vision_v2", "qwen2_5_omni_thinker", "qwen2_5_vl"), gated_vit
    ),
    "florence2": _florence_vision,
    # their FFNs are as wide as what the tower gives, and intermediate_size is the merger's
    **dict.fromkeys(
        ("glm46v", "glm4v", "glmga", "glm4v_moe"), lambda c: gated_vit(c, False, c.vision_config.out_hidden_size)
    ),
    "janus": lambda c: towers(c.vision_config, inner=int(c.vision_config.hidden_size * c.vision_config.mlp_ratio)),
    **dict.fromkeys(
        ("lfm3_vl", "lighton_ocr", "mistral3", "mistral_large4", "ovis2"), lambda c: gated_vit(c, bias=False)
    ),
    "mllama": lambda c: (
        c.vision_config.num_hidden_layers + c.vision_config.num_global_layers,
        (c.vision_config.num_hidden_layers + c.vision_config.num_global_layers)
        * mlp(c.vision_config.hidden_size, c.vision_config.intermediate_size),
    ),
    "kosmos-2.5": lambda c: gated_vit(c, bias=False),
    "nemotron_h_omni": lambda c: towers(c.vision_config, inner=4 * c.vision_config.hidden_size),
    "pix2struct": lambda c: gated_vit(c, bias=False, inner=c.vision_config.d_ff),
    "qwen2_vl": lambda c: (
        c.vision_config.depth,
        c.vision_config.depth * mlp(c.vision_config.embed_dim, c.vision_config.embed_dim * c.vision_config.mlp_ratio),
    ),
    "step3p7": lambda c: towers(c.vision_config, inner=int(c.vision_config.hidden_size * c.vision_config.mlp_ratio)),
    "t5gemma2": lambda c: towers(c.encoder.vision_config),
    "unlimited_ocr": lambda c: towers(c.vision_config.sam_config, c.vision_config.encoder_config),
    "video_llava": lambda c: towers(c.vision_config, c.vision_config),
    "vision-encoder-decoder": lambda c: towers(c.encoder),
}
_PROJECTOR: dict[str, Rule] = {
    "aria": lambda c: (1, text(c).hidden_size * (c.vision_config.hidden_size + text(c).hidden_size)),
    **dict.fromkeys(("aya_vision", "cohere2_vision"), _swiglu_projector),
    "blip-2": lambda c: qformer(c, 1),
    **dict.fromkeys(("instructblip", "instructblipvideo"), lambda c: qformer(c, 2)),
    **dict.fromkeys(("cohere_compass", "cosmos3_omni", "qwen3_vl", "qwen3_vl_moe"), deep_merger),
    **dict.fromkeys(("exaone4_5", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe"), merger),
    "qwen3_omni_moe_thinker": deep_merger,
    **dict.fromkeys(("cosmos3_edge", "lfm2_vl", "lfm3_vl"), _projected),
    **dict.fromkeys(
        ("deepseek_vl", "llava", "llava_next", "llava_next_video", "llava_onevision", "video_llama_3", "video_llava"),
        llava,
    ),
    "deepseek_vl_hybrid": _hybrid,
    "ernie4_5_vl_moe": _ernie_projector,
    "florence2": lambda c: one(c.vision_config.embed_dim[-1], text(c).d_model, False),
    **dict.fromkeys(("git", "paligemma"), lambda c: one(c.vision_config.hidden_size, text(c).hidden_size)),
    **dict.fromkeys(("glm46v", "glm4v", "glmga", "glm4v_moe"), lambda c: glm(c, c.vision_config.intermediate_size)),
    "glm5_next": lambda c: glm(c, c.vision_config.projection_intermediate_size),
    "glm_ocr": lambda c: glm(c, c.vision_config.out_hidden_size * c.vision_config.in_channels),
    **dict.fromkeys(("got_ocr2", "pp_chart2table"), lambda c: one(text(c).hidden_size, text(c).hidden_size)),
    "gemma4": lambda c: one(c.vision_config.hidden_size, text(c).hidden_size, False),
    "granite4_vision": _granite4,
    "granite_docling": _granite,
    "hyperclovax_vision_v2": lambda c: (2, merger(c)[1] + lin(c.vision_config.out_hidden_size, text(c).hidden_size)),
    "idefics2": _idefics2,
    **dict.fromkeys(
        ("idefics3", "smolvlm"),
        lambda c: one(c.vision_config.hidden_size * c.scale_factor**2, text(c).hidden_size, False),
    ),
    **dict.fromkeys(("internvl", "qianfan_ocr"), shuffled),
    "dots3_note": lambda c: (
        1,
        lin(4 * c.vision_config.adapter_in_dim, 4 * c.vision_config.adapter_in_dim)
        + lin(4 * c.vision_config.adapter_in_dim, c.vision_config.adapter_out_dim),
    ),
    "hunyuan_vl": lambda c: one(4 * c.vision_config.hidden_size, text(c).hidden_size),
    **dict.fromkeys(("inkling2", "inkling2_loop"), _inkling),
    "janus": lambda c: (2, llava(c)[1]),
    "kimi_k25": _kimi,
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), lambda c: one(c.vision_config.hidden_size, _kosmos(c))),
    "llama4": _llama4,
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _window),
    "mllama": lambda c: one(c.vision_config.vision_output_dim, text(c).hidden_size),
    "molmo2": lambda c: (
        1,
        c.adapter_config.intermediate_size * (2 * c.adapter_config.hidden_size + c.adapter_config.text_hidden_size),
    ),
    **dict.fromkeys(("muse_glimmer", "muse_spark"), _muse),
    "nemotron_h_omni": lambda c: (
        1,
        c.projector_hidden_size * (4 * c.vision_config.hidden_size + text(c).hidden_size),
    ),
    "paddleocr_vl": merger,
    "deepseek_ocr2": lambda c: one(c.vision_config.encoder_config.hidden_size, text(c).hidden_size),
    "unlimited_ocr": lambda c: one(  # of both towers side by side
        c.vision_config.sam_config.downsample_channels[-1] + c.vision_config.encoder_config.hidden_size,
        text(c).hidden_size,
    ),
    "qwen4_exp": merger,
    "step3p7": lambda c: one(4 * c.vision_config.hidden_size, text(c).hidden_size, False),
    **dict.fromkeys(("lighton_ocr", "mistral3", "mistral_large4"), pixtral),
    "minimax_m3_vl": _minimax,
    "pp_formulanet": lambda c: (1, lin(c.vision_config.post_conv_out_channels, 32) + lin(32, text(c).d_model)),
    "vipllava": lambda c: (
        1,
        lin(c.vision_config.hidden_size * len(c.vision_feature_layer), text(c).hidden_size)
        + lin(text(c).hidden_size, text(c).hidden_size),
    ),
}
