"""Folders of models that diffusers and transformers read for us: whatever is wrong in them becomes a sentence."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
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
        clear = isinstance(error, ValueError | OSError | ImportError | MemoryError)
        # torch's own of that name is not to be imported for this
        clear = clear or type(error).__name__ == "OutOfMemoryError"
        if clear and not isinstance(error, UnicodeError | json.JSONDecodeError):
            raise
        raise ValueError(
            f"the model {source} cannot be loaded: its configuration or its weights are not what its library expects "
            f"({type(error).__name__}: {' '.join(str(error).split()):.300}). Copy or download it again"
        ) from error


def model_of(
    name: str, model: str | Path | None, models: Collection[str], formulas: Collection[str], what: str
) -> tuple[str, str | Path | None]:
    """Read the name of a `what`, "KIND" or "KIND=MODEL", beside a `model` given apart: its kind, and the model or None.

    `models` are the kinds that are models, `formulas` those that take none. Raises `ValueError` for an unknown kind, a
    model for a formula, and two models.
    """
    kind, given, path = name.partition("=")
    if given and model is not None:
        raise ValueError(f"{name!r} names a model, and model={str(model)!r} another: pass one of them")
    if given and not path:
        raise ValueError(f"{name!r} names no model after the =: write {kind}=FOLDER, or {kind} alone")
    chosen: str | Path | None = path if given else model
    if kind in formulas and chosen is not None:
        raise ValueError(f"{kind} is a formula and takes no model, but was given {str(chosen)!r}")
    if kind not in formulas and kind not in models:
        raise ValueError(f"there is no {what} {kind!r}: choose among {', '.join([*models, *formulas])}")
    return kind, chosen
