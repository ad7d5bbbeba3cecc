"""Cells of `comparison.py` all at once, a process each: one small model leaves most of a GPU idle.

    python benchmarks/side_by_side.py --methods products "width pruning" --fractions 0.5 0.25 --minutes 9 \\
        --output runs/long --results comparison_long.json -- --steps 600 --teacher live --attention sdpa

What follows `--` goes to every `comparison.py`. Every process has a results file in OUTPUT/results and a log in
OUTPUT/logs; finished cells are added to --results every few seconds, so that nothing is lost where the time is up. The
same command goes on from there. Speeds and seconds of cells that ran beside others say nothing about the methods.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import FRACTIONS, methods

from hyperfade.errors import OutputError
from hyperfade.workspace import read_json, write_json

COMPARISON = Path(__file__).with_name("comparison.py")
_POLL_SECONDS, _SAY_SECONDS, _GRACE_SECONDS = 2.0, 60.0, 10.0


@dataclass(frozen=True)
class Job:
    """A method at a fraction; the paper's recipe has no fraction."""

    method: str
    fraction: float | None

    @property
    def name(self) -> str:
        """As a file name."""
        whole = self.method if self.fraction is None else f"{self.method} at {self.fraction:g}"
        return whole.replace(" ", "-").replace(",", "")

    def command(self, args: argparse.Namespace) -> list[str]:
        """What runs its cells."""
        own = ["--methods", self.method, "--output", str(args.output), "--results", str(results_of(self, args.output))]
        own += ["--teacher-folder", str(args.output / "teacher" / self.name)]
        if self.fraction is not None:
            own += ["--fractions", str(self.fraction)]
        return [sys.executable, "-u", str(COMPARISON), *args.options, *own]


def jobs_of(names: Sequence[str], fractions: Sequence[float]) -> list[Job]:
    """Every method at every fraction, the paper's recipe once."""
    jobs = [Job(name, fraction) for fraction in fractions for name in names if name != "paper"]
    return jobs + [Job("paper", None)] * ("paper" in names)


def results_of(job: Job, output: Path) -> Path:
    """The results file that a job's process writes."""
    return output / "results" / f"{job.name}.json"


def merge(main: Path, parts: Sequence[Path]) -> int:
    """Add the cells of `parts` that exist to `main`; how many it holds then.

    Raises `OutputError`, and adds nothing, where a part has other settings.
    """
    kept: dict[str, Any] = read_json(main) if main.exists() else {}
    before = len(kept.get("cells", {}))
    for part in parts:
        if not part.exists():
            continue
        own = read_json(part)
        if own["settings"] != kept.setdefault("settings", own["settings"]):
            raise OutputError(
                f"{part} holds cells of other settings than {main}: {own['settings']}, not {kept['settings']}.",
                "Choose another --output and --results.",
            )
        new = {name: cell for name, cell in own["cells"].items() if name not in kept.get("cells", {})}
        if new:
            kept |= {"cells": kept.get("cells", {}) | new, "dense": own["dense"]}
    if len(kept.get("cells", {})) > before:
        write_json(main, kept)
    return len(kept.get("cells", {}))


def start(job: Job, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Its process, which knows the cells that are finished already."""
    if args.results.exists():
        write_json(results_of(job, args.output), read_json(args.results))
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with log_of(job, args.output).open("ab") as log:
        return subprocess.Popen(
            job.command(args),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | threads | {"TOKENIZERS_PARALLELISM": "false"},
        )


def log_of(job: Job, output: Path) -> Path:
    """What a job's process said."""
    return output / "logs" / f"{job.name}.log"


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that still run: a cell goes on from its last state when it is started again."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def watch(processes: dict[Job, subprocess.Popen[bytes]], args: argparse.Namespace) -> None:
    """Wait for all, or until the time is up; collect results, and say once a minute how it stands."""
    began, said = time.monotonic(), 0.0
    while True:
        running = [job.name for job, process in processes.items() if process.poll() is None]
        num_cells = merge(args.results, [results_of(job, args.output) for job in processes])
        now = time.monotonic() - began
        up = args.minutes is not None and now > 60 * args.minutes
        if not running or up or now - said >= _SAY_SECONDS:
            said = now
            ended = [f"{j.name} ({p.returncode})" for j, p in processes.items() if p.returncode is not None]
            print(f"{now:.0f} s: {num_cells} cells; ended: {', '.join(ended) or 'none'}", flush=True)
        if not running or up:
            if running:
                print(f"The time is up; not done: {', '.join(running)}", flush=True)
            return
        time.sleep(_POLL_SECONDS)


def main() -> None:
    """Run all jobs; the exit status is 1 where one was not finished."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="What follows -- are options for every comparison.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, known = parser.add_argument, [*methods(0.5), "paper"]
    add("--methods", nargs="+", choices=known, default=known, metavar="METHOD", help=f"of {', '.join(known)}")
    add("--fractions", type=float, nargs="+", default=FRACTIONS, help="shares of the FFN parameters that stay")
    add("--output", type=Path, required=True, help="folder of the cells' own folders, logs and results")
    add("--results", type=Path, required=True, help="file that every finished cell is added to")
    add("--minutes", type=float, help="end what is not done by then")
    add("--threads", type=int, default=1, help="threads of every process")
    given = sys.argv[1:]
    here = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:here])
    args.options = given[here + 1 :]
    for folder in ("logs", "results"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(args.methods, args.fractions)
    merge(args.results, [results_of(job, args.output) for job in jobs])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # whoever ends this ends all
    processes: dict[Job, subprocess.Popen[bytes]] = {}
    try:
        for job in jobs:
            processes[job] = start(job, args)
        watch(processes, args)
    finally:
        stop(list(processes.values()))
        merge(args.results, [results_of(job, args.output) for job in jobs])
    failed = [job for job, process in processes.items() if process.returncode]
    for job in failed:
        lines = log_of(job, args.output).read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
        print("\n".join([f"== {job.name}: status {processes[job].returncode}", *lines]))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
