"""A preference pair, and the rows it is read from: Pick-a-Pic's columns, or prompt, winner and loser."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

from PIL import Image

from deradiff.alignment.data_order import Unreadable
from deradiff.files.images import read_rgb, rgb

PICK_A_PIC_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label")
PLAIN_COLUMNS = ("prompt", "winner", "loser")

ImageData = bytes | Path | Image.Image | None
"""An image before it is decoded; None where the data have none."""


@dataclass(frozen=True)
class PreferencePair:
    """Two images of one prompt, of which people preferred `winner`; both RGB."""

    prompt: str
    winner: Image.Image
    loser: Image.Image


@dataclass(frozen=True)
class UndecodedPair:
    """A pair before its images are decoded; `place` names it in messages."""

    prompt: str
    winner: ImageData
    loser: ImageData
    place: str


class LeftOut(Exception):
    """A row that is no pair by its labels; the text is the reason it is counted under."""


def read_row(row: Mapping[str, Any], place: str) -> UndecodedPair:
    """A pair from Pick-a-Pic's columns (`caption`, `jpg_0`, `jpg_1`, `label_0`, ...) or `prompt`, `winner`, `loser`.

    Raises:
        LeftOut: the row is a tie, has no label, or no prompt.
        ValueError: it has neither set of columns, or a value of another kind: a label that is text, an image that is a
            path.
    """
    columns = pair_columns(row.keys(), place)
    prompt, winner, loser = (row[column] for column in columns[:3])
    if columns is PICK_A_PIC_COLUMNS and not first_wins(row, place):
        winner, loser = loser, winner
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        raise LeftOut("no prompt")
    if not isinstance(prompt, str):
        raise ValueError(f"{place}: {columns[0]} is {prompt!r:.80}, not text")
    return UndecodedPair(prompt, _image_data(winner, place), _image_data(loser, place), place)


def pair_columns(names: Collection[str], place: str) -> tuple[str, ...]:
    """`PICK_A_PIC_COLUMNS` or `PLAIN_COLUMNS`, whichever are among `names`; prompt and images come first in either.

    Raises `ValueError` for other columns; `place` says whose they are.
    """
    if {"caption", "jpg_0", "jpg_1", "label_0"} <= {*names}:
        return PICK_A_PIC_COLUMNS
    if {*PLAIN_COLUMNS} <= {*names}:
        return PLAIN_COLUMNS
    raise ValueError(
        f"{place} is no preference pair: it has the columns {sorted(names)}, and needs either prompt, winner and "
        "loser, or Pick-a-Pic's caption, jpg_0, jpg_1 and label_0"
    )


def first_wins(row: Mapping[str, Any], place: str = "the row") -> bool:
    """Whether image 0 of a Pick-a-Pic row was preferred. Raises `LeftOut` for ties and unlabelled rows.

    `label_0` is 1, 0 or ½; `label_1` is what remains of 1. Validation data also know rows without a label. Raises
    `ValueError` for labels that are no such numbers; `place` says whose they are.
    """
    has_label = row.get("has_label")
    if has_label not in (None, True, False):
        raise ValueError(f"{place}: has_label is {has_label!r:.80}, neither true nor false")
    label, other = (_label(row, name, place) for name in ("label_0", "label_1"))
    if has_label in (False,) or label is None:
        raise LeftOut("unlabelled")
    difference = label - (1 - label if other is None else other)
    if difference == 0:
        raise LeftOut("tie")
    return difference > 0


def _label(row: Mapping[str, Any], name: str, place: str) -> float | None:
    """A label from 0 to 1; None where there is none."""
    label = row.get(name)
    number = float(label) if isinstance(label, Real | Decimal) else math.nan
    if label is None or (isinstance(label, Real | Decimal) and math.isnan(number)):
        return None
    if not 0 <= number <= 1:
        kind = f"{label!r:.80}, a {type(label).__name__}" if math.isnan(number) else f"{label!r:.80}"
        raise ValueError(f"{place}: {name} is {kind}: labels are numbers, 1 (preferred), 0 or 0.5 (a tie)")
    return number


def _image_data(value: Any, place: str) -> ImageData:
    # The hub's image columns hold {"bytes": ..., "path": ...}.
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if value is None or isinstance(value, bytes | Image.Image):
        return value
    raise ValueError(f"{place}: an image must be bytes (the file's content), got {type(value).__name__}")


def decode_pair(row: UndecodedPair) -> PreferencePair:
    """The pair of a row, its images decoded to RGB.

    Raises:
        Unreadable: an image is absent from the data ("no image"), or damaged or without a meaning in RGB ("corrupt
            image"; see `files.images.rgb`).
        OSError: a file is missing or cannot be opened; names the row and the path.
    """
    return PreferencePair(row.prompt, _decode(row.winner, "winner", row.place), _decode(row.loser, "loser", row.place))


def _decode(data: ImageData, role: str, place: str) -> Image.Image:
    if data is None:
        raise Unreadable("no image", f"{place}: the {role} has no image")
    if isinstance(data, Path):
        path = data
        try:
            data = path.read_bytes()
        except OSError as error:
            raise type(error)(f"{place}: the {role} cannot be read from {path} ({error.strerror})") from error
    name = f"{place}: the {role}"
    try:
        return rgb(data, name) if isinstance(data, Image.Image) else read_rgb(data, name)
    except ValueError as error:
        raise Unreadable("corrupt image", str(error)) from error
