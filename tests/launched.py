"""`hyperfade` in one of several processes, noting what it changes on disk: launched.py FOLDER ARGUMENTS

Every path that this process writes, renames or removes goes to FOLDER/RANK.txt.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def main(folder: Path) -> None:
    """Watch, then be the command."""
    record = (folder / f"{os.environ['RANK']}.txt").open("a", encoding="utf-8", buffering=1)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or (writes and isinstance(arguments[0], str)):
            record.write(f"{arguments[0]}\n")

    sys.addaudithook(note)
    sys.argv = ["hyperfade", *sys.argv[2:]]
    runpy.run_module("hyperfade", run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
