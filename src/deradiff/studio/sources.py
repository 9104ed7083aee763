"""Which models a page may ask for: what ships, what lies in the folders the studio was opened on, and hub ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from deradiff.worlds import SHIPPED, find, find_anchor

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w./-]{0,150}\.safetensors)?")

_MODEL_FILES = ("model_index.json", "config.json", "adapter_config.json", "pytorch_lora_weights.safetensors")

MOST_LISTED = 500


class Sources:
    """What the studio may load.

    `folders` are models, or hold models, one or two levels below. `allowed` are sources that were named when the studio
    was opened, whatever they are. `hub` says whether pages may name models of the hub.
    """

    def __init__(self, folders: Sequence[Path] = (), allowed: Iterable[str] = (), hub: bool = True) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"--models {folder} is no folder: name one that holds models")
        self.folders = tuple(folder.resolve() for folder in folders)
        self.allowed = tuple(dict.fromkeys(allowed))
        self.hub = hub

    def references(self) -> list[str]:
        """Pipelines to choose from."""
        local = [str(path) for path in self._local() if (path / "model_index.json").is_file()]
        return list(dict.fromkeys([*SHIPPED, *self.allowed, *local]))

    def anchors(self) -> list[str]:
        """Anchors to choose from."""
        shipped = [f"{name}:{anchor}" for name in SHIPPED if (world := find(name)) for anchor in world.anchors]
        return list(dict.fromkeys([*shipped, *self.allowed, *map(str, self._local())]))

    def require(self, source: str) -> str:
        """`source` if a page may load it; raises `ValueError` that says what it may, and touches no other path."""
        if source in self.allowed or find(source) or find_anchor(source):
            return source
        path = Path(source)
        if path.is_absolute():
            if (inside := path.resolve()) != path or not any(inside.is_relative_to(folder) for folder in self.folders):
                raise ValueError(self._outside(source))
            if not path.exists():
                raise ValueError(f"there is no model {source} any more: choose another")
            return source
        if not HUB_ID.fullmatch(source) or ".." in source:
            raise ValueError(self._outside(source))
        if path.exists():  # diffusers would take the folder for the hub's model
            raise ValueError(
                f"{source} is also a folder where the studio was opened: open the studio with --models {path.parts[0]} "
                "to use it"
            )
        if not self.hub:
            raise ValueError(f"this studio loads nothing from the hub: {source} was not loaded")
        return source

    def _outside(self, source: str) -> str:
        hub = " or a hub id like owner/name" if self.hub else ""
        return (
            f"{source[:200]!r} is no model of this studio: choose one from the list{hub}. Folders are added with "
            "deradiff studio --models FOLDER"
        )

    def _local(self) -> list[Path]:
        models: list[Path] = []
        for folder in self.folders:
            inside = [folder, *_below(folder)]
            inside += [deeper for path in inside[1:] if not _is_model(path) for deeper in _below(path)]
            models += [path for path in inside if _is_model(path)]
        return models[:MOST_LISTED]


def _below(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_symlink())
    except OSError:
        return []


def _is_model(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".safetensors"
    return path.is_dir() and any((path / name).is_file() for name in _MODEL_FILES)
