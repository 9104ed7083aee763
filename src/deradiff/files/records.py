"""What an image carries with it: every setting that made it, and the versions."""

import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from deradiff.files.reading import parse, require_file
from deradiff.files.writing import atomic_file

CHUNK = "deradiff"
"""The PNG text chunk (iTXt, UTF-8) that holds an image's settings as JSON."""


def write_png(path: Path, image: Image.Image, settings: Mapping[str, Any], within: Path | None = None) -> None:
    """Write `image` to `path` with `settings` inside, whole or not at all; `within` is as in `atomic_file`."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps(settings, ensure_ascii=False))
    with atomic_file(path, within) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_png(path: str | Path) -> dict[str, Any]:
    """The settings that `write_png` put into an image. Raises `ValueError` where there are none, and `OSError`."""
    require_file(Path(path), "image")
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(CHUNK)
    except Exception as error:  # of a damaged file Pillow raises errors of many kinds, SyntaxError among them
        raise ValueError(f"{path} is no image that can be read ({' '.join(str(error).split())})") from None
    if text is None:
        raise ValueError(
            f"{path} carries no deradiff settings: it was not written by deradiff, or was saved anew since."
        )
    return parse(dict[str, Any], str(text), f"what {path} carries", "record of an image", "")


def versions() -> dict[str, str]:
    """The versions that decide what an image looks like."""
    installed = {}
    for name in ("deradiff", "torch", "diffusers", "transformers", "peft"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def slug(text: str, longest: int = 40) -> str:
    """`text` as a piece of a file name: lower case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:longest].rstrip("-") or "prompt"
