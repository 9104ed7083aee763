"""One process at a time in an output folder, and a place of ours in it for what is not finished."""

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from deradiff.files.disks import FULL, DiskFull, full

PRIVATE = ".deradiff"
"""The folder in an output folder that is ours alone: the lock, and what is not finished. It goes when work is done."""

LOCK, HOLDER = "lock", "holder.json"
"""In it: what is locked, and who by."""

_held: set[tuple[Path, int]] = set()
"""The folders that this process holds, and the threads that do."""


class FolderInUse(OSError):
    """Another process, or another thread of this one, holds the folder; the message says who, and since when."""


@contextmanager
def taken(folder: Path, what: str) -> Iterator[Path]:
    """Hold `folder`, which is made, as long as the block runs; yields a folder in it for what is not finished.

    What the block leaves in that folder is there for the next one that takes `folder`; an empty one goes, and so does
    `folder` if it was made here and is empty. A thread that holds a folder may take it again.

    The lock is the system's: it goes with the process, however that ends. `what` is being made there is told to
    whoever comes second.

    Raises:
        FolderInUse: somebody else holds it.
        OSError: it is a file, or cannot be made or written to.
    """
    folder = folder.resolve()
    private, holder = folder / PRIVATE, (folder, threading.get_ident())
    if holder in _held:
        yield private
        return
    made: list[Path] = []
    try:
        with _saying_what_to_do(folder):
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            lock = _locked(folder, private, what)
        try:
            _held.add(holder)
            yield private
        finally:
            _held.discard(holder)
            _tidy(private)
            lock.release()
    finally:
        for path in (private, *made):
            with suppress(OSError):
                path.rmdir()


def _locked(folder: Path, private: Path, what: str) -> Any:
    from filelock import FileLock, Timeout

    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder")
    if private.is_symlink() or (private.exists() and not private.is_dir()):
        raise FileExistsError(f"{private} is in the way: deradiff keeps there what it has not finished. Move it away")
    lock = FileLock(private / LOCK, timeout=0.5)
    try:
        _acquire(lock, private)
        (private / HOLDER).write_text(json.dumps(_holder(what)), encoding="utf-8")
    except Timeout:
        raise FolderInUse(
            f"{folder} is in use: {_described(private)}. Wait for it, stop it, or name another folder"
        ) from None
    except OSError:
        lock.release()
        raise
    return lock


@contextmanager
def _saying_what_to_do(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # words of ours
            raise
        if error.errno in FULL:
            raise DiskFull(full(folder)) from None
        raise type(error)(f"{folder} cannot be written to ({error.strerror}): name another folder") from None


def _acquire(lock: Any, private: Path) -> None:
    """Take the lock, whose folder another process may remove, as empty, between the two lines."""
    for attempt in range(20):
        try:
            private.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            return
        except (FileNotFoundError, FileExistsError):  # the latter where it went while it was looked at
            if attempt == 19:
                raise


def _holder(what: str) -> dict[str, Any]:
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"what": what, "process": os.getpid(), "host": socket.gethostname(), "since": now}


def _described(private: Path) -> str:
    """Who holds the folder, as far as they have said so by now."""
    try:
        about = json.loads((private / HOLDER).read_text(encoding="utf-8"))
        who = f"process {about['process']} on {about['host']}"
        return f"{who} has been making {about['what']} there since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process has just begun there"


def _tidy(private: Path) -> None:
    """Remove what the lock needed, if nothing unfinished is left: while it is held, so that nobody else has it."""
    with suppress(OSError):
        (private / HOLDER).unlink()
        if [path.name for path in private.iterdir()] == [LOCK]:
            (private / LOCK).unlink()


def discard(path: Path) -> None:
    """Remove a file or a folder in a private folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
