"""Prints how far two ways to fit and save a checkpoint push this process's resident size: from disk, and in memory.

python convert_memory.py WARM_UP SOURCE FOLDER: WARM_UP is a small checkpoint that is converted first, so that what is
measured on SOURCE is no import. Three FFNs of each are replaced: more would take time, and no more memory.
"""

import json
import sys
from pathlib import Path

import torch
from test_convert import in_memory, quiet, recipe

from hyperfade.convert import convert
from hyperfade.recipe import Layer, Replace, Rule

LAST = Replace(vision=None, rules=(Rule(layer=None), Rule(last_layers=3, layer=Layer(n=4))))


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    torch.set_num_threads(1)
    warm_up, source, folder = map(Path, sys.argv[1:])
    grown = {}
    for name, checkpoint in (("warm_up", warm_up), ("measured", source)):
        wanted = recipe(checkpoint, folder / name).model_copy(update={"replace": LAST})
        for way, run in (
            ("from disk", lambda wanted: convert(wanted, quiet, shard_bytes=10**7)),
            ("in memory", lambda wanted, name=name: in_memory(wanted, folder / f"{name} in memory")),
        ):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
            before = status("VmRSS")
            run(wanted)
            grown[way] = status("VmHWM") - before
    print(json.dumps(grown))


if __name__ == "__main__":
    main()
