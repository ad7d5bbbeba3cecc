"""The command line: thin commands over the library. They import what is heavy themselves, so `--help` is instant."""

from hyperfade.cli.program import app, main

__all__ = ["app", "main"]
