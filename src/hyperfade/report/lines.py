"""What the commands print: a plan, a fit, a budget, faults and scores as lines of text."""

from collections import defaultdict
from typing import Any

from hyperfade.hub import metric_label, score_rows, score_text
from hyperfade.surgery import Plan, human


def plan_lines(plan: Plan, bytes_per_parameter: int = 2) -> list[str]:
    """The plan as aligned text: one row per kind of replacement, then the totals of the whole model."""
    groups: dict[tuple[str, str, str, str], list[Any]] = defaultdict(list)
    for swap in plan.swaps:
        shape = " → ".join(map(str, swap.spec.dense_features))
        groups[swap.region, swap.name.rpartition(".")[2], shape, swap.spec.label].append(swap)
    rows = [("region", "matrix", "features", "count", "becomes", "parameters", "multiply-adds/token")]
    for (region, matrix, shape, label), swaps in groups.items():
        before, after = sum(s.dense_parameters for s in swaps), sum(s.spec.num_parameters for s in swaps)
        work = sum(s.dense_multiply_adds for s in swaps), sum(s.spec.multiply_adds for s in swaps)
        rows.append(
            (
                *(region, matrix, shape, str(len(swaps)), label),
                *(f"{human(before)} → {human(after)}", f"{human(work[0])} → {human(work[1])}"),
            )
        )
    rule = tuple("-" * max(len(row[i]) for row in rows) for i in range(len(rows[0])))
    lines = _aligned([rows[0], rule, *rows[1:]])
    before, after = plan.bytes(bytes_per_parameter)
    lines.append(
        f"replaced matrices keep {plan.ffn_params_ratio:.1%} of their parameters; the whole model: "
        f"{human(plan.parameters_before)} → {human(plan.parameters_after)} ({plan.params_ratio:.1%}), "
        f"{human(before)}B → {human(after)}B at {8 * bytes_per_parameter} bits"
    )
    if plan.kept:
        lines.append(f"{len(plan.kept)} FFN matrices stay dense, e.g. {plan.kept[0][0]}: {plan.kept[0][1]}")
    lines += [
        f"{region}: no FFN of a known shape; if the model has one, name its nn.Linear modules with replace.patterns"
        for region in plan.missing
    ]
    return lines


def fit_text(layer: Any) -> str:
    """How one matrix came out of the fit, a `LayerFit` that has an error."""
    rival = "" if layer.low_rank_error is None else f" (low-rank of the same size {layer.low_rank_error:.4f})"
    aim = "" if layer.correction is None else f", {layer.correction:.0%} corrected for the layers before"
    own = "" if layer.held_out is None else f", own training: {held_out_text(layer.held_out)}"
    return f"fit {layer.name}: {layer.label}, error {layer.error:.4f}{rival}{aim}{own}, {layer.seconds:.1f} s"


def held_out_text(left: float) -> str:
    """What an FFN's training by itself came to, from the squared error that it left on held-out batches."""
    return f"{left:.1%} of its squared error left" if left < 1 else "undone"


def allocation_lines(allocation: dict[str, Any]) -> list[str]:
    """An `Allocation`, as a mapping: where the budget went, a line per region, and what that is predicted to gain."""
    lines, shares = [], allocation["shares"]
    for region in dict.fromkeys(share["region"] for share in shares):
        own = sorted((share for share in shares if share["region"] == region), key=share_kept)
        least, most = (
            f"{share_kept(s):.1%} ({s['name']}: {s['size']}, sensitivity {s['sensitivity']:.3g})"
            for s in (own[0], own[-1])
        )
        lines.append(f"budget: {region} keeps {share_kept(*own):.1%} of its parameters, from {least} to {most}")
    lines.append(
        f"budget: {share_kept(*shares):.2%} of {allocation['budget']:.2%} used; predicted loss change "
        f"{allocation['loss']:.4g} nats per answer token, with one size for all {allocation['uniform_loss']:.4g}"
    )
    return lines


def share_kept(*shares: dict[str, Any]) -> float:
    """Parameters after over before, of all of them together."""
    return sum(s["parameters"] for s in shares) / sum(s["dense_parameters"] for s in shares)


def quality_lines(quality: dict[str, Any]) -> list[str]:
    """The scores of a `Quality`, as a mapping, as aligned text: one row per task, part of its examples and metric."""
    rows = [
        (task, part, metric_label(metric), score_text(metric, score), f"of {score['count']}")
        for task, own in quality["tasks"].items()
        for (part, metric), score in score_rows(own).items()
    ]
    return _aligned(rows)


def harness_lines(found: dict[str, Any]) -> list[str]:
    """What `measure.run_tasks` returned as aligned text: one row per metric, with its standard error."""
    rows = []
    for task, metrics in found["results"].items():
        samples = found["n-samples"].get(task)
        count = f"of {samples['effective']}" if samples else ""  # groups have none of their own
        for key, value in metrics.items():
            name, comma, way = key.partition(",")  # "exact_match,strict-match": a metric, and how the answer was found
            if comma and not name.endswith("_stderr") and isinstance(value, float | int):
                error = metrics.get(f"{name}_stderr,{way}")
                margin = f"± {error:.4f}" if isinstance(error, float | int) else ""
                rows.append((task, name if way == "none" else f"{name} ({way})", f"{value:.4f}", margin, count))
    return _aligned(rows)


def fault_text(fault: dict[str, Any]) -> str:
    """A fault of the training and what was done about it, in one sentence."""
    if "back_to" in fault:
        return f"{fault['fault']} in step {fault['step']}: back to step {fault['back_to']}, with half the step"
    return f"{fault['fault']} in step {fault['step']}: every batch in {fault['parts']} parts from then on"


def few_tokens_text(few_tokens: dict[str, int], most: int | None = 8) -> str:
    """Which experts calibration hardly reached, in one sentence; at most so many by number."""
    shown = [f"{expert} ({tokens})" for expert, tokens in few_tokens.items()]
    rest = "" if most is None or len(shown) <= most else f" and {len(shown) - most} more"
    return f"fitted on the average of all experts more than on their own tokens: expert {', '.join(shown[:most])}{rest}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
