"""Lists of prompts in files, in every form that people keep them in: one reader for all commands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from deradiff.files import comments, reading, tables

PROMPT_COLUMNS = ("prompt", "caption", "text")
CATEGORY_COLUMNS = ("category", "style")

FORMS = ".txt, .yaml, .json, .jsonl, .csv, .tsv and .parquet"

WHAT = "list of prompts"


class Entry(NamedTuple):
    """A prompt, its category where the file gives one, and its place for messages."""

    prompt: str
    category: str | None
    place: str


def read_prompts(path: Path) -> list[Entry]:
    """The prompts of a file, in its order, duplicates included; blanks around a prompt are not part of it.

    Args:
        path: `.txt` or no ending: a prompt per line, empty lines and lines that begin with # skipped. `.yaml`, `.json`:
            a list, `prompts:` with a list, or a mapping from category to list. `.csv`, `.tsv`, `.parquet`: the column
            prompt, caption or text, and category or style if there is one; capitals do not matter. `.jsonl`: the same
            as objects, one per line.

    A warning tells of words that may have been meant and that the file's form takes for a comment.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is of another form or encoding, no table, or holds something else than text.
        ImportError: Parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{path}: prompts are read from {FORMS} files")
    return [Entry(_checked(prompt, place), category, place) for prompt, category, place in _READERS[suffix](path)]


def _checked(prompt: Any, place: str) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"{place} is {prompt!r:.80}, not text; quote prompts that look like numbers, dates or yes/no")
    if not prompt.strip():
        raise ValueError(f"{place} is an empty prompt")
    if "\0" in prompt:
        raise ValueError(f"{place} holds a NUL character: delete it")
    return prompt.strip(" \t\r\n")


# -- one a line --------------------------------------------------------------------------------------------------------

_Raw = tuple[Any, str | None, str]
"""An entry that is not checked yet."""


def _of_lines(path: Path) -> Iterator[_Raw]:
    left_out = []
    for number, line in tables.lines(tables.read_text(path, WHAT)):
        text = line.strip()
        if text.startswith("#"):
            left_out += [f"line {number}, {text[:60]!r}"] if text[1:2].isalnum() else []
        elif text:
            yield line, None, f"{path}, line {number}"
    if left_out:
        warnings.warn(
            f"{path}: {len(left_out)} lines that begin with # are left out as comments, the first is {left_out[0]}; a "
            "prompt that begins with # needs another form, such as .csv",
            stacklevel=1,
        )


def _of_json_lines(path: Path) -> Iterator[_Raw]:
    for number, line in tables.lines(tables.read_text(path, WHAT)):
        if line.strip():
            place = f"{path}, line {number}"
            yield _of_object(reading.parse(object, line, place, "prompt", "write an object in JSON"), place)


# -- tables ------------------------------------------------------------------------------------------------------------


def _of_table(read: Callable[[str, str], list[tables.Row]], path: Path) -> Iterator[_Raw]:
    rows = read(tables.read_text(path, WHAT), str(path))
    return (_of_object(row.cells, f"{path}, line {row.line}") for row in rows)


def _of_parquet(path: Path) -> Iterator[_Raw]:
    opened = tables.open_parquet(path)
    names = opened.schema_arrow.names
    wanted = [name for name in names if name.lower() in (*PROMPT_COLUMNS, *CATEGORY_COLUMNS)]
    if not any(name.lower() in PROMPT_COLUMNS for name in wanted):
        _of_object(dict.fromkeys(names), str(path))
    number = 0
    for batch in opened.iter_batches(columns=wanted):
        for row in batch.to_pylist():
            yield _of_object(row, f"{path}, row {number}")
            number += 1


# -- lists -------------------------------------------------------------------------------------------------------------


def _of_yaml(path: Path) -> Iterator[_Raw]:
    text = tables.read_text(path, WHAT)
    content = reading.parse_yaml(text, str(path))
    comments.warn_of_cut_texts(text, str(path), lists=None, texts=PROMPT_COLUMNS)
    return _of_lists(path, content)


def _of_json(path: Path) -> Iterator[_Raw]:
    content = reading.parse(object, tables.read_text(path, WHAT), str(path), WHAT, "")
    return _of_lists(path, content)


def _of_lists(path: Path, content: Any) -> Iterator[_Raw]:
    """A list of prompts or of objects, or a mapping from category to such lists; `prompts` alone is no category."""
    if content is None:
        return
    by_category = content if isinstance(content, dict) else {"prompts": content}
    for category, prompts in by_category.items():
        if not isinstance(category, str) or not isinstance(prompts, list):
            raise ValueError(f"{path} must hold a list of prompts, or a mapping from category to list, at {category!r}")
        usual = None if list(by_category) == ["prompts"] else category
        for number, prompt in enumerate(prompts, 1):
            place = f"{path}, {category}, entry {number}"
            if isinstance(prompt, dict):
                text, own, _ = _of_object(prompt, place)
                yield text, own or usual, place
            else:
                yield prompt, usual, place


def _of_object(row: Any, place: str) -> _Raw:
    """The prompt and the category of a row by its columns."""
    if not isinstance(row, dict):
        raise ValueError(f"{place} has no prompt: it is {row!r:.80}, not an object with one of {_either()}")
    named = [key for key in row if isinstance(key, str)]
    tables.require_names(named, place)
    lowered = {key.lower(): row[key] for key in named}
    column = next((name for name in PROMPT_COLUMNS if name in lowered), None)
    if column is None:
        held = ", ".join(repr(str(key)[:60]) for key in row) or "none"
        hint = "; quote a prompt that holds a colon" if len(row) == 1 else ""
        raise ValueError(
            f"{place} has no prompt: it has the columns {held}, and needs one of the columns {_either()}{hint}"
        )
    category = next((lowered[name] for name in CATEGORY_COLUMNS if lowered.get(name)), None)
    return lowered[column], category if category is None else str(category), place


def _either() -> str:
    return ", ".join(PROMPT_COLUMNS)


_READERS: Mapping[str, Callable[[Path], Iterator[_Raw]]] = {
    "": _of_lines,
    ".txt": _of_lines,
    ".jsonl": _of_json_lines,
    ".csv": partial(_of_table, tables.read_csv),
    ".tsv": partial(_of_table, tables.read_tsv),
    ".parquet": _of_parquet,
    ".yaml": _of_yaml,
    ".yml": _of_yaml,
    ".json": _of_json,
}
