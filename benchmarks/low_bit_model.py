"""Few bits in a large model: Qwen2.5-VL-3B at its true shapes, decoded with FFNs in int4, dense and smaller.

    python benchmarks/low_bit_model.py
    python benchmarks/quantization_report.py

Weights are random, everything but the FFNs is the same memory, and all models take turns. 14 GB of memory, minutes.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from stacking import ffn_bytes
from whole_models import QUESTION_TOKENS, built, compressed, twin

from hyperfade.compose.quantize import quantize_
from hyperfade.measure import compare_speed, machine
from hyperfade.workspace import write_json

RESULTS = Path(__file__).parent / "results" / "low_bit_model.json"
MODEL = "Qwen2.5-VL-3B"
VARIANTS = ("products n=4", "low-rank 1/4", "low-rank, rank 416")


def int4(model: Any, name: str) -> Any:
    """The model with its FFNs rounded, in groups of 64."""
    print(f"rounding {name}", flush=True)
    quantize_(model, "int4", 64)
    return model


@torch.inference_mode()
def main() -> None:
    """Time dense in bfloat16 and int4, and the smaller ones in int4; dense in int4 is what all are compared with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that the results are written to")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing")
    args = parser.parse_args()
    dense = built(MODEL)
    models = {"dense, int4": int4(twin(dense), "dense"), "dense, bf16": dense}
    models |= {f"{variant}, int4": int4(compressed(dense, MODEL, variant)[0], variant) for variant in VARIANTS}
    ids = torch.randint(5, 1000, (1, QUESTION_TOKENS), generator=torch.Generator().manual_seed(1))
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    speeds = compare_speed(models, asked, new_tokens=args.new_tokens, rounds=args.rounds)
    found = {"machine": machine(), "model": MODEL, "prompt_tokens": QUESTION_TOKENS}
    found |= {"ffn_bytes": {name: ffn_bytes(model) for name, model in models.items()}}
    write_json(args.results, found | {"speeds": {name: asdict(speed) for name, speed in speeds.items()}})
    for name, speed in speeds.items():
        print(
            f"{name}: {1000 * speed.decode_seconds_per_token:.0f} ms per token, {speed.decode_speedup:.2f}×", flush=True
        )


if __name__ == "__main__":
    main()
