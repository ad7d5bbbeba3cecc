"""What every test shares: one seed before each, and Hypothesis without clocks or chance."""

import os

if os.environ.get("HYPERFADE_TEST_ACCELERATOR") != "1":  # before torch looks: results of an accelerator have other bits
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton asks once, when something imports it first
torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other

settings.register_profile("hyperfade", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("hyperfade")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
