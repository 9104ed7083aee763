"""Tables as files: CSV, tab-separated text and Parquet, whose every row must fit the header.

A comma that should have been quoted makes a row longer, a quotation mark that was not closed makes it swallow the rows
behind it. Both are errors here, since what they would drop is a piece of somebody's prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deradiff.files import reading

LARGEST = 1 << 30
"""Bytes of a list or a table."""

INSTALL = "pip install 'deradiff[align]'"

_BREAK = re.compile(r"\r\n|\n|\r")
"""Where a line ends. Nothing else ends one: `str.splitlines` cuts at U+2028, U+0085, form feeds and others, which are
parts of a text."""

_CELL = re.compile(r'"(?:[^"]++|"")*+"|(?!")[^,\r\n]*')
"""A cell in quotation marks, which are doubled inside, or one without. What opens and never closes is neither."""


class Row(NamedTuple):
    """A row of a table: the number of the line it begins in, and its cells by the names of the header."""

    line: int
    cells: dict[str, str]


def read_text(path: Path, what: str) -> str:
    """The text of a file in UTF-8. Raises `OSError`, and `ValueError` for another encoding."""
    text = reading.text_of(path, what, LARGEST)
    if "\0" in text:
        line = lines(text[: text.index("\0")])[-1][0]
        raise ValueError(f"{path}, line {line} holds a NUL character, as text in UTF-16 does: save the {what} as UTF-8")
    return text


def lines(text: str) -> list[tuple[int, str]]:
    """The lines of a text with their numbers, from 1."""
    return list(enumerate(_BREAK.split(text), 1))


def read_csv(text: str, where: str) -> list[Row]:
    """The rows of comma-separated text (RFC 4180), empty lines left out. Raises `ValueError` for what is no table."""
    return list(_fitted(_comma_separated(text, where), where))


def read_tsv(text: str, where: str) -> list[Row]:
    """The rows of tab-separated text, empty lines left out. Quotation marks are part of the cells, as in PartiPrompts.

    Raises `ValueError` for what is no table.
    """
    return list(_fitted(((line, row.split("\t")) for line, row in lines(text)), where))


def _comma_separated(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Every record with the number of the line it begins in."""
    place, line, began = 0, 1, 1
    cells: list[str] = []
    while True:
        match = _CELL.match(text, place)
        if match is None:
            raise ValueError(
                f"{where}, line {line}: the quotation mark before {_line(text, place + 1)} is never closed: close it, "
                "and write quotation marks inside of a quoted cell twice"
            )
        cell = match.group()
        cells.append(cell[1:-1].replace('""', '"') if cell.startswith('"') else cell)
        line += len(_BREAK.findall(cell))
        place = match.end()
        if text.startswith(",", place):
            place += 1
            continue
        ended = _BREAK.match(text, place)
        if ended is None and place < len(text):
            raise ValueError(
                f"{where}, line {line}: {_line(text, place)} stands behind a closing quotation mark, "
                f"where a comma or the line's end belongs (the row began in line {began}): write quotation marks "
                "inside of a quoted cell twice"
            )
        yield began, cells
        if ended is None:
            return
        place, line, cells = ended.end(), line + 1, []
        began = line


def _fitted(records: Iterable[tuple[int, list[str]]], where: str) -> Iterator[Row]:
    """The rows below the header, each with a cell for every name in it."""
    filled = ((line, cells) for line, cells in records if cells != [""])
    line, header = next(filled, (1, []))
    names = [name.strip() for name in header]
    require_names(names, f"{where}, line {line}")
    for line, cells in filled:
        if len(cells) != len(names):
            raise ValueError(
                f"{where}, line {line} has {len(cells)} cells, {', '.join(map(_shown, cells))}, and the header has "
                f"{len(names)}, {', '.join(map(_shown, names))}: quote a cell that holds a comma, and leave none out"
            )
        yield Row(line, dict(zip(names, cells, strict=True)))


def require_names(names: Sequence[str], place: str) -> None:
    """Raise `ValueError` where columns cannot be told apart by their names, capitals left aside."""
    lowered = [name.lower() for name in names]
    if "" in lowered:
        raise ValueError(f"{place}: column {lowered.index('') + 1} of {len(names)} has no name: name it, or delete it")
    if twice := sorted({name for name in lowered if lowered.count(name) > 1}):
        raise ValueError(f"{place}: two columns are called {', '.join(map(repr, twice))}: keep one of them")


def open_parquet(path: Path) -> Any:
    """A Parquet file, pyarrow's `ParquetFile`. Raises `ImportError` without pyarrow, `ValueError` for another file."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path}: Parquet files are read with pyarrow, which is missing: {INSTALL}") from error
    try:
        opened = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise ValueError(f"{path} cannot be read as Parquet ({error}): download or write it anew") from error
    require_names(opened.schema_arrow.names, str(path))
    return opened


def _line(text: str, place: int) -> str:
    """What stands at `place`, to the end of its line."""
    return _shown(_BREAK.split(text[place : place + 80])[0])


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:56]} ...")
