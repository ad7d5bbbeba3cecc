"""A real vLLM engine against transformers, on checkpoints that hold every form of layer."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from served import image_text_model, text_model
from torch import Tensor

from hyperfade.hub import load, load_processor

ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
SINGLE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
TOKENS = [[5, 9, 33, 7], [100, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [64]]
QUESTIONS = (("red", "ellipse", "what color is the shape?"), ("blue", "rectangle", "what shape is in the image?"))
LARGEST_DIFFERENCE = 2e-4  # of a log-probability, float32; observed 1.7e-5


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_text_model(tmp_path_factory.mktemp("image") / "model")


def served(folder: Path, prompts: list[dict[str, Any]], max_tokens: int, work: Path, **options: Any) -> Any:
    request = {
        "prompts": prompts,
        "max_tokens": max_tokens,
        "options": {"distributed_executor_backend": "uni"} | options,
    }
    (work / "request.json").write_text(json.dumps(request))
    command = [sys.executable, str(Path(__file__).with_name("engine.py")), str(folder)]
    command += [str(work / "request.json"), str(work / "answer.json")]
    environment = ENVIRONMENT | (SINGLE if "tensor_parallel_size" not in options else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((work / "answer.json").read_text())


@torch.inference_mode()
def expected(model: Any, inputs: dict[str, Tensor], max_tokens: int, **options: Any) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities by transformers."""
    made = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    tokens = made.sequences[0, inputs["input_ids"].shape[1] :]
    logits = torch.cat(made.logits).log_softmax(-1)
    return tokens.tolist(), logits.gather(1, tokens[:, None]).flatten().tolist()


def assert_equal(answers: Any, wanted: list[tuple[list[int], list[float]]]) -> None:
    for answer, (tokens, log_probabilities) in zip(answers, wanted, strict=True):
        assert answer["tokens"] == tokens
        difference = torch.tensor(answer["log_probabilities"]) - torch.tensor(log_probabilities)
        assert difference.abs().max() < LARGEST_DIFFERENCE


def expected_of_text(folder: Path) -> list[tuple[list[int], list[float]]]:
    model = load(str(folder))
    return [expected(model, {"input_ids": torch.tensor([ids])}, 24, pad_token_id=0) for ids in TOKENS]


def test_greedy_tokens_of_every_form_of_layer_are_those_of_transformers(text_folder: Path, tmp_path: Path) -> None:
    prompts = [{"prompt_token_ids": ids} for ids in TOKENS]
    assert_equal(served(text_folder, prompts, 24, tmp_path, skip_tokenizer_init=True), expected_of_text(text_folder))


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_greedy_tokens_of_few_bits_are_those_of_transformers(to: Any, tmp_path: Path) -> None:
    """Every form of layer, with attention in few bits as well."""
    folder = text_model(tmp_path / "model", to=to)
    prompts = [{"prompt_token_ids": ids} for ids in TOKENS]
    assert_equal(served(folder, prompts, 24, tmp_path, skip_tokenizer_init=True), expected_of_text(folder))


def test_two_processes_that_share_every_layer_give_the_same_tokens(tmp_path: Path) -> None:
    folder = text_model(tmp_path / "model", lone_gate=False)
    prompts = [{"prompt_token_ids": ids} for ids in TOKENS]
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "skip_tokenizer_init": True}
    assert_equal(served(folder, prompts, 24, tmp_path, **options), expected_of_text(folder))


def pictures(folder: Path) -> list[tuple[Path, str]]:
    made = []
    for color, shape, question in QUESTIONS:
        image = Image.new("RGB", (60, 60), "white")
        getattr(ImageDraw.Draw(image), shape)((12, 12, 44, 44), fill=color)
        image.save(folder / f"{color}.png")
        made.append((folder / f"{color}.png", question))
    return made


def expected_of_pictures(folder: Path, asked: list[tuple[Path, str]]) -> list[tuple[list[int], list[float]]]:
    model, processor = load(str(folder)), load_processor(str(folder))
    wanted = []
    for path, question in asked:
        parts = [{"type": "image", "image": Image.open(path)}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        wanted.append(expected(model, dict(inputs), 8))
    return wanted


def test_an_image_text_model_answers_as_in_transformers(image_folder: Path, tmp_path: Path) -> None:
    asked = pictures(tmp_path)
    prompts = [{"prompt": f"<s>user: <image>\n{question}\nassistant: ", "image": str(path)} for path, question in asked]
    assert_equal(served(image_folder, prompts, 8, tmp_path), expected_of_pictures(image_folder, asked))


@pytest.fixture
def server(image_folder: Path, tmp_path: Path) -> Iterator[str]:
    """The address of an OpenAI-compatible server that was given the checkpoint's folder and nothing else."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # what `vllm serve` runs; the command itself looks for a distribution called vllm, which vllm-cpu is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(image_folder)]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=ENVIRONMENT, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while not _healthy(address):
            assert process.poll() is None, (tmp_path / "server.log").read_text()[-4000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _healthy(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def test_the_server_answers_a_chat_request_with_a_picture(server: str, image_folder: Path, tmp_path: Path) -> None:
    asked = pictures(tmp_path)
    tokenizer = load_processor(str(image_folder)).tokenizer
    for (path, question), (tokens, _) in zip(asked, expected_of_pictures(image_folder, asked), strict=True):
        url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {
            "model": str(image_folder),
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 8,
        }
        request = urllib.request.Request(
            f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        reply = json.load(urllib.request.urlopen(request, timeout=300))
        # the engine's text begins with the space that parts it from the prompt
        written = reply["choices"][0]["message"]["content"].strip()
        assert written == tokenizer.decode(tokens, skip_special_tokens=True)
