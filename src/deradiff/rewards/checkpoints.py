"""Published checkpoints that are pickles: read as tensors alone, fitted, converted once, and kept as safetensors."""

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from deradiff.rewards.clip import folder_of


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint or of its `state_dict`, of which nothing is run.

    Raises `ValueError` if it is damaged or holds other things.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors alone: it is damaged, or holds code, which is never run "
            f"({str(error).partition(chr(10))[0]})"
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} is no checkpoint of a model: neither it nor its 'state_dict' is tensors by name")
    return tensors


def require_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], otherwise: str) -> None:
    """Raise `ValueError`, which begins with `otherwise`, unless `tensors` have the names and shapes of `expected`."""
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is not expected" for name in tensors if name not in expected]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)} and not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{otherwise}: {', '.join(wrong[:4])}{more} (in transformers' names)")


def require_new(folder: str | Path) -> Path:
    """The path of a folder that is still to be written. Raises `FileExistsError` if it is there."""
    path = Path(folder).expanduser()
    if path.exists():
        raise FileExistsError(f"{path} exists already: name a new folder, or load this one")
    return path


def write_model(tensors: dict[str, Tensor], config: Any, folder: Path) -> Path:
    """Write a model's config and its tensors, in their own precision; the folder appears when it is whole."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    part.mkdir(parents=True, exist_ok=True)
    try:
        config.save_pretrained(part)
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def opened(
    model: str | Path,
    checkpoint: str,
    files: Sequence[str],
    is_converted: Callable[[Path], bool],
    convert: Callable[[Path, Path], Path],
) -> tuple[Path, Path]:
    """The folder of a converted model, and the one that a tokenizer would be in.

    `model` is the `checkpoint` itself, a folder or hub id that has it, which `convert` converts once, or a folder or
    hub id that `is_converted`, of these `files`. Raises `ValueError` where it is none of these.
    """
    path = Path(model).expanduser()
    if not path.is_file():
        path = folder_of(model, [checkpoint, *files])
        if is_converted(path):
            return path, path
        path = path / checkpoint
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has neither {path.name}, the published checkpoint, nor the config.json and "
            "model.safetensors of a converted one"
        )
    folder = kept_at(path)
    if not folder.is_dir():
        try:
            convert(path, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder, path.parent


def kept_at(checkpoint: Path) -> Path:
    """Where `checkpoint` is kept converted: in `deradiff` of the hub library's `HF_HOME`, by path, size and date."""
    file = checkpoint.resolve()
    state = file.stat()
    digest = hashlib.sha256(f"{file} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    return Path(constants.HF_HOME) / "deradiff" / f"{checkpoint.stem}-{digest}"
