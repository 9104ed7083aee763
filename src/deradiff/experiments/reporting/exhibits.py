"""What a report consists of: exhibits, each a figure, a picture sheet or a table, with its numbers; and their files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from matplotlib import rc_context

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

DPI = 200
"""Of PNG files."""


@dataclass(frozen=True)
class Exhibit:
    """One figure or table of the report.

    `key` is its file name without suffix, `section` the heading it stands under. The caption says what is shown, in
    which units, what the bars are, and which figure or table of which paper it follows. `rows` are the numbers: a table
    on the page where there is neither figure nor picture, and a CSV file in any case.
    """

    key: str
    section: str
    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    figure: Figure | None = None
    picture: Image | None = None
    """A sheet of images, which is kept as PNG alone; there is no figure beside it."""


@dataclass(frozen=True)
class WrittenExhibit:
    """An exhibit whose files are written."""

    exhibit: Exhibit
    files: tuple[Path, ...]
    picture: bytes | None
    """What the page embeds: the smaller of PNG and SVG."""
    kind: Literal["png", "svg+xml"]
    width: int | None
    """How many pixels wide it is meant to be seen."""
    warnings: tuple[str, ...]
    """What was warned of while it was made."""


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
    """The header and the rows of a table, one row at least, whose rows all name the same cells in the same order."""
    return tuple(rows[0]), tuple(tuple(row.values()) for row in rows)


def write_exhibit(exhibit: Exhibit, warnings: tuple[str, ...], out: Path) -> WrittenExhibit:
    """Write an exhibit's files into `out`."""
    shown: dict[str, bytes] = {}
    width = None
    if exhibit.figure is not None:
        shown = {"png": rendered(exhibit.figure, "png"), "svg": rendered(exhibit.figure, "svg")}
        width = round(100 * exhibit.figure.get_figwidth())
    elif exhibit.picture is not None:
        held = io.BytesIO()
        exhibit.picture.save(held, format="PNG")
        shown, width = {"png": held.getvalue()}, exhibit.picture.width
    content = shown | {"csv": as_csv(exhibit.header, exhibit.rows)}
    files = [out / f"{exhibit.key}.{suffix}" for suffix in content]
    for file, data in zip(files, content.values(), strict=True):
        file.write_bytes(data)
    smallest = min(shown, key=lambda suffix: len(shown[suffix]), default=None)
    return WrittenExhibit(
        exhibit=replace(exhibit, figure=None, picture=None),
        files=tuple(files),
        picture=None if smallest is None else shown[smallest],
        kind="svg+xml" if smallest == "svg" else "png",
        width=width,
        warnings=warnings,
    )


def rendered(figure: Figure, form: Literal["png", "svg"]) -> bytes:
    """A figure as a file: the same figure gives the same bytes."""
    held = io.BytesIO()
    with rc_context({"svg.hashsalt": "deradiff"}):
        figure.savefig(held, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
    return held.getvalue()


def as_csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """Rows as CSV in UTF-8; what is not known is empty."""
    held = io.StringIO(newline="")
    lines = csv.writer(held, lineterminator="\n")
    lines.writerow(header)
    lines.writerows([None if isinstance(x, float) and math.isnan(x) else x for x in row] for row in rows)
    return held.getvalue().encode()
