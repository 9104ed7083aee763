"""Reading weights and configurations from disk, with errors that name the file."""

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deradiff.anchors.errors import AnchorError, CorruptAnchor, PickledAnchor
from deradiff.files.reading import read


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `CorruptAnchor` naming the file."""
    try:
        return read(dict[str, Any], path, "configuration of a model", "copy or download it again")
    except (ValueError, OSError) as error:
        raise CorruptAnchor(str(error)) from error


def read_tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of the files, by name. Those of a .safetensors file are views of it: read when used, not to be kept.

    Raises `CorruptAnchor` for a truncated or damaged file, `PickledAnchor` for a pickle that holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            with _opened(path) as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        else:
            tensors |= _unpickle(path)
    if not tensors:
        raise CorruptAnchor(f"{', '.join(map(str, paths))} holds no tensors.")
    return tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CorruptAnchor(
            f"{path} is no sound .safetensors file ({error}): truncated, damaged, or of another format "
            f"({path.stat().st_size:,} bytes). Copy or download it again."
        ) from error
    except OSError as error:
        raise AnchorError(f"{path} cannot be read: {error}") from error


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PickledAnchor(
            f"{path} is damaged, or holds more than weights, which is never loaded, not even with allow_pickle=True: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CorruptAnchor(f"{path} cannot be read as weights saved by torch: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]  # the layout of training checkpoints
    if not isinstance(found, dict):
        raise CorruptAnchor(f"{path} holds a {type(found).__name__}, expected tensors by name.")
    return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
