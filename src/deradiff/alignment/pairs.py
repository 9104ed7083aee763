"""Preference pairs by name: Pick-a-Pic on the hub, Parquet files, or a folder with a list of pairs.

The folder of a list is self-contained: `pairs.jsonl`, `pairs.json` or `pairs.csv` gives a prompt, a winner and a loser
per row, the images as paths relative to the folder.
"""

import csv
import hashlib
import os
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import NonNegativeInt

from deradiff.alignment.feeds import Cursor, Feed, Step, Unreadable, permuted, read_cursor, split_held_out
from deradiff.alignment.pair_rows import PLAIN_COLUMNS, Pair, PairRow, decode_pair
from deradiff.alignment.pair_streams import HubShards, PairStream, ParquetShards
from deradiff.files.reading import Record, parse

__all__ = ["HUB_NAMES", "Feed", "Pair", "PairFolder", "PairStream", "open_pairs"]

HUB_NAMES = {"pickapic-v1": "yuvalkirstain/pickapic_v1", "pickapic-v2": "yuvalkirstain/pickapic_v2"}
"""Short names of hub datasets. Both hold 0.6 to 1 million rows; their captions include unsafe ones."""

LISTS = ("pairs.jsonl", "pairs.json", "pairs.csv")


def open_pairs(
    source: str | Path, *, held_out: int = 0, split: str = "train", revision: str | None = None
) -> "PairFolder | PairStream":
    """The pairs of `source`, of which `held_out` never train.

    Args:
        source: a key of `HUB_NAMES`, a Parquet file, a folder of Parquet files or with a list of pairs, or the id of a
            hub dataset with the columns of Pick-a-Pic or prompt, winner, loser.
        held_out: how many pairs are set aside.
        split: of a hub dataset; Pick-a-Pic has train, validation, test, validation_unique, test_unique.
        revision: of a hub dataset: a commit, so that the order stays the same when the dataset is changed.

    Raises:
        FileNotFoundError: there is no such file, folder or image.
        ValueError: the data are empty or not a pair's.
        ImportError: reading them needs a library that is not installed.
        OSError: the hub cannot be reached.
    """
    path = Path(source)
    if str(source) in HUB_NAMES:
        return PairStream(HubShards(HUB_NAMES[str(source)], split, revision), held_out)
    if path.is_file() and path.suffix == ".parquet":
        return PairStream(ParquetShards([path]), held_out)
    if path.is_dir():
        parquet = sorted(path.rglob("*.parquet"))
        if parquet and not any((path / name).exists() for name in LISTS):
            return PairStream(ParquetShards(parquet), held_out)
        return PairFolder(path, held_out)
    if path.exists():
        raise ValueError(f"{source} is neither a Parquet file nor a folder")
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        return PairStream(HubShards(source, split, revision), held_out)
    raise FileNotFoundError(
        f"there is no file or folder {source}; pairs also come from {', '.join(HUB_NAMES)} or a hub dataset, owner/name"
    )


class _Listed(NamedTuple):
    prompt: str
    winner: str
    loser: str
    place: str


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
        found = [self.folder / name for name in LISTS if (self.folder / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} has no list of pairs: it must hold {' or '.join(LISTS)}")
        if len(found) > 1:
            raise ValueError(f"{folder} holds {' and '.join(path.name for path in found)}: keep one of them")
        content = found[0].read_bytes()
        self._root = os.path.realpath(self.folder)
        self._rows = [self._checked(*row) for row in _listed(found[0], content)]
        if not self._rows:
            raise ValueError(f"{found[0]} lists no pair")
        self.fingerprint: dict[str, Any] = {
            "kind": "folder",
            "pairs": len(self._rows),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        self.held_out_rows = held_out
        self._train, self._set_aside = split_held_out(len(self._rows), held_out)

    def _checked(self, place: str, row: Any) -> _Listed:
        if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in PLAIN_COLUMNS):
            raise ValueError(f"{place} must give prompt, winner and loser as text, got {row!r:.200}")
        if not row["prompt"].strip():
            raise ValueError(f"{place} has an empty prompt")
        for role in ("winner", "loser"):
            path = os.path.realpath(os.path.join(self._root, row[role]))
            if not path.startswith(self._root + os.sep):
                raise ValueError(f"{place}: the {role} {row[role]!r} lies outside {self.folder}; move it inside")
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{place}: the {role} {row[role]!r} is missing, there is no {path}")
        return _Listed(row["prompt"], row["winner"], row["loser"], place)

    def __len__(self) -> int:
        return len(self._rows)

    def open(self, row: int) -> Pair:
        """The pair of a row. Raises `Unreadable` where an image is damaged, `OSError` where it has gone."""
        listed = self._rows[row]
        winner, loser = self.folder / listed.winner, self.folder / listed.loser
        return decode_pair(PairRow(listed.prompt, winner, loser, listed.place))

    def steps(self, seed: int, cursor: Cursor | None) -> Iterator[Step[int]]:
        """Training rows without end, from `cursor` on."""
        return permuted(self._train, seed, cursor)

    def in_order(self, cursor: Cursor | None) -> Iterator[Step[int]]:
        """Every row once, held-out ones included, as listed."""
        for row in range(read_cursor(_Next, cursor).next if cursor else 0, len(self._rows)):
            yield Step(row, {"next": row + 1}, {})

    def held_out(self) -> Iterator[Pair]:
        """The held-out pairs, decoded as they are asked for; those that cannot be decoded are left out."""
        for row in self._set_aside.tolist():
            try:
                yield self.open(row)
            except Unreadable:
                continue


def _listed(path: Path, content: bytes) -> list[tuple[str, Any]]:
    """The rows of a list, each with its place for messages."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None
    if path.suffix == ".csv":
        table = csv.DictReader(StringIO(text, newline=""))
        try:
            return [(f"{path}, line {table.line_num}", row) for row in table]
        except csv.Error as error:
            raise ValueError(f"{path} is not CSV at line {table.line_num}: {error}") from None
    if path.suffix == ".json":
        rows = _json(text, str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path} must hold a list of objects with prompt, winner and loser")
        return [(f"{path}, entry {number}", row) for number, row in enumerate(rows, 1)]
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(place, _json(line, place)) for place, line in lines]


def _json(text: str, place: str) -> Any:
    return parse(object, text, place, "list of pairs", "")
