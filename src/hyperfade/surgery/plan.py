"""The plan: a pure value that says which matrix becomes what, with its cost before and after. Nothing is changed yet.

Works on a model on the meta device as well, so a config alone is enough to plan.
"""

import math
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from hyperfade.algebra import Algebra, rank_for
from hyperfade.errors import AllExcludedError, NothingMatchedError, PlanError
from hyperfade.nn import LightSpec
from hyperfade.recipe import Layer, Recipe, Region, Replace
from hyperfade.surgery.experts import find_experts
from hyperfade.surgery.families import FFN, Dense, dense_matrices, features, find_ffns, is_dense, region_of

_REGIONS: tuple[Region, ...] = ("language", "vision", "projector")


@dataclass(frozen=True)
class Swap:
    """One dense matrix and what it becomes. `ffn` is the name of the FFN it belongs to."""

    name: str
    ffn: str
    region: Region
    spec: LightSpec

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense layer, its bias included; of experts, of all."""
        d, k = self.spec.dense_features
        return (self.spec.experts or 1) * (d * k + (k if self.spec.bias else 0))

    @property
    def dense_multiply_adds(self) -> int:
        """Multiply-adds per token of the dense layer; of experts, of the one that the token goes to."""
        d, k = self.spec.dense_features
        return d * k


@dataclass(frozen=True)
class Plan:
    """All swaps of a model. `ffns`: the FFNs that take part, in module order; counts are of the whole model."""

    swaps: tuple[Swap, ...]
    ffns: tuple[FFN, ...]
    parameters_before: int
    kept: tuple[tuple[str, str], ...]  # matrices of FFNs that stay dense, with the reason
    missing: tuple[Region, ...]  # regions that the recipe replaces but where no FFN of a known shape is

    @property
    def saved_parameters(self) -> int:
        """Parameters that the swaps remove."""
        return sum(s.dense_parameters - s.spec.num_parameters for s in self.swaps)

    @property
    def parameters_after(self) -> int:
        """Parameters of the whole model after the swaps."""
        return self.parameters_before - self.saved_parameters

    @property
    def ffn_params_ratio(self) -> float:
        """Parameters of the replaced matrices, after over before."""
        before = sum(s.dense_parameters for s in self.swaps)
        return 1 - self.saved_parameters / before

    @property
    def params_ratio(self) -> float:
        """Parameters of the whole model, after over before."""
        return self.parameters_after / self.parameters_before

    def bytes(self, bytes_per_parameter: int) -> tuple[int, int]:
        """Weight bytes of the whole model before and after, at one width for every parameter."""
        return self.parameters_before * bytes_per_parameter, self.parameters_after * bytes_per_parameter


def plan(model: nn.Module, recipe: Recipe | Replace) -> Plan:
    """Match `recipe` to `model`. Changes nothing.

    Raises `NothingMatchedError` where the recipe meets no matrix (or a pattern meets none), `AllExcludedError` where
    every match was excluded, `PlanError` where a budget meets experts, `AlgebraError` where n does not divide a
    matrix's widths (it names the matrix).
    """
    choice = recipe.replace if isinstance(recipe, Recipe) else recipe
    matrices = dense_matrices(model)
    found = find_ffns(model)
    ffns = found + _matched_by_pattern(model, choice, {name for ffn in found for name in ffn.linears})
    unknown = [experts for experts in find_experts(model) if not experts.matrices]
    if not ffns:
        only = f"but {unknown[0].name}, experts of an unknown make" if unknown else "of a known shape"
        raise NothingMatchedError(
            f"{type(model).__name__} has no feed-forward network {only}.",
            "Name its nn.Linear modules with replace.patterns, e.g. patterns: ['*.mlp.*'], and replace.other.",
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, named.values()))
    _check_globs(choice, [name for ffn in ffns for name in ffn.linears])
    swaps, kept = [], []
    for ffn in ffns:
        for name in ffn.linears:
            linear = matrices[name]
            layer, reason = _choose(choice, ffn, name, linear, ffns)
            if layer is not None and uses[id(named[name if ffn.experts else f"{name}.weight"])] > 1:
                # the other user would keep it dense
                layer, reason = None, "sharing its weight with another module"
            if layer is None:
                kept.append((name, reason))
            else:
                swaps.append(Swap(name, ffn.name, ffn.region, spec_of(layer, linear, ffn, name)))
        _check_widths(ffn, swaps)
        if choice.budget is not None and ffn.experts and swaps and swaps[-1].ffn == ffn.name:
            raise PlanError(
                f"replace.budget cannot be shared out over experts: {ffn.name} has {ffn.experts}.",
                "Take the budget away, --set replace.budget=null, or keep experts dense, --set "
                """'replace.exclude=["*.experts.*"]'.""",
            )
    for held in unknown:
        reason = f"holding {held.number} experts in a module of an unknown make"
        kept += [(f"{held.name}.{key}", reason) for key in held.tensors]
    if not swaps:
        regions = ", ".join(sorted({f.region for f in ffns}))
        raise AllExcludedError(
            f"All {len(kept)} matching matrices of {type(model).__name__} stay dense: {kept[0][0]} is {kept[0][1]}.",
            f"The model has FFNs in: {regions}. Change replace.{ffns[0].region}, exclude or min_weight_elements.",
        )
    names = {s.ffn for s in swaps}
    return Plan(
        tuple(swaps),
        tuple(f for f in ffns if f.name in names),
        sum(p.numel() for p in model.parameters()),
        tuple(kept),
        tuple(
            region
            for region in _REGIONS
            if getattr(choice, region)
            and region not in {*(f.region for f in ffns), *(region_of(held.name) for held in unknown)}
        ),
    )


def _check_globs(choice: Replace, names: list[str]) -> None:
    """Raise `NothingMatchedError` for an exclusion or a rule that speaks of no FFN matrix: a typing mistake, mostly."""
    globs = [("exclude", glob) for glob in choice.exclude] + [("rules: match", rule.match) for rule in choice.rules]
    for key, glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise NothingMatchedError(
                f"replace.{key} {glob!r} matches no FFN matrix.", f"They are called like {names[0]} and {names[-1]}."
            )


def _matched_by_pattern(model: nn.Module, choice: Replace, taken: set[str]) -> tuple[FFN, ...]:
    """Each linear a user's pattern names, as an FFN of its own, unless it is `taken` by a known shape."""
    linears = [name for name, module in model.named_modules() if is_dense(module)]
    found: dict[str, FFN] = {}
    for pattern in choice.patterns:
        names = [name for name in linears if fnmatchcase(name, pattern)]
        if not names:
            near = ", ".join(linears[:3]) or "none at all"
            raise NothingMatchedError(
                f"Pattern {pattern!r} matches no nn.Linear module.",
                f"The model's linears: {near}{', …' if linears[3:] else ''}.",
            )
        found.update({name: FFN(name, "other", (), name) for name in names if name not in taken})
    return tuple(found.values())


