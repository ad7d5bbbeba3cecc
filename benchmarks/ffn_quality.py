"""One FFN of a pretrained language model by every method at every size: its output's error before and after training.

    make reference
    python benchmarks/ffn_quality.py --text wikitext-2

The rest of the model stays out of it: the FFN's inputs are recorded once, every method is fitted on the same ones and
trained for the same steps on the FFN's own output. That takes seconds where a whole model takes minutes, so it tells
methods apart before anything else is spent on them. The text folder holds valid.txt (fit and training) and test.txt
(errors). WikiText-2 (Merity et al. 2016) in its tokenised form is what the kept results are from.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comparison import FRACTIONS, RESULTS, methods
from torch import Tensor, nn

from hyperfade.distill import fit_, teacher_of
from hyperfade.hub import load, load_processor
from hyperfade.measure import machine
from hyperfade.recipe import Fit, Replace
from hyperfade.surgery import drop_dense_, plan, swap_
from hyperfade.workspace import read_json, write_json

LENGTH = 256  # tokens of a sequence
BATCH = 2048  # tokens of a training step


class OneFFN(nn.Module):
    """An FFN as a model of its own: forward(x (tokens, width)) → the same shape."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


@torch.inference_mode()
def recorded_inputs(language: Any, tokens: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """What the FFNs of these layers read, (tokens, width), but for the first token of each sequence: there sit massive
    activations that outweigh all others."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        language.layers[layer].mlp.register_forward_pre_hook(
            lambda _, args, layer=layer: seen[layer].append(args[0][:, 1:].flatten(0, 1).clone())
        )
        for layer in layers
    ]
    for batch in tokens.view(-1, LENGTH).split(16):
        language(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts) for layer, parts in seen.items()}


def error(ffn: nn.Module, inputs: Tensor, outputs: Tensor) -> float:
    """Relative error of the output, root of the mean square."""
    with torch.no_grad():
        return ((ffn(inputs) - outputs).square().mean() / outputs.square().mean()).sqrt().item()


def train_(ffn: nn.Module, dense: nn.Module, inputs: Tensor, steps: int, rate: float) -> None:
    """Minimise the mean squared difference of the two FFNs' outputs with AdamW, on random batches of the inputs."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(ffn.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x = inputs[torch.randint(len(inputs), (BATCH,), generator=generator)]
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
            wanted = dense(x).float()
        with torch.autocast(x.device.type, torch.bfloat16):
            got = ffn(x)
        loss = (got.float() - wanted).square().mean() / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def cell(
    mlp: nn.Module, fields: Mapping[str, Any], seen: Tensor, held_out: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Fit and train one FFN; errors on held-out inputs, share of parameters, seconds."""
    torch.manual_seed(0)
    ffn = OneFFN(mlp)
    dense = teacher_of(ffn)
    ffn = OneFFN(teacher_of(mlp))  # a copy to change, which shares its weights with the model's own
    chosen = plan(ffn, Replace.model_validate(fields["replace"]))
    ffn.requires_grad_(False)
    swap_(ffn, chosen)
    batches = [{"x": part} for part in seen[: args.calibration].split(8192)]
    began = time.perf_counter()
    fit_(ffn, chosen, batches, Fit(sweeps=6, ridge=1e-4, **fields.get("fit", {})))
    fit_seconds = time.perf_counter() - began
    drop_dense_(ffn)
    ffn.requires_grad_(True)
    with torch.no_grad():
        wanted = dense(held_out)
    before, began = error(ffn, held_out, wanted), time.perf_counter()
    train_(ffn, dense, seen, args.steps, args.learning_rate)
    return {
        "before": before,
        "after": error(ffn, held_out, wanted),
        "ratio": chosen.ffn_params_ratio,
        "fit_seconds": fit_seconds,
        "train_seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Run every cell that the results file lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model", default="runs/reference/untrained", help="a model whose decoder has layers[i].mlp, or a LLaVA of one"
    )
    add("--text", type=Path, required=True, help="folder with valid.txt and test.txt")
    add("--results", type=Path, default=RESULTS.with_name("ffn_quality.json"), help="finished cells")
    add("--layers", type=int, nargs="+", default=[10, 26], help="layers whose FFN is taken")
    add("--fractions", type=float, nargs="+", default=FRACTIONS, help="shares of the FFN parameters that stay")
    add("--steps", type=int, default=300, help="training steps of 2,048 tokens")
    add("--learning-rate", type=float, default=2e-3, help="peak learning rate of AdamW")
    add("--tokens", type=int, default=196_608, help="tokens of valid.txt that are trained on")
    add("--calibration", type=int, default=65_536, help="of these, tokens of the fit")
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ("steps", "learning_rate", "tokens", "calibration")}
    kept = read_json(args.results) if args.results.exists() else {}
    if kept.setdefault("settings", settings) != settings:
        parser.error(f"{args.results} holds cells of other settings, {kept['settings']}: choose another --results")
    kept |= {"machine": machine(), "model": Path(args.model).name}
    cells = kept.setdefault("cells", {})
    language: Any = load(args.model, "bfloat16").get_decoder()
    processor = load_processor(args.model)
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = {}
    for split, count in (("valid", args.tokens), ("test", 16_384)):
        text = (args.text / f"{split}.txt").read_text(encoding="utf-8")
        inputs[split] = recorded_inputs(language, torch.tensor(tokenizer(text)["input_ids"][:count]), args.layers)
    for layer in args.layers:
        mlp = language.layers[layer].mlp.float()
        seen, held_out = (inputs[split][layer].float() for split in ("valid", "test"))
        for fraction in args.fractions:
            for method, fields in methods(fraction).items():
                name = f"layer {layer}, {method} at {fraction:g}"
                alone = "budget" not in fields["replace"] and "prefix" not in fields.get("fit", {})
                if name not in cells and alone:  # one FFN has nothing to share, and nothing before it
                    identity = {"layer": layer, "method": method, "fraction": fraction}
                    cells[name] = identity | cell(mlp, fields, seen, held_out, args)
                    write_json(args.results, kept)
                    print(f"{name}: {cells[name]['before']:.3f} → {cells[name]['after']:.3f}", flush=True)


if __name__ == "__main__":
    main()
