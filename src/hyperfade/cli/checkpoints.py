"""Commands that write a finished checkpoint in another form."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hyperfade.cli.shared import refuse_existing
from hyperfade.errors import PlanError
from hyperfade.formats import Format

if TYPE_CHECKING:
    from hyperfade.compose.quantize import MomentsOf

_BATCH = 16  # calibration examples per forward pass


def quantize(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, compressed or dense, or `embedded`.")],
    to: Annotated[Format, typer.Option(help="Format of the matrices.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the new checkpoint.", show_default="MODEL-TO")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=0, help="Neighbours that share a scale, 0 for rows.", show_default="64 for int4 and nf4, else 0"
        ),
    ] = None,
    rest: Annotated[
        bool, typer.Option("--rest", help="Attention and the other linears too; never output head and embeddings.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Calibrate int4 on these: easy-vqa:train, a .jsonl file, or datasets:NAME[:SPLIT]."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="So many of these examples, a seeded sample.", show_default="128")
    ] = None,
) -> None:
    """Round a checkpoint's FFNs to few bits, as torchao or bitsandbytes do; the result loads like any other."""
    from hyperfade.compose.quantize import check_format, quantize_
    from hyperfade.hub import load, load_processor, mark_, resolve, save, stored_dtype
    from hyperfade.measure import disk_bytes

    if samples and not data:
        raise PlanError("--samples counts examples of --data, and there is no --data.", "Give both, or neither.")
    check_format(to, group_size, calibrated=data is not None)
    folder = output or Path(f"{model.rstrip('/')}-{to}")
    refuse_existing(folder)
    loaded, processor = load(model), load_processor(model)
    source = Path(resolve(model))
    storage = stored_dtype(source) if source.is_dir() else None  # what is not rounded stays as small as it was
    moments_of = _readings(loaded, processor, data, samples or 128) if data else None
    report = quantize_(loaded, to, group_size, rest, scale_dtype=storage, moments_of=moments_of)
    mark_(loaded)
    save(loaded, folder, processor, storage_dtype=storage)
    typer.echo("\n".join([*report.lines(), f"{folder}: {disk_bytes(folder) / 1e6:.2f} MB of weights"]))


def _readings(model: Any, processor: Any, data: str, samples: int) -> "MomentsOf":
    """What the model's layers read on a seeded sample of `data`, for whichever of them are asked about."""
    import torch

    from hyperfade.data import Collator, open_source
    from hyperfade.distill import second_moments
    from hyperfade.hub import takes_images
    from hyperfade.recipe import Data

    source = open_source(data, needs_images=takes_images(model.config))
    collator = Collator(processor, max_tokens=Data().max_tokens)
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:samples].split(_BATCH)
    batches = [collator.training_batch([source[i] for i in part.tolist()]) for part in chosen]
    for batch in batches:
        batch |= {key: value.to(model.dtype) for key, value in batch.items() if value.is_floating_point()}
    return partial(second_moments, model, batches=batches, ridge=0, reached_only=True)


def export(
    model: Annotated[str, typer.Argument(help="Compressed or quantized checkpoint folder.")],
    to: Annotated[
        Literal["dense", "onnx"],
        typer.Option(help="dense: a plain checkpoint, every matrix materialised. onnx: the forward pass, in float32."),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="MODEL-TO")] = None,
) -> None:
    """Write a model for tools that know nothing of hyperfade."""
    from hyperfade.compose.export import densify_, example_of, export_onnx
    from hyperfade.hub import load, load_processor, save, write_folder
    from hyperfade.measure import disk_bytes

    folder = output or Path(f"{model.rstrip('/')}-{to}")
    refuse_existing(folder)
    processor = load_processor(model)
    if to == "onnx":
        loaded = load(model, "float32")
        write_folder(folder, lambda target: export_onnx(loaded, example_of(loaded, processor), target / "model.onnx"))
        megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        typer.echo(f"{folder / 'model.onnx'}: {megabytes:.2f} MB in float32, whole sequences, without a cache")
        return
    loaded = load(model)
    count = len(densify_(loaded))
    save(loaded, folder, processor)
    before = f", {disk_bytes(Path(model)) / 1e6:.2f} MB before" if Path(model).is_dir() else ""
    typer.echo(f"{folder}: {count} matrices materialised, {disk_bytes(folder) / 1e6:.2f} MB of weights{before}")
    typer.echo("It loads without hyperfade, and saves nothing: neither memory nor time.")
