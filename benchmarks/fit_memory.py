"""Peak memory of a calibrated fit, relative to the model: python benchmarks/fit_memory.py [--hidden 2048 ...]

A causal language model with random weights, by default at the shapes of Qwen2.5-VL-3B's language model, is loaded and
swapped as a whole, and its first FFN is fitted as `hyperfade compress` would; every other FFN takes the same memory,
one at a time. What counts is the process's peak resident size, less what it was before the model existed.
"""

import argparse
import dataclasses
import resource
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hyperfade.distill import fit_
from hyperfade.measure import machine, weight_bytes
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import plan, swap_
from hyperfade.workspace import write_json


def peak_bytes() -> int:
    """Largest resident size of this process so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048, help="features of the residual stream")
    parser.add_argument("--ffn", type=int, default=11008, help="hidden units of an FFN")
    parser.add_argument("--layers", type=int, default=36, help="decoder layers")
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fit_memory.json")
    args = parser.parse_args()
    before = peak_bytes()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model_bytes = weight_bytes(model)
    after_load = peak_bytes()
    choice = plan(model, Replace(language=Layer(kind="products", n=4)))
    swap_(model, choice)
    batches = [{"input_ids": torch.randint(config.vocab_size, (1, 512))} for _ in range(args.tokens // 512)]
    start = time.perf_counter()
    layers = fit_(model, dataclasses.replace(choice, ffns=choice.ffns[:1]), batches, Fit(sweeps=2))
    seconds = time.perf_counter() - start
    ratio = (peak_bytes() - before) / model_bytes
    print(f"model {model_bytes / 1e9:.2f} GB, peak of load and fit {ratio:.2f}× that; one FFN in {seconds:.0f} s")
    shape = {key: getattr(args, key) for key in ("hidden", "ffn", "layers", "tokens")}
    write_json(
        args.output,
        {
            "machine": machine(),
            "shape": shape,
            "model_bytes": model_bytes,
            "peak_bytes_after_load": after_load - before,
            "peak_bytes": peak_bytes() - before,
            "peak_over_model": ratio,
            "seconds_per_ffn": seconds,
            "layers": [dataclasses.asdict(layer) for layer in layers],
        },
    )


if __name__ == "__main__":
    main()
