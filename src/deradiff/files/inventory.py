"""Which files a finished folder has, written down when it is finished and checked before that is believed.

Small files are compared by their content, large ones by their size and, where they hold tensors, by their header: so a
model of any size is checked in milliseconds. What was cut, emptied, deleted or written anew is found out; single bits
that turned over inside of large weights are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field

from deradiff.files import tensors
from deradiff.files.reading import Record, read, require_file, sha256_of

SMALL = 1 << 20
"""Bytes of the files whose content is compared."""

PEOPLES = (".md",)
"""Kinds of files that people change afterwards, and may."""

INDEX = ".safetensors.index.json"


class FileState(Record):
    """What is known of a file: its size in bytes, and of a small one its SHA-256."""

    size: Annotated[int, Field(ge=0)]
    sha256: str | None = None


Inventory = dict[str, FileState]
"""The files of a folder by their paths in it, with slashes."""


def inventory(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The state of files in `folder` as plain data for its record: of `names`, by default of all but `PEOPLES`."""
    paths = folder.rglob("*") if names is None else (folder / name for name in names)
    files = sorted(path for path in paths if path.is_file() and path.suffix not in PEOPLES)
    return {path.relative_to(folder).as_posix(): _state(path).model_dump(exclude_none=True) for path in files}


def require_whole(folder: Path, files: Mapping[str, FileState] | None, what: str, cure: str) -> None:
    """Raise `ValueError` unless the finished `what` in `folder` has all of `files`, and each as it was written.

    Where none were written down (None, as by version 0.1), it must have weights, all of which open: a .safetensors file
    says itself how long it is.
    """
    if files is None:
        _require_weights(folder, what, cure)
        return
    for name, state in files.items():
        path = folder / name
        try:
            size = require_file(path, "file").st_size
        except OSError as error:
            raise ValueError(f"{folder} is no whole {what}: {error}: {cure}") from None
        if size != state.size:
            raise ValueError(
                f"{folder} is no whole {what}: {name} has {size:,} bytes, and {state.size:,} were written: {cure}"
            )
        if state.sha256 is not None and sha256_of(path) != state.sha256:
            raise ValueError(f"{folder} is no whole {what}: {name} is not what was written: {cure}")
        if state.sha256 is None and path.suffix == ".safetensors":
            tensors.require_whole(path, "file of tensors", cure)


def require_picture(path: Path, what: str, cure: str) -> None:
    """Raise `ValueError` unless the picture is there and whole: its checksums are compared, nothing is decoded."""
    try:
        require_file(path, what)
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # Pillow's own, of a damaged file, are of many kinds
        raise ValueError(f"{path} is no whole {what} ({error}): {cure}") from None


def _require_weights(folder: Path, what: str, cure: str) -> None:
    weights = sorted(folder.rglob("*.safetensors"))
    listed = [index.parent / name for index in sorted(folder.rglob(f"*{INDEX}")) for name in _listed(index, cure)]
    missing = [str(path) for path in listed if path not in weights]
    if missing or not weights:
        lacking = missing[0] if missing else ".safetensors file"
        raise ValueError(f"{folder} is no whole {what}: there is no {lacking} in it: {cure}")
    for path in weights:
        tensors.require_whole(path, "file of tensors", cure)


class _Index(Record):
    weight_map: dict[str, str]


def _listed(index: Path, cure: str) -> list[str]:
    return sorted({*read(_Index, index, "index of weights", cure).weight_map.values()})


def _state(path: Path) -> FileState:
    size = path.stat().st_size
    return FileState(size=size, sha256=sha256_of(path) if size <= SMALL else None)
