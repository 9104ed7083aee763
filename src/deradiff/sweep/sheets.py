"""Contact sheets: a labelled grid of images, one row per prompt and seed, one column per λ; and panels of several."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from deradiff.files.images import rgb

SMALLEST_CELL, LARGEST_CELL = 128, 320
SMALLEST_TILE, LARGEST_TILE = 96, 160
"""Of an image in a panel."""
MARGIN, GAP, TILE_GAP, PANEL_GAP = 20, 6, 2, 24
PANELS_WIDTH = 1640
"""What a sheet of panels may be wide, unless a single panel is wider."""
ROW_LABEL_WIDTH = 190
TYPE_SIZE = 14
INK, FAINT_INK, PAPER = (25, 25, 30), (105, 105, 115), (255, 255, 255)


def contact_sheet(
    images: Sequence[Sequence[Image.Image]], columns: Sequence[str], rows: Sequence[str], caption: str = ""
) -> Image.Image:
    """Draw `images[row][column]` as a grid with a label over every column and beside every row.

    The first line of a label is set in bold, the others in grey; what does not fit is wrapped, and cut with an
    ellipsis where it would leave its cell. Small images are enlarged by a whole factor without smoothing, large ones
    reduced. Raises `ValueError` where the grid and its labels do not match.
    """
    if len(images) != len(rows) or any(len(row) != len(columns) for row in images) or not images or not columns:
        shape = [len(row) for row in images]
        raise ValueError(
            f"{len(rows)} row and {len(columns)} column labels do not fit a grid with rows of {shape} images"
        )
    cell = _cell_size(images[0][0])
    width = MARGIN + ROW_LABEL_WIDTH + len(columns) * (cell[0] + GAP) - GAP + MARGIN
    headers = [_wrap(label, cell[0], lines=4) for label in columns]
    header_height = max(_height(lines) for lines in headers) + GAP
    foot = _wrap(caption, width - 2 * MARGIN, lines=6, bold_first=False) if caption else []
    height = MARGIN + header_height + len(rows) * (cell[1] + GAP) + (_height(foot) + GAP if foot else 0) + MARGIN

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [MARGIN + ROW_LABEL_WIDTH + i * (cell[0] + GAP) for i in range(len(columns))]
    for left, lines in zip(lefts, headers, strict=True):
        _write(draw, (left + cell[0] / 2, MARGIN + header_height - GAP - _height(lines)), lines, centred=True)
    for i, (label, row) in enumerate(zip(rows, images, strict=True)):
        top = MARGIN + header_height + i * (cell[1] + GAP)
        lines = _wrap(label, ROW_LABEL_WIDTH - 14, lines=cell[1] // _line_height())
        _write(draw, (MARGIN, top + (cell[1] - _height(lines)) / 2), lines)
        for left, image in zip(lefts, row, strict=True):
            sheet.paste(_fit(image, cell), (left, top))
    if foot:
        _write(draw, (MARGIN, height - MARGIN - _height(foot)), foot)
    return sheet


def panel_sheet(panels: Sequence[Sequence[Image.Image]], titles: Sequence[str], heading: str = "") -> Image.Image:
    """Draw titled panels beside and below each other, each with several images in a square, row by row.

    Titles are set as the labels of `contact_sheet`, and images sized likewise, but smaller. Raises `ValueError` where
    panels and titles do not match.
    """
    if not panels or len(panels) != len(titles) or not all(panels):
        raise ValueError(f"{len(titles)} titles do not fit panels with {[len(panel) for panel in panels]} images")
    tile = _cell_size(panels[0][0], SMALLEST_TILE, LARGEST_TILE)
    most = max(len(panel) for panel in panels)
    wide = math.isqrt(most - 1) + 1
    width, height = wide * (tile[0] + TILE_GAP) - TILE_GAP, -(-most // wide) * (tile[1] + TILE_GAP) - TILE_GAP
    rows = -(-len(panels) // max(1, (PANELS_WIDTH - 2 * MARGIN + PANEL_GAP) // (width + PANEL_GAP)))
    across = -(-len(panels) // rows)
    total = 2 * MARGIN + across * (width + PANEL_GAP) - PANEL_GAP
    labels = [_wrap(title, width, lines=4) for title in titles]
    head = _wrap(heading, total - 2 * MARGIN, lines=4) if heading else []
    tops, bottom = [], MARGIN + (_height(head) + PANEL_GAP if head else 0)
    for start in range(0, len(panels), across):
        tops.append(bottom + max(_height(lines) for lines in labels[start : start + across]) + GAP)
        bottom = tops[-1] + height + PANEL_GAP

    sheet = Image.new("RGB", (total, bottom - PANEL_GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (MARGIN, MARGIN), head)
    for number, (panel, lines) in enumerate(zip(panels, labels, strict=True)):
        left, top = MARGIN + number % across * (width + PANEL_GAP), tops[number // across]
        _write(draw, (left, top - GAP - _height(lines)), lines)
        for place, image in enumerate(panel):
            at = (left + place % wide * (tile[0] + TILE_GAP), top + place // wide * (tile[1] + TILE_GAP))
            sheet.paste(_fit(image, tile), at)
    return sheet


def covered(image: Image.Image) -> Image.Image:
    """What stands in a sheet for an image that a safety checker blacked out: grey with a bar, no picture."""
    plain = Image.new("RGB", image.size, (205, 205, 210))
    middle, thick = image.height // 2, max(1, image.height // 12)
    plain.paste((110, 110, 115), (image.width // 8, middle - thick, image.width * 7 // 8, middle + thick))
    return plain


@cache
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: every machine has the same letters, λ and β among them."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), TYPE_SIZE)


def _cell_size(image: Image.Image, smallest: int = SMALLEST_CELL, largest: int = LARGEST_CELL) -> tuple[int, int]:
    longest = max(image.size)
    if longest < smallest:
        factor = -(-smallest // longest)
        return image.width * factor, image.height * factor
    scale = min(1.0, largest / longest)
    return round(image.width * scale), round(image.height * scale)


def _fit(image: Image.Image, cell: tuple[int, int]) -> Image.Image:
    enlarging = cell[0] > image.width
    return rgb(image).resize(cell, Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS)


def _line_height() -> int:
    ascent, descent = _font(False).getmetrics()
    return ascent + descent + 2


def _height(lines: Sequence[tuple[str, bool]]) -> int:
    return len(lines) * _line_height()


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], lines: Sequence[tuple[str, bool]], centred: bool = False
) -> None:
    for i, (text, bold) in enumerate(lines):
        left = at[0] - _font(bold).getlength(text) / 2 if centred else at[0]
        draw.text((left, at[1] + i * _line_height()), text, INK if bold else FAINT_INK, _font(bold))


def _wrap(label: str, width: float, lines: int, bold_first: bool = True) -> list[tuple[str, bool]]:
    """`label` as at most `lines` lines of (text, bold) that fit `width`; the first paragraph gives way."""
    first, *others = label.split("\n")
    rest = [(line, False) for part in others for line in _break(part, width, _font(False))][: lines - 1]
    font, room = _font(bold_first), max(1, lines - len(rest))
    head = _break(first, width, font)
    if len(head) > room:
        last = head[room - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        head = [*head[: room - 1], last.rstrip() + "…"]
    return [(line, bold_first) for line in head] + rest


def _break(text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """Greedy line breaking at spaces, and inside a word that is wider than a line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
