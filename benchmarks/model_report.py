"""The speed page's part about whole models."""

from typing import Any

from report_pieces import ratio, table

from hyperfade.surgery import human

AMDAHL_TARGET = 0.10
TEXT = (
    "Time to first token: one image and 32 words, vision tower and prompt. `measured / predicted` compares with "
    "Amdahl's law: the FFNs' share of the dense model's time and the FFNs' own speed-ups, both from the same process. "
    f"Within {AMDAHL_TARGET:.0%} of 1 the FFNs' gain reaches the model in full. A dash: not measured, because a "
    "processor without bfloat16 instructions takes minutes to a first token in it."
)
LOADING = (
    "A checkpoint that is not in the file cache, loaded by `from_pretrained` in a fresh process, which then answers "
    "once. Peak memory is that process's largest resident set, the libraries' own included."
)


def model_parts(results: dict[str, Any]) -> list[str]:
    """Its paragraphs and tables."""
    speeds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    loads: dict[str, dict[str, dict[str, Any]]] = {}
    for key, cell in results["cells"].items():
        kind, name, what = key.split("|")
        if kind == "speed":
            speeds.setdefault((name, cell["dtype"]), []).append(cell)
        else:
            loads.setdefault(name, {})[what] = cell
    parts = [TEXT]
    for (name, dtype), cells in speeds.items():
        parts += [f"### {name}, {dtype}", _facts(cells[0]), _speeds(cells)]
    headline = _headline([cell for (name, _), cells in speeds.items() if name == "Qwen2.5-VL-7B" for cell in cells])
    return [*parts, *headline, *(["### Loading and memory", LOADING, _loads(loads)] if loads else [])]


def _facts(cell: dict[str, Any]) -> str:
    """What was timed, and where the dense model's time goes."""
    dense, share, period = cell["models"]["dense"], cell["ffn_share"], cell["shared_period"]
    sizes = f"{human(dense['parameters'])} parameters, {cell['prompt_tokens']} prompt tokens, {cell['patches']} patches"
    text = f"{sizes}, {cell['rounds']} rounds. Dense: {1e3 * dense['per_token']['seconds']:.0f} ms per token"
    text += f", of which FFNs take {share['decode language']:.0%}"
    if "first_token" in dense:
        text += (
            f"; {dense['first_token']['seconds']:.2f} s to the first token, of which FFNs of language take "
            f"{share['prefill language']:.0%} and those of vision {share['prefill vision']:.0%}"
        )
    text += "."
    if period:
        text += (
            f" To fit beside its compressed forms, every {period}th language layer uses the same storage; a layer is "
            "far larger than the caches, so each token still reads every layer's weights from memory."
        )
    return text


def _speeds(cells: list[dict[str, Any]]) -> str:
    rows = []
    for cell in cells:
        for variant, own in cell["models"].items():
            if variant == "dense":
                continue
            row = [variant, human(own["parameters"])]
            for phase in ("first_token", "per_token"):
                measured = phase in own
                row.append(ratio(own[phase]["speedup"]) if measured else "–")
                row.append(f"{own['amdahl'][phase]['measured_over_predicted']:.2f}" if measured else "–")
            row.append(f"{1 / own['per_token']['seconds']:.2f}")
            row += [ratio(own["per_token_batch_8"]["speedup"]), f"{8 / own['per_token_batch_8']['seconds']:.2f}"]
            rows.append(row)
    check = "measured / predicted"
    head = ["FFNs", "parameters", "first token", check, "per token", check, "tokens/s"]
    return table([*head, "per token, batch 8", "tokens/s, batch 8"], rows)


def _headline(cells: list[dict[str, Any]]) -> list[str]:
    """The paper's own claim beside what its recipe and ours reach on a model of its size."""
    lines = []
    for cell in cells:
        for variant, own in cell["models"].items():
            kind, _, way = variant.partition(", ")
            if kind not in ("paper", "products n=4"):
                continue
            recipe = ("the paper's recipe" if kind == "paper" else kind) + (way and f", {way}")
            line = f"- {recipe}, {cell['dtype']}, {human(own['parameters'])} parameters: "
            line += f"{ratio(own['per_token']['speedup'])} per token"
            if "first_token" in own:
                line += f", {ratio(own['first_token']['speedup'])} to the first"
            lines.append(line)
    claim = "The paper reports 48 % more speed at 8.29 B → 5.38 B parameters. At the same shapes here:"
    return [f"{claim}\n\n" + "\n".join(lines)] if lines else []


def _loads(loads: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = []
    for name, entries in loads.items():
        dense = entries.get("dense")
        for variant, cell in entries.items():
            gain = f"{dense['load_seconds'] / cell['load_seconds']:.2f}×" if dense else "–"
            peak = cell["peak_bytes"]
            sizes = [f"{size / 1e9:.2f}" for size in (cell["disk_bytes"], peak["loaded"], peak["answered"])]
            rows.append([name, variant, *sizes, f"{cell['load_seconds']:.1f}", gain])
    return table(["model", "FFNs", "on disk, GB", "peak loaded, GB", "peak answering, GB", "load, s", "speed-up"], rows)
