"""What a report consists of: exhibits, each a figure, a picture sheet or a table, with its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


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
