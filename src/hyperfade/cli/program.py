"""The program `hyperfade`: its commands in the order of its help, and what becomes of an error."""

import logging
import os
import sys
from typing import Annotated

import typer

from hyperfade.cli.checkpoints import export, quantize
from hyperfade.cli.measurements import benchmark, evaluate
from hyperfade.cli.recipes import compress, convert, demo, inspect, recipe
from hyperfade.errors import HyperfadeError

app = typer.Typer(
    name="hyperfade",
    help="Make vision-language models smaller and faster: dense feed-forward layers fade out, hypercomplex fade in.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options of every command; `main` reads --debug itself."""


for command in (inspect, compress, convert, quantize, export, demo, evaluate, benchmark, recipe):
    app.command()(command)


def main() -> None:
    """Run a command; an error of ours is two lines, and Ctrl-C says how to go on."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]  # it may stand anywhere
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for loader in ("torchao", "torch.utils._pytree"):  # on import torchao names every GPU kernel that a CPU lacks
        logging.getLogger(loader).setLevel(logging.ERROR)
    try:
        app()
    except HyperfadeError as error:
        if debug:
            raise
        typer.echo(f"Error: {error.message}\n{error.hint}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # typer turns Ctrl-C into an exit with 130
            raise
        typer.echo("\nStopped. Run the same command again to continue from the last checkpoint.", err=True)
        sys.exit(130)
