"""Look for input on which a reader of hyperfade fails with anything but an error of its own, guided by coverage.

    make fuzz                                             # every reader for a minute
    python scripts/fuzz.py rows --seconds 600 --corpus runs/fuzz

`tests/test_fuzz.py` has the same readers under hypothesis, which knows what input looks like and forgets what it has
learnt; atheris mutates bytes, remembers which of them reached new lines, and goes on from its corpus. What it finds
becomes an `@example` there. Every reader is a process of its own that is told where to write.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

Reader = Callable[[Path], object]


def readers() -> dict[str, tuple[str, bytes, Reader]]:
    """By name: what the file is called, what a sound one holds, and what reads that."""
    import torch
    from safetensors.torch import save

    from hyperfade.algebra import Algebra
    from hyperfade.data import open_source
    from hyperfade.distill.journal import Journal, Rollback, StepReport
    from hyperfade.hub import HyperfadeConfig, verify_checkpoint
    from hyperfade.hub.integrity import verify_safetensors
    from hyperfade.nn.spec import LightSpec
    from hyperfade.recipe import Recipe
    from hyperfade.workspace import read_json

    def config(file: Path) -> object:
        found = read_json(file)
        return HyperfadeConfig.from_dict(found) if isinstance(found, dict) else None

    def journal(file: Path) -> None:
        Journal(file, 0).close()

    tensors = save({"a": torch.ones(3)}, {"version": "1"})
    row = (
        b'{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},'
        b' {"role": "assistant", "content": "b"}], "images": ["c.png"], "task": "caption"}\n'
    )
    layer = LightSpec(in_features=8, out_features=8, bias=False, algebra=Algebra.products(4, 4)).to_dict()
    lines = StepReport(1, 0.5, 0.5, 0.1, 0.0, 1.0, 1e-3, 2.0), Rollback("spike", 2, 1)
    replaced = json.dumps({"version": 1, "layers": {"a": layer}, "inner": None}).encode()

    def folder(file: Path) -> None:
        file.with_name("config.json").write_text("{}")
        file.with_name("x.safetensors").write_bytes(tensors)
        verify_checkpoint(file.parent)

    return {
        "recipe": ("recipe.yaml", b"replace: {language: {kind: products}}\ntrain: {fade_steps: 3}\n", Recipe.load),
        "rows": ("train.jsonl", row, lambda file: list(open_source(str(file)))),
        "config": ("config.json", replaced, config),
        "index": ("model.safetensors.index.json", b'{"weight_map": {"a": "x.safetensors"}}', folder),
        "weights": ("model.safetensors", tensors, lambda file: verify_safetensors([file])),
        "journal": ("metrics.jsonl", b"".join(json.dumps(asdict(line)).encode() + b"\n" for line in lines), journal),
    }


def fuzz(name: str, seconds: int, corpus: Path) -> None:
    """Mutate what `name` reads until the time is over; ends the process, with a status other than 0 if it failed."""
    import atheris

    with atheris.instrument_imports(include=["hyperfade", "yaml", "json"]):
        known = readers()

    from hyperfade.errors import HyperfadeError

    called, sound, read = known[name]
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "sound").write_bytes(sound)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / called
        file.write_bytes(sound)
        read(file)  # what is mutated has to lead to the end of the reader

        def once(content: bytes) -> None:
            file.write_bytes(content)
            with suppress(HyperfadeError):
                read(file)

        options = [f"-max_total_time={seconds}", "-max_len=400", f"-artifact_prefix={corpus.parent}/failed-{name}-"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], once)
        atheris.Fuzz()


def main() -> None:
    """One reader in this process, or all of them one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("reader", nargs="?", help="only this one; all, if none is named")
    parser.add_argument("--seconds", type=int, default=60, help="time for each reader")
    parser.add_argument("--corpus", type=Path, default=Path("runs/fuzz"), help="folder of inputs to go on from")
    args = parser.parse_args()
    if args.reader:
        fuzz(args.reader, args.seconds, args.corpus / args.reader)
        return
    options = ["--seconds", str(args.seconds), "--corpus", str(args.corpus)]
    failed = [name for name in readers() if subprocess.run([sys.executable, __file__, name, *options]).returncode]
    sys.exit(f"failed: {', '.join(failed)}; the inputs are in {args.corpus}" if failed else 0)


if __name__ == "__main__":
    main()
