"""What numbers may be held in, by the words that recipes, commands and checkpoints have in common."""

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]  # of a model, as torch calls them
Format = Literal["int8", "int4", "nf4", "fp8"]  # of a matrix in few bits
