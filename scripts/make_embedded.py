"""Train the embedded default model: a small LLaVA that answers easy-VQA questions, made from nothing on a CPU.

The model is the real architecture in miniature: a SigLIP vision tower, a two-layer projector and a Llama language
model with wide FFNs, tied together by `LlavaForConditionalGeneration`. It is trained in two stages.

1. *see*: tower and projector alone learn to point at the words for shape and colour: the mean image feature times the
   language model's own word embeddings gives the logits. No language model runs, so a step is cheap, and unlimited
   rendered images (`render_shapes.py`) leave nothing to memorise.
2. *answer*: the language model learns to answer, tower and projector stay as they are. Questions are those of the train
   split, images the real ones or rendered ones about which yes and no are about equally likely. Only answer and end
   token carry loss. Questions with "no" and "not" join later: a thing's presence and the question's negation decide
   the answer together but tell nothing apart, so learning both at once starts on a long plateau.

One train image in ten is held out for validation. The finished folder is rounded to float16, loaded again as a user
would load it, and measured by greedy generation on every question of the test split, which nothing else touches.
Figures land in `training.json` and in the model card, `README.md`.

Run `python scripts/make_embedded.py`; if interrupted, run it again: it resumes from the last checkpoint in `--work`.
Needs torch, transformers, pillow and easy-vqa; no GPU, no network.
"""

import argparse
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import easy_vqa
import numpy as np
import torch
from PIL import Image
from render_shapes import COLOURS, SHAPES, render
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

SIDE, PATCH = 60, 10
PATCHES = (SIDE // PATCH) ** 2
ASSETS = Path(__file__).resolve().parents[1] / "src" / "hyperfade" / "assets" / "easy-vqa-llava"
Sample = tuple[str, str, int]  # question, answer, image id

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- message.role + ': ' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- if message.content is string %}
                {{- message.content }}
            {%- else %}
                {%- for part in message.content %}{{- part.text }}{%- endfor %}
            {%- endif %}
            {{- eos_token }}
        {%- endgeneration %}
    {%- elif message.content is string %}
        {{- message.content + '\\n' }}
    {%- else %}
        {%- for part in message.content %}
            {{- '<image>' if part.type == 'image' else part.text }}{{- '\\n' }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}
"""


def read_split(split: str) -> tuple[list[Sample], dict[int, Path]]:
    """Questions with answer and image id, and the image files, of easy-VQA's "train" or "test" split."""
    questions, paths = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }[split]
    return list(zip(*questions(), strict=True)), {key: Path(path) for key, path in paths().items()}


def mentioned(question: str) -> str | None:
    """The shape or colour that a question names, if it names one."""
    return next((word for word in question.rstrip("?").split() if word in SHAPES or word in COLOURS), None)


def kind(question: str) -> str:
    """The four kinds of question in easy-VQA."""
    words = question.split()
    if words[0] == "what":
        return "colour" if "color" in words else "shape"
    return "absence" if {"no", "not"} & set(words) else "presence"


def solve(question: str, shape: str, colour: str) -> str:
    """The right answer about an image of `shape` in `colour`."""
    asked = kind(question)
    if asked in ("colour", "shape"):
        return colour if asked == "colour" else shape
    return "yes" if (mentioned(question) in (shape, colour)) == (asked == "presence") else "no"


def suit(question: str, shape: str, colour: str, rng: np.random.Generator) -> str:
    """`question`, reworded to fit an image: what it takes for granted is true, what it doubts is true half the time."""
    named = mentioned(question)
    if named and (kind(question) in ("colour", "shape") or rng.random() < 0.5):
        return question.replace(named, shape if named in SHAPES else colour)
    return question


