"""Memory of a corrected fit by blocks on the reference model: python benchmarks/corrected_memory.py [--samples 128 512]

Every calibration batch rests in front of the FFN that is fitted, twice: in the dense model and in the compressed one. A
process of its own for every number of samples, and one more with a single arena for malloc (`MALLOC_ARENA_MAX=1`, of
glibc): batches run in threads, and by default each thread keeps what it has freed. A process ends behind the third FFN
of the language model, where most is held. What counts is its peak resident size, less what it was before the fit.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from comparison import arguments, methods, recipe

from hyperfade.distill import LayerFit, fit_
from hyperfade.hub import load
from hyperfade.measure import machine
from hyperfade.surgery import plan, swap_
from hyperfade.task import open_task
from hyperfade.workspace import write_json

RESULTS = Path(__file__).parent / "results" / "corrected_memory.json"
LAST = "model.language_model.layers.2.mlp.down_proj"
LESS = {"MALLOC_ARENA_MAX": "1"}


class _Enough(Exception):
    """Behind `LAST`."""


def _stop_behind_last(layer: LayerFit) -> None:
    if layer.name == LAST:
        raise _Enough


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def measured(samples: int) -> dict[str, Any]:
    """What the fit takes in this process: bytes, and of how many tokens."""
    args = arguments("", RESULTS, Path("runs/corrected_memory")).parse_args(["--calibration", str(samples)])
    fields = methods(0.25)["low-rank, whitened, by blocks"] | {"train": {}}
    fields["fit"] |= {"samples": samples, "block_epochs": 1}
    asked = recipe("memory", fields, args)
    model = load(asked.model, asked.dtype)
    task = open_task(asked, model)
    batches = task.calibration_batches(asked.fit)
    the_plan = plan(model, asked.replace)
    swap_(model, the_plan)
    before = _peak_bytes()
    try:
        fit_(model, the_plan, batches, asked.fit, on_layer=_stop_behind_last)
    except _Enough:
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        width = model.config.get_text_config().hidden_size
        return {"tokens": tokens, "width": width, "before_bytes": before, "fit_bytes": _peak_bytes() - before}
    raise SystemExit(f"{LAST} was never fitted")


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[128, 512], help="calibration samples")
    parser.add_argument("--inside", action="store_true", help="measure this very process, and print what it took")
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(measured(*args.samples)))
        return
    found = []
    for samples in args.samples:
        for less in ({}, LESS):
            command = [sys.executable, __file__, "--inside", "--samples", str(samples)]
            told = subprocess.run(command, env=os.environ | less, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append({"samples": samples, "environment": less, **json.loads(told.splitlines()[-1])})
            print(found[-1], flush=True)
    write_json(RESULTS, {"machine": machine(), "fits": found})


if __name__ == "__main__":
    main()
