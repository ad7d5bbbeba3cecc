"""Which matrices are replaced, and what each of them becomes."""

from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from hyperfade.recipe.section import Number, Section

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


class Layer(Section):
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

    def at_full_width(self) -> "Layer | None":
        """A layer of the same size for where all hidden units stay: its matrices get smaller instead, by fewer products
        or a lower rank. None for kinds that have no such size."""
        if self.width is None:
            return self
        size: dict[str, Any] = {}
        if self.kind == "products":
            assert self.n is not None
            size["products"] = max(1, round(self.width * (self.products or self.n)))
        if self.fraction is not None:
            size["fraction"] = self.width * self.fraction
        return self.model_copy(update={"width": None, **size}) if size else None


class Rule(Section):
    """An exception to the regional choice. The last rule that matches a matrix wins."""

    match: str = Field(default="*", description="glob over module names, e.g. *.layers.0.mlp.*")
    region: Region | None = Field(default=None, description="restrict the rule to one region")
    last_layers: int | None = Field(
        default=None, ge=1, description="restrict the rule to the last N FFNs of the region"
    )
    layer: Layer | None = Field(default=None, description="what the matrix becomes; null keeps it dense")


class Replace(Section):
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
                "budget finds the size of every layer itself: leave out rules (exclude keeps layers dense), or the "
                "budget (--set replace.budget=null)"
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
