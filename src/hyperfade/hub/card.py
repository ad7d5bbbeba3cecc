"""The measured table, and the model card that carries it. Both are made from results.json, never by hand."""

from collections.abc import Mapping
from typing import Any

_LABELS = {"compressed": "**hyperfade**", "low_rank": "low-rank, whitened", "paper": "paper's recipe, adapted"}
_METRICS = {  # name for people, format of a score, format of its interval's ends
    "exact_match": ("exact match", ".2%", ".1%"),
    "vqa_accuracy": ("VQA accuracy", ".2%", ".1%"),
    "cider": ("CIDEr", ".3f", ".2f"),
    "bleu4": ("BLEU-4", ".1f", ".1f"),
    "character_accuracy": ("character accuracy", ".2%", ".1%"),
    "character_error_rate": ("character error rate", ".2%", ".1%"),
    "word_error_rate": ("word error rate", ".2%", ".1%"),
}


def metric_label(name: str) -> str:
    """A metric's name for people."""
    return _METRICS[name][0]


def is_share(name: str) -> bool:
    """Whether a metric is written in per cent."""
    return _METRICS[name][1].endswith("%")


def score_text(name: str, score: Mapping[str, Any]) -> str:
    """A metric's score with its 95 % interval: "99.55% (99.1%-99.8%)"."""
    _, own, ends = _METRICS[name]
    return f"{score['value']:{own}} ({score['low']:{ends}}-{score['high']:{ends}})"


def score_rows(own: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(examples, metric) → score of one task: every metric of all examples, then the headline of parts.

    Parts are kinds, and examples with and without an image where there are both.
    """
    metric, modalities = own["headline"], own["by_modality"]
    rows = {("all", name): score for name, score in own["scores"].items()}
    rows |= {(f"kind {kind}", metric): scores[metric] for kind, scores in own["by_kind"].items()}
    if len(modalities) > 1:
        rows |= {("with image", metric): modalities["image"][metric], ("text only", metric): modalities["text"][metric]}
    return rows


def headline(quality: Mapping[str, Any], task: str) -> str:
    """The score that stands for a task, with its interval; "-" where no example of it could be used."""
    own = quality["tasks"].get(task)
    return "-" if own is None else score_text(own["headline"], own["scores"][own["headline"]])


def table(results: dict[str, Any]) -> str:
    """A Markdown table: the dense model, the compressed one, and every rival, as measured in one run."""
    details, speed = results["quality"]["details"], results["dense_speed"]
    tasks = {task: metric_label(own["headline"]) for task, own in details["dense"]["tasks"].items()}
    several = len(tasks) > 1
    names = [f"{task}: {metric}" if several else metric for task, metric in tasks.items()]
    columns = [*(f"{name} (95 % interval)" for name in names), "kept, least of the tasks" if several else "kept"]
    lines = [
        f"| model | {' | '.join(columns)} | FFN parameters | all parameters | on disk | prefill | decode |",
        "|---" * (len(columns) + 6) + "|",
        f"| dense | {' | '.join(headline(details['dense'], task) for task in tasks)} | | 100 % | "
        f"{results['parameters']['dense'] / 1e6:.2f} M | {_megabytes(results['disk_bytes']['dense'])} | "
        f"{1e3 * speed['prefill_seconds']:.1f} ms | {1e3 * speed['decode_seconds_per_token']:.2f} ms/token |",
    ]
    for name, entry in {"compressed": results, **results["rivals"]}.items():
        own = entry["quality"]["details"]["compressed"]
        lines.append(
            f"| {_LABELS.get(name, name)} | {' | '.join(headline(own, task) for task in tasks)} | "
            f"{_share(entry['quality']['retention'])} | {entry['ffn_params_ratio']:.1%} | "
            f"{results['parameters'][name] / 1e6:.2f} M | {_megabytes(entry['disk_bytes']['compressed'])} | "
            f"{_speedup(entry['speed'], 'prefill')} | {_speedup(entry['speed'], 'decode')} |"
        )
    return "\n".join(lines)


def card(results: dict[str, Any], name: str = "compressed") -> str:
    """The README.md of one variant's checkpoint, Hugging Face front matter included."""
    entry = results if name == "compressed" else results["rivals"][name]
    return f"""{card_head({**results, **entry}, name)}
## Measured

{table(results)}

{footnote(results)}
"""


def card_head(facts: Mapping[str, Any], name: str) -> str:
    """What a checkpoint is and how to load it: the beginning of its README.md.

    facts: recipe, machine, takes_images, ffn_params_ratio and params_ratio, as results.json has them.
    """
    recipe, machine = facts["recipe"], facts["machine"]
    model_class, processor_class = (
        ("AutoModelForImageTextToText", "AutoProcessor")
        if facts["takes_images"]
        else ("AutoModelForCausalLM", "AutoTokenizer")
    )
    return f"""---
library_name: transformers
tags: [hyperfade, phm, compression]
---

# {recipe["model"]}, compressed with hyperfade ({name})

Feed-forward weights at {facts["ffn_params_ratio"]:.1%} of their parameters, the whole model at
{facts["params_ratio"]:.1%}. Made by hyperfade {machine["hyperfade"]} on {machine["date"]}.

## Use

```python
import hyperfade  # registers the layers; without it transformers refuses to load this folder
from transformers import {model_class}, {processor_class}

model = {model_class}.from_pretrained("THIS_FOLDER")
processor = {processor_class}.from_pretrained("THIS_FOLDER")
```
"""


def footnote(results: dict[str, Any]) -> str:
    """What was measured where, in one paragraph."""
    recipe, machine = results["recipe"], results["machine"]
    tasks = results["quality"]["details"]["dense"]["tasks"]
    counts = {task: own["scores"][own["headline"]]["count"] for task, own in tasks.items()}
    if list(tasks) == ["question"]:
        data = f"{counts['question']:,} questions, greedy answers, exact match, Wilson interval"
    else:
        data = ", ".join(f"{count:,} of task {task}" for task, count in counts.items())
        data += ", greedy answers; intervals are Wilson's for exact match, and bootstrap over examples for other scores"
    return (
        f"Data: {recipe['data']['evaluation']}, {data}. "
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
