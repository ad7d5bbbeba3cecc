"""hyperfade: dense feed-forward layers fade out, hypercomplex ones fade in.

`import hyperfade` registers its checkpoints with transformers, so `from_pretrained` loads them; public names are loaded
when they are first used. The command line is spared the registration's cost (it imports torch and transformers), so
that `hyperfade --help` answers at once: its commands load what they need.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperfade.algebra import Algebra as Algebra
    from hyperfade.hub import fold_ as fold_
    from hyperfade.measure import evaluate as evaluate
    from hyperfade.nn import BlendLinear as BlendLinear
    from hyperfade.nn import LowRankLinear as LowRankLinear
    from hyperfade.nn import PHMLinear as PHMLinear
    from hyperfade.nn import compile_ as compile_
    from hyperfade.nn import keep_derived_ as keep_derived_
    from hyperfade.pipeline import compress as compress
    from hyperfade.recipe import Recipe as Recipe
    from hyperfade.surgery import plan as plan
    from hyperfade.surgery import set_alpha_ as set_alpha_
    from hyperfade.surgery import swap_ as swap_

_HOMES = {
    "Algebra": "algebra",
    "BlendLinear": "nn",
    "LowRankLinear": "nn",
    "PHMLinear": "nn",
    "Recipe": "recipe",
    "compile_": "nn",
    "compress": "pipeline",
    "evaluate": "measure",
    "fold_": "hub",
    "keep_derived_": "nn",
    "plan": "surgery",
    "set_alpha_": "surgery",
    "swap_": "surgery",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hyperfade' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hyperfade.{_HOMES[name]}"), name)


def _is_the_command_line() -> bool:
    program = Path(sys.argv[0]).name  # "-m" while `python -m` looks for its module
    return program == "hyperfade" or (program == "-m" and "hyperfade" in sys.orig_argv)


if not _is_the_command_line():
    importlib.import_module("hyperfade.hub")
