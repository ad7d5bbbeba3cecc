"""One vLLM engine in a process of its own: python engine.py FOLDER REQUEST.json ANSWER.json

The request holds prompts (as vLLM takes them, images by path), max_tokens, and options of the engine. The answer holds
for each prompt the greedy tokens and their log-probabilities.
"""

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image


def answer(folder: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Start the engine, answer every prompt."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"enforce_eager": True, "dtype": "float32", "max_model_len": 128}
    llm = LLM(folder, **options | request["options"])
    prompts = [
        {"prompt": p["prompt"], "multi_modal_data": {"image": Image.open(p["image"])}} if "image" in p else p
        for p in request["prompts"]
    ]
    greedy = SamplingParams(temperature=0, max_tokens=request["max_tokens"], logprobs=0)
    outputs = [generated.outputs[0] for generated in llm.generate(prompts, greedy)]
    return [
        {
            "tokens": list(output.token_ids),
            "log_probabilities": [
                step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)
            ],
        }
        for output in outputs
    ]


if __name__ == "__main__":
    _, folder, request, written = sys.argv
    Path(written).write_text(json.dumps(answer(folder, json.loads(Path(request).read_text()))))
