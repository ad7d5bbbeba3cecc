"""Where the FFNs are: numbers and parameter counts follow from each family's config, and nothing else is listed."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import FAMILIES
from torch import nn

from hyperfade.surgery import FFN, find_ffns, region_of

Expected = dict[str, tuple[int, int]]  # region → (number of FFNs, their parameters)


def _with_bias(*shapes: tuple[int, int]) -> int:
    """Parameters of biased linears given as (in, out)."""
    return sum(d * k + k for d, k in shapes)


def _two(h: int, i: int) -> int:
    """fc1 and fc2 with biases."""
    return _with_bias((h, i), (i, h))


def _llama_text(t: Any) -> tuple[int, int]:
    return t.num_hidden_layers, t.num_hidden_layers * 3 * t.hidden_size * t.intermediate_size


def _vit(v: Any) -> tuple[int, int]:
    return v.num_hidden_layers, v.num_hidden_layers * _two(v.hidden_size, v.intermediate_size)


def _llava(c: Any) -> Expected:
    v, t = c.vision_config.hidden_size, c.text_config.hidden_size
    return {
        "language": _llama_text(c.text_config),
        "vision": _vit(c.vision_config),
        "projector": (1, _with_bias((v, t), (t, t))),
    }


def _idefics(c: Any) -> Expected:
    projector = c.vision_config.hidden_size * c.scale_factor**2 * c.text_config.hidden_size  # no bias
    return {"language": _llama_text(c.text_config), "vision": _vit(c.vision_config), "projector": (1, projector)}


def _qwen2_vl(c: Any) -> Expected:
    v = c.vision_config
    merged = v.embed_dim * v.spatial_merge_size**2
    return {
        "language": _llama_text(c.text_config),
        "vision": (v.depth, v.depth * _two(v.embed_dim, v.embed_dim * v.mlp_ratio)),
        "projector": (1, _with_bias((merged, merged), (merged, v.hidden_size))),
    }


def _qwen2_5_vl(c: Any) -> Expected:
    v = c.vision_config
    h, i, merged = v.hidden_size, v.intermediate_size, v.hidden_size * v.spatial_merge_size**2
    return {
        "language": _llama_text(c.text_config),
        "vision": (v.depth, v.depth * _with_bias((h, i), (h, i), (i, h))),
        "projector": (1, _with_bias((merged, merged), (merged, v.out_hidden_size))),
    }


def _qwen3_vl(c: Any) -> Expected:
    v = c.vision_config
    merged, mergers = v.hidden_size * v.spatial_merge_size**2, 1 + len(v.deepstack_visual_indexes)
    return {
        "language": _llama_text(c.text_config),
        "vision": (v.depth, v.depth * _two(v.hidden_size, v.intermediate_size)),
        "projector": (mergers, mergers * _with_bias((merged, merged), (merged, v.out_hidden_size))),
    }


def _paligemma(c: Any) -> Expected:
    projector = _with_bias((c.vision_config.hidden_size, c.projection_dim))
    return {"language": _llama_text(c.text_config), "vision": _vit(c.vision_config), "projector": (1, projector)}


def _blip2(c: Any) -> Expected:
    q, t = c.qformer_config, c.text_config
    if t.model_type == "opt":
        language = t.num_hidden_layers, t.num_hidden_layers * _two(t.hidden_size, t.ffn_dim)
    else:  # gated T5: encoder and decoder, three matrices without bias
        language = t.num_layers + t.num_decoder_layers, (t.num_layers + t.num_decoder_layers) * 3 * t.d_model * t.d_ff
    projector = q.num_hidden_layers * _two(q.hidden_size, q.intermediate_size)
    projector += _with_bias((q.hidden_size, t.hidden_size))
    return {"language": language, "vision": _vit(c.vision_config), "projector": (q.num_hidden_layers + 1, projector)}


EXPECTED: dict[str, Callable[[Any], Expected]] = {
    "llava_siglip": _llava,
    "llava_clip": _llava,
    "idefics3": _idefics,
    "smolvlm": _idefics,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "paligemma": _paligemma,
    "blip2_opt": _blip2,
    "blip2_t5": _blip2,
    "llama": lambda c: {"language": _llama_text(c)},
    "qwen2": lambda c: {"language": _llama_text(c)},
}
ALL = pytest.mark.parametrize("name", FAMILIES)


@ALL
def test_numbers_and_parameters_follow_from_the_config(name: str) -> None:
    model = FAMILIES[name].meta()
    found: dict[str, tuple[int, int]] = {}
    for ffn in find_ffns(model):
        number, parameters = found.get(ffn.region, (0, 0))
        own = sum(p.numel() for linear in ffn.linears for p in model.get_submodule(linear).parameters())
        found[ffn.region] = (number + 1, parameters + own)
    assert found == EXPECTED[name](FAMILIES[name].config())


@ALL
def test_every_linear_is_an_ffn_or_attention_or_head_and_never_two(name: str) -> None:
    """Both directions: what is listed is neither attention nor embedding nor head, what is not listed is."""
    model = FAMILIES[name].meta()
    listed = [linear for ffn in find_ffns(model) for linear in ffn.linears]
    assert len(listed) == len(set(listed))
    spared = {id(m) for m in model.modules() if isinstance(m, nn.Embedding | nn.Conv2d | nn.Conv3d)}
    heads = [part.get_output_embeddings() for part in model.modules() if hasattr(part, "get_output_embeddings")]
    spared |= {id(head) for head in heads if head is not None}
    for part in model.modules():
        if "Attention" in type(part).__name__:  # includes SigLIP's pooling head, an attention of its own
            spared |= {id(m) for m in part.modules()}
    for module_name, module in model.named_modules():
        if module_name in listed:
            assert type(module) is nn.Linear
            assert id(module) not in spared, module_name
        elif isinstance(module, nn.Linear):
            assert id(module) in spared, f"{module_name} is in no FFN"
    assert spared, "the test has looked at nothing"


@ALL
def test_readers_share_the_input_and_meet_the_writer_in_the_middle(name: str) -> None:
    model = FAMILIES[name].meta()
    for ffn in find_ffns(model):
        writer = model.get_submodule(ffn.writer)
        for reader in map(model.get_submodule, ffn.readers):
            assert reader.out_features == writer.in_features
            assert reader.in_features == model.get_submodule(ffn.readers[0]).in_features
        assert ffn.linears == (*ffn.readers, ffn.writer)


def test_the_smallest_tower_in_full() -> None:
    found = find_ffns(FAMILIES["llava_clip"].meta())
    assert found[0] == FFN(
        "model.vision_tower.encoder.layers.0.mlp",
        "vision",
        ("model.vision_tower.encoder.layers.0.mlp.fc1",),
        "model.vision_tower.encoder.layers.0.mlp.fc2",
    )
    assert [f.region for f in found] == ["vision"] * 2 + ["projector"] + ["language"] * 3


@pytest.mark.parametrize(
    ("name", "region"),
    [
        ("", "language"),
        ("model.layers.0.mlp", "language"),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp", "vision"),
        ("model.visual.blocks.3.mlp", "vision"),
        ("model.visual.merger.mlp", "projector"),
        ("model.visual.deepstack_merger_list.0", "projector"),
        ("model.connector.modality_projection", "projector"),
        ("qformer.encoder.layer.0", "projector"),
        ("model.visually_named.mlp", "language"),
        ("emerger.mlp", "language"),
    ],
)
def test_regions_go_by_whole_parts_of_a_name(name: str, region: str) -> None:
    assert region_of(name) == region


class _MLP(nn.Module):
    def __init__(self, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(8, 16), nn.Linear(16, 8)


class _OtherLinear(nn.Linear):
    pass


def test_a_model_that_is_an_ffn_itself_is_found_under_its_own_names() -> None:
    assert find_ffns(_MLP()) == (FFN("", "language", ("fc1",), "fc2"),)


def test_subclasses_of_linear_are_left_alone() -> None:
    """A quantized or adapted linear is someone else's: its weight may not be what it seems."""
    assert find_ffns(_MLP(_OtherLinear)) == ()
    assert find_ffns(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))) == ()