def make_processor(samples: list[Sample]) -> LlavaProcessor:
    """Word-level tokenizer, SigLIP image processor and chat template, as one processor."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    split = pre_tokenizers.Whitespace()
    texts = ["user: assistant:", *{q for q, _, _ in samples}, *easy_vqa.get_answers()]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_max_length=256,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    half = [0.5, 0.5, 0.5]
    pictures = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half)
    return LlavaProcessor(
        pictures, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The architecture, randomly initialised. FFNs are wide on purpose: they are what hyperfade compresses."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = SiglipVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=768,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=3072,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,  # 1 / sqrt(256), where the usual 0.02 fits a width of some thousands
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=8, **ids)
    return model


def shrink(image: Image.Image) -> np.ndarray:
    """What the processor's resize does, without its overhead."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def pixels(images: list[np.ndarray]) -> Tensor:
    """What the processor's rescaling and normalisation do: a batch with values from -1 to 1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def prompt(processor: LlavaProcessor, question: str) -> str:
    """A question about one image, through the chat template."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def fit(
    name: str, module: nn.Module, loss: Callable[[np.random.Generator, float], Tensor], args: argparse.Namespace
) -> tuple[int, float]:
    """Minimise `loss` over a stage: AdamW, warm-up, cosine, checkpoints. Returns steps taken and seconds spent.

    Progress is the larger of the shares of steps and of minutes used up; it drives the learning rate and ends the
    stage. Every step draws its batch from a generator seeded with (seed, stage, step), so a resumed run sees the
    batches it would have seen.
    """
    steps = {"see": args.see_steps, "answer": args.steps}[name]
    seconds = 60 * args.minutes * {"see": args.see_share, "answer": 1 - args.see_share}[name]
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    path, step, spent = args.work / f"{name}.pt", 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["seconds"]
        print(f"{name}: resumed at step {step}", flush=True)
    module.train()
    recent: list[float] = []
    began, before = time.monotonic(), spent
    while (progress := max(step / steps, spent / seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / args.warmup) * (1 + math.cos(math.pi * progress)) / 2
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(np.random.default_rng([args.seed, len(name), step]), progress)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        step, spent = step + 1, before + time.monotonic() - began
        recent.append(value.item())
        if step % 50 == 0:
            print(f"{name}: step {step}, {spent:.0f} s, loss {np.mean(recent):.4f}", flush=True)
            recent.clear()
        if step % 500 == 0 or max(step / steps, spent / seconds) >= 1:
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": spent}
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    return step, spent


def see(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> tuple[int, float]:
    """Stage 1: the features of a rendered image learn to point at the words for its shape and its colour."""
    names = list(COLOURS)
    words = processor.tokenizer.convert_tokens_to_ids([*SHAPES, *names])
    embeddings = model.get_input_embeddings().weight[words].detach()
    eyes = nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector])

    def loss(rng: np.random.Generator, progress: float) -> Tensor:
        shape = rng.integers(len(SHAPES), size=args.see_batch)
        colour = rng.integers(len(names), size=args.see_batch)
        images = [shrink(render(SHAPES[s], names[c], rng)) for s, c in zip(shape, colour, strict=True)]
        features = torch.stack(list(model.get_image_features(pixels(images)).pooler_output)).mean(1)
        of_shape, of_colour = (features @ embeddings.T).float().split([len(SHAPES), len(names)], dim=1)
        entropy = nn.functional.cross_entropy
        return entropy(of_shape, torch.from_numpy(shape)) + entropy(of_colour, torch.from_numpy(colour))

    spent = fit("see", eyes, loss, args)
    eyes.requires_grad_(False)
    return spent


def answer(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, samples: list[Sample], args: argparse.Namespace
) -> tuple[int, float]:
    """Stage 2: the language model learns to answer the train split's questions about real and rendered images.

    Several questions share one image. They stand one after another behind it, but each sees only the image and itself
    and counts its positions from the image: the same numbers as in separate samples, at less than half the cost.
    """
    paths = read_split("train")[1]
    known: dict[int, list[tuple[str, str]]] = {}
    for question, right, key in samples:
        known.setdefault(key, []).append((question, right))
    keys = sorted(known)
    real = {key: shrink(Image.open(paths[key])) for key in keys}
    blank = Image.new("RGB", (SIDE, SIDE))
    asked = {q: processor(text=prompt(processor, q), images=blank)["input_ids"][0] for q in {q for q, _, _ in samples}}
    start = next(iter(asked.values()))
    start = start[: len(start) - start[::-1].index(model.config.image_token_id)]  # up to the last image token
    token = {a: processor.tokenizer.convert_tokens_to_ids(a) for a in easy_vqa.get_answers()}
    eos = model.config.eos_token_id
    easy = [sample for sample in samples if kind(sample[0]) != "absence"]

    def draw(rng: np.random.Generator, samples: list[Sample], share: float) -> tuple[np.ndarray, list[tuple[str, str]]]:
        if rng.random() < share:
            key = keys[rng.integers(len(keys))]
            return real[key], [known[key][i] for i in rng.integers(len(known[key]), size=args.questions)]
        shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        image = shrink(render(shape, colour, rng))
        questions = [suit(samples[i][0], shape, colour, rng) for i in rng.integers(len(samples), size=args.questions)]
        return image, [(q, solve(q, shape, colour)) for q in questions]

    def loss(rng: np.random.Generator, progress: float) -> Tensor:
        lesson = (easy, 0.0) if progress < args.easy else (samples, args.real)
        images, rows = [], []  # a row is a list of (token, label, position, segment); segment 0 is the image
        for _ in range(args.batch):
            image, pairs = draw(rng, *lesson)
            images.append(image)
            row = [(t, -100, i, 0) for i, t in enumerate(start)]
            for segment, (question, right) in enumerate(pairs, 1):
                ids, target = asked[question][len(start) :], [token[right], eos]
                labels = [-100] * len(ids) + target
                row += [
                    (t, y, len(start) + i, segment) for i, (t, y) in enumerate(zip(ids + target, labels, strict=True))
                ]
            rows.append(row)
        length = max(map(len, rows))
        padded = torch.tensor([row + [(model.config.pad_token_id, -100, 0, -1)] * (length - len(row)) for row in rows])
        ids, labels, positions, segments = padded.unbind(-1)
        seen = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        mask = torch.full(seen.shape, torch.finfo(torch.float32).min).masked_fill(seen.tril(), 0.0)[:, None]
        return model(
            input_ids=ids,
            pixel_values=pixels(images),
            attention_mask=mask,
            position_ids=positions,
            labels=labels,
            use_cache=False,
        ).loss

    return fit("answer", model.model.language_model, loss, args)


