"""What to do, as a value: a `Recipe` is read from YAML, checked completely before anything happens, and never changed.

    recipe = Recipe.load("quarter")            # a recipe that ships with hyperfade ...
    recipe = Recipe.load("my-recipe.yaml")     # ... or a file

Every field has its help text beside it; `hyperfade recipe --keys` prints them.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hyperfade.errors import RecipeError

SHIPPED_RECIPES = Path(__file__).parent / "recipes"


def _number_in_text(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` (no dot) as text; it means a number here."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _no_is_a_word(value: Any) -> Any:
    """YAML 1.1 reads an unquoted `no` as false."""
    return "no" if value is False else value


def _free_name(value: str) -> str:
    """A rival's name becomes a folder and a key of the results, beside `dense` and `compressed`."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", value) or value in ("dense", "compressed"):
        raise ValueError("a rival's name has letters, digits, - and _, and is neither dense nor compressed")
    return value


Number = Annotated[float, BeforeValidator(_number_in_text), Field(allow_inf_nan=False)]
Name = Annotated[str, AfterValidator(_free_name)]
Kind = Literal[
    "products",
    "learned",
    "complex",
    "split_complex",
    "quaternion",
    "octonion",
    "cyclic",
    "z2",
    "paper",
    "low_rank",
    "dense",
]
Region = Literal["language", "vision", "projector", "other"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Layer(_Section):
    """What one dense matrix becomes."""

    kind: Kind = Field(
        default="products", description="algebra of the PHM layer; low_rank; or dense, which only width makes smaller"
    )
    n: int | None = Field(default=None, ge=2, description="algebra dimension (products, learned, cyclic, z2)")
    terms: int | None = Field(default=None, ge=1, description="number of terms t of a terms-form algebra [default: n]")
    products: int | None = Field(
        default=None, ge=1, description="number of products R of a products-form algebra [default: n]"
    )
    companion_rank: int = Field(default=0, ge=0, description="rank of the low-rank companion added to the PHM layer")
    fraction: Number | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="parameters as a fraction of the matrix: of low_rank, or of a hypercomplex layer with the companion"
        " that fills it up",
    )
    width: Number | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the FFN's hidden units that stay, those that matter most; what stays becomes `kind`",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needs_n = self.kind in ("products", "learned", "cyclic", "z2")
        if needs_n and self.n is None:
            raise ValueError(f"kind {self.kind!r} needs n, the algebra dimension (2, 4 or 8 are usual)")
        if not needs_n and self.n is not None:
            raise ValueError(f"kind {self.kind!r} takes no n")
        if self.kind == "low_rank" and self.fraction is None:
            raise ValueError("kind 'low_rank' needs fraction, its share of the matrix's parameters")
        if self.fraction is not None and (self.companion_rank or self.kind == "dense"):
            raise ValueError("fraction sets the companion's rank: leave companion_rank out, and kind 'dense' has none")
        if self.kind == "dense" and self.width is None:
            raise ValueError("kind 'dense' needs a width: without one nothing becomes smaller (null keeps a layer)")
        if self.terms is not None and self.kind in ("products", "low_rank", "dense"):
            raise ValueError(f"kind {self.kind!r} has no terms")
        if self.products is not None and self.kind != "products":
            raise ValueError(f"products is the size of kind 'products', not of {self.kind!r}")
        if self.kind in ("low_rank", "dense") and self.companion_rank:
            raise ValueError(f"kind {self.kind!r} has no companion: it is for hypercomplex layers")
        return self


class Rule(_Section):
    """An exception to the regional choice. The last rule that matches a matrix wins."""

    match: str = Field(default="*", description="glob over module names, e.g. *.layers.0.mlp.*")
    region: Region | None = Field(default=None, description="restrict the rule to one region")
    last_layers: int | None = Field(
        default=None, ge=1, description="restrict the rule to the last N FFNs of the region"
    )
    layer: Layer | None = Field(default=None, description="what the matrix becomes; null keeps it dense")


