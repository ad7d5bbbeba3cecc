"""Saving is all or nothing: whatever goes wrong, the earlier folder is intact and no half-written one remains."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers.modeling_utils
from folded import files, folded, saved
from safetensors import SafetensorError
from tiny_models import FAMILIES, logits

from hyperfade.errors import OutputError
from hyperfade.hub import load, save, write_folder

NO_SPACE = "Error while serializing: I/O error: No space left on device (os error 28)"


def _fail(error: Exception) -> Callable[..., None]:
    """A `save_file` that writes a part and then meets `error`."""

    def write(tensors: Any, filename: Any, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(NO_SPACE),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("exists", [True, False], ids=["over an earlier model", "fresh"])
def test_a_failed_save_leaves_what_was_there(
    error: Exception, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    if exists:
        saved(folder)
    before = files(tmp_path)
    assert bool(before) == exists
    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", _fail(error))
        with pytest.raises(OutputError, match=str(folder)) as caught:
            save(folded("llama", seed=1), folder)
    assert caught.value.__cause__ is error
    assert files(tmp_path) == before
    assert [f.name for f in tmp_path.iterdir()] == (["model"] if exists else [])
    saved(folder)  # and the next save works
    assert load(str(folder)).config.model_type == "llama"


def test_other_errors_keep_their_type_and_leave_what_was_there(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    before = files(tmp_path)

    def write(target: Path) -> None:
        (target / "half").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_folder(folder, write)
    assert files(tmp_path) == before


def test_a_processor_that_fails_takes_the_model_with_it(tmp_path: Path) -> None:
    class Processor:
        def save_pretrained(self, target: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OutputError, match="Input/output error"):
        save(folded("llama"), tmp_path / "model", Processor())
    assert files(tmp_path) == {}


@pytest.mark.parametrize("step", [0, 1], ids=["moving the old away", "moving the new in"])
def test_a_rename_that_fails_puts_the_old_folder_back(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model")
    before, rename, calls = files(tmp_path), Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == step + 1:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="busy"):
        save(folded("llama", seed=1), folder)
    assert files(tmp_path) == before


def test_a_killed_save_leaves_the_old_folder_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    before = files(folder)

    def killed(target: Path) -> None:
        (target / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, killed)
    assert files(folder) == before
    saved(folder, "llava_siglip")
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
    assert not (folder / "half").exists()


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Then the old folder lies beside its place; a failing next save brings it back."""
    folder = saved(tmp_path / "model")
    before = files(folder)
    folder.rename(tmp_path / ".model.replaced")

    def failing(target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError):
        write_folder(folder, failing)
    assert files(folder) == before


def test_a_save_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", shard_bytes=20_000)
    (folder / "stale.txt").write_text("of the earlier model")
    save(folded("llava_siglip"), folder)
    assert not (folder / "stale.txt").exists()
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    assert load(str(saved(tmp_path / "a" / "b" / "model"))).config.model_type == "llama"


def test_a_file_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    for folder in (tmp_path / "notes", tmp_path / "notes" / "model"):
        with pytest.raises(OutputError):
            saved(folder)
    assert files(tmp_path) == {"notes": b"precious"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB. Mounting needs rights that a test may not have."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("cannot mount a small file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True, timeout=20)


@pytest.mark.parametrize("free", [0, 8, 60], ids=["nothing", "the config fits", "half of the weights fits"])
def test_a_disk_that_really_is_full(free: int, small_disk: Path) -> None:
    folder, model = saved(small_disk / "model"), folded("llama", seed=1)
    space = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - free * 1024))
    before = files(small_disk)
    with pytest.raises(OutputError, match="No space left") as caught:
        save(model, folder)
    assert "Free space" in caught.value.hint
    assert files(small_disk) == before
    assert {f.name for f in small_disk.iterdir()} == {"model", "filler"}
    assert load(str(folder)).config.model_type == "llama"
    (small_disk / "filler").unlink()
    save(model, folder)
    assert (logits(load(str(folder)), FAMILIES["llama"]) == logits(model, FAMILIES["llama"])).all()
