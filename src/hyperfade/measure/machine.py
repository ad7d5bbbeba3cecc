"""What was measured where: a line of facts for every results file."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from hyperfade.processes import on_cpu


def device() -> torch.device:
    """Where models run: the accelerator, if there is one."""
    found = None if on_cpu() else torch.accelerator.current_accelerator()
    return found or torch.device("cpu")


def machine() -> dict[str, str | int]:
    """Processor, cores, accelerator, date (UTC) and the versions that decide numbers."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "accelerator": _accelerator(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("hyperfade", "torch", "transformers")},
    }


def _accelerator() -> str:
    """The product's name where torch tells it."""
    found = device()
    if found.type == "cuda":
        return f"{torch.cuda.get_device_name(found)}, CUDA {torch.version.cuda}"
    return "none" if found.type == "cpu" else str(found)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    flags = set(next((v for k, v in fields.items() if k.strip() == "flags"), "").split())
    name = next((v.strip() for k, v in fields.items() if k.strip() == "model name"), platform.processor())
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(wide)})" if wide else name
