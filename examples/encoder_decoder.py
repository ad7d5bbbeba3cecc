"""Compress a model of your own: its loader, its forward and its loss stay yours.

    python examples/encoder_decoder.py

A plain PyTorch encoder-decoder that learned to sort letters. `plan` finds the FFNs of PyTorch's transformer layers by
itself; `patterns` adds a matrix that it cannot know. The fade is an ordinary training loop with α set at every step.
What is saved is a state dict and a JSON file that says which layers became what.
"""

import json
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperfade.distill import fit_, teacher_of
from hyperfade.measure import num_parameters
from hyperfade.nn import LightSpec, light_modules
from hyperfade.recipe import Fit, Layer, Replace
from hyperfade.surgery import drop_dense_, install_, plan, set_alpha_, swap_

LETTERS, LENGTH, WIDTH = 20, 8, 32
START = LETTERS
REPLACE = Replace(language=Layer(n=4), vision=None, patterns=("mix",), other=Layer(n=2))


class Sorter(nn.Module):
    """Letters (batch, 8) in any order, and the sorted ones so far (batch, ≤ 8), to logits of the next (…, 20)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(LETTERS + 1, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 1, 1, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, LETTERS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        steps = torch.arange(target.shape[1])
        ahead = torch.ones(len(steps), len(steps), dtype=torch.bool).triu(1)
        hidden = self.transformer(self.embed(source), self.embed(target) + self.places(steps), tgt_mask=ahead)
        return self.head(hidden + F.gelu(self.mix(hidden)))


def batch(size: int = 64) -> dict[str, Tensor]:
    """Letters, the sorted ones behind a start sign, and what comes next at each place."""
    source = torch.randint(LETTERS, (size, LENGTH))
    answer = source.sort(dim=1).values
    start = torch.full((size, 1), START)
    return {"source": source, "target": torch.cat([start, answer[:, :-1]], 1), "answer": answer}


def loss_of(model: nn.Module, teacher: nn.Module | None, size: int = 64) -> Tensor:
    """Cross-entropy on what comes next; with a teacher, its distribution counts as much."""
    examples = batch(size)
    answer = examples.pop("answer")
    logits = model(**examples)
    loss = F.cross_entropy(logits.flatten(0, 1), answer.flatten())
    if teacher is not None:
        with torch.no_grad():
            wanted = teacher(**examples).log_softmax(-1)
        own = logits.log_softmax(-1)
        loss = loss + F.kl_div(own.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
    return loss


def train_(model: nn.Module, steps: int, teacher: nn.Module | None = None, fade: int = 0) -> None:
    """Adam on whatever has gradients; over the first `fade` steps α goes from 0 to 1."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    model.train()
    for step in range(steps):
        if fade:
            set_alpha_(model, min(1.0, (step + 1) / fade))
        loss_of(model, teacher).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def save(model: nn.Module, folder: Path) -> None:
    """The weights, and what each replaced layer is."""
    layers = {name: LightSpec.of(layer).to_dict() for name, layer in light_modules(model).items()}
    (folder / "layers.json").write_text(json.dumps(layers))
    save_file(model.state_dict(), folder / "model.safetensors")


def load(folder: Path) -> Sorter:
    """Your own loader: build the model, put the layers in, read the weights."""
    model = Sorter()
    layers = json.loads((folder / "layers.json").read_text())
    install_(model, {name: LightSpec.from_dict(fields, name) for name, fields in layers.items()})
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def compress_(model: nn.Module, steps: int) -> None:
    """Plan, swap, fit on a few batches, fade with the teacher's help, drop the dense weights."""
    chosen = plan(model, REPLACE)
    teacher = teacher_of(model)
    model.requires_grad_(False)
    swap_(model, chosen)
    calibration = [{key: value for key, value in batch().items() if key != "answer"} for _ in range(4)]
    for layer in fit_(model, chosen, calibration, Fit()):
        print(f"{layer.name}: {layer.label}, output error {layer.error:.3f}")
    train_(model, steps, teacher, fade=steps // 2)
    drop_dense_(model)


def main(steps: int = 200) -> None:
    """Make a model, compress it, save it, load it; print what it did to size and loss."""
    torch.manual_seed(0)
    model = Sorter()
    train_(model, 2 * steps)
    before = num_parameters(model), loss_of(model, None, 512).item()
    compress_(model, steps)
    after = num_parameters(model), loss_of(model, None, 512).item()
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        loaded = load(Path(folder))
    examples = batch()
    del examples["answer"]
    with torch.no_grad():
        assert torch.equal(loaded(**examples), model(**examples))
    print(f"{before[0]:,} → {after[0]:,} parameters, loss {before[1]:.3f} → {after[1]:.3f}, reloaded bit-equal")


if __name__ == "__main__":
    main()
