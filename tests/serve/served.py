"""Compressed checkpoints for the engine's tests: every form of layer that a vLLM linear can hold."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hyperfade.compose.quantize import quantize_
from hyperfade.distill import fit_
from hyperfade.formats import Format
from hyperfade.hub import fold_, load, load_processor, mark_, save
from hyperfade.nn import light_modules
from hyperfade.recipe import Fit, Layer, Replace, Rule
from hyperfade.surgery import plan, swap_

FORMS = (
    Layer(n=4),
    Layer(kind="learned", n=2, terms=2),
    Layer(kind="quaternion", companion_rank=3),
    Layer(kind="low_rank", fraction=0.5),
    Layer(kind="dense", width=0.5),
    Layer(n=4, products=3, width=0.5),
)
"""One for each layer of the text model."""


def text_model(folder: Path, lone_gate: bool = True, to: Format | None = None) -> Path:
    """A small Llama with biases, random weights and a form per layer, saved to `folder`.

    lone_gate: with one more layer, of which only the gate is replaced. to: what all of its linears are rounded to.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=len(FORMS) + lone_gate,
        num_attention_heads=2,  # of 32: the engine has no smaller heads on a CPU
        num_key_value_heads=1,
        max_position_embeddings=128,
        mlp_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    rules = [Rule(match=f"model.layers.{i}.mlp.*", layer=form) for i, form in enumerate(FORMS)]
    if lone_gate:
        rules.append(Rule(match=f"model.layers.{len(FORMS)}.mlp.gate_proj", layer=Layer(n=4)))
    swap_(model, plan(model, Replace(language=None, rules=tuple(rules))))
    fold_(model)
    for layer in light_modules(model).values():
        for name, parameter in layer.named_parameters():
            parameter.data.normal_(std=0.5 if name in ("P", "Q", "A") else 0.2)
    if to is not None:
        quantize_(model, to, rest=True)
        mark_(model)
    save(model, folder)
    return folder


def image_text_model(folder: Path) -> Path:
    """The embedded model with FFNs and projector replaced in three forms, fitted and not trained."""
    torch.manual_seed(0)
    model = load("embedded", "float32")
    low_rank, learned = Layer(kind="low_rank", fraction=0.7), Layer(kind="learned", n=2, terms=2)
    chosen = plan(model, Replace(language=Layer(n=2), vision=learned, projector=low_rank))
    swap_(model, chosen)
    fit_(model, chosen, [], Fit(method="frobenius"))
    fold_(model)
    save(model, folder, load_processor("embedded"))
    return folder