def check_preprocessing(processor: LlavaProcessor, samples: list[Sample]) -> None:
    """Training must see what users will see: same pixels, and answers that our rules reproduce."""
    paths = read_split("train")[1]
    images = [Image.open(paths[key]) for key in range(8)]
    theirs = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels([shrink(image) for image in images]), theirs, atol=1e-5, rtol=0)
    facts: dict[int, set[str]] = {}
    for question, right, key in samples:
        facts.setdefault(key, set()).update({right, mentioned(question) or right} if question[0] == "w" else ())
    for question, right, key in samples:
        shape, colour = facts[key] & set(SHAPES), facts[key] & set(COLOURS)
        assert not (shape and colour) or solve(question, *shape, *colour) == right, question


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write model (rounded to float16), tokenizer and processor to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    half = LlavaForConditionalGeneration(model.config).half()
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    processor.save_pretrained(out)


@torch.inference_mode()
def measure(out: Path, samples: list[Sample], paths: dict[int, Path], batch: int = 256) -> dict:
    """Exact-match accuracy of the saved folder, loaded as a user would: greedy, float32, answer and then end token."""
    processor = AutoProcessor.from_pretrained(out)
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    tally: Counter[tuple[str, str, bool]] = Counter()
    samples = sorted(samples, key=lambda sample: len(sample[0].split()))  # little padding
    for start in range(0, len(samples), batch):
        questions, answers, keys = zip(*samples[start : start + batch], strict=True)
        inputs = processor(
            text=[prompt(processor, q) for q in questions],
            images=[Image.open(paths[key]) for key in keys],
            padding=True,
            return_tensors="pt",
        )
        replies = model.generate(**inputs, max_new_tokens=2)[:, inputs["input_ids"].shape[1] :]
        for question, right, reply in zip(questions, answers, replies, strict=True):
            said = processor.decode(reply).split()
            tally[kind(question), right, said == [right, "</s>"]] += 1

    def accuracy(*wanted: str) -> dict[str, float | int]:
        right, total = (
            sum(n for (k, a, good), n in tally.items() if not set(wanted) - {k, a} and (good or not only))
            for only in (True, False)
        )
        return {"accuracy": round(right / max(total, 1), 4), "right": right, "questions": total}

    return {
        **accuracy(),
        "by_kind": {k: accuracy(k) for k in ("colour", "shape", "presence", "absence")},
        "by_answer": {a: accuracy(a) for a in sorted(easy_vqa.get_answers())},
    }


def count(model: LlavaForConditionalGeneration) -> dict[str, int]:
    """Parameters in all, by part, and in the FFNs of tower and language model."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    keys = {"total": "", "vision tower": "vision_tower", "projector": "projector", "language model": "language_model"}
    keys["ffn"] = ".mlp."
    return {part: sum(n for name, n in sizes.items() if key in name) for part, key in keys.items()}


CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
language: en
---
# easy-VQA LLaVA

A vision-language model of {total:.2f} M parameters that answers questions about one coloured shape. hyperfade embeds it
for examples, tests and measurements: the real LLaVA architecture, small enough to ship.

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
question = {{"type": "text", "text": "what color is the shape?"}}
chat = [{{"role": "user", "content": [{{"type": "image", "image": Image.open("shape.png")}}, question]}}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.dtype)
reply = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(reply, skip_special_tokens=True))
```

## Accuracy

Exact match by greedy generation in float32 from the float16 weights in this folder; an answer is right when the right
word comes first and the end token second. **{test[accuracy]:.2%}** of all {test[questions]:,} questions of the test
split; {validation[accuracy]:.2%} of the {validation[questions]:,} questions about held-out images of the train split.

{by_kind}
{by_answer}
## Architecture

| part | what | parameters |
|---|---|---:|
| vision tower | SigLIP: {eyes}, {vision} | {parameters[vision tower]:,} |
| projector | two layers with GELU | {parameters[projector]:,} |
| language model | Llama: {vocabulary} words, tied embeddings, {text} | {parameters[language model]:,} |

{ffn:.0%} of all parameters are in the FFNs of tower and language model. A token is a word, and only the words of
easy-VQA's questions and answers are known.

## How it was made

`{command}` on {date}: {minutes} minutes of training on {options[threads]} CPU threads, bfloat16
autocast, seed {options[seed]}. First {stages[see][steps]:,} steps of {options[see_batch]} images taught tower and
projector to point at the words for shape and colour. Then {stages[answer][steps]:,} steps of {options[batch]} images
with {options[questions]} questions each taught the language model to answer, with loss on answer and end token alone.
Versions: {software}.

Data: [easy-VQA](https://github.com/vzhou842/easy-VQA) 1.0 by Victor Zhou, MIT licence: the questions and nine tenths of
the images of its train split, and images rendered after its recipe by `scripts/render_shapes.py`: all in the first
stage and in the first {options[easy]:.0%} of the second, then {rendered:.0%}. The test split served this measurement
only.

`training.json` holds all figures; the script writes both files.
"""


