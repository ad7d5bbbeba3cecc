"""Peak memory of converting a checkpoint from disk: python benchmarks/stream_memory.py [--language-layers 12 ...]

A random checkpoint at the shapes of Qwen2.5-VL-3B, bfloat16, is written file by file, then converted in a process of
its own as `hyperfade convert` does it, by a Frobenius fit. What counts is that process's peak resident size: torch and
transformers are part of it, and so are the pages of the files it maps. Checkpoint and result are removed afterwards.

The last `--language-layers` and `--vision-layers` FFNs are replaced: all FFNs of a tower have one shape, so more of
them take more time and no more memory.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from shapes import MODELS

from hyperfade.convert import convert
from hyperfade.hub import skeleton
from hyperfade.measure import disk_bytes, machine, num_parameters
from hyperfade.recipe import Fit, Layer, Recipe, Replace, Rule
from hyperfade.workspace import write_json

SOURCE_SHARD_BYTES = 4 * 10**9  # as the model's own files are


def write_checkpoint(model: Any, folder: Path) -> None:
    """Fill the shapes of `model`, which is on the meta device, with random numbers, one file at a time."""
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tied = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    state = {name: p for name, p in model.named_parameters() if tied[id(p)] == name}
    split = split_torch_state_dict_into_shards(
        {name: p.data.to(torch.bfloat16) for name, p in state.items()}, max_shard_size=SOURCE_SHARD_BYTES
    )
    generator = torch.Generator().manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        tensors = {
            name: torch.empty(state[name].shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    write_json(
        folder / "model.safetensors.index.json", {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    )


def peak_bytes() -> int:
    """Largest resident size of this process so far (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measured(recipe: Recipe, answers: Any) -> None:
    """Convert, in a process of its own."""
    before, start = peak_bytes(), time.perf_counter()
    facts = convert(recipe, lambda line: print(line, flush=True))
    answers.put((before, peak_bytes(), time.perf_counter() - start, facts))


def main() -> None:
    """Write, convert, measure, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="Qwen2.5-VL-3B")
    parser.add_argument(
        "--language-layers", type=int, default=36, help="language FFNs that are replaced, the last ones"
    )
    parser.add_argument("--vision-layers", type=int, default=32, help="vision FFNs that are replaced, the last ones")
    parser.add_argument(
        "--sweeps", type=int, default=2, help="sweeps of the fit, of which a Frobenius fit makes 20 each"
    )
    parser.add_argument("--folder", type=Path, default=None, help="folder for source and result [default: temporary]")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "stream_memory.json")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=args.folder))
    layer = Layer(n=4)
    rules = (
        Rule(region="language", layer=None),
        Rule(region="vision", layer=None),
        Rule(region="language", last_layers=args.language_layers, layer=layer),
        Rule(region="vision", last_layers=args.vision_layers, layer=layer),
    )
    recipe = Recipe(
        model=str(place / "dense"),
        output=place / "out",
        replace=Replace(language=layer, vision=layer, rules=rules),
        fit=Fit(method="frobenius", sweeps=args.sweeps),
    )
    try:
        shape = MODELS[args.model].skeleton()
        write_checkpoint(shape, place / "dense")
        context = multiprocessing.get_context("spawn")
        answers = context.SimpleQueue()
        process = context.Process(target=measured, args=(recipe, answers))
        process.start()
        before, peak, seconds, facts = answers.get()
        process.join()
        sizes = {
            name: disk_bytes(folder) for name, folder in (("source", place / "dense"), ("model", place / "out/model"))
        }
        result = skeleton(str(place / "out" / "model"))
        files = sorted((place / "out" / "model").glob("*.safetensors"))
        largest = max(file.stat().st_size for file in files)
    finally:
        shutil.rmtree(place)
    print(f"{sizes['source'] / 1e9:.2f} GB → {sizes['model'] / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {seconds:.0f} s")
    write_json(
        args.output,
        {
            "machine": machine(),
            "model": args.model,
            "parameters": {"dense": num_parameters(shape), "converted": num_parameters(result)},
            "disk_bytes": sizes,
            "largest_file_bytes": largest,
            "matrices_replaced": len(facts["layers"]),
            "language_layers": args.language_layers,
            "vision_layers": args.vision_layers,
            "sweeps": args.sweeps,
            "peak_bytes_after_imports": before,
            "peak_bytes": peak,
            "seconds": seconds,
            "fit_seconds": facts["fit_seconds"],
            "load_average": os.getloadavg()[1],
        },
    )


if __name__ == "__main__":
    main()