def _choose(choice: Replace, ffn: FFN, name: str, linear: Dense, ffns: tuple[FFN, ...]) -> tuple[Layer | None, str]:
    """What a matrix becomes, or None with the reason."""
    if ffn.region == "other" and not any(fnmatchcase(name, pattern) for pattern in choice.patterns):
        return None, "neither language nor vision nor projector, and named by none of replace.patterns"
    if any(fnmatchcase(name, pattern) for pattern in choice.exclude):
        return None, "excluded"
    if (ffn.experts or 1) * math.prod(features(linear)) < choice.min_weight_elements:
        return None, f"smaller than min_weight_elements={choice.min_weight_elements}"
    layer: Layer | None = getattr(choice, ffn.region)
    reason = f"in region {ffn.region}, which the recipe keeps dense"
    for rule in choice.rules:
        region = [f.name for f in ffns if f.region == ffn.region]
        among_last = rule.last_layers is None or ffn.name in region[-rule.last_layers :]
        if fnmatchcase(name, rule.match) and rule.region in (None, ffn.region) and among_last:
            layer, reason = rule.layer, f"kept dense by the rule {rule.match!r}"
    if layer is None or layer.width is None or (ffn.readers and not ffn.experts):
        return layer, reason
    return layer.at_full_width(), f"of an FFN that keeps all its hidden units, and kind {layer.kind!r} has a width only"


