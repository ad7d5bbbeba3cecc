"""Where a model's feed-forward networks are.

Model families differ in what they call things, not in what an FFN is: one or two linears that read the hidden state
(`gate`, `up`) and one that writes it back (`down`). Each row of `SHAPES` names them as found in one group of families,
relative to the module that holds them. The region of an FFN follows from the names on its path.
"""

import re
from dataclasses import dataclass
from typing import get_args

from torch import nn

from hyperfade.nn import Light
from hyperfade.recipe import Region

# (linears that read the FFN's input, linear that writes its output), relative to the holding module
SHAPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Qwen, Gemma, Mistral; Qwen2.5-VL's vision tower
    (("fc1",), "fc2"),  # CLIP, SigLIP, OPT, BLIP-2's and Qwen2-VL's vision towers
    (("linear_fc1",), "linear_fc2"),  # Qwen3-VL's vision tower
    (("wi_0", "wi_1"), "wo"),  # T5 v1.1
    (("w1", "w3"), "w2"),  # InternLM2
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    (("intermediate.dense",), "output.dense"),  # BERT, Q-Former
    (("intermediate_query.dense",), "output_query.dense"),  # BLIP-2's Q-Former
)
PROJECTOR_SHAPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("linear_1",), "linear_2"),  # LLaVA
    (("0",), "2"),  # Qwen2-VL's merger: a Sequential
    ((), "linear"),  # PaliGemma
    ((), "proj"),  # Idefics3 and SmolVLM
)
SINGLE_PROJECTORS = ("language_projection", "multi_modal_projector", "mm_projector")  # an nn.Linear themselves (BLIP-2)

_PROJECTOR = re.compile(
    r"(^|\.)(multi_modal_projector|mm_projector|connector|modality_projection|merger|deepstack_merger_list|qformer"
    r"|language_projection)(\.|$)"
)
_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual|vision_encoder|vision_embed_tokens)(\.|$)")
_POOLING_HEAD = re.compile(r"(^|\.)head(\.|$)")  # SigLIP's attention pooling: not on a VLM's path


@dataclass(frozen=True)
class FFN:
    """One feed-forward network: `readers` see its input (gate and up, or fc1), `writer` makes its output (down, fc2).

    All are full module names of `nn.Linear` modules; a single linear (some projectors) is a writer without readers.
    """

    name: str
    region: Region
    readers: tuple[str, ...]
    writer: str

    @property
    def linears(self) -> tuple[str, ...]:
        """Readers, then the writer: the order in which a fit replaces them."""
        return (*self.readers, self.writer)


def find_ffns(model: nn.Module, with_light: bool = False) -> tuple[FFN, ...]:
    """Every FFN of `model` that has one of the known shapes, in module order; `with_light` also those in which
    replacement layers have the place of some linears."""
    kinds = (nn.Linear, *get_args(Light)) if with_light else (nn.Linear,)
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        region = region_of(name)
        if _POOLING_HEAD.search(name):
            continue
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in SINGLE_PROJECTORS:
            found.append(FFN(name, "projector", (), name))
            continue
        for readers, writer in SHAPES + (PROJECTOR_SHAPES if region == "projector" else ()):
            names = [f"{name}.{child}" if name else child for child in (*readers, writer)]
            if all(type(modules.get(full)) in kinds for full in names) and _fit_together(modules, names):
                found.append(FFN(name, region, tuple(names[:-1]), names[-1]))
                break
    return tuple(found)


def _fit_together(modules: dict[str, nn.Module], names: list[str]) -> bool:
    """Whether the writer (last) reads what the readers write: names alone may mean something else elsewhere."""
    *readers, writer = (modules[name] for name in names)
    return all(r.out_features == writer.in_features for r in readers)


def region_of(name: str) -> Region:
    """The region a module name belongs to; what is neither vision nor projector is language."""
    if _PROJECTOR.search(name):
        return "projector"
    return "vision" if _VISION.search(name) else "language"
