"""What training adds to the untrained model, as one small file; and the finished model from both, without training.

    python benchmarks/reference/adapter.py --untrained FOLDER --adapter FILE --output FOLDER

The file holds, in safetensors,

    NAME.lora   int8 (r, d + k)     row i is aᵢ and bᵢ of a linear d → k, whose weight grows by Σᵢ scaleᵢ bᵢ aᵢᵀ
    NAME.weight int8 (k, d)         a projector's linear, whose row j is scaleⱼ times these
    NAME.scale  float32 (r,) or (k,)
    NAME.bias   float32 (k,)        a projector's

so one byte a number, about 2.3 MB for rank 3 in the language model and rank 10 in the vision tower. The finished model
is made from the rounded numbers: whoever has the file and the untrained model gets it bit for bit. The sum is taken in
float64 and rounded once to the model's dtype, so that it does not depend on the order in which a processor adds.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperfade.errors import CheckpointError
from hyperfade.hub import load, load_processor, save
from hyperfade.surgery import region_of

UNTRAINED, OUTPUT = (Path("runs/reference") / name for name in ("untrained", "model"))
ADAPTER = Path(__file__).with_name("adapter.safetensors")  # the one that comes with the project
FORMAT = "hyperfade-reference-adapter-1"
_LORA = "default"  # what PEFT calls the only adapter


def projector_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the projector, by full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and region_of(n) == "projector"}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights but the projector's, whatever their names and order."""
    digests = []
    for name, parameter in model.named_parameters():
        if region_of(name) != "projector":
            flat = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
            digests.append(hashlib.sha256(flat.numpy()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


@torch.no_grad()
def pack(model: nn.Module, path: Path, base: str, facts: dict[str, Any]) -> None:
    """Write PEFT's LoRA layers and the projector of `model` to `path`.

    base: `fingerprint` of the untrained model. facts: how it was trained, kept in the file's header.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            a, a_scale = _rounded(layer.lora_A[_LORA].weight)
            b, b_scale = _rounded(layer.lora_B[_LORA].weight.T)
            tensors[f"{name}.lora"] = torch.cat([a, b], dim=1)
            tensors[f"{name}.scale"] = (a_scale * b_scale * layer.scaling[_LORA]).float()
    for name, linear in projector_linears(model).items():
        weight, scale = _rounded(linear.weight)
        tensors |= {f"{name}.weight": weight, f"{name}.scale": scale.float(), f"{name}.bias": linear.bias.float()}
    header = {"base": base, "transformers": transformers.__version__, "training": facts}
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata=_entry(header))
    partial.chmod(0o644)
    partial.replace(path)


def _entry(header: dict[str, Any]) -> dict[str, str]:
    """As one entry: safetensors writes several in any order, and the same training shall give the same bytes."""
    return {FORMAT: json.dumps(header, sort_keys=True)}


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) → int8 (n, m) and float64 (n,), whose product is nearest to `rows`."""
    rows = rows.detach().double()
    scale = rows.abs().amax(dim=1) / 127
    return (rows / scale.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).round().to(torch.int8), scale


@torch.no_grad()
def add_(model: nn.Module, path: Path) -> None:
    """Add what `path` holds to the weights of the untrained `model`.

    Raises `CheckpointError`, and changes nothing, where the file is damaged or made for another model.
    """
    header, tensors = _read(path)
    if header.get("base") != fingerprint(model):
        raise CheckpointError(
            f"{path} was made for another untrained model.",
            f"Assemble it again with transformers {header.get('transformers')}, or train anew.",
        )
    modules = dict(model.named_modules())
    changes: list[tuple[Tensor, Tensor]] = []
    for key, stored in tensors.items():
        name, _, kind = key.rpartition(".")
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(
                f"{path} changes {name}, and the model has no linear of that name.",
                f"Use transformers {header.get('transformers')}, with which it was made; names may have changed.",
            )
        if kind == "scale":
            continue
        if kind == "bias":
            changes.append((linear.bias, stored))
            continue
        scaled = stored.double() * tensors[f"{name}.scale"].double()[:, None]
        if kind == "lora":
            a, b = stored.double()[:, : linear.in_features], scaled[:, linear.in_features :]
            scaled = linear.weight.double() + b.T @ a
        changes.append((linear.weight, scaled))
    for target, value in changes:
        if target.shape != value.shape:
            raise CheckpointError(f"{path}: a weight is {list(value.shape)}, the model's {list(target.shape)}.", _AGAIN)
    for target, value in changes:
        target.copy_(value)


_AGAIN = "Get the file again, or train anew."


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            entries = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", _AGAIN) from error
    if FORMAT not in entries:
        raise CheckpointError(f"{path} is not in format {FORMAT}; its header has {sorted(entries)}.", _AGAIN)
    return json.loads(entries[FORMAT]), tensors


@torch.no_grad()
def restore_(model: nn.Module, path: Path) -> None:
    """Put what `path` holds back into the projector and PEFT's LoRA layers of `model`, so that training goes on.

    Only the product of a row's two scales is kept, so both halves get its root. Raises `CheckpointError` where the file
    was made for other layers or another rank; nothing is changed then.
    """
    _, tensors = _read(path)
    changes: list[tuple[Tensor, Tensor]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            rows, scale = tensors.get(f"{name}.lora"), tensors.get(f"{name}.scale")
            a, b = layer.lora_A[_LORA].weight, layer.lora_B[_LORA].weight
            if rows is None or scale is None or rows.shape != (len(a), a.shape[1] + len(b)):
                found = "nothing" if rows is None else f"rows {tuple(rows.shape)}"
                raise CheckpointError(f"{path} holds {found} for {name}.", "Train with the ranks it was made with.")
            half = (scale / layer.scaling[_LORA]).sqrt()[:, None] * rows.float()
            changes += [(a, half[:, : a.shape[1]]), (b, half[:, a.shape[1] :].T)]
    for name, linear in projector_linears(model).items():
        weight, bias = (tensors.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is None or bias is None or weight.shape != linear.weight.shape:
            raise CheckpointError(f"{path} has no projector {name} of this shape.", _AGAIN)
        changes += [(linear.weight, weight.float() * tensors[f"{name}.scale"][:, None]), (linear.bias, bias)]
    for target, value in changes:
        target.copy_(value)


def kept_facts(path: Path) -> dict[str, Any]:
    """How the adapter in `path` was trained."""
    return _read(path)[0]["training"]


def build(untrained: Path, adapter: Path, output: Path) -> None:
    """Write the finished model, an ordinary Hugging Face folder, from the untrained one and the adapter file."""
    model = load(str(untrained))
    add_(model, adapter)
    save(model, output, load_processor(str(untrained)))


def main() -> None:
    """Build the finished model."""
    parser = argparse.ArgumentParser(
        description="Build the trained reference model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--untrained", type=Path, default=UNTRAINED, help="folder that assemble.py wrote")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="file that train.py wrote")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write the finished model to")
    args = parser.parse_args()
    build(args.untrained, args.adapter, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
