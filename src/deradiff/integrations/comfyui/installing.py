"""The folder that ComfyUI loads the nodes from, put where it looks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deradiff.files.writing import atomic_folder

SOURCE = Path(__file__).parent / "custom_node"

NAME = "deradiff"


def install(comfyui: Path) -> Path:
    """Put the custom node into the ComfyUI at this path; returns its folder, which a second call brings up to date.

    Raises `ValueError` for a folder that is no ComfyUI, `FileExistsError` where something else has the name.
    """
    if not (comfyui / "comfy" / "samplers.py").is_file() or not (comfyui / "nodes.py").is_file():
        raise ValueError(f"{comfyui} is no ComfyUI: the folder with main.py, nodes.py and comfy/ in it is meant")
    folder = comfyui / "custom_nodes" / NAME
    if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
        raise FileExistsError(f"{folder} is there and is not ours: move it away first")
    folder.parent.mkdir(exist_ok=True)
    old = folder.with_name(f".{NAME}.old")
    with atomic_folder(folder) as fresh:
        shutil.copytree(SOURCE, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _is_ours(folder: Path) -> bool:
    """Whether we wrote it, and nobody put a file of another kind beside."""
    own = folder / "__init__.py"
    return own.is_file() and "deradiff.integrations.comfyui" in own.read_text(encoding="utf-8", errors="replace")
