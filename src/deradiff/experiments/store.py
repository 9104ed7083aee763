"""The store: an SQLite file that knows every image of an experiment, and the images as files beside it.

An image counts once its row says so, and its row is written after its file has its name. One process writes; any
number may read meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deradiff.algorithm.path_weights import Obstacle
from deradiff.files import databases
from deradiff.files.folders import contents
from deradiff.files.locks import taken
from deradiff.files.reading import Record, fit, parse
from deradiff.files.writing import atomic_file

SCHEMA = 1
"""The version of the tables below; a store of a later one is refused."""

IMAGE = "the image"
"""What stands among the failures in place of a score, where an image could not be drawn."""

_DIAGNOSTICS = "told"
"""The column of what is known of an image, as stores of version 0.1 call it."""

_TABLES = f"""
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE runs (number INTEGER PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE items (
    id TEXT PRIMARY KEY, batch INTEGER NOT NULL, place INTEGER NOT NULL, drawing TEXT NOT NULL,
    sha256 TEXT, size INTEGER, mtime INTEGER, {_DIAGNOSTICS} TEXT, seconds REAL, run INTEGER REFERENCES runs
) WITHOUT ROWID;
CREATE INDEX batches ON items (batch, place);
CREATE TABLE scores (
    item TEXT NOT NULL, name TEXT NOT NULL, sha256 TEXT NOT NULL, value REAL, error TEXT, run INTEGER,
    PRIMARY KEY (item, name)
) WITHOUT ROWID;
CREATE TABLE features (
    item TEXT NOT NULL, name TEXT NOT NULL, sha256 TEXT NOT NULL, vector BLOB, error TEXT, run INTEGER,
    PRIMARY KEY (item, name)
) WITHOUT ROWID;
"""


DAMAGED = "restore the store from a copy, or begin a new experiment"


class StoredGuidance(Record):
    """The weights of an image drawn at one guidance scale: see `guided_weights.GuidedWeights`."""

    scale: float
    conditional: float
    unconditional: float
    strength: float


class StoredDiagnostics(Record):
    """What is known of an image; how much of it depends on how it was drawn."""

    log_weight: float = 0.0
    log_ratios: dict[str, float] = Field(default_factory=dict)
    path_kl: float | None = None
    memoryless: bool = False
    obstacles: list[Obstacle] = Field(default_factory=list)
    predictions: int = 0
    guidance: StoredGuidance | None = None
    effective: float | None = None
    families: int | None = None
    collapsed: bool = False


class StoreError(RuntimeError):
    """The store cannot be read or written; the message says what to do."""


class Missing(StoreError):
    """An image that the store knows is gone or is not what it was."""


@dataclass(frozen=True)
class Image:
    """An image that is there: its bytes are those that were drawn."""

    id: str
    sha256: str
    path: Path

    def read(self) -> bytes:
        """The file's bytes. Raises `Missing` if they are not what was written."""
        with suppress(OSError):
            content = self.path.read_bytes()
            if hashlib.sha256(content).hexdigest() == self.sha256:
                return content
        raise Missing(f"{self.path} is gone or was altered")


class Store:
    """The images of an experiment and everything known about them, in the folder of a run.

    A context manager; `create` makes the folder where there is none. Raises `StoreError` for a folder without a store,
    or with one of a later version, for a disk that is full. Raises
    `FolderInUse` where another process writes to it.
    """

    def __init__(self, folder: Path, *, create: bool = False, write: bool = True) -> None:
        self.folder, self.file, self.images = folder, folder / "store.sqlite", folder / "images"
        self.run: int | None = None
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file: name a folder")
        with databases.explained(self.file, StoreError), ExitStack() as opened:
            fresh = not self.file.exists()
            if fresh and not create:
                raise StoreError(f"{folder} holds no experiment: start one with `deradiff experiment run`")
            if fresh and folder.exists() and contents(folder):
                raise StoreError(f"{folder} holds other files and no experiment: name another folder")
            if write:
                opened.enter_context(taken(folder, "an experiment"))
            self._db = opened.enter_context(
                closing(databases.writing(self.file) if write else databases.reading(self.file))
            )
            self._require_tables(write)
            if write:  # now that the folder is known by its database, should this be cut short
                self.images.mkdir(exist_ok=True)
                for left in self.images.glob("*/.*.partial"):
                    left.unlink(missing_ok=True)
            self._opened = opened.pop_all()

    def _require_tables(self, write: bool) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise StoreError(
                f"{self.file} was written by a later deradiff (store version {version}; this one reads {SCHEMA}): "
                "update deradiff"
            )
        if version == 0 and not write:
            raise StoreError(f"{self.folder} holds nothing yet: its first run ended before it began; run it again")
        if write:
            # After a power cut the last rows may be lost, but the file stays whole; their images are drawn again.
            self._db.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            with self._transaction():
                for statement in filter(str.strip, _TABLES.split(";")):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with databases.explained(self.file, StoreError):
            databases.patient(self.file, lambda: self._db.execute("BEGIN IMMEDIATE"))
            try:
                yield
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        # All at once: what is left open half-way would speak up when the store is closed.
        with databases.explained(self.file, StoreError):
            return iter(databases.patient(self.file, lambda: self._db.execute(query, values).fetchall()))

    # -- facts and provenance -----------------------------------------------------------------------------------------

    def fact(self, name: str, kind: Any = Any) -> Any:
        """What was remembered under `name`, plain data that must be of this `kind`; None if nothing was."""
        row = next(self._rows("SELECT value FROM facts WHERE name = ?", name), None)
        return None if row is None else self._parsed(kind, row[0], f"the fact {name[:40]!r}")

    def remember(self, name: str, value: Any) -> None:
        """Keep `value`, plain data, under `name`."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value, ensure_ascii=False))
            )

    def begin(self, record: Mapping[str, Any]) -> None:
        """A run begins: what it makes from here on was made with the versions and devices of `record`."""
        with self._transaction():
            row = self._db.execute("SELECT number FROM runs WHERE record = ?", (_json(record),)).fetchone()
            self.run = row[0] if row else None
            if self.run is None:
                self.run = self._db.execute("INSERT INTO runs (record) VALUES (?)", (_json(record),)).lastrowid

    def runs(self) -> dict[int, dict[str, Any]]:
        """What every run was made with, by its number."""
        rows = self._rows("SELECT number, record FROM runs")
        return {number: self._parsed(dict[str, Any], record, f"run {number}") for number, record in rows}

    # -- images -------------------------------------------------------------------------------------------------------

    def known(self) -> set[str]:
        """The identities of all images that belong to a batch, drawn or not."""
        return {str(row[0]) for row in self._rows("SELECT id FROM items")}

    def add_batches(self, batches: Iterable[Sequence[tuple[str, Mapping[str, Any]]]]) -> None:
        """Append batches of (identity, everything that decides the image). They stay together from now on."""
        with self._transaction():
            number = self._db.execute("SELECT COALESCE(MAX(batch), -1) FROM items").fetchone()[0]
            for batch in batches:
                number += 1
                rows = [(item, number, place, _json(drawing)) for place, (item, drawing) in enumerate(batch)]
                self._db.executemany("INSERT INTO items (id, batch, place, drawing) VALUES (?, ?, ?, ?)", rows)

    def batches(self) -> dict[int, list[tuple[str, bool]]]:
        """The members of every batch in order, each with whether its image is there."""
        batches: dict[int, list[tuple[str, bool]]] = {}
        for item, batch, drawn in self._rows("SELECT id, batch, sha256 IS NOT NULL FROM items ORDER BY batch, place"):
            batches.setdefault(batch, []).append((str(item), bool(drawn)))
        return batches

    def unbatch(self, items: Iterable[str]) -> None:
        """Forget that these images, which are not there, belong to a batch."""
        with self._transaction():
            self._db.executemany("DELETE FROM items WHERE id = ? AND sha256 IS NULL", [(item,) for item in items])

    def drawn(self) -> dict[str, Image]:
        """Every image that is there."""
        rows = self._rows("SELECT id, sha256 FROM items WHERE sha256 IS NOT NULL")
        return {item: Image(item, sha256, self.path(item)) for item, sha256 in rows}

    def path(self, item: str) -> Path:
        """Where the image's file is. Raises `StoreError` for a row whose identity is none."""
        if not isinstance(item, str) or not re.fullmatch(r"[\w.-]{1,100}", item):
            raise StoreError(f"image {item!r} in {self.file} has no identity of an image: {DAMAGED}")
        return self.images / item[:2] / f"{item}.png"

    def put(self, drawn: Sequence[tuple[str, bytes | None, Mapping[str, Any]]], seconds: float) -> None:
        """Keep images of one batch, (identity, PNG file, what is known of it), that took so long together.

        Without a file it was drawn and came to nothing (see `unmade`).
        """
        rows: list[tuple[Any, ...]] = []
        for item, png, diagnostics in drawn:
            if png is None:
                rows.append((None, None, None, _json(diagnostics), seconds / len(drawn), self.run, item))
                continue
            path = self.path(item)
            with databases.explained(self.file, StoreError, needed=len(png)):
                path.parent.mkdir(exist_ok=True)
                with atomic_file(path) as temporary:
                    temporary.write_bytes(png)
                state = path.stat()
            digest = hashlib.sha256(png).hexdigest()
            made = digest, state.st_size, state.st_mtime_ns
            rows.append((*made, _json(diagnostics), seconds / len(drawn), self.run, item))
        with self._transaction():
            self._db.executemany(
                f"UPDATE items SET sha256 = ?, size = ?, mtime = ?, {_DIAGNOSTICS} = ?, seconds = ?, run = ? "
                "WHERE id = ?",
                rows,
            )

    def diagnostics(self) -> dict[str, tuple[dict[str, Any], float, int | None]]:
        """Of every image that is there: what is known of it, its seconds, and the number of its run."""
        rows = self._rows(f"SELECT id, {_DIAGNOSTICS}, seconds, run FROM items WHERE sha256 IS NOT NULL")
        known = {}
        for item, diagnostics, seconds, run in rows:
            if not isinstance(seconds, float) or not isinstance(run, int | None):
                raise StoreError(f"image {item!r} in {self.file} took {seconds!r} seconds in run {run!r}: {DAMAGED}")
            known[item] = (self._parsed(StoredDiagnostics, diagnostics, f"image {item!r}"), seconds, run)
        return known

    def _parsed(self, kind: Any, text: object, row: str) -> Any:
        """A cell with JSON, which must be of this kind, as plain data. Raises `StoreError` that names the row."""
        where, what = f"{row} in {self.file}", "record of an experiment"
        try:
            content = parse(Any, text, where, what, DAMAGED)
            fit(kind, content, where, what, DAMAGED)
        except ValueError as error:
            raise StoreError(str(error)) from None
        return content

    def unmade(self) -> dict[str, dict[str, Any]]:
        """What is known of every image that was drawn and is none: `blacked_out`, or why it `failed`."""
        rows = self._rows(f"SELECT id, {_DIAGNOSTICS} FROM items WHERE sha256 IS NULL AND {_DIAGNOSTICS} IS NOT NULL")
        known = {item: json.loads(diagnostics) for item, diagnostics in rows}
        return {item: why for item, why in known.items() if why.get("blacked_out") or why.get("failed")}

    def altered(self, thoroughly: bool = False) -> list[str]:
        """The images that are gone or are not what was drawn.

        A file with the size and time that it was written with is taken for whole, unless `thoroughly` reads them all.
        """
        lost = []
        for item, sha256, size, mtime in list(
            self._rows("SELECT id, sha256, size, mtime FROM items WHERE sha256 IS NOT NULL")
        ):
            image = Image(item, sha256, self.path(item))
            try:
                state = image.path.stat()
                if thoroughly or (state.st_size, state.st_mtime_ns) != (size, mtime):
                    image.read()
            except (OSError, Missing):
                lost.append(item)
        return lost

    def check(self, thoroughly: bool = False) -> list[str]:
        """Forget the images that are `altered`, so that they are drawn again."""
        lost = self.altered(thoroughly)
        self.forget(lost)
        return lost

    def forget(self, items: Iterable[str]) -> None:
        """These images are not there any more."""
        with self._transaction():
            self._db.executemany("UPDATE items SET sha256 = NULL WHERE id = ?", [(item,) for item in items])

    # -- what is measured of single images ----------------------------------------------------------------------------

    def unscored(self, table: str, name: str, items: Iterable[str], again: bool = False) -> list[str]:
        """Those of `items` that have no value of this name yet, for the image that is there now.

        Images for which it failed count as done, except `again`.
        """
        _require_table(table)
        query = f"SELECT i.id FROM items i JOIN {table} s ON s.item = i.id AND s.name = ? AND s.sha256 = i.sha256" + (
            " WHERE s.error IS NULL" if again else ""
        )
        done = {row[0] for row in self._rows(query, name)}
        return [item for item in items if item not in done]

    def put_scores(self, table: str, name: str, scored: Sequence[tuple[Image, Any, str | None]]) -> None:
        """Keep the values, or errors in words, of one scorer: numbers in `scores`, vectors in `features`."""
        _require_table(table)
        rows = []
        for image, value, error in scored:
            if table == "features" and value is not None:
                value = np.asarray(value, dtype="<f4").tobytes()
            rows.append((image.id, name, image.sha256, value, error, self.run))
        with self._transaction():
            self._db.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?, ?, ?)", rows)

    def scores(self, name: str) -> dict[str, float]:
        """The score of every image that is there and has one."""
        query = "SELECT id, value FROM items JOIN scores s ON item = id AND s.sha256 = items.sha256 WHERE name = ?"
        return {item: self._number(item, name, value) for item, value in self._rows(query, name) if value is not None}

    def _number(self, item: str, name: str, value: object) -> float:
        if not isinstance(value, float):
            raise StoreError(f"the score {name} of image {item!r} in {self.file} is {value!r:.80}: {DAMAGED}")
        return value

    def features(self, name: str) -> dict[str, NDArray[np.float32]]:
        """The feature vector of every image that is there and has one."""
        query = "SELECT id, vector FROM items JOIN features s ON item = id AND s.sha256 = items.sha256 WHERE name = ?"
        rows = {item: blob for item, blob in self._rows(query, name) if blob is not None}
        lengths = {len(blob) if isinstance(blob, bytes) else 0 for blob in rows.values()}
        for item, blob in rows.items():
            if not isinstance(blob, bytes) or not blob or len(lengths) > 1 or len(blob) % 4:
                raise StoreError(f"the features {name} of image {item!r} in {self.file} are no such vector: {DAMAGED}")
        return {item: np.frombuffer(blob, dtype="<f4") for item, blob in rows.items()}

    def failures(self) -> list[tuple[str, str, str]]:
        """(score, image, error) of everything that could not be computed for an image that is there.

        Of an image that could not be drawn itself, with `IMAGE` in place of a score.
        """
        parts = [
            f"SELECT s.name, s.item, s.error FROM {table} s JOIN items i ON i.id = s.item AND i.sha256 = s.sha256 "
            "WHERE s.error IS NOT NULL"
            for table in ("scores", "features")
        ]
        undrawn = [(IMAGE, item, str(why["failed"])) for item, why in self.unmade().items() if "failed" in why]
        rows = self._rows(" UNION ALL ".join(parts))
        return [*undrawn, *((str(name), str(item), str(error)) for name, item, error in rows)]


def _require_table(table: str) -> None:
    if table not in ("scores", "features"):
        raise ValueError(f"there is no table {table!r}")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
