"""Arithmetic that many families share: from a config to (number of FFNs, their parameters) of one region."""

from typing import Any

Part = tuple[int, int]  # number of FFNs, their parameters


def lin(d: int, k: int) -> int:
    """Parameters of a biased matrix."""
    return d * k + k


def mlp(h: int, i: int) -> int:
    """Two biased matrices, h → i → h."""
    return lin(h, i) + lin(i, h)


def none(config: Any) -> Part:
    """No FFN."""
    return 0, 0


def text(config: Any) -> Any:
    """The language model's config."""
    return getattr(config, "text_config", None) or config


def gated(config: Any) -> Part:
    """Gate, up and down without biases in every language layer; fused or not makes no difference."""
    t = text(config)
    return t.num_hidden_layers, t.num_hidden_layers * 3 * t.hidden_size * t.intermediate_size


def ungated(config: Any) -> Part:
    """Two biased matrices in every language layer (BERT, OPT, Persimmon)."""
    t = text(config)
    inner = getattr(t, "ffn_dim", None) or t.intermediate_size
    return t.num_hidden_layers, t.num_hidden_layers * mlp(t.hidden_size, inner)


def vit(config: Any) -> Part:
    """Two biased matrices in every vision layer."""
    return towers(config.vision_config)


def towers(*visions: Any, inner: int | None = None) -> Part:
    """The same of several towers; `inner` where the config has no intermediate_size."""
    layers = [getattr(v, "num_hidden_layers", None) or v.depth for v in visions]
    sizes = [mlp(v.hidden_size, inner or getattr(v, "mlp_dim", None) or v.intermediate_size) for v in visions]
    return sum(layers), sum(n * size for n, size in zip(layers, sizes, strict=True))


def gated_vit(config: Any, bias: bool = True, inner: int | None = None) -> Part:
    """Gate, up and down in every vision layer."""
    v = config.vision_config
    h, i, layers = v.hidden_size, inner or v.intermediate_size, getattr(v, "num_hidden_layers", None) or v.depth
    return layers, layers * (3 * h * i + (2 * i + h if bias else 0))


def experts(config: Any, shared: int, dense: int | None = None) -> Part:
    """Gated shared experts of `shared` units in the sparse layers, gated FFNs in the `dense` others."""
    t = text(config)
    kinds = getattr(t, "mlp_layer_types", None) or []
    own: int = kinds.count("dense") if dense is None else dense
    sparse = t.num_hidden_layers - own
    number = own + (sparse if shared else 0)
    return number, 3 * t.hidden_size * (own * t.intermediate_size + sparse * shared)


def routed(config: Any) -> Part:
    """Gated experts in every sparse layer: a module each, with the parameters of all."""
    t = text(config)
    names = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    number = next(getattr(t, name) for name in names if getattr(t, name, None))
    kinds = getattr(t, "mlp_layer_types", None)
    sparse = kinds.count("sparse") if kinds else t.num_hidden_layers - (getattr(t, "first_k_dense_replace", None) or 0)
    units = getattr(t, "moe_intermediate_size", None) or t.intermediate_size
    return sparse, sparse * number * 3 * t.hidden_size * units


def shared_alone(config: Any, shared: int) -> Part:
    """Gated shared experts in every layer, of a config without dense layers."""
    t = text(config)
    return t.num_hidden_layers, t.num_hidden_layers * 3 * t.hidden_size * shared


def llava(config: Any) -> Part:
    """vision → text → text, biased."""
    v, t = config.vision_config.hidden_size, text(config).hidden_size
    return 1, lin(v, t) + lin(t, t)


def shuffled(config: Any) -> Part:
    """Four patches as one, then text → text (InternVL)."""
    v, t = config.vision_config.hidden_size, text(config).hidden_size
    return 1, lin(4 * v, t) + lin(t, t)


def merger(config: Any, count: int = 1) -> Part:
    """Qwen's: four patches as one, then the same width, then text."""
    v = config.vision_config
    merged = getattr(v, "embed_dim", v.hidden_size) * v.spatial_merge_size**2
    return count, count * (lin(merged, merged) + lin(merged, text(config).hidden_size))


def deep_merger(config: Any) -> Part:
    """One merger, and one more for every layer whose features go deep."""
    return merger(config, 1 + len(config.vision_config.deepstack_visual_indexes))


def pixtral(config: Any) -> Part:
    """Mistral's: merging four patches, then vision → text → text, all without biases."""
    v, t = config.vision_config.hidden_size, text(config).hidden_size
    return 2, 4 * v * v + v * t + t * t


def glm(config: Any, context: int) -> Part:
    """GLM's merger: a matrix of its own, then a gated FFN of `context` units."""
    out = config.vision_config.out_hidden_size
    return 2, out * out + 3 * out * context


def qformer(config: Any, ffns: int) -> Part:
    """`ffns` per Q-Former layer, and the matrix into the language model."""
    q = config.qformer_config
    own = q.num_hidden_layers * ffns
    return own + 1, own * mlp(q.hidden_size, q.intermediate_size) + lin(q.hidden_size, text(config).hidden_size)


def one(d: int, k: int, bias: bool = True) -> Part:
    """A single matrix."""
    return 1, lin(d, k) if bias else d * k
