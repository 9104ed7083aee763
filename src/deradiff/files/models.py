"""Folders of models that diffusers and transformers read for us: whatever is wrong in them becomes a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reading_model(source: str | Path) -> Iterator[None]:
    """Say of which model it is that another library could not read a configuration or weights.

    Raises `ValueError` in the place of the many errors that such a library makes of a wrong value or of JSON that is
    too deep, and leaves its `OSError`, its `ValueError` and what is not of the kind, such as too little memory, alone.
    """
    try:
        yield
    except Exception as error:
        said = isinstance(error, ValueError | OSError | ImportError | MemoryError)
        # torch's own of that name is not to be imported for this
        said = said or type(error).__name__ == "OutOfMemoryError"
        if said and not isinstance(error, UnicodeError | json.JSONDecodeError):
            raise
        raise ValueError(
            f"the model {source} cannot be loaded: its configuration or its weights are not what its library expects "
            f"({type(error).__name__}: {' '.join(str(error).split()):.300}). Copy or download it again"
        ) from error
