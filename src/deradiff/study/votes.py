"""A study's database: its plan, its images, its participants, every pair that was shown, and every vote.

A vote is on the disk when its `Future` has a result. Votes are only ever added, so a killed server leaves nothing to
repair, and a database can be read while the study runs.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import sqlite3
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any

from deradiff.files import databases
from deradiff.files.folders import contents
from deradiff.files.reading import parse
from deradiff.study.plan import ANSWERS, NOISE, TILES, StudyImage, StudyPlan, parse_plan
from deradiff.study.rows import CURE, StudyError, pair_of
from deradiff.study.writing import Busy, Writer

__all__ = ["AlreadyAnswered", "Busy", "NotShown", "Shown", "StudyError", "StudyFull", "Votes", "file_of", "plan_of"]

SCHEMA = 1
"""The version of the tables below; a database of a later one is refused."""

_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE images (
    configuration INTEGER NOT NULL, method TEXT NOT NULL, prompt INTEGER NOT NULL, seed INTEGER NOT NULL,
    file TEXT NOT NULL UNIQUE, PRIMARY KEY (configuration, method, prompt, seed)
) WITHOUT ROWID;
CREATE TABLE participants (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, checks TEXT NOT NULL);
CREATE TABLE pairs (
    id TEXT PRIMARY KEY, participant INTEGER NOT NULL REFERENCES participants, position INTEGER NOT NULL,
    cell INTEGER NOT NULL, prompt INTEGER NOT NULL, left TEXT NOT NULL, right TEXT NOT NULL, seeds TEXT NOT NULL,
    UNIQUE (participant, position)
) WITHOUT ROWID;
CREATE INDEX shown ON pairs (cell) WHERE left <> '' AND right <> '';
CREATE TABLE votes (
    pair TEXT NOT NULL REFERENCES pairs, question TEXT NOT NULL,
    answer TEXT NOT NULL CHECK (answer IN ('left', 'equal', 'right')), PRIMARY KEY (pair, question)
) WITHOUT ROWID;
"""

_LATER = """
CREATE INDEX IF NOT EXISTS positions ON pairs (position);
INSERT OR IGNORE INTO facts VALUES ('secret', hex(randomblob(32)));
"""
"""What studies of version 1 may lack, and gain without harm."""

PLACE_SECONDS = 3600.0
"""For so long after a vote its participant holds a place; whoever has answered every pair holds it for good."""

MOST_SILENT = 10_000
"""Participants who began and have not voted; beyond these the first ones are forgotten."""

_chance = random.SystemRandom()


class NotShown(ValueError):
    """A vote for a pair that this participant was not shown, or by nobody that the study knows."""


class AlreadyAnswered(ValueError):
    """A second, different vote for a pair."""


class StudyFull(RuntimeError):
    """The study has as many participants as its plan allows."""


@dataclass(frozen=True)
class Shown:
    """A pair as a participant sees it: the files of nine images on each side."""

    id: str
    position: int
    """From 0."""
    prompt: str
    left: tuple[str, ...]
    right: tuple[str, ...]


def file_of(folder: Path) -> Path:
    """Where the database of the study in `folder` is."""
    return folder / "study.sqlite"


