"""Train the reference model: first its projector alone, then projector and LoRA on every linear of both towers.

    python benchmarks/reference/train.py --train my/train.jsonl [--steps 3000]

The loop is hyperfade's own, with nothing to fade and no teacher (`kd_weight=0`), so what remains is cross-entropy on
the answers. Run it again after an interruption and it continues. LoRA of rank 4 is for the size of the result: what the
training adds fits in 2.2 MB (see adapter.py), small enough to keep, while both towers come from package registries.

On a CPU that other processes use as well, set OMP_WAIT_POLICY=passive, or threads that wait for each other burn the
time of those that work: 30 instead of 7 CPU seconds a step were seen. On two free cores (AVX512-bf16) a step of 32
samples of 86 tokens takes 3.1 s, ten samples a second.

Only positions that predict an answer's token go through the output layer: 49,152 words at every position of a sample
cost as much as eight of the language model's 30 layers.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from adapter import UNTRAINED, build, fingerprint, kept_facts, pack, projector_linears, restore_
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hyperfade.data import Collator, open_source
from hyperfade.distill import answers_only, distill_
from hyperfade.distill.loop import StepReport
from hyperfade.hub import load, load_processor
from hyperfade.recipe import Train
from hyperfade.surgery import region_of

OUTPUT = Path("runs/reference/train")
MAX_TOKENS = 512


def add_lora_(model: Any, rank: int) -> None:
    """LoRA with scale 1 on every linear but projector and output layer. It trains, and so does what trained before."""
    head = model.get_output_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and region_of(name) != "projector"
    ]
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # autocast casts the small matrices; PEFT would cast every input
    for parameter in training:  # PEFT freezes whatever is not an adapter
        parameter.requires_grad_(True)


def progress(name: str, steps: int, every: int) -> Callable[[StepReport], None]:
    """Prints a line every so many steps: loss and what time is left, by the pace of this process."""
    began, losses = time.perf_counter(), []

    def line(report: StepReport) -> None:
        losses.append(report.loss)
        if report.step % every and report.step != steps:
            return
        pace = (time.perf_counter() - began) / len(losses)
        recent = losses[-every:]
        print(
            f"[{name}] step {report.step} of {steps}: loss {sum(recent) / len(recent):.3f}, {pace:.2f} s a step, "
            f"{pace * (steps - report.step) / 60:.0f} minutes left",
            flush=True,
        )

    return line


def train(args: argparse.Namespace) -> Path:
    """Both stages; returns the path of the adapter file."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model: Any = load(str(args.model)).to(device)
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # the fused kernel's backward pass took a third of a step's time
    base = fingerprint(model)
    source = open_source(args.train, needs_images=True)
    collator = Collator(load_processor(str(args.model)), max_tokens=MAX_TOKENS)
    print(f"{len(source):,} examples; {args.projector_steps} steps of the projector, {args.steps} of all", flush=True)

    def batch_of(numbers: Sequence[int]) -> dict[str, Tensor]:
        batch = answers_only(collator.training_batch([source[number] for number in numbers]))
        return {key: value.to(device) for key, value in batch.items()}

    def stage(name: str, steps: int, learning_rate: float, seed: int) -> None:
        recipe = Train(
            fade_steps=0,
            polish_steps=steps,
            batch_size=args.batch,
            dense_learning_rate=learning_rate,
            warmup_fraction=args.warmup,
            kd_weight=0,
            mixed_precision="bf16",
            checkpoint_every=args.checkpoint_every,
        )
        # with kd_weight 0 a teacher is never called
        line = progress(name, steps, args.log_every)
        distill_(model, model, len(source), batch_of, recipe, seed=seed, folder=args.output / name, on_step=line)

    model.requires_grad_(False)
    for linear in projector_linears(model).values():
        linear.requires_grad_(True)
    if args.start is None:
        stage("projector", args.projector_steps, args.projector_learning_rate, args.seed)
    torch.manual_seed(args.seed)
    add_lora_(model, args.rank)
    if args.start is not None:
        restore_(model, args.start)
    stage("all", args.steps, args.learning_rate, args.seed + 1)
    path = args.output / "adapter.safetensors"
    left_out = ("model", "output", "checkpoint_every", "log_every", "train", "start")
    facts: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in left_out}
    if args.start is not None:
        facts["start"] = kept_facts(args.start)
    pack(model, path, base, facts | {"examples": len(source)})
    return path


def main() -> None:
    """Train, keep the adapter, build the finished model from it."""
    parser = argparse.ArgumentParser(
        description="Train the reference model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--train", required=True, help="examples: easy-vqa:train, a .jsonl file, or datasets:NAME_OR_FOLDER[:SPLIT]")
    add("--model", type=Path, default=UNTRAINED, help="folder that assemble.py wrote")
    add("--start", type=Path, help="adapter to train on from, in place of stage 1; its rank has to be --rank")
    add("--output", type=Path, default=OUTPUT, help="folder for states, metrics, adapter and finished model")
    add("--projector-steps", type=int, default=200, help="steps of stage 1, projector alone")
    add("--steps", type=int, default=1000, help="steps of stage 2, projector and LoRA")
    add("--batch", type=int, default=32, help="samples a step")
    add("--rank", type=int, default=4, help="rank of LoRA")
    add("--projector-learning-rate", type=float, default=1e-3, help="peak learning rate of stage 1")
    add("--learning-rate", type=float, default=1e-3, help="peak learning rate of stage 2")
    add("--warmup", type=float, default=0.03, help="share of each stage's steps with a rising learning rate")
    add("--checkpoint-every", type=int, default=100, help="steps between states to continue from")
    add("--log-every", type=int, default=10, help="steps between printed lines; metrics.jsonl has every step")
    add("--seed", type=int, default=0, help="seed of data order and LoRA")
    args = parser.parse_args()
    adapter = train(args)
    build(args.model, adapter, args.output / "model")
    print(json.dumps({"adapter": str(adapter), "bytes": adapter.stat().st_size, "model": str(args.output / "model")}))


if __name__ == "__main__":
    main()
