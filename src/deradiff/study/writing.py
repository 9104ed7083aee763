"""One writer for an SQLite file: what is asked for at the same time shares a commit, and so the wait for the disk."""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

WAITING = 256
"""Jobs that may wait; more are turned away."""

TOGETHER = 64
"""Jobs that share a commit at most."""


class Busy(RuntimeError):
    """Too much waits to be written: try again in a moment."""


class _Job(NamedTuple):
    work: Callable[[sqlite3.Connection], Any]
    result: Future[Any]


class Writer:
    """Runs jobs on a connection in a thread of its own, one after the other.

    A job's result is there once its commit is on the disk, never before. A job that raises leaves nothing behind and
    does not hold up the others.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self._jobs: queue.Queue[_Job | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="votes", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Have `work` done within a transaction. Raises `Busy` where too many wait."""
        job = _Job(work, Future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy(f"{WAITING} votes wait to be written: try again in a moment") from None
        return job.result

    def close(self) -> None:
        """Write what still waits, and end."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        last = False
        while not last:
            jobs = [self._jobs.get()]
            with suppress(queue.Empty):
                while len(jobs) < TOGETHER and jobs[-1] is not None:
                    jobs.append(self._jobs.get_nowait())
            last = jobs[-1] is None
            # Whoever went away before their job began asked for nothing.
            batch = [job for job in jobs if job is not None and job.result.set_running_or_notify_cancel()]
            for job, (value, error) in zip(batch, self._committed(batch), strict=True):
                if error is None:
                    job.result.set_result(value)
                else:
                    job.result.set_exception(error)

    def _committed(self, batch: list[_Job]) -> list[tuple[Any, Exception | None]]:
        """What every job of a batch gave, or raised, after their common commit."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            outcomes = [self._outcome(job) for job in batch]
            self._db.execute("COMMIT")
        except Exception as error:  # such as a full disk: nothing of the batch was written
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            return [(None, error)] * len(batch)
        return outcomes

    def _outcome(self, job: _Job) -> tuple[Any, Exception | None]:
        self._db.execute("SAVEPOINT job")
        try:
            value = job.work(self._db)
        except Exception as error:
            if not self._db.in_transaction:  # a full disk may have undone the whole batch
                raise
            self._db.execute("ROLLBACK TO job")
            self._db.execute("RELEASE job")
            return None, error
        self._db.execute("RELEASE job")
        return value, None