class Replace(_Section):
    """Which feed-forward matrices are replaced, by what. Attention, embeddings and head are never touched.

    With a budget, the size of each is found at compress time: `width` of an FFN whose layer has one, else `fraction` or
    `products` of a matrix. What a layer gives is where it starts, and what `hyperfade inspect` shows.
    """

    budget: Number | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="parameters of all replaced matrices together, as a fraction of dense, distributed over layers by"
        " measured sensitivity; null gives every layer the size it names",
    )
    language: Layer | None = Field(default=Layer(n=4), description="FFNs of the language model; null keeps them dense")
    vision: Layer | None = Field(default=Layer(n=4), description="FFNs of the vision tower; null keeps them dense")
    projector: Layer | None = Field(default=None, description="the projector between them; null keeps it dense")
    other: Layer | None = Field(default=None, description="nn.Linear modules named by `patterns`")
    patterns: tuple[str, ...] = Field(
        default=(), description="globs of further nn.Linear modules, for models of any kind"
    )
    exclude: tuple[str, ...] = Field(default=(), description="globs of module names that stay dense")
    min_weight_elements: int = Field(default=0, ge=0, description="matrices with fewer elements stay dense")
    rules: tuple[Rule, ...] = Field(default=(), description="exceptions; the last that matches wins")

    @model_validator(mode="before")
    @classmethod
    def _start_at_the_budget(cls, fields: Any) -> Any:
        """A layer that names no size starts with the budget's."""
        if not isinstance(fields, dict) or fields.get("budget") is None:
            return fields
        started = dict(fields)
        for region in get_args(Region):
            layer = started.get(region)
            if isinstance(layer, dict) and layer.get("kind") in ("dense", "low_rank"):
                size = "width" if layer["kind"] == "dense" else "fraction"
                if layer.get(size) is None:
                    started[region] = {**layer, size: fields["budget"]}
        return started

    @model_validator(mode="after")
    def _sizes_can_be_distributed(self) -> Self:
        if self.budget is None:
            return self
        if self.rules:
            raise ValueError(
                "budget finds the size of every layer itself: leave out rules (exclude keeps layers dense)"
            )
        for layer in self.layers():
            if layer.width is None and layer.fraction is None and layer.kind != "products":
                raise ValueError(
                    f"budget has no size to choose for kind {layer.kind!r}: give the layer a width or a fraction"
                )
        return self

    @model_validator(mode="after")
    def _patterns_have_a_layer(self) -> Self:
        if bool(self.patterns) != (self.other is not None):
            raise ValueError(
                "patterns and other come together: patterns say which nn.Linear, other says what they become"
            )
        return self

    def layers(self) -> list[Layer]:
        """Every layer that some matrix may become."""
        named = (self.language, self.vision, self.projector, self.other, *(rule.layer for rule in self.rules))
        return [layer for layer in named if layer is not None]


class Fit(_Section):
    """How dense weights become hypercomplex ones before any training."""

    method: Literal["calibrated", "frobenius", "random"] = Field(
        default="calibrated", description="what the fit minimises"
    )
    basis: Literal["none", "energy"] = Field(
        default="none", description="order of the FFN's hidden units before the split"
    )
    prefix: Literal["compressed", "dense"] = Field(
        default="compressed",
        description="what a layer is fitted behind: the layers compressed so far, or (one pass for all) the dense ones",
    )
    refit_writer: bool = Field(
        default=True, description="with a width: solve the writer for the units that stay; false is plain pruning"
    )
    sweeps: int = Field(default=12, ge=1, description="alternating least-squares sweeps per matrix")
    samples: int = Field(default=128, ge=1, description="training samples whose activations calibrate the fit")
    batch_size: int = Field(default=16, ge=1, description="samples per calibration forward pass")
    ridge: Number = Field(default=1e-6, ge=0, description="added to C's diagonal, relative to its mean")
    expert_prior: Number = Field(
        default=0.1,
        gt=0,
        description="weight of all experts' average in each expert's second moment, in tokens per input feature",
    )

    @model_validator(mode="after")
    def _basis_needs_activations(self) -> Self:
        if self.basis == "energy" and self.method != "calibrated":
            raise ValueError("basis 'energy' sorts by activations, which only method 'calibrated' gathers")
        return self