def card(report: dict, model: LlavaForConditionalGeneration) -> str:
    """The model card, every figure taken from `report` and the model's config."""

    def table(title: str, rows: dict[str, dict]) -> str:
        body = "".join(
            f"| {k} | {v['right']:,} / {v['questions']:,} | {v['accuracy']:.2%} |\n" for k, v in rows.items()
        )
        return f"| {title} | right | accuracy |\n|---|---:|---:|\n{body}"

    def size(config: SiglipVisionConfig | LlamaConfig) -> str:
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        return f"width {config.hidden_size}, {layers} layers, {heads} heads, FFN {config.intermediate_size}"

    return CARD.format(
        **report,
        total=report["parameters"]["total"] / 1e6,
        ffn=report["parameters"]["ffn"] / report["parameters"]["total"],
        by_kind=table("question about", report["test"]["by_kind"]),
        by_answer=table("answer", report["test"]["by_answer"]),
        eyes=f"{SIDE} x {SIDE} pixels, patch {PATCH} ({PATCHES} tokens)",
        vision=size(model.config.vision_config),
        text=size(model.config.text_config),
        rendered=1 - report["options"]["real"],
        software=", ".join(f"{name} {number}" for name, number in report["versions"].items()),
    )


def main() -> None:
    """Train, save, measure, write the card."""
    parser = argparse.ArgumentParser(
        description="Train the embedded easy-VQA model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ASSETS, help="folder to write the model to")
    add("--work", type=Path, default=Path("runs/embedded"), help="folder for checkpoints; delete it to start afresh")
    add("--minutes", type=float, default=45.0, help="wall-clock limit of the training, both stages together")
    add("--see-share", type=float, default=0.3, help="share of --minutes that stage 1 may use")
    add("--see-steps", type=int, default=700, help="most steps of stage 1")
    add("--steps", type=int, default=2400, help="most steps of stage 2")
    add("--see-batch", type=int, default=128, help="images a step in stage 1")
    add("--batch", type=int, default=16, help="images a step in stage 2")
    add("--questions", type=int, default=8, help="questions an image in stage 2")
    add("--real", type=float, default=0.25, help="share of real images in stage 2 once negation has joined")
    add("--easy", type=float, default=0.2, help="first share of stage 2, on rendered images, without negation")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.05, help="AdamW's weight decay of matrices")
    add("--warmup", type=int, default=100, help="warm-up steps of each stage")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--seed", type=int, default=20261123, help="seed of weights and data")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    samples, paths = read_split("train")
    training = [sample for sample in samples if sample[2] % 10]
    validation = [sample for sample in samples if not sample[2] % 10]
    processor = make_processor(training)
    check_preprocessing(processor, samples)
    model = make_model(processor.tokenizer)
    model.set_attn_implementation("eager")  # on a CPU the fused kernel's backward costs more than it saves
    stages = {}
    for stage, spent in ("see", see(model, processor, args)), ("answer", answer(model, processor, training, args)):
        stages[stage] = dict(zip(("steps", "seconds"), spent, strict=True))
    save(model, processor, args.out)
    folders = ("out", "work")
    report = {
        "command": "python scripts/make_embedded.py",
        "options": {name: value for name, value in vars(args).items() if name not in folders},
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow", "numpy", "easy-vqa")},
        "stages": stages,
        "minutes": round(sum(stage["seconds"] for stage in stages.values()) / 60, 1),
        "parameters": count(model),
        "vocabulary": len(processor.tokenizer),
        "validation": measure(args.out, validation, paths),
        "test": measure(args.out, *read_split("test")),
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "README.md").write_text(card(report, model))
    print(f"{args.out}: {report['test']['accuracy']:.2%} of the test questions right")


if __name__ == "__main__":
    main()
