"""Where a model's feed-forward networks are.

Model families differ in what they call things, not in what an FFN is: linears that read the hidden state (`gate` and
`up`, `fc1`, or both in one as `gate_up`) and one that writes it back (`down`, `fc2`). Two rules find them, both on the
children of one module: names in use (`SHAPES`), and for other names two or three linears that fit together inside a
module that is called an MLP and holds no other matrices. What lies inside attention, or heads a vision tower, is none.
A projector may also be a single matrix: there every linear counts that is in no FFN. Experts that are stored together
(`experts.py`) are one FFN, whose matrices go by the names of their tensors.

The region of an FFN follows from the names on its path, and where these say nothing, from what the model around it
takes: pixels make a vision tower.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hyperfade.nn import ExpertsLinear, Light
from hyperfade.recipe import Region
from hyperfade.surgery.experts import find_experts, opened_experts

Dense = nn.Linear | Conv1D | ExpertsLinear
"""A dense matrix with its bias, or those of experts. `Conv1D` (GPT-2) is a linear that stores its weight transposed."""
_DENSE = get_args(Dense)

# (linears that read the FFN's input, linear that writes its output), relative to the holding module
SHAPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Qwen, Gemma, Mistral; Qwen2.5-VL's vision tower
    (("gate_up_proj",), "down_proj"),  # GLM, Phi-3: gate and up in one matrix
    (("up_proj",), "down_proj"),  # Nemotron
    (("fc1",), "fc2"),  # CLIP, SigLIP, BART, OPT, BLIP-2's and Qwen2-VL's vision towers
    (("linear_fc1",), "linear_fc2"),  # Qwen3-VL's vision tower
    (("wi_0", "wi_1"), "wo"),  # T5 v1.1
    (("wi",), "wo"),  # T5
    (("w1", "w3"), "w2"),  # InternLM2, LFM2
    (("c_fc",), "c_proj"),  # GPT-2
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon, Persimmon
    (("lin1",), "lin2"),  # SAM
    (("linear1",), "linear2"),  # PyTorch's own transformer layers
    (("intermediate.dense",), "output.dense"),  # BERT, ViT, Q-Former
    (("intermediate_query.dense",), "output_query.dense"),  # BLIP-2's Q-Former
)
PROJECTOR_SHAPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("linear_1",), "linear_2"),  # LLaVA
    (("merge_linear_1",), "merge_linear_2"),  # MiniMax
    (("0",), "2"),  # Qwen2-VL's merger: a Sequential
)
_PROJECTOR = re.compile(
    r"(^|\.)((\w+_)?(projector|merger|aligner|resampler|connector|qformer)(s|_list|_model)?|modality_projection"
    r"|vision_adapter|embed_vision|(language|vision|visual|image|image_to_text)_projection)(\.|$)"
)
_OTHER = re.compile(r"(^|\.)((\w+_)?audio(_\w+)?|speech\w*|protein_encoder|vqmodel|generation_\w+|dit|mtp)(\.|$)")
_VISION = re.compile(
    r"(^|\.)((\w+_)?(vision|image|video|sam)_(tower|model|encoder|backbone)|visual|vision_embed_tokens|vit)(\.|$)"
)
_LANGUAGE = re.compile(r"(^|\.)(language_model|text_model|text_decoder|decoder|lm)(\.|$)")
_NO_FFN = re.compile(  # head: SigLIP's attention pooling
    r"(^|\.)(\w*(attn|attention)|head|lm_head|cls|\w*embeddings|\w*router|\w*gate)(\.|$)", re.IGNORECASE
)
_ATTENTION = {
    "q_proj",
    "k_proj",
    "query",
    "key",
    "to_q",
    "to_kv",
    "q",
    "k",
    "qkv",
}  # children of attention, however named
_MLP = re.compile(r"mlp|ffn|feed_?forward|dense_?relu_?dense", re.IGNORECASE)


@dataclass(frozen=True)
class FFN:
    """One feed-forward network: `readers` see its input (gate and up, or fc1), `writer` makes its output (down, fc2).

    All are full module names of `Dense` modules; a single linear (some projectors) is a writer without readers.
    fused: the one reader holds gate and up, the gate's rows first. experts: how many FFNs of one shape this stands for,
    whose matrices are tensors of one module (then fused says no order of rows); 0 for an FFN by itself.
    """

    name: str
    region: Region
    readers: tuple[str, ...]
    writer: str
    fused: bool = False
    experts: int = 0

    @property
    def linears(self) -> tuple[str, ...]:
        """Readers, then the writer: the order in which a fit replaces them."""
        return (*self.readers, self.writer)


def dense_matrices(model: nn.Module) -> dict[str, Dense]:
    """Every dense matrix of `model` by name; those of experts by the names of their tensors."""
    found: dict[str, Dense] = {name: module for name, module in model.named_modules() if isinstance(module, Dense)}
    for experts in find_experts(model):
        found |= {f"{experts.name}.{key}": matrix for key, matrix in experts.matrices.items()}
    return found


def is_dense(module: nn.Module | None) -> bool:
    """Whether a module is a `Dense` itself: a subclass is someone else's, its weight may not be what it seems."""
    return type(module) in _DENSE


