"""Train the reference model: first its eyes, then its projector, then projector and LoRA in both towers.

    python benchmarks/reference/train.py --train my/train.jsonl [--steps 3000]

The loop is hyperfade's own, with nothing to fade and no teacher (`kd_weight=0`), so what remains is cross-entropy: in
the first stage on what is in the images (`seeing.py`), then on the answers. Run it again after an interruption and it
continues. LoRA of small rank is for the size of the result: what the training adds fits in 2.3 MB (see adapter.py),
small enough to keep, while both towers come from package registries. The vision tower, which has never been shown
text, gets more of it.

On a CPU, bind the threads to its cores (OMP_PROC_BIND=true OMP_PLACES=cores): where the system put two threads on one
core, matrix products ran at half their speed. On two cores (AVX512-bf16) stage 1 takes a second a step of 64 images,
stage 3 three to four seconds a step of 32 samples of 86 tokens.

Only positions that predict an answer's token go through the output layer: 49,152 words at every position of a sample
cost as much as eight of the language model's 30 layers.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter import UNTRAINED, build, fingerprint, kept_facts, pack, projector_linears, restore_
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from seeing import Examples, Seeing
from torch import Tensor, nn

from hyperfade.data import Collator, open_source
from hyperfade.distill import answers_only, distill_
from hyperfade.distill.loop import StepReport
from hyperfade.hub import load, load_processor
from hyperfade.processes import is_first
from hyperfade.recipe import Train
from hyperfade.surgery import region_of

OUTPUT, CACHE = Path("runs/reference/train"), Path("runs/reference/cache")
MAX_TOKENS = 512


def add_lora_(model: Any, rank: int, vision_rank: int) -> None:
    """LoRA with scale 1 on every linear but projector and output layer."""
    head = model.get_output_embeddings()
    ranks = {
        name: vision_rank if region_of(name) == "vision" else rank
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and region_of(name) != "projector"
    }
    exact = {f"^{re.escape(name)}$": own for name, own in ranks.items()}
    config = LoraConfig(r=rank, lora_alpha=rank, rank_pattern=exact, alpha_pattern=exact, target_modules=list(ranks))
    inject_adapter_in_model(config, model)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # autocast casts the small matrices; PEFT would cast every input


def train_only_(model: nn.Module, regions: Sequence[str]) -> None:
    """Let the projector train, and the LoRA of these regions."""
    model.requires_grad_(False)
    for linear in projector_linears(model).values():
        linear.requires_grad_(True)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and region_of(name) in regions:
            for part in (layer.lora_A, layer.lora_B):
                part.requires_grad_(True)


def progress(name: str, steps: int, every: int) -> Callable[[StepReport], None]:
    """Prints a line every so many steps: loss and what time is left, by the pace of this process."""
    began, losses = time.perf_counter(), []

    def line(report: StepReport) -> None:
        losses.append(report.loss)
        if not is_first() or (report.step % every and report.step != steps):
            return
        pace = (time.perf_counter() - began) / len(losses)
        recent = losses[-every:]
        print(
            f"[{name}] step {report.step} of {steps}: loss {sum(recent) / len(recent):.3f}, {pace:.2f} s a step, "
            f"{pace * (steps - report.step) / 60:.0f} minutes left",
            flush=True,
        )

    return line


@dataclass(frozen=True)
class Stage:
    """What one call of the training loop sees, and for how long."""

    name: str
    steps: int
    count: int
    batch_of: Callable[[Sequence[int]], dict[str, Tensor]]
    batch_size: int


def run_(student: Any, stage: Stage, args: argparse.Namespace, seed: int) -> None:
    """Train what requires gradients in `student`, going on where an earlier process stopped."""
    recipe = Train(
        fade_steps=0,
        polish_steps=stage.steps,
        batch_size=stage.batch_size,
        dense_learning_rate=args.learning_rate,
        warmup_fraction=args.warmup,
        kd_weight=0,
        mixed_precision="bf16",
        checkpoint_every=args.checkpoint_every,
    )
    device = next(student.parameters()).device

    def placed(numbers: Sequence[int]) -> dict[str, Tensor]:
        return {key: value.to(device) for key, value in stage.batch_of(numbers).items()}

    folder, line = args.output / stage.name, progress(stage.name, stage.steps, args.log_every)
    # with kd_weight 0 a teacher is never called
    distill_(student, student, stage.count, placed, recipe, seed=seed, folder=folder, on_step=line)


def train(args: argparse.Namespace) -> Path:
    """All stages; returns the path of the adapter file."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model: Any = load(str(args.model)).to(device)
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # the fused kernel's backward pass took a third of a step's time
    base = fingerprint(model)
    processor = load_processor(str(args.model))
    source = open_source(str(args.train), needs_images=True)
    collator = Collator(processor, max_tokens=MAX_TOKENS)

    def samples(numbers: Sequence[int]) -> dict[str, Tensor]:
        return answers_only(collator.training_batch([source[number] for number in numbers]))

    def of_answers(name: str, steps: int) -> Stage:
        return Stage(name, steps, len(source), samples, args.batch)

    torch.manual_seed(args.seed)
    add_lora_(model, args.rank, args.vision_rank)
    if args.adapter is not None:
        restore_(model, args.adapter)
    if args.seeing_steps:
        examples = Examples(args.train, args.cache, processor, args.seed)
        if is_first():
            print(f"{len(examples):,} pictures and texts, {len(examples.words):,} words", flush=True)
        train_only_(model, ["vision"])
        seeing = Seeing(model, processor.tokenizer, examples.words).to(device)
        stage = Stage("seeing", args.seeing_steps, len(examples), examples.batch, args.seeing_batch)
        run_(seeing, stage, args, args.seed)
    if args.projector_steps:
        train_only_(model, [])
        run_(model, of_answers("projector", args.projector_steps), args, args.seed + 1)
    train_only_(model, ["vision", "language"])
    run_(model, of_answers("all", args.steps), args, args.seed + 2)
    path = args.output / "adapter.safetensors"
    left_out = ("model", "output", "cache", "checkpoint_every", "log_every", "train", "adapter")
    facts: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in left_out}
    if args.adapter is not None:
        facts["adapter"] = kept_facts(args.adapter)
    if is_first():
        pack(model, path, base, facts | {"examples": len(source)})
    return path


