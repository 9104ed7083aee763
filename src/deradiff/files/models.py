"""Folders of models that diffusers and transformers read for us: whatever is wrong in them becomes a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deradiff.files.reading import read


@contextmanager
def reading_model(source: str | Path) -> Iterator[None]:
    """Say of which model it is that another library could not read a configuration or weights.

    Configurations of a folder are read beforehand as plain JSON: these libraries have no bound for its depth. Raises
    `ValueError` in the place of the many errors that they make of a wrong value, and leaves `OSError`, `ValueError` and
    what is not of the kind, such as too little memory, as it is.
    """
    if (config := Path(source) / "config.json").is_file():
        read(dict[str, Any], config, "configuration of a model", "copy or download it again")
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not to be imported for this
            raise
        raise ValueError(
            f"the model {source} cannot be loaded: its configuration or its weights are not what its library expects "
            f"({type(error).__name__}: {' '.join(str(error).split()):.300}). Copy or download it again"
        ) from error