def features(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a `Dense`, or of a layer in its place."""
    if isinstance(linear, Conv1D):
        return int(linear.nx), int(linear.nf)
    assert isinstance(linear, nn.Linear | ExpertsLinear | Light)
    return linear.in_features, linear.out_features


def weight_of(linear: nn.Module) -> Tensor:
    """The weight (out, in) of a `Dense`, sharing its storage; of experts (experts, out, in)."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def find_ffns(model: nn.Module, with_light: bool = False) -> tuple[FFN, ...]:
    """Every FFN of `model`, in module order; `with_light` also those in which replacement layers have the place of some
    matrices."""
    kinds = (*_DENSE, *get_args(Light)) if with_light else _DENSE
    modules = dict(model.named_modules())
    found: dict[str, FFN] = {}  # by the matrices they take, or the module that holds those of experts
    for experts in find_experts(model):
        if experts.matrices:
            (reader, up), (writer, down) = experts.matrices.items()
            parts = (_join(experts.name, reader),), _join(experts.name, writer), up.out_features == 2 * down.in_features
            found[experts.name] = FFN(experts.name, _region(modules, experts.name), *parts, experts.number)
    opened = opened_experts(model)
    for name, module in modules.items():
        if name in opened or _is_none(name, module):
            continue
        region = _region(modules, name)
        for children, child in _shapes_in(module, name, region, kinds):
            readers, writer = tuple(_join(name, reader) for reader in children), _join(name, child)
            if not found.keys() & {*readers, writer}:
                fused = features(modules[readers[0]])[1] == 2 * features(modules[writer])[0]
                found |= dict.fromkeys((*readers, writer), FFN(name, region, readers, writer, fused))
    for name, module in modules.items():
        around = modules[name.rpartition(".")[0]]
        single = is_dense(module) and name not in found and not _is_none(name, around)
        if single and _region(modules, name) == "projector":
            found[name] = FFN(name, "projector", (), name)
    return tuple(dict.fromkeys(found[name] for name in modules if name in found))


def _is_none(name: str, around: nn.Module) -> bool:
    """Whether a name tells of what holds no FFN, or the module around the matrices attends."""
    return _NO_FFN.search(name) is not None or not _ATTENTION.isdisjoint(key for key, _ in around.named_children())


def _shapes_in(
    module: nn.Module, name: str, region: Region, kinds: tuple[type, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """(readers, writer) of every FFN of these kinds of matrices that the module holds, as names relative to it."""
    left = dict(_linears_in(module, kinds))
    for readers, writer in SHAPES + (PROJECTOR_SHAPES if region == "projector" else ()):
        if all(part in left for part in (*readers, writer)):
            parts = [left[part] for part in (*readers, writer)]
            if _fit_together(*(module.get_submodule(part) for part in parts)):
                yield tuple(parts[:-1]), parts[-1]
                left = {key: part for key, part in left.items() if part not in parts}
    if len(left) in (2, 3) and (region == "projector" or _is_mlp(module, name)):
        parts = list(left.values())
        linears = [module.get_submodule(part) for part in parts]
        if _fit_together(*linears) and _nothing_else(module, linears):
            yield tuple(parts[:-1]), parts[-1]


def _linears_in(module: nn.Module, kinds: tuple[type, ...]) -> Iterator[tuple[str, str]]:
    """(what it goes by, where it is) of the matrices among a module's children, and of those that a child wraps: as
    `dense` with a norm (BERT's way), or as `linear` with limits (Gemma 4's)."""
    for key, child in module.named_children():
        if type(child) in kinds:
            yield key, key
        elif type(getattr(child, "dense", None)) in kinds:
            yield f"{key}.dense", f"{key}.dense"
        elif type(getattr(child, "linear", None)) in kinds:
            yield key, f"{key}.linear"


def _fit_together(*linears: nn.Module) -> bool:
    """Whether the last reads what the others write: names alone may mean something else elsewhere. One reader may write
    gate and up at once."""
    *readers, writer = linears
    hidden, inputs = features(writer)[0], {features(reader)[0] for reader in readers}
    outputs = [features(reader)[1] for reader in readers]
    fused = len(outputs) == 1 and outputs[0] == 2 * hidden
    return len(inputs) == 1 and (fused or all(out == hidden for out in outputs))


def _nothing_else(module: nn.Module, linears: list[nn.Module]) -> bool:
    """Whether no other matrices stand beside these linears: what lies between them might be more than an activation."""
    own = {id(p) for linear in linears for p in linear.parameters()}
    return all(p.dim() < 2 or id(p) in own for p in module.parameters())


def _is_mlp(module: nn.Module, name: str) -> bool:
    return _MLP.search(name.rpartition(".")[2]) is not None or _MLP.search(type(module).__name__) is not None


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name and child else name or child


def _region(modules: dict[str, nn.Module], name: str) -> Region:
    """`region_of`, and for a name that says nothing: vision where the nearest model around it takes images alone."""
    region = region_of(name)
    if region != "language" or _LANGUAGE.search(name):
        return region
    while not isinstance(modules[name], PreTrainedModel):
        if not name:
            return region
        name = name.rpartition(".")[0]
    around = modules[name]
    assert isinstance(around, PreTrainedModel)
    takes = around.input_modalities
    return "vision" if set((takes,) if isinstance(takes, str) else takes) <= {"image", "video"} else region


def region_of(name: str) -> Region:
    """The region a module name belongs to; what is neither vision nor projector nor audio is language."""
    if _OTHER.search(name):
        return "other"
    if _PROJECTOR.search(name):
        return "projector"
    return "vision" if _VISION.search(name) else "language"