def main() -> None:
    """Train, keep the adapter, build the finished model from it."""
    parser = argparse.ArgumentParser(
        description="Train the reference model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--train", type=Path, required=True, help="train.jsonl that data.py wrote")
    add("--cache", type=Path, default=CACHE, help="folder of the unpacked packages, for their fonts")
    add("--model", type=Path, default=UNTRAINED, help="folder that assemble.py wrote")
    add("--adapter", type=Path, help="adapter to train on from; its ranks have to be these")
    add("--output", type=Path, default=OUTPUT, help="folder for states, metrics, adapter and finished model")
    add("--seeing-steps", type=int, default=1100, help="steps of stage 1, vision tower and projector, without answers")
    add("--seeing-batch", type=int, default=64, help="images a step of stage 1")
    add("--projector-steps", type=int, default=40, help="steps of stage 2, projector alone")
    add("--steps", type=int, default=800, help="steps of stage 3, projector and all LoRA")
    add("--batch", type=int, default=32, help="samples a step of stages 2 and 3")
    add("--rank", type=int, default=3, help="rank of LoRA in the language model")
    add("--vision-rank", type=int, default=10, help="rank of LoRA in the vision tower")
    add("--learning-rate", type=float, default=1.5e-3, help="peak learning rate of every stage")
    add("--warmup", type=float, default=0.03, help="share of each stage's steps with a rising learning rate")
    add("--checkpoint-every", type=int, default=100, help="steps between states to continue from")
    add("--log-every", type=int, default=10, help="steps between printed lines; metrics.jsonl has every step")
    add("--seed", type=int, default=0, help="seed of data order and LoRA")
    args = parser.parse_args()
    adapter = train(args)
    if not is_first():
        return
    build(args.model, adapter, args.output / "model")
    print(json.dumps({"adapter": str(adapter), "bytes": adapter.stat().st_size, "model": str(args.output / "model")}))


if __name__ == "__main__":
    main()
