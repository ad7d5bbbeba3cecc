"""The stacking table and its targets, from the results that `stacking.py` keeps; and how products run in few bits."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quantization import BITS
from report_pieces import ratio, table
from rounding_quality import GROUPINGS
from stacking import CALIBRATED, FORMATS, METHODS, MODELS, SAMPLES

BEGIN, END = "<!-- stacking:begin", "<!-- stacking:end -->"
IN_README = ("dense", "recipe quarter")
TITLES = {"embedded": "the model that ships", "language": "SmolLM2-135M"}
MOST_POINTS, MOST_RATIO, MOST_BYTES = 0.5, 0.03, 0.08
Kept = Mapping[str, Any]


def shown_quality(cell: Kept) -> str:
    """Exact match in percent, or perplexity."""
    return f"{cell['perplexity']:.2f}" if "perplexity" in cell else f"{cell['exact_match']:.2%}"


def lost(kept: Kept, name: str, method: str, to: str) -> float | None:
    """What rounding costs a method: points of exact match, or by how much it multiplies the perplexity, less 1."""
    whole, own = (kept["cells"].get(f"{name}|{method}|{bits}") for bits in ("bf16", to))
    if whole is None or own is None:
        return None
    if "perplexity" in own:
        return own["perplexity"] / whole["perplexity"] - 1
    return 100 * (whole["exact_match"] - own["exact_match"])


def shown_loss(kept: Kept, name: str, method: str, to: str) -> str:
    """`lost`, with its unit."""
    value = lost(kept, name, method, to)
    if value is None or to == "bf16":
        return ""
    return f"× {1 + value:.4f}" if name == "language" else f"{value:.2f} points"


def speed_columns(kept: Kept, name: str, method: str, to: str) -> list[str]:
    """Decode against the dense model of the same bits with quartiles, then prefill and decode against dense bf16."""
    group = kept.get("speed", {}).get(name, {}).get(to)
    if group is None or method not in group:
        return ["", "", ""]
    own, whole = group[method], group["dense bf16"]
    same = "" if method == "dense" else ratio((own["decode_speedup"], *own["decode_speedup_range"]))
    seconds = ("prefill_seconds", "decode_seconds_per_token")
    return [same, *(f"{whole[key] / own[key]:.2f}×" for key in seconds)]


def stacking_table(kept: Kept, methods: Iterable[str] = METHODS) -> str:
    """A row for every cell of these methods that was measured."""
    rows = []
    for name in MODELS:
        dense = kept["cells"].get(f"{name}|dense|bf16")
        for method in methods:
            for to in (*FORMATS, CALIBRATED):
                cell = kept["cells"].get(f"{name}|{method}|{to}")
                if cell is None or dense is None:
                    continue
                rows.append(
                    [
                        *(TITLES[name], method, to, shown_quality(cell), shown_loss(kept, name, method, to)),
                        f"{cell['ffn_bytes'] / dense['ffn_bytes']:.1%}",
                        *(f"{cell[key] / 1e6:.1f} MB" for key in ("disk_bytes", "memory_bytes")),
                        *speed_columns(kept, name, method, to),
                    ]
                )
    speeds = ["decode against dense of the same bits", "prefill against dense bf16", "decode against dense bf16"]
    head = ["model", "FFNs", "bits", "quality", "rounding costs", "FFN bytes", "on disk", "in memory", *speeds]
    return table(head, rows)


def targets(kept: Kept) -> str:
    """What was to be reached, and what was: a line for each that can be judged."""
    return "\n".join(f"- {line}" for line in _targets(kept)) or "Not measured yet."


def _targets(kept: Kept) -> Iterator[str]:
    for name in MODELS:
        for to, method in itertools.product(("int4", CALIBRATED), METHODS):
            dense, own = (lost(kept, name, which, to) for which in ("dense", method))
            if method in ("dense", "low-rank 1/4") or own is None or dense is None:
                continue
            if name == "language":
                more = (1 + own) / (1 + dense) - 1
                said = f"multiplies the perplexity by {1 + more:.4f} of what it does to dense (target 1.03)"
                yield _line(f"{TITLES[name]}, {method}: {to} {said}", more <= MOST_RATIO)
            else:
                said = f"costs {own - dense:+.2f} points more than it costs dense (target {MOST_POINTS})"
                yield _line(f"{TITLES[name]}, {method}: {to} {said}", own - dense <= MOST_POINTS)
        cells = [kept["cells"].get(f"{name}|{key}") for key in ("products n=4|int4", "dense|bf16")]
        if all(cells):
            share = cells[0]["ffn_bytes"] / cells[1]["ffn_bytes"]
            said = f"take {share:.1%} of the bytes of the dense ones in bf16 (target {MOST_BYTES:.0%})"
            yield _line(f"{TITLES[name]}: FFNs of products n=4 in int4 {said}", share <= MOST_BYTES)
        if own := kept.get("speed", {}).get(name, {}).get("int4", {}).get("products n=4"):
            said = f"decode {ratio((own['decode_speedup'], *own['decode_speedup_range']))} as fast as dense in int4"
            yield _line(f"{TITLES[name]}: products n=4 in int4 {said}", own["decode_speedup"] >= 1)


def _line(what: str, reached: bool) -> str:
    return f"{what}: **{'reached' if reached else 'missed'}**."


def footnote(kept: Kept) -> str:
    """Settings and machines."""
    own = kept["settings"]
    text = (
        f"The model that ships: trained as in the demo, exact match on {own['examples']:,} questions. SmolLM2-135M: "
        f"{own['steps']} steps, perplexity on {own['test']} sequences of WikiText-2's test set. int8 by rows, int4 by "
        f"groups of {own['group']}, to nearest or calibrated (GPTQ) on {SAMPLES} samples; attention, embeddings and "
        "head in bfloat16."
    )
    for what, machine in (("Quality", kept["machine"]), ("Speed", kept.get("speed", {}).get("machine"))):
        if machine is not None:
            text += f" {what}: {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
            text += f"transformers {machine['transformers']}, {machine['date']}."
    return text


def large_section(kept: Kept) -> list[str]:
    """Decoding at the shapes of a model of billions."""
    speeds, whole = kept["speeds"], kept["ffn_bytes"]["dense, bf16"]
    rows = [
        [
            name,
            f"{kept['ffn_bytes'][name] / whole:.1%}",
            f"{1000 * own['decode_seconds_per_token']:.0f} ms",
            ratio((own["decode_speedup"], *own["decode_speedup_range"])),
            ratio((own["prefill_speedup"], *own["prefill_speedup_range"])),
        ]
        for name, own in speeds.items()
    ]
    own = speeds["products n=4, int4"]
    said = ratio((own["decode_speedup"], *own["decode_speedup_range"]))
    facts = kept["machine"]
    return [
        "### A model of billions, in few bits",
        f"{kept['model']} at its true shapes with random weights, text alone, {kept['prompt_tokens']} tokens of prompt "
        "(`benchmarks/low_bit_model.py`): all FFNs in int4 by groups of 64, everything else in bfloat16. Against dense "
        f"in int4, medians and quartiles over alternating rounds. {facts['processor']}, {facts['threads']} threads, "
        f"torch {facts['torch']}, {facts['date']}.",
        table(["FFNs", "FFN bytes", "per token", "decode", "prefill"], rows),
        f"- {_line(f'products n=4 in int4 decode {said} as fast as dense in int4', own['decode_speedup'] >= 1)}",
    ]


def section(kept: Kept) -> list[str]:
    """The part of the page on rounding."""
    return [
        "## Smaller layers and fewer bits together",
        "Written from `benchmarks/results/stacking.json`, which `benchmarks/stacking.py` keeps.",
        stacking_table(kept),
        targets(kept),
        footnote(kept),
    ]


def answers_section(kept: Kept) -> list[str]:
    """What rounding to any number of bits leaves of the answers."""
    rows = []
    for name in MODELS:
        for bits, grouping in [(16, "whole"), *((bits, grouping) for bits in BITS for grouping in GROUPINGS)]:
            cells = [kept["cells"].get(f"{name}|{method}|{bits}|{grouping}") for method in METHODS]
            if any(cells):
                shown = ["" if cell is None else shown_quality(cell) for cell in cells]
                rows.append([TITLES[name], str(bits), "" if bits == 16 else grouping, *shown])
    own, machine = kept["settings"], kept["machine"]
    return [
        "### Answers, by bits",
        "The same checkpoints, their FFN matrices rounded to nearest by rows or by groups of at most "
        f"{own['group']} (`benchmarks/rounding_quality.py`): exact match on {own['examples']:,} questions, perplexity "
        f"on {own['test']} sequences. A, P and Q stay as they are. torch {machine['torch']}, {machine['date']}.",
        table(["model", "bits", "by", *METHODS], rows),
    ]


def with_stacking(readme: str, kept: Kept) -> str:
    """The README's text with the part between the markers made anew."""
    head, rest = readme.split(BEGIN, 1)
    marker, rest = rest.split("\n", 1)
    return f"{head}{BEGIN}{marker}\n{stacking_table(kept, IN_README)}\n\n{footnote(kept)}\n{END}{rest.split(END, 1)[1]}"


def calls_section(kept: Kept) -> list[str]:
    """How long products in few bits take, in one call and in several, beside the dense matrix in as few bits."""
    rows = []
    for key, cell in kept["cells"].items():
        shape, n, to, tokens = key.split("|")
        ways = ("dense", "1 calls", f"{n} calls")
        times = [f"{cell['microseconds'][way]:.0f}" for way in ways]
        shown = [f"**{time}**" if way == cell["chosen"] else time for way, time in zip(ways, times, strict=True)]
        rows.append([shape.replace("x", " → "), n, to, tokens, *shown])
    machine = kept["machine"]
    return [
        "### One kernel call for all products, or one for each",
        "Microseconds, the least of 31 alternating timings (`benchmarks/low_bit_forms.py`); what is chosen is bold. "
        "With more than 96 rows (int8: 16) both rebuild T for one batched product. "
        f"{machine['processor']}, threads: {machine['threads']}, torch {machine['torch']}, {machine['date']}.",
        table(["matrix", "n", "bits", "tokens", "dense", "one call for all", "a call for each"], rows),
    ]
