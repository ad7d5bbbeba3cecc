"""What was measured where: a line of facts for every results file."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch


def device() -> torch.device:
    """Where models run: the accelerator, if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def machine() -> dict[str, str | int]:
    """Processor, cores, accelerator, date (UTC) and the versions that decide numbers."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "accelerator": "none" if device().type == "cpu" else str(device()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("hyperfade", "torch", "transformers")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    flags = set(next((v for k, v in fields.items() if k.strip() == "flags"), "").split())
    name = next((v.strip() for k, v in fields.items() if k.strip() == "model name"), platform.processor())
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(wide)})" if wide else name