class Votes:
    """The database of the study in `folder`, to be served from. A context manager.

    A folder that is not there, or empty, becomes a study of `plan`; one that was begun with it goes on.

    Raises:
        StudyError: the folder holds other files, another study, or one of a later version; the disk is full.
    """

    def __init__(self, folder: Path, plan: StudyPlan) -> None:
        self.folder, self._file = folder, file_of(folder)
        if not self._file.exists():
            _require_room(folder)
            folder.mkdir(parents=True, exist_ok=True)
        self._reading, writing = connected(self._file), connected(self._file)
        self._one_reads = Lock()
        # WAL alone would leave the last votes to a power cut; this waits for the disk at every commit.
        writing.execute("PRAGMA synchronous = FULL")
        _make_tables(writing, self._file, plan)
        self.plan = _plan_in(self._reading, self._file)
        if plan != self.plan:
            self._reading.close()
            writing.close()
            raise StudyError(
                f"{folder} holds the study {self.plan.name!r} with another plan: name another folder, since votes of "
                "two plans are not counted together"
            )
        self._writing, self._writer = writing, Writer(writing)
        # When those who have answered some pairs voted last. It stands nowhere: no time is written into the database.
        unfinished = writing.execute(_UNFINISHED, (plan.shown - 1,))
        self._voted = dict.fromkeys((row[0] for row in unfinished), monotonic())

    def __enter__(self) -> Votes:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._writing.close()
        self._reading.close()

    @property
    def mark(self) -> str:
        """A few letters that tell this study's cookie from another's on the same machine."""
        return str(self._one("SELECT value FROM facts WHERE name = 'mark'")[0])

    @property
    def secret(self) -> str:
        """What the study's cookies are signed with."""
        return str(self._one("SELECT value FROM facts WHERE name = 'secret'")[0])

    # -- images -------------------------------------------------------------------------------------------------------

    def entered(self) -> dict[StudyImage, str]:
        """The file of every image that was entered, by its place."""
        rows = self._all("SELECT configuration, method, prompt, seed, file FROM images")
        return {StudyImage(*place): str(file) for *place, file in rows}

    def enter(self, files: Mapping[StudyImage, str]) -> None:
        """Keep the files of images."""
        rows = [(*place, file) for place, file in files.items()]
        self._writer.do(lambda db: db.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?)", rows)).result()

    def image(self, name: str) -> Path | None:
        """The file entered under this name, None for any other: a path that a browser makes up leads nowhere."""
        entered = self._one("SELECT file FROM images WHERE file = ?", name)
        return None if entered is None else self.folder / "images" / entered[0]

    # -- participants and pairs ---------------------------------------------------------------------------------------

    def begin(self) -> Future[str]:
        """A new participant, whose first pair is chosen; gives the key that they are known by.

        The key itself is kept nowhere but with the participant, who has no place before the first vote.
        Raises `StudyFull`, `Busy`.
        """
        key = secrets.token_urlsafe(24)

        def work(db: sqlite3.Connection) -> str:
            self._require_place(db)
            _forget_silent(db)
            checks = json.dumps(check_positions(self.plan))
            row = db.execute("INSERT INTO participants (key, checks) VALUES (?, ?)", (_hashed(key), checks))
            self._issue(db, row.lastrowid)
            return key

        return self._writer.do(work)

    def knows(self, key: str) -> bool:
        """Whether this is a participant's key."""
        return self._one("SELECT 1 FROM participants WHERE key = ?", _hashed(key)) is not None

    def current(self, key: str) -> Shown | None:
        """The pair that waits for the participant's answers; None where all are given.

        Raises `NotShown` for a key that is nobody's.
        """
        if not self.knows(key):
            raise NotShown("nobody in this study has this key")
        row = self._one(
            "SELECT id, participant, position, cell, prompt, left, right, seeds "
            "FROM pairs p JOIN participants ON number = participant "
            "WHERE key = ? AND NOT EXISTS (SELECT 1 FROM votes WHERE pair = p.id)",
            _hashed(key),
        )
        if row is None:
            return None
        shown = pair_of(self.plan, row[1:], f"the pair {row[0]!r} in {self._file}")
        configuration = self.plan.cells[shown.cell].configuration
        text = self.plan.configurations[configuration].prompts[shown.prompt]
        sides = (self._files(configuration, method, shown.prompt, shown.seeds) for method in (shown.left, shown.right))
        return Shown(str(row[0]), shown.position, text, *sides)

    def vote(self, key: str, pair: str, answers: Mapping[str, str]) -> Future[None]:
        """Keep a participant's answers to all questions about a pair, and choose the next one.

        The same answers again change nothing and are acknowledged. Raises, from the result:
            NotShown: the pair was not shown to this participant.
            AlreadyAnswered: it was answered otherwise.
            Full: the participant has no place, and there is none.
            ValueError: an answer is missing, or there is no such question or answer.
        """
        given = dict(answers)

        def work(db: sqlite3.Connection) -> None:
            row = db.execute(
                "SELECT participant FROM pairs JOIN participants ON number = participant WHERE id = ? AND key = ?",
                (pair, _hashed(key)),
            ).fetchone()
            if row is None:
                raise NotShown("this pair was not shown to you")
            known = dict(db.execute("SELECT question, answer FROM votes WHERE pair = ?", (pair,)))
            if known and known != given:
                raise AlreadyAnswered("this pair was answered otherwise before")
            if not known:
                require_answers(self.plan, given)
                if row[0] not in self._voted or self._lapsed(row[0]):
                    self._require_place(db)
                db.executemany("INSERT INTO votes VALUES (?, ?, ?)", [(pair, *answer) for answer in given.items()])
                self._voted[row[0]] = monotonic()
                self._issue(db, row[0])

        return self._writer.do(work)

    def _require_place(self, db: sqlite3.Connection) -> None:
        """Raise `StudyFull` where all places are taken: by who has answered every pair, and who voted lately."""
        self._voted = {number: voted for number, voted in self._voted.items() if not self._lapsed(number)}
        finished = {row[0] for row in db.execute(_FINISHED, (self.plan.shown - 1,))}
        if len(finished | self._voted.keys()) >= self.plan.most_participants:
            raise StudyFull(f"the study has its {self.plan.most_participants} participants")

    def _lapsed(self, participant: int) -> bool:
        return monotonic() - self._voted[participant] > PLACE_SECONDS

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _all(self, query: str, *values: Any) -> list[Any]:
        # One at a time, each to its end: reads that overlap on one connection see what the first of them saw, so a
        # participant's next pair would be the one that was just answered.
        with databases.explained(self._file, StudyError), self._one_reads:
            return self._reading.execute(query, values).fetchall()

    def _one(self, query: str, *values: Any) -> Any:
        return next(iter(self._all(query, *values)), None)

    def _files(self, configuration: int, method: str, prompt: int, seeds: list[int]) -> tuple[str, ...]:
        places = [StudyImage(configuration, method, prompt, seed) if method else NOISE for seed in seeds]
        query = "SELECT file FROM images WHERE configuration = ? AND method = ? AND prompt = ? AND seed = ?"
        rows = [self._one(query, *place) for place in places]
        if None in rows:
            raise StudyError(f"{self._file} does not have the image {places[rows.index(None)]}: {CURE}")
        return tuple(str(row[0]) for row in rows)

    def _issue(self, db: sqlite3.Connection, participant: int | None) -> None:
        """Choose the participant's next pair, unless they have seen all of theirs."""
        plan = self.plan
        seen = db.execute(
            "SELECT cell, prompt, left <> '' AND right <> '' FROM pairs WHERE participant = ?", (participant,)
        ).fetchall()
        position = len(seen)
        if position >= plan.shown:
            return
        kept = db.execute("SELECT checks FROM participants WHERE number = ?", (participant,)).fetchone()[0]
        checks = parse(list[int], kept, f"participant {participant} in {self._file}", "list of attention checks", CURE)
        if position in checks:
            cell = _chance.randrange(len(plan.cells))
            configuration = plan.configurations[plan.cells[cell].configuration]
            prompt = _chance.randrange(len(configuration.prompts))
            sides = [_chance.choice(plan.cells[cell][1:]), NOISE.method]
        else:
            shown = dict(
                db.execute("SELECT cell, COUNT(*) FROM pairs WHERE left <> '' AND right <> '' GROUP BY cell").fetchall()
            )
            cell, prompt = next_pair(plan, {(cell, prompt) for cell, prompt, real in seen if real}, shown)
            configuration = plan.configurations[plan.cells[cell].configuration]
            sides = list(plan.cells[cell][1:])
        _chance.shuffle(sides)
        seeds = json.dumps(_chance.sample(configuration.seeds, TILES))
        row = (secrets.token_urlsafe(24), participant, position, cell, prompt, *sides, seeds)
        db.execute("INSERT INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


_FINISHED = "SELECT participant FROM pairs WHERE position = ? AND EXISTS (SELECT 1 FROM votes WHERE pair = id)"

_UNFINISHED = f"SELECT DISTINCT participant FROM votes JOIN pairs ON id = pair EXCEPT {_FINISHED}"


def _forget_silent(db: sqlite3.Connection) -> None:
    """Delete who began first of those who have not voted, where they are too many: they fill the disk for nothing."""
    silent = "position = 0 AND NOT EXISTS (SELECT 1 FROM votes WHERE pair = id)"
    count = db.execute(f"SELECT COUNT(*) FROM pairs WHERE {silent}").fetchone()[0]
    if count >= MOST_SILENT:
        query = f"SELECT participant FROM pairs WHERE {silent} ORDER BY participant LIMIT ?"
        gone = db.execute(query, (count - MOST_SILENT + 1,)).fetchall()
        db.executemany("DELETE FROM pairs WHERE participant = ?", gone)
        db.executemany("DELETE FROM participants WHERE number = ?", gone)


def connected(file: Path, *, write: bool = True) -> sqlite3.Connection:
    """A connection to a study's database that any thread may use, one at a time."""
    with databases.explained(file, StudyError), ExitStack() as opened:
        if write:
            db = opened.enter_context(
                closing(sqlite3.connect(file, isolation_level=None, timeout=30, check_same_thread=False))
            )
            db.execute("PRAGMA journal_mode = WAL")
        else:
            db = opened.enter_context(closing(databases.reading(file)))
        version = db.execute("PRAGMA user_version").fetchone()[0]
        opened.pop_all()  # all went well: it stays open
    if version > SCHEMA:
        db.close()
        raise StudyError(f"{file} was written by a later deradiff (version {version}, here {SCHEMA}): update deradiff")
    return db


def plan_of(folder: Path) -> StudyPlan:
    """The plan of the study in `folder`. Raises `StudyError` where there is none."""
    if not file_of(folder).is_file():
        raise StudyError(f"{folder} holds no study: start one with `deradiff study serve PLAN --out {folder}`")
    file = file_of(folder)
    with closing(connected(file, write=False)) as db, databases.explained(file, StudyError):
        return _plan_in(db, file)


def require_answers(plan: StudyPlan, answers: Mapping[str, str]) -> None:
    """Raise `ValueError` unless each question, and nothing else, has one of the three answers."""
    keys = [question.key for question in plan.questions]
    if missing := [key for key in keys if key not in answers]:
        raise ValueError(f"there is no answer about {', '.join(missing)}: answer every question")
    if strange := [f"{key}={answer}" for key, answer in answers.items() if key not in keys or answer not in ANSWERS]:
        raise ValueError(f"{strange[0][:80]!r} answers no question of this study")


def check_positions(plan: StudyPlan) -> list[int]:
    """Where a participant's attention checks stand: at random, one in each of as many equal stretches."""
    ends = [round(part * plan.shown / max(1, plan.attention_checks)) for part in range(plan.attention_checks + 1)]
    return [_chance.randrange(ends[part], ends[part + 1]) for part in range(plan.attention_checks)]


def next_pair(plan: StudyPlan, seen: set[tuple[int, int]], shown: Mapping[int, int]) -> tuple[int, int]:
    """A cell and a prompt that the participant has not seen: of the cells shown least so far, at random."""
    unseen: dict[int, list[int]] = {}
    for number, cell in enumerate(plan.cells):
        prompts = range(len(plan.configurations[cell.configuration].prompts))
        if left := [prompt for prompt in prompts if (number, prompt) not in seen]:
            unseen[number] = left
    least = min(shown.get(number, 0) for number in unseen)
    chosen = _chance.choice([number for number in unseen if shown.get(number, 0) == least])
    return chosen, _chance.choice(unseen[chosen])


def _require_room(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or contents(folder)):
        raise StudyError(f"{folder} holds other files and no study: name a new folder")


def _make_tables(db: sqlite3.Connection, file: Path, plan: StudyPlan) -> None:
    """Make the tables where there are none; two servers that start at once make them once."""
    with databases.explained(file, StudyError):
        db.execute("BEGIN IMMEDIATE")
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:
            for statement in filter(str.strip, _TABLES.split(";")):
                db.execute(statement)
            facts = {"plan": plan.model_dump_json(), "mark": secrets.token_hex(4)}
            db.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            db.execute(f"PRAGMA user_version = {SCHEMA}")
        for statement in filter(str.strip, _LATER.split(";")):
            db.execute(statement)
        db.execute("COMMIT")


def _plan_in(db: sqlite3.Connection, file: Path) -> StudyPlan:
    with databases.explained(file, StudyError):
        row = db.execute("SELECT value FROM facts WHERE name = 'plan'").fetchone()
    if row is None:
        raise StudyError(f"{file} holds no study: name another folder")
    where = f"the plan in {file}"
    return parse_plan(parse(dict[str, Any], row[0], where, "plan of a study", CURE), where)


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
