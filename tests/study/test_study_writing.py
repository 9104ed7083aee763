"""The one writer of the votes: what fails alone, what a full disk says, and who is turned away."""

import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from deradiff.study import writing
from deradiff.study.votes import Busy
from messages import naming

# -- the writer -------------------------------------------------------------------------------------------------------


def writer(tmp_path: Path) -> tuple[writing.Writer, sqlite3.Connection]:
    db = sqlite3.connect(tmp_path / "some.sqlite", isolation_level=None, check_same_thread=False)
    db.execute("CREATE TABLE numbers (number INTEGER UNIQUE)")
    return writing.Writer(db), db


def inserting(number: int, table: str = "numbers") -> Callable[[sqlite3.Connection], int | None]:
    """A job that inserts a number; gives the number of its row."""
    return lambda db: db.execute(f"INSERT INTO {table} VALUES ({number})").lastrowid


def test_a_job_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    written, db = writer(tmp_path)
    hold: Future[None] = Future()
    first = written.do(lambda db: hold.result())

    def broken(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO numbers VALUES (7)")
        raise ValueError("no")

    jobs = [written.do(inserting(number)) for number in (1, 2, 2)]
    failing, cancelled = written.do(broken), written.do(broken)
    assert cancelled.cancel()
    hold.set_result(None)
    first.result()
    assert (jobs[0].result(), jobs[1].result()) == (1, 2)
    with pytest.raises(sqlite3.IntegrityError):
        jobs[2].result()
    with pytest.raises(ValueError, match="no"):
        failing.result()
    written.close()
    assert db.execute("SELECT number FROM numbers ORDER BY number").fetchall() == [(1,), (2,)]


def test_nobody_is_acknowledged_where_the_commit_fails(tmp_path: Path) -> None:
    written, db = writer(tmp_path)
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("CREATE TABLE later (number REFERENCES numbers (number) DEFERRABLE INITIALLY DEFERRED)")
    hold: Future[None] = Future()
    written.do(lambda db: hold.result())
    jobs = [written.do(inserting(5)), written.do(inserting(6, "later"))]
    hold.set_result(None)
    for job in jobs:
        with pytest.raises(sqlite3.IntegrityError):
            job.result()
    written.do(inserting(1)).result()
    written.close()
    assert db.execute("SELECT number FROM numbers").fetchall() == [(1,)]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    written, db = writer(tmp_path)
    db.execute("PRAGMA max_page_count = 5")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        written.do(lambda db: db.executemany("INSERT INTO numbers VALUES (?)", [(n,) for n in range(9000)])).result()
    written.do(inserting(1)).result()
    written.close()
    assert db.execute("SELECT number FROM numbers").fetchall() == [(1,)]


def test_too_many_are_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "WAITING", 2)
    written, _ = writer(tmp_path)
    hold: Future[None] = Future()
    with pytest.raises(Busy, match=naming(2, "votes")):
        for _ in range(10):
            written.do(lambda db: hold.result())
    hold.set_result(None)
    written.close()
