"""Our .safetensors files read back: whole, with the tensors that they should have, or refused in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from deradiff.files.reading import Schema, parse, require_file

Kind = TypeVar("Kind")


def handle(path: Path, what: str, cure: str) -> Any:
    """`opened`, for a file that stays open as long as somebody has it."""
    require_file(path, what)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole {what} ({error}): {cure}") from None


@contextmanager
def opened(path: Path, what: str, cure: str) -> Iterator[Any]:
    """A .safetensors file, memory-mapped; its header says how long it must be, so that one which was cut is refused.

    Raises `OSError` where it cannot be read, `ValueError` where it is damaged or lacks what is asked for.
    """
    try:
        with handle(path, what, cure) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole {what} ({error}): {cure}") from None


def require_whole(path: Path, what: str, cure: str) -> None:
    """Raise as `opened` does unless the file is as long as its header says. Reads the header alone."""
    with opened(path, what, cure):
        pass


def metadata(file: Any, name: str, kind: Schema[Kind], path: Path, what: str, cure: str) -> Kind:
    """What the header of an opened file holds under `name`, JSON, as `kind`. Raises `ValueError`."""
    return parse(kind, (file.metadata() or {}).get(name), f"{name!r} in {path}", what, cure)


def rows(path: Path, wanted: Mapping[str, Sequence[int] | None], count: int, what: str, cure: str) -> dict[str, Any]:
    """The tensors of a file that are wanted, `count` rows each of the shape that is given, or of any (None).

    Raises as `opened` does.
    """
    with opened(path, what, cure) as file:
        tensors = {name: file.get_tensor(name) for name in wanted}
    for name, shape in wanted.items():
        held = tuple(tensors[name].shape)
        if held[:1] != (count,) or (shape is not None and held[1:] != tuple(shape)):
            expected = f"{count} rows" if shape is None else f"the shape {(count, *shape)}"
            raise ValueError(f"{path} is no {what}: {name} has the shape {held} and should have {expected}: {cure}")
    return tensors


def joined(parts: Mapping[Path, Mapping[str, Any]], what: str, cure: str) -> dict[str, Any]:
    """The rows of several files one after the other. Raises `ValueError` for those that are not of the first's kind."""
    import torch

    first = next(iter(parts.values()))
    for path, tensors in parts.items():
        for name, tensor in tensors.items():
            if (tensor.shape[1:], tensor.dtype) != (first[name].shape[1:], first[name].dtype):
                raise ValueError(
                    f"{path} is no {what} like those before it: {name} has rows of {list(tensor.shape[1:])} in "
                    f"{tensor.dtype}, not {list(first[name].shape[1:])} in {first[name].dtype}: {cure}"
                )
    return {name: torch.cat([tensors[name] for tensors in parts.values()]) for name in first}
