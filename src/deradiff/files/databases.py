"""SQLite files: read where nothing may be written, waited for where another process writes, and their errors in words.

Errors say what was met: no right to write, a full disk, a lock, a folder that is gone. Only what SQLite itself finds
damaged is called damaged.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from deradiff.files import disks
from deradiff.files.waiting import LOOK, Patience

Value = TypeVar("Value")

_UNSHARED = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
}
"""What SQLite says where it may read a database, but not make the files that its readers and writers share."""


class ReadConnection(sqlite3.Connection):
    """A connection that only reads, from a `copy` where there is one."""

    copy: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        """Close it, and remove the copy."""
        super().close()
        if self.copy is not None:
            self.copy.cleanup()


def writing(file: Path) -> sqlite3.Connection:
    """A connection to write with, in WAL mode: others can read meanwhile."""
    db = sqlite3.connect(file, isolation_level=None, timeout=LOOK)
    try:
        patient(file, lambda: db.execute("PRAGMA journal_mode = WAL"))
    except BaseException:
        db.close()
        raise
    return db


def reading(file: Path) -> sqlite3.Connection:
    """A connection to read with, which needs no right to write to the file or its folder, and which any thread may use.

    Who may not write cannot make the files that readers and writers share, and where these are missing nobody writes:
    then the database is read as it lies, and with what a killed writer left beside it from a copy.
    """
    try:
        return _reading(file, "mode=rw")  # which makes no file; SQLite reads where it may not write
    except sqlite3.OperationalError as error:
        if _code(error) not in _UNSHARED or not _may(file, os.R_OK):
            raise
    log = file.with_name(f"{file.name}-wal")
    if not log.exists() or log.stat().st_size == 0:
        return _reading(file, "immutable=1")
    copy = tempfile.TemporaryDirectory(prefix="deradiff-")
    try:
        for path in (file, log):
            shutil.copyfile(path, Path(copy.name, path.name))
        db = _reading(Path(copy.name, file.name), "mode=rw")
    except BaseException:
        copy.cleanup()
        raise
    db.copy = copy
    return db


def _reading(file: Path, how: str) -> ReadConnection:
    where = f"{file.resolve().as_uri()}?{how}"
    db = sqlite3.connect(
        where, uri=True, isolation_level=None, timeout=LOOK, check_same_thread=False, factory=ReadConnection
    )
    try:
        db.execute("PRAGMA query_only = ON")
        patient(file, lambda: db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone())  # now it can, or never
    except BaseException:
        db.close()
        raise
    return db


def patient(file: Path, attempt: Callable[[], Value]) -> Value:
    """What `attempt` gives once no other process has locked the database. Raises `WaitedTooLong` as `Patience` does."""
    patience = Patience(f"{file}", lambda: "another process has locked it; stop it, or let it end")
    while True:
        try:
            return attempt()
        except sqlite3.OperationalError as error:
            if _code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            patience.check()


# -- errors in words --------------------------------------------------------------------------------------------------


@contextmanager
def explained(file: Path, kind: type[Exception], needed: int = 0) -> Iterator[None]:
    """Raise errors of SQLite about the database `file`, and those of its disk, as `kind`, in words.

    `needed` is how many bytes the block writes, where that is known.
    """
    try:
        with disks.explained(file.parent, kind, needed):
            yield
    except (sqlite3.Error, UnicodeError) as error:  # of a damaged file, the words of an error may be no text either
        raise kind(_of_sqlite(file, error)) from error


def _of_sqlite(file: Path, error: Exception) -> str:
    match _code(error):
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return (
                f"{file} is damaged: {_damage(file, error)}. Restore it from a copy, or see what is left of it with "
                f"`sqlite3 {file.name} .recover`; nothing was changed"
            )
        case sqlite3.SQLITE_FULL:
            return disks.full(file)
        case sqlite3.SQLITE_CONSTRAINT:
            return f"{file} refused what deradiff wrote ({error}): that is an error of deradiff's, please report it"
    if not file.exists():
        return disks.gone(file)
    if not _may(file, os.R_OK):
        return f"{file} may not be read (permission denied): ask its owner"
    if not (_may(file, os.W_OK) and _may(file.parent, os.W_OK)):
        return f"{file} may not be written to (permission denied, or a read-only disk): {error}"
    return f"{file} cannot be used: {error}"


def _code(error: Exception) -> int:
    """SQLite's own number for an error; Python's own, of a text that is none, has the one of a damaged file."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)) & 0xFF


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _damage(file: Path, error: Exception) -> str:
    """What SQLite finds wrong with a file."""
    with suppress(sqlite3.Error, UnicodeError), closing(reading(file)) as db:
        for (finding,) in db.execute("PRAGMA quick_check(1)"):
            if finding != "ok":
                return " ".join(finding.removeprefix("*** in database main ***").split())
    return str(error)
