"""Reading weights and configurations from disk, with errors that name the file."""

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deradiff.anchors.errors import AnchorError, CorruptAnchor, PickledAnchor
from deradiff.anchors.sources import some
from deradiff.files.reading import parse, read

# Under which names training checkpoints keep a model's tensors.
_NESTS = (
    "state_dict",
    "model_state_dict",
    "ema_state_dict",
    "model",
    "model_ema",
    "ema",
    "ema_model",
    "params",
    "params_ema",
    "module",
    "net",
    "unet",
    "transformer",
    "weights",
    "lora",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `CorruptAnchor` naming the file."""
    try:
        return read(dict[str, Any], path, "configuration of a model", "copy or download it again")
    except (ValueError, OSError) as error:
        raise CorruptAnchor(str(error)) from error


def _settings(text: str, where: str) -> dict[str, Any]:
    try:
        return parse(dict[str, Any], text, where, "object of settings", "")
    except ValueError as error:
        raise CorruptAnchor(str(error)) from error


def read_lora_metadata(paths: Iterable[Path]) -> dict[str, Any]:
    """The settings that diffusers writes into the header of a LoRA's file; empty where there are none."""
    metadata: dict[str, Any] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            with _opened(path) as file:
                text = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
            metadata |= _settings(text, f"{LORA_ADAPTER_METADATA_KEY} in the header of {path}") if text else {}
    return metadata


def read_tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of the files, by name. Those of a .safetensors file are views of it: read when used, not to be kept.

    Raises `CorruptAnchor` for a truncated or damaged file, `PickledAnchor` for a pickle that holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        part = _read_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
        if twice := tensors.keys() & part.keys():
            raise CorruptAnchor(
                f"{len(twice)} tensors are in {path} and in another file of the same model: {some(sorted(twice))}. "
                "These files are of different models, or one of them is a copy."
            )
        tensors |= part
    if not tensors:
        raise CorruptAnchor(f"{', '.join(map(str, paths))} holds no tensors.")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


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
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptAnchor(f"{path} holds tensors of a type that the installed torch does not have.") from error


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PickledAnchor(
            f"{path} is damaged, or holds more than weights, which is never loaded, not even with allow_pickle=True: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its remains happen to mean
        raise CorruptAnchor(f"{path} cannot be read as weights saved by torch: it is damaged or truncated.") from error
    return _state_of(value, path)


def _state_of(value: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a training checkpoint, which may lie under one of the usual names, `{"model": ...}`."""
    if not isinstance(value, dict):
        raise CorruptAnchor(f"{path} holds a {type(value).__name__}, expected tensors by name.")
    tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    inside = {str(name): state for name, state in value.items() if isinstance(state, dict) and name in _NESTS}
    if inside:  # a step or a loss beside the model is no weight
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.ndim}
    if tensors or not inside:
        if not tensors:
            raise CorruptAnchor(
                f"{path} holds no tensors by name, but {some(map(str, value)) or 'nothing'}; known are tensors by "
                f"name, by themselves or under {', '.join(_NESTS)}."
            )
        return tensors
    if len(inside) > 1:
        raise CorruptAnchor(
            f"{path} holds several models, {', '.join(inside)}: save the one that you mean by itself, as .safetensors."
        )
    return _state_of(next(iter(inside.values())), path)