def spec_of(layer: Layer, linear: Dense, ffn: FFN, name: str) -> LightSpec:
    """What `layer` makes of `linear`, the matrix `name` of `ffn`. Raises `PlanError` where that would not shrink it."""
    (d, k), bias, experts = features(linear), linear.bias is not None, ffn.experts or None
    dense, replaced = (experts or 1) * (d * k + (k if bias else 0)), None
    if layer.width is not None and ffn.readers:
        replaced, parts = (d, k), 2 if ffn.fused else 1
        d, k = (
            (kept_units(layer, d, name), k) if name == ffn.writer else (d, parts * kept_units(layer, k // parts, name))
        )
    if layer.kind == "dense":
        spec = LightSpec(d, k, bias, None, 0, replaced)
    elif layer.kind == "low_rank":
        assert layer.fraction is not None
        spec = LightSpec(d, k, bias, None, rank_for(d, k, layer.fraction * d * k), replaced, experts=experts)
    else:
        algebra = algebra_of(layer)
        algebra.check_features(d, k, where=name)
        rank = _companion_rank(layer, algebra, d, k, name)
        spec = LightSpec(d, k, bias, algebra, rank, replaced, experts=experts)
    if spec.num_parameters >= dense:
        raise PlanError(
            f"{name} {features(linear)[::-1]} would not shrink: {spec.num_parameters:,} parameters as {spec.label},"
            f" dense {dense:,}.",
            "Use fewer terms or products, a smaller companion_rank or width, or exclude the matrix.",
        )
    return spec


def _companion_rank(layer: Layer, algebra: Algebra, d: int, k: int, name: str) -> int:
    """The companion's rank: as given, or what fills the layer up to its fraction of a (k, d) matrix."""
    if layer.fraction is None:
        return layer.companion_rank
    own = algebra.num_parameters(d, k)
    left = layer.fraction * d * k - own
    if left < 0:
        raise PlanError(
            f"{name} ({k}, {d}): its {layer.kind} alone take {own / (d * k):.3f} of the matrix, fraction is "
            f"{layer.fraction:g}.",
            "Raise the fraction, or ask for fewer terms or products.",
        )
    return rank_for(d, k, left) if left >= d + k else 0


def kept_units(layer: Layer, hidden: int, where: str = "the FFN") -> int:
    """How many of an FFN's `hidden` units a layer with a width keeps: fewer than all, and a multiple of 8 (of hidden/32
    where there are few) that the algebra's n divides, because odd widths are slow. Raises `PlanError` where there is no
    such number."""
    assert layer.width is not None
    n = 1 if layer.kind in ("low_rank", "dense") else algebra_of(layer).n
    step = math.lcm(n, 8 if hidden >= 256 else max(hidden // 32, 1))
    most = (hidden - 1) // step
    if not most:
        raise PlanError(
            f"{where}: a width keeps a multiple of {step} hidden units, and there are {hidden}.",
            "Ask for a smaller n, or give this FFN no width.",
        )
    return min(max(1, round(layer.width * hidden / step)), most) * step


def _check_widths(ffn: FFN, swaps: list[Swap]) -> None:
    """Raise `PlanError` unless all matrices of the FFN, the last of `swaps`, agree on how many hidden units it has."""
    own = [s for s in swaps if s.ffn == ffn.name]
    parts = 2 if ffn.fused else 1
    narrow = {
        s.spec.in_features if s.name == ffn.writer else s.spec.out_features // parts for s in own if s.spec.replaced
    }
    if narrow and (len(narrow) > 1 or any(s.spec.replaced is None for s in own) or len(own) < len(ffn.linears)):
        raise PlanError(
            f"{ffn.name}: its matrices would have different numbers of hidden units.",
            "Give all matrices of an FFN the same width: let rules match the whole FFN, and exclude all of it or none.",
        )


def algebra_of(layer: Layer) -> Algebra:
    """The algebra a recipe's `Layer` names."""
    if layer.kind == "products":
        return Algebra.products(layer.n or 0, layer.products)
    if layer.kind == "learned":
        return Algebra.learned(layer.n or 0, layer.terms)
    return Algebra.named(layer.kind, layer.terms, layer.n)


def matched_low_rank(swap: Swap) -> int:
    """The rank of a low-rank layer with as many parameters as the swap's replacement, or just below (at most the full
    rank)."""
    d, k = swap.spec.dense_features
    budget = swap.spec.num_parameters // (swap.spec.experts or 1) - (
        k if swap.spec.bias else 0
    )  # its own bias: a narrow layer's is shorter
    return min(rank_for(d, k, budget), d, k)


def human(count: float) -> str:
    """1234567 → `1.23 M`."""
    if count < 1000:
        return f"{count:g}"
    power = min(int(math.log10(count) / 3), 4)
    return f"{count / 1000**power:.2f} {['', 'k', 'M', 'B', 'T'][power]}"
