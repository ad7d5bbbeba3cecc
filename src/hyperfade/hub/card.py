"""The measured table, and the model card that carries it. Both are made from results.json, never by hand."""

from typing import Any

_LABELS = {"compressed": "**hyperfade**", "low_rank": "low-rank, whitened", "paper": "paper's recipe, adapted"}


def table(results: dict[str, Any]) -> str:
    """A Markdown table: the dense model, the compressed one, and every rival, as measured in one run."""
    dense, details = results["quality"]["dense"], results["quality"]["details"]["dense"]["overall"]
    speed = results["dense_speed"]
    lines = [
        "| model | exact match (95 % interval) | kept | FFN parameters | all parameters | on disk | prefill | decode |",
        "|---|---|---|---|---|---|---|---|",
        f"| dense | {dense:.2%} ({details['low']:.1%}-{details['high']:.1%}) | | 100 % | "
        f"{results['parameters']['dense'] / 1e6:.2f} M | {_megabytes(results['disk_bytes']['dense'])} | "
        f"{1e3 * speed['prefill_seconds']:.1f} ms | {1e3 * speed['decode_seconds_per_token']:.2f} ms/token |",
    ]
    for name, entry in {"compressed": results, **results["rivals"]}.items():
        score = entry["quality"]["details"]["compressed"]["overall"]
        lines.append(
            f"| {_LABELS.get(name, name)} | {score['accuracy']:.2%} ({score['low']:.1%}-{score['high']:.1%}) | "
            f"{_share(entry['quality']['retention'])} | {entry['ffn_params_ratio']:.1%} | "
            f"{results['parameters'][name] / 1e6:.2f} M | {_megabytes(entry['disk_bytes']['compressed'])} | "
            f"{_speedup(entry['speed'], 'prefill')} | {_speedup(entry['speed'], 'decode')} |"
        )
    return "\n".join(lines)


def card(results: dict[str, Any], name: str = "compressed") -> str:
    """The README.md of one variant's checkpoint, Hugging Face front matter included."""
    recipe, machine = results["recipe"], results["machine"]
    entry = results if name == "compressed" else results["rivals"][name]
    model_class, processor_class = (
        ("AutoModelForImageTextToText", "AutoProcessor")
        if results["takes_images"]
        else ("AutoModelForCausalLM", "AutoTokenizer")
    )
    return f"""---
library_name: transformers
tags: [hyperfade, phm, compression]
---

# {recipe["model"]}, compressed with hyperfade ({name})

Feed-forward weights at {entry["ffn_params_ratio"]:.1%} of their parameters, the whole model at
{entry["params_ratio"]:.1%}. Made by hyperfade {machine["hyperfade"]} on {machine["date"]}.

## Use

```python
import hyperfade  # registers the layers; without it transformers refuses to load this folder
from transformers import {model_class}, {processor_class}

model = {model_class}.from_pretrained("THIS_FOLDER")
processor = {processor_class}.from_pretrained("THIS_FOLDER")
```

## Measured

{table(results)}

{footnote(results)}
"""


def footnote(results: dict[str, Any]) -> str:
    """What was measured where, in one paragraph."""
    recipe, machine = results["recipe"], results["machine"]
    count = results["quality"]["details"]["dense"]["overall"]["count"]
    return (
        f"Data: {recipe['data']['evaluation']}, {count:,} questions, greedy answers, exact match, Wilson interval. "
        f"Speed: {recipe['dtype']}, one prompt of {results['prompt_tokens']} tokens, medians and quartiles over "
        f"alternating rounds against the dense model in the same run. Machine: {machine['processor']}, "
        f"{machine['threads']} threads, accelerator {machine['accelerator']}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}; "
        f"{machine['date']}."
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _speedup(speed: dict[str, Any], phase: str) -> str:
    low, high = speed[f"{phase}_speedup_range"]
    return f"{speed[f'{phase}_speedup']:.2f}× ({low:.2f}-{high:.2f})"