class Train(_Section):
    """The distillation: fade the dense weights out, then polish what is left. All lengths are optimizer steps."""

    fade_steps: int = Field(default=100, ge=0, description="steps of the fade; 0 starts with the dense branch gone")
    polish_steps: int = Field(default=200, ge=0, description="steps after the dense branch is dropped")
    fade_shape: Literal["linear", "cosine", "step"] = Field(default="linear", description="shape of α over the fade")
    fade_order: Literal["together", "layer_by_layer"] = Field(
        default="together", description="whether layers fade in turn"
    )
    batch_size: int = Field(default=32, ge=1, description="samples per forward pass")
    accumulation: int = Field(default=1, ge=1, description="forward passes per optimizer step")
    group_by_length: bool = Field(
        default=False, description="batches of examples of like length, so that little is padded"
    )
    learning_rate: Number = Field(default=2e-4, gt=0, description="peak learning rate of the hypercomplex weights")
    dense_learning_rate: Number = Field(default=1e-4, gt=0, description="peak learning rate of train_also and LoRA")
    weight_decay: Number = Field(default=0.0, ge=0, description="AdamW weight decay")
    warmup_fraction: Number = Field(
        default=0.1, ge=0, le=1, description="share of the steps with a rising learning rate"
    )
    clip_norm: Number = Field(default=1.0, gt=0, description="gradient norm limit")
    spike_factor: Number | None = Field(
        default=3.0,
        gt=1,
        description="a spike is five polish losses in a row above so many times the highest of the twenty before: the"
        " run goes back to a state from before it, with half the step; null never",
    )
    label_smoothing: Number = Field(default=0.0, ge=0, lt=1, description="label smoothing of the cross-entropy")
    kd_weight: Number = Field(default=0.9, ge=0, le=1, description="λ: share of the teacher's KL against cross-entropy")
    kd_ramp: bool = Field(default=False, description="let λ grow with α instead of starting at its full value")
    temperature: Number = Field(default=2.0, gt=0, description="T of the softened distributions in the KL")
    teacher: Literal["live", "cached"] = Field(
        default="live", description="cached: the teacher answers every example once, before the training"
    )
    teacher_top_k: int = Field(
        default=32, ge=1, description="with a cached teacher: likeliest tokens kept per answer token, beside their rest"
    )
    teacher_folder: Path | None = Field(
        default=None, description="with a cached teacher: where its answers lie, for several recipes [default: output]"
    )
    reconstruction_weight: Number = Field(
        default=0.0, ge=0, description="μ: weight of the layers' output error while fading"
    )
    hidden_weight: Number = Field(
        default=0.0,
        ge=0,
        description="η: weight of the relative error of the language model's hidden states, at every position",
    )
    train_also: tuple[str, ...] = Field(
        default=(), description="globs of dense parameters that train as well, e.g. lm_head.*"
    )
    lora_rank: int = Field(
        default=0, ge=0, description="LoRA on the language model's attention, merged at the end; 0 for none"
    )
    lora_alpha: int = Field(default=16, ge=1, description="LoRA scale")
    mixed_precision: Annotated[Literal["no", "bf16"], BeforeValidator(_no_is_a_word)] = Field(
        default="no", description="autocast of the training forward passes"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute activations to save memory")
    shard: bool = Field(
        default=False, description="of several processes each holds a part of teacher and student (FSDP2), not a copy"
    )
    checkpoint_every: int = Field(default=100, ge=1, description="steps between resumable checkpoints")
    log_every: int = Field(default=10, ge=1, description="steps between printed lines; metrics.jsonl has every step")
    trackers: tuple[str, ...] = Field(default=(), description="accelerate trackers, e.g. tensorboard")

    @model_validator(mode="after")
    def _hidden_states_are_not_cached(self) -> Self:
        if self.hidden_weight and self.teacher == "cached":
            raise ValueError("hidden_weight needs the teacher's hidden states, which are not cached: take teacher live")
        return self


class Data(_Section):
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


class Rival(_Section):
    """Another way to the same size, trained with the same data and budget for comparison."""

    replace: Replace = Field(description="what it replaces; keys as in the recipe's own `replace`")
    fit: Fit | None = Field(default=None, description="its own fit; null takes the recipe's")
    train: Train | None = Field(default=None, description="its own training; null takes the recipe's")


class Quantize(_Section):
    """Rounding of the finished model's matrices to few bits, after training. A word alone means `to`."""

    to: Literal["int8", "int4", "nf4", "fp8"] = Field(description="format of the matrices")
    group_size: int | None = Field(
        default=None, ge=0, description="neighbours that share a scale, 0 for rows [default: int4 and nf4 64, others 0]"
    )
    rest: bool = Field(default=False, description="attention and the other linears too; never head and embeddings")

    @model_validator(mode="before")
    @classmethod
    def _word(cls, given: Any) -> Any:
        return {"to": given} if isinstance(given, str) else given


class Recipe(_Section):
    """From a dense model to a finished one."""

    model: str = Field(
        default="embedded", description="checkpoint folder or hub name; `embedded` is the shipped example model"
    )
    output: Path = Field(Path("runs/compressed"), description="folder for the checkpoint, results and report")
    seed: int = Field(default=0, ge=0, description="seed of everything random")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="dtype the model runs in")
    attention: Literal["sdpa", "eager"] | None = Field(
        default=None,
        description="attention the models run with here; eager trains short sequences faster on a CPU"
        " [default: transformers' choice]",
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="dtype on disk [default: dtype]"
    )
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
        path = Path(source)
        if not path.suffix and not path.is_file():
            path = SHIPPED_RECIPES / f"{source}.yaml"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # no text, or no name a file can have
            shipped = ", ".join(sorted(p.stem for p in SHIPPED_RECIPES.glob("*.yaml")))
            raise RecipeError(
                f"Cannot read recipe {str(source)!r}: {error}", f"Give a YAML file or one of: {shipped}."
            ) from error
        fields = read_yaml(text, str(path))
        return cls.parse({} if fields is None else fields, where=str(path))

    @classmethod
    def parse(cls, fields: Any, where: str = "recipe") -> "Recipe":
        """A checked recipe from nested dictionaries; `where` names their origin in errors."""
        try:
            return cls.model_validate(fields)
        except RecursionError as error:
            raise RecipeError(f"{where} contains itself, or is nested too deeply.", "Write it flat.") from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the top level"
            given = first.get("input")
            shown = f" (given {given!r})" if not isinstance(given, (dict, BaseModel)) else ""
            hint = (
                f"{error.error_count()} problem(s) in all; `hyperfade recipe --keys` lists every key with its meaning."
            )
            raise RecipeError(f"{where}: {key}: {first['msg']}{shown}", hint) from error

    def to_yaml(self) -> str:
        """The complete recipe, defaults included, as YAML that `load` reads back."""
        return yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False)


def read_yaml(text: str, where: str) -> Any:
    """The value that YAML `text` describes; raises `RecipeError` that begins with `where`."""
    try:
        return yaml.safe_load(text)
    # besides its own errors, PyYAML lets through what the makers of dates and numbers raise at 2026-13-41 or `!!int x`
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{where} is not YAML: {reason}", "Check indentation, colons and brackets there.") from error
