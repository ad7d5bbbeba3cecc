"""Does a run that is killed again and again end as one that was never killed? python benchmarks/soak.py

`hyperfade compress` runs once in peace; then once more in a folder of its own, where its process gets SIGKILL at random
moments of its fit and its training and is started again, as often as asked for. Both must end with the same weights to
the last bit, and with the same lines in metrics.jsonl but for the seconds.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hyperfade.measure import machine
from hyperfade.recipe import Recipe
from hyperfade.workspace import write_json

HANGS_SECONDS = 3600


def recipe_for(output: Path, steps: int, checkpoint_every: int) -> Recipe:
    """Fit, fade, polish, LoRA, dense weights that train too, weight decay: everything a state has to hold."""
    fields = {
        "output": str(output),
        "dtype": "float32",
        "replace": {"language": {"n": 4}, "vision": {"n": 4}},
        "fit": {"samples": 32, "batch_size": 8, "sweeps": 2},
        "train": {
            "fade_steps": steps // 2,
            "polish_steps": steps - steps // 2,
            "batch_size": 8,
            "checkpoint_every": checkpoint_every,
            "lora_rank": 2,
            "train_also": ["*embed_tokens*"],
            "reconstruction_weight": 1e-3,
            "weight_decay": 0.01,
        },
        "data": {"evaluation_limit": 8, "max_new_tokens": 4},
    }
    return Recipe.parse(fields)


def start(recipe: Recipe) -> subprocess.Popen[str]:
    """`hyperfade compress` in a process of its own."""
    file = recipe.output.with_suffix(".yaml")
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "hyperfade", "compress", "--recipe", str(file)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def progress(work: Path) -> int:
    """How far a run is: FFNs fitted and steps taken."""
    metrics = work / "metrics.jsonl"
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    return len(list((work / "fit").glob("*.safetensors"))) + steps


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a run that nobody disturbs."""
    try:
        _, errors = process.communicate(timeout=HANGS_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    if process.returncode:
        raise SystemExit(f"The run failed:\n{errors}")


def kill_at(recipe: Recipe, moment: int, pause: float) -> dict[str, Any]:
    """Start the run and kill it `pause` seconds after it has come to `moment`; says where that was."""
    work, process = recipe.output / "work", start(recipe)
    deadline = time.monotonic() + HANGS_SECONDS
    while progress(work) < moment or not recipe.output.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise SystemExit(f"The run did not come to {moment}:\n{process.communicate()[1]}")
        time.sleep(0.002)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.wait()
    states = sorted(path.name for path in work.glob("step-*"))
    return {"progress": progress(work), "states": states, "returned": process.returncode}


def difference(one: Path, other: Path) -> tuple[int, int]:
    """How many weights of two checkpoints there are, and in how many they differ, bit for bit."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    if a.keys() != b.keys():
        raise SystemExit(f"Other tensors: {sorted(a.keys() ^ b.keys())}")
    bits = {key: (a[key].view(torch.uint8), b[key].view(torch.uint8)) for key in a}
    return sum(t.numel() for t in a.values()), sum(int((x != y).sum()) for x, y in bits.values())


def metrics(work: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its clock."""
    text = (work / "metrics.jsonl").read_text(encoding="utf-8")
    return [{**json.loads(line), "seconds": 0} for line in text.splitlines()]


def main() -> None:
    """Run, kill, compare, write the results file; exits with 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps, half of them fade")
    parser.add_argument("--checkpoint-every", type=int, default=3, help="steps between states")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # sums must not depend on who runs beside
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        whole, parts = (recipe_for(folder / name, args.steps, args.checkpoint_every) for name in ("whole", "parts"))
        began = time.monotonic()
        finish(start(whole))
        undisturbed = time.monotonic() - began
        chance = random.Random(args.seed)
        moments = sorted(chance.randrange(progress(whole.output / "work")) for _ in range(args.kills))
        unit = undisturbed / progress(whole.output / "work")
        kills = []
        for moment in moments:
            kills.append(kill_at(parts, moment, chance.uniform(0, unit)))
            print(f"kill {len(kills)}/{args.kills}: {kills[-1]}", flush=True)
        finish(start(parts))
        weights, differing = difference(whole.output / "model", parts.output / "model")
        same_metrics = metrics(whole.output / "work") == metrics(parts.output / "work")
    finally:
        shutil.rmtree(folder)
    print(f"{len(kills)} kills: {differing} differing bytes in {weights:,} weights; same metrics: {same_metrics}")
    result = {"kills": kills, "weights": weights, "differing_bytes": differing, "same_metrics": same_metrics}
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    write_json(args.output, {"machine": machine(), "settings": settings, "undisturbed_seconds": undisturbed, **result})
    if differing or not same_metrics or any(kill["returned"] != -signal.SIGKILL for kill in kills):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
