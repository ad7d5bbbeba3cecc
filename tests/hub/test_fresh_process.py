"""What a user does: another process, another day. With `import hyperfade` bit for bit, without it no model at all."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from folded import KINDS, NARROW, folded
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES

from hyperfade.hub import EMBEDDED, EMBEDDED_FOLDER, fold_, load, save
from hyperfade.recipe import Replace
from hyperfade.surgery import plan, swap_

WITH = """
import sys
import hyperfade
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

folder, given, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
inputs = load_file(given)
with torch.no_grad():
    logits = model(**inputs).logits
    tokens = model.generate(**inputs, do_sample=False, use_cache=True, min_new_tokens=8, max_new_tokens=8)
save_file({"logits": logits.contiguous(), "tokens": tokens.contiguous()}, out)
"""
WITHOUT = """
import sys
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

classes = {
    "llava": (AutoModelForImageTextToText, LlavaForConditionalGeneration),
    "llama": (AutoModelForCausalLM, LlamaForCausalLM),
}
for folder in sys.argv[1:]:
    for cls in classes[folder.split("/")[-1].split("-")[0]]:
        try:
            cls.from_pretrained(folder)
        except RuntimeError as error:
            print("refused" if "mismatched" in str(error) else error)
        else:
            print("LOADED")
assert not any(name.startswith("hyperfade") for name in sys.modules)
"""


def python(code: str, *arguments: Any) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _subject() -> tuple[Any, dict[str, torch.Tensor]]:
    """The embedded model (a tiny LLaVA where a checkout lacks it), its FFNs replaced, and inputs for it."""
    if not EMBEDDED_FOLDER.is_dir():
        return folded("llava_siglip"), FAMILIES["llava_siglip"].inputs()
    model = load(EMBEDDED, "float32")
    swap_(model, plan(model, Replace(projector=KINDS["products"])))
    fold_(model)
    vision, token = model.config.vision_config, model.config.image_token_id
    ids = torch.tensor([[token] * (vision.image_size // vision.patch_size) ** 2 + [1, 2, 3]])
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def test_another_process_gives_the_same_logits_and_answers(tmp_path: Path) -> None:
    model, inputs = _subject()
    save(model, tmp_path / "model")
    save_file(inputs, tmp_path / "inputs.safetensors")
    python(WITH, tmp_path / "model", tmp_path / "inputs.safetensors", tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    assert torch.equal(out["logits"], model(**inputs).logits)
    options = {"do_sample": False, "use_cache": True, "min_new_tokens": 8, "max_new_tokens": 8}
    assert torch.equal(out["tokens"], model.generate(**inputs, **options))


def test_without_hyperfade_no_model_comes_back(tmp_path: Path) -> None:
    """transformers only warns of a method it does not know: the empty tensors must stop it."""
    folders = [tmp_path / f"{name}-{kind}" for name in ("llava", "llama") for kind in (*KINDS, *NARROW)]
    for folder in folders:
        name, kind = folder.name.split("-")
        save(folded({"llava": "llava_siglip", "llama": "llama"}[name], (KINDS | NARROW)[kind]), folder)
    assert python(WITHOUT, *folders).splitlines() == ["refused"] * 2 * len(folders)
