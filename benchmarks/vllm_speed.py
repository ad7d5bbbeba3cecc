"""A text model in vLLM, dense and compressed: the greedy tokens of transformers, and tokens per second.

    make test-vllm
    .venv-vllm/bin/python benchmarks/vllm_speed.py --model FOLDER

Needs the environment of `make test-vllm`. FOLDER is a causal language model, or a LLaVA of one (`make reference`). FFNs
are replaced by a plain fit of their weights and nothing is trained: equal tokens and speed ask for no quality.
Every engine runs in a process of its own, dense and compressed in turn, round by round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from hyperfade.distill import fit_
from hyperfade.hub import fold_, load, load_processor, save, takes_images
from hyperfade.measure import machine
from hyperfade.recipe import Fit, Layer, Replace, Rule
from hyperfade.surgery import plan, swap_
from hyperfade.workspace import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "vllm.json"
PRODUCTS, TERMS = Layer(n=4), Layer(kind="learned", n=2, terms=2)
COMPRESSED = {
    "products n=4": Replace(language=PRODUCTS),
    "terms n=2": Replace(language=TERMS),
    # without training only this one still writes sentences, so that its tokens are many different ones
    "products n=4 in three FFNs": Replace(
        language=None, rules=tuple(Rule(match=f"*.layers.{i}.mlp.*", layer=PRODUCTS) for i in (10, 15, 20))
    ),
}
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small robot who",
    "To bake bread you need flour, water and",
    "def fibonacci(n):",
)
GREEDY_TOKENS, PROMPT_TOKENS, DECODED_TOKENS = 32, 512, 64
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def text_model(source: str) -> tuple[Any, Any]:
    """The causal language model in `source`, in float32, and its tokenizer."""
    model: Any = load(source, "float32")
    processor = load_processor(source)
    if not takes_images(model.config):
        return model, processor
    language = LlamaForCausalLM(model.config.text_config)
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    return language, processor.tokenizer


def checkpoints(source: str, work: Path) -> dict[str, Path]:
    """The dense model and a compressed one per form, written where they are missing."""
    folders = {"dense": work / "dense"} | {name: work / name.replace(" ", "-") for name in COMPRESSED}
    for name, folder in folders.items():
        if folder.exists():
            continue
        model, tokenizer = text_model(source)
        if name != "dense":
            chosen = plan(model, COMPRESSED[name])
            swap_(model, chosen)
            fit_(model, chosen, [], Fit(method="frobenius"))
            fold_(model)
        save(model, folder, tokenizer)
    return folders


@torch.inference_mode()
def greedy(folder: Path) -> list[list[int]]:
    """What transformers writes after each prompt, in float32."""
    model: Any = load(str(folder), "float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=GREEDY_TOKENS, eos_token_id=None)
        made.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    return made


def engine(folder: str, dtype: str) -> dict[str, Any]:
    """What one engine in this process writes and how fast. Tokens per second: of one prompt's prefill, and of decoding
    behind short prompts, one sequence or eight at once."""
    from vllm import LLM, SamplingParams  # here: the engine's process alone

    llm = LLM(
        folder,
        dtype=dtype,
        max_model_len=1024,
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
    )

    def run(prompts: list[Any], tokens: int) -> tuple[float, list[list[int]]]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        began = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began, [list(output.outputs[0].token_ids) for output in outputs]

    _, written = run(list(PROMPTS), GREEDY_TOKENS)  # also warms up
    long, _ = run([{"prompt_token_ids": list(range(10, 10 + PROMPT_TOKENS))}], 1)
    found = {"tokens": written, "prefill": PROMPT_TOKENS / long}
    for count in (1, 8):
        prompts = [{"prompt_token_ids": list(range(10 + i, 18 + i))} for i in range(count)]
        first, _ = run(prompts, 1)
        all_of_them, _ = run(prompts, 1 + DECODED_TOKENS)
        found[f"decode of {count}"] = count * DECODED_TOKENS / (all_of_them - first)
    return found


def in_a_process(folder: Path, dtype: str, work: Path) -> dict[str, Any]:
    """`engine` in a process of its own."""
    answer = work / "engine.json"
    command = [sys.executable, __file__, "--engine", str(folder), "--dtype", dtype, "--results", str(answer)]
    subprocess.run(command, env=os.environ | ENVIRONMENT, check=True)
    return read_json(answer)


def main() -> None:
    """Compare every checkpoint's tokens, then measure rounds, and keep both."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="runs/reference/untrained", help="a causal language model, or a LLaVA of one")
    add("--work", type=Path, default=Path("runs/vllm"), help="folder for the checkpoints")
    add("--results", type=Path, default=RESULTS, help="file to write")
    add("--rounds", type=int, default=3, help="engines per checkpoint")
    add("--dtype", default="bfloat16", help="of the measured engines")
    add("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        args.results.write_text(json.dumps(engine(args.engine, args.dtype)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    folders = checkpoints(args.model, args.work)
    results: dict[str, Any] = {
        "machine": machine(),
        "settings": {"dtype": args.dtype, "rounds": args.rounds, "prompt_tokens": PROMPT_TOKENS},
        "models": {},
    }
    for name, folder in folders.items():
        wanted, got = greedy(folder), in_a_process(folder, "float32", args.work)["tokens"]
        equal = sum(a == b for mine, other in zip(wanted, got, strict=True) for a, b in zip(mine, other, strict=True))
        distinct = len({token for answer in wanted for token in answer})
        counts = {"equal_tokens": equal, "tokens": GREEDY_TOKENS * len(PROMPTS), "distinct_tokens": distinct}
        results["models"][name] = counts | {"rounds": []}
        print(
            f"{name}: {equal} of {GREEDY_TOKENS * len(PROMPTS)} greedy tokens equal those of transformers", flush=True
        )
    for _ in range(args.rounds):
        for name, folder in folders.items():
            found = in_a_process(folder, args.dtype, args.work)
            results["models"][name]["rounds"].append({key: found[key] for key in found if key != "tokens"})
    for name, own in results["models"].items():
        own["tokens_per_second"] = {
            key: statistics.median(found[key] for found in own["rounds"]) for key in own["rounds"][0]
        }
        print(name, {key: round(value, 1) for key, value in own["tokens_per_second"].items()}, flush=True)
    write_json(args.results, results)


if __name__ == "__main__":
    main()
