"""The whole recipe: its sections, where the data come from, rivals, and what has to hold between them."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from hyperfade.errors import RecipeError
from hyperfade.formats import Dtype
from hyperfade.recipe.reading import read, refusal
from hyperfade.recipe.replace import Replace
from hyperfade.recipe.section import Section
from hyperfade.recipe.steps import Fit, Quantize, Train


def _free_name(value: str) -> str:
    """A rival's name becomes a folder and a key of the results, beside `dense` and `compressed`."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", value) or value in ("dense", "compressed"):
        raise ValueError("a rival's name has letters, digits, - and _, and is neither dense nor compressed")
    return value


Name = Annotated[str, AfterValidator(_free_name)]


class Data(Section):
    """Where examples come from: `easy-vqa`, a .jsonl file, or `datasets:` and what datasets.load_dataset takes."""

    train: str = Field(default="easy-vqa:train", description="training examples (SOURCE or SOURCE:SPLIT)")
    evaluation: str = Field(
        default="easy-vqa:test", description="examples that quality is measured on, never trained on"
    )
    evaluation_limit: int | None = Field(
        default=None, ge=1, description="evaluate on the first N (seeded shuffle) only"
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        default="error", description="skip counts bad samples instead of stopping"
    )
    max_tokens: int = Field(default=2048, ge=8, description="longest sample, in tokens with its image tokens")
    max_new_tokens: int = Field(default=16, ge=1, description="longest answer generated in the evaluation, in tokens")


class Rival(Section):
    """Another way to the same size, trained with the same data and budget for comparison."""

    replace: Replace = Field(description="what it replaces; keys as in the recipe's own `replace`")
    fit: Fit | None = Field(default=None, description="its own fit; null takes the recipe's")
    train: Train | None = Field(default=None, description="its own training; null takes the recipe's")


class Recipe(Section):
    """From a dense model to a finished one."""

    model: str = Field(
        default="embedded", description="checkpoint folder or hub name; `embedded` is the shipped example model"
    )
    output: Path = Field(Path("runs/compressed"), description="folder for the checkpoint, results and report")
    seed: int = Field(default=0, ge=0, description="seed of everything random")
    dtype: Dtype = Field(default="bfloat16", description="dtype the model runs in")
    attention: Literal["sdpa", "eager"] | None = Field(
        default=None,
        description="attention the models run with here; eager trains short sequences faster on a CPU"
        " [default: transformers' choice]",
    )
    save_dtype: Dtype | None = Field(default=None, description="dtype on disk [default: dtype]")
    replace: Replace = Replace()
    fit: Fit = Fit()
    train: Train = Train()
    data: Data = Data()
    quantize: Quantize | None = Field(
        default=None, description="few bits on top, for the recipe's own model and its rivals; int4, say"
    )
    rivals: dict[Name, Rival] = Field(default={}, description="baselines trained beside it, by name")

    @model_validator(mode="after")
    def _choices_have_activations(self) -> Self:
        own = {"": (self.replace, self.fit)}
        own |= {f"rivals.{name}.": (rival.replace, rival.fit or self.fit) for name, rival in self.rivals.items()}
        for prefix, (replaced, fit) in own.items():
            if fit.method != "calibrated" and any(layer.width is not None for layer in replaced.layers()):
                raise ValueError(
                    f"{prefix}replace has a width, which chooses units by activations: only {prefix}fit.method "
                    f"calibrated gathers them, not {fit.method}"
                )
            if fit.method != "calibrated" and replaced.budget is not None:
                raise ValueError(f"{prefix}replace.budget measures on what only {prefix}fit.method calibrated gathers")
        return self

    @model_validator(mode="after")
    def _cached_by_number(self) -> Self:
        trains = [self.train, *(rival.train for rival in self.rivals.values() if rival.train)]
        if self.data.on_bad_sample == "skip" and any(train.teacher == "cached" for train in trains):
            raise ValueError("train.teacher cached goes by example number: it needs data.on_bad_sample error")
        return self

    @model_validator(mode="after")
    def _trainable_dtype(self) -> Self:
        if self.dtype == "float16":
            raise ValueError("dtype float16 cannot train without loss scaling: take bfloat16, and save_dtype: float16")
        return self

    @classmethod
    def load(cls, source: str | Path) -> "Recipe":
        """The recipe called `source`: a YAML file, or the name of one that ships with hyperfade.

        Raises `RecipeError` that names the file, the key and what was expected there.
        """
        fields, where = read(source)
        return cls.parse(fields, where)

    @classmethod
    def parse(cls, fields: Any, where: str = "recipe") -> "Recipe":
        """A checked recipe from nested dictionaries; `where` names their origin in errors."""
        try:
            return cls.model_validate(fields)
        except RecursionError as error:
            raise RecipeError(f"{where} contains itself, or is nested too deeply.", "Write it flat.") from error
        except ValidationError as error:
            raise refusal(error, where) from error

    def to_yaml(self) -> str:
        """The complete recipe, defaults included, as YAML that `load` reads back."""
        return yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False)
