"""Preference pairs by name: Pick-a-Pic on the hub, Parquet files, or a folder with a list of pairs.

The folder of a list is self-contained: `pairs.jsonl`, `pairs.json` or `pairs.csv` gives a prompt, a winner and a loser
per row, the images as paths relative to the folder.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from deradiff.alignment.data_order import Cursor, OrderedRow, permuted, read_cursor, readable, split_held_out
from deradiff.alignment.pair_rows import PreferencePair, UndecodedPair, decode_pair
from deradiff.alignment.pair_streams import HubShards, PairStream, ParquetShards
from deradiff.alignment.prompts import PICKAPIC
from deradiff.files import reading, tables
from deradiff.files.reading import Record

LISTS = ("pairs.jsonl", "pairs.json", "pairs.csv")

WHAT = "list of pairs"


def open_pairs(
    source: str | Path, *, held_out: int = 0, split: str | None = None, revision: str | None = None
) -> "PairFolder | PairStream":
    """The pairs of `source`, of which `held_out` never train.

    Args:
        source: a key of `PICKAPIC`, a Parquet file, a folder of Parquet files or with a list of pairs, or the id of a
            hub dataset with the columns of Pick-a-Pic or prompt, winner, loser.
        held_out: how many pairs are set aside.
        split: of a hub dataset or of Parquet files, whose names tell (`split_of`); train by default, or the only one
            there is. Pick-a-Pic has train, validation, test, validation_unique, test_unique.
        revision: of a hub dataset: a commit, so that the order stays the same when the dataset is changed.

    Raises:
        FileNotFoundError: there is no such file, folder or image.
        ValueError: the data are empty or not a pair's; there is no such split; a split of a list of pairs, or a
            revision of local files.
        ImportError: reading them needs a library that is not installed.
        OSError: the hub cannot be reached.
    """
    path = Path(source)
    on_hub = PICKAPIC.get(str(source))
    if on_hub is None and not path.exists() and isinstance(source, str) and _HUB_ID.fullmatch(source):
        on_hub = source
    if on_hub is not None:
        return PairStream(HubShards(on_hub, split or "train", revision), held_out)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file or folder {source}; pairs also come from {', '.join(PICKAPIC)} or a hub dataset, "
            "owner/name"
        )
    if revision is not None:
        raise ValueError(f"{source} is no dataset of the hub and has no revision {revision!r}: leave revision out")
    if path.is_file() and path.suffix.lower() == ".parquet":
        return PairStream(ParquetShards(_of_split([path], source, split)), held_out)
    if not path.is_dir():
        raise ValueError(f"{source} is neither a Parquet file nor a folder")
    parquet = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".parquet")
    listed = [name for name in LISTS if (path / name).exists()]
    if not parquet or listed:
        if parquet:
            raise ValueError(f"{source} holds {listed[0]} and Parquet files, {parquet[0]}: keep one of both")
        if split is not None:
            raise ValueError(f"{source} is a list of pairs without splits: leave split={split!r} out")
        return PairFolder(path, held_out)
    return PairStream(ParquetShards(_of_split(parquet, source, split)), held_out)


_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")


class _Listed(Record):
    """A row of a list; images are paths within its folder."""

    prompt: str
    winner: str
    loser: str


class _Next(Record):
    next: NonNegativeInt


class PairFolder:
    """Pairs listed in a folder, each epoch in a fresh permutation.

    Args:
        folder: holds one of `LISTS` and the images.
        held_out: how many pairs are set aside; which ones, the list alone decides.

    Raises:
        FileNotFoundError: the folder has no list, or an image is missing; names the row and the path.
        ValueError: the list is empty or unreadable, or a path leads out of the folder.
    """

    def __init__(self, folder: str | Path, held_out: int = 0) -> None:
        self.folder = Path(folder)
        lists = [self.folder / name for name in LISTS if (self.folder / name).is_file()]
        if not lists:
            raise FileNotFoundError(f"{folder} has no list of pairs: it must hold {' or '.join(LISTS)}")
        if len(lists) > 1:
            raise ValueError(f"{folder} holds {' and '.join(path.name for path in lists)}: keep one of them")
        content = lists[0].read_bytes()
        self._root = os.path.realpath(self.folder)
        self._rows = [self._checked(*row) for row in _listed(lists[0])]
        if not self._rows:
            raise ValueError(f"{lists[0]} lists no pair")
        self.fingerprint: dict[str, Any] = {
            "kind": "folder",
            "pairs": len(self._rows),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        self.held_out_rows = held_out
        self._train, self._set_aside = split_held_out(len(self._rows), held_out)

    def _checked(self, place: str, row: Any) -> UndecodedPair:
        known = f"it has {', '.join(map(repr, row))}" if isinstance(row, dict) else f"it is {row!r:.80}"
        listed = reading.fit(_Listed, row, place, "pair of texts: prompt, winner and loser", known)
        if not listed.prompt.strip():
            raise ValueError(f"{place} has an empty prompt")
        for role, name in (("winner", listed.winner), ("loser", listed.loser)):
            path = os.path.realpath(os.path.join(self._root, name))
            if not path.startswith(self._root + os.sep):
                raise ValueError(f"{place}: the {role} {name!r} lies outside {self.folder}; move it inside")
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{place}: the {role} {name!r} is missing, there is no {path}")
        return UndecodedPair(listed.prompt, self.folder / listed.winner, self.folder / listed.loser, place)

    def __len__(self) -> int:
        return len(self._rows)

    def open(self, row: int) -> PreferencePair:
        """The pair of a row. Raises `Unreadable` where an image is damaged, `OSError` where it has gone."""
        return decode_pair(self._rows[row])

    def steps(self, seed: int, cursor: Cursor | None) -> Iterator[OrderedRow[int]]:
        """Training rows without end, from `cursor` on."""
        return permuted(self._train, seed, cursor)

    def in_order(self, cursor: Cursor | None) -> Iterator[OrderedRow[int]]:
        """Every row once, held-out ones included, as listed."""
        for row in range(read_cursor(_Next, cursor).next if cursor else 0, len(self._rows)):
            yield OrderedRow(row, {"next": row + 1}, {})

    def held_out(self) -> Iterator[PreferencePair]:
        """The held-out pairs, decoded as they are asked for; those that cannot be decoded are left out."""
        return readable(self.open, self._set_aside.tolist())


def _listed(path: Path) -> list[tuple[str, Any]]:
    """The rows of a list, each with its place for messages."""
    text = tables.read_text(path, WHAT)
    if path.suffix == ".csv":
        rows = tables.read_csv(text, str(path))
        return [(f"{path}, line {row.line}", row.cells) for row in rows]
    if path.suffix == ".json":
        entries = _json(text, str(path))
        if not isinstance(entries, list):
            raise ValueError(f"{path} must hold a list of objects with prompt, winner and loser")
        return [(f"{path}, entry {number}", entry) for number, entry in enumerate(entries, 1)]
    lines = [(f"{path}, line {number}", line) for number, line in tables.lines(text) if line.strip()]
    return [(place, _json(line, place)) for place, line in lines]


def _json(text: str, place: str) -> Any:
    return reading.parse(object, text, place, WHAT, "")


# -- splits ------------------------------------------------------------------------------------------------------------

_CALLED = r"(?:train|training|validation|valid|val|dev|test|testing|eval|evaluation)"

_FILE = re.compile(
    rf"(\w+)-\d{{5}}-of-\d{{5}}(?:-\w+)?|({_CALLED}(?:_[a-z]\w*?)?)(?:[-._]\d+)*", re.ASCII | re.IGNORECASE
)
"""The name of a file of a split: as the hub numbers them (train-00000-of-00004), or beginning with what splits are
called (train, test_unique-1)."""

_FOLDER = re.compile(rf"{_CALLED}(?:_unique)?", re.IGNORECASE)


def split_of(file: Path) -> str | None:
    """The split that a Parquet file belongs to by its name, or by that of its folder; None where neither tells."""
    if match := _FILE.fullmatch(file.stem):
        return (match[1] or match[2]).lower()
    return file.parent.name.lower() if _FOLDER.fullmatch(file.parent.name) else None


def _of_split(files: list[Path], source: str | Path, split: str | None) -> list[Path]:
    """Those of `files` that are of `split`; without one all, if they are of one split, else those of "train"."""
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file), []).append(file)
    there = ", ".join(sorted(filter(None, by_split)))
    if split is not None:
        if split in by_split:
            return by_split[split]
        has = f"has {there}" if there else "has none, by the names of its files"
        raise ValueError(f"{source} has no split {split!r}: it {has}")
    if len(by_split) == 1:
        return files
    if None in by_split or "train" not in by_split:
        others = f", and {by_split[None][0]} of none" if None in by_split else ""
        raise ValueError(f"{source} holds files of the splits {there}{others}: name one of them as split, or one file")
    return by_split["train"]
