"""What the operating system says of a disk, in words for who runs a command: it is full, gone, or not theirs."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk that is full, a quota, or a limit on the size of files is reported as."""


class DiskFull(OSError):
    """There is no room; the message says where, and how much there is."""


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Raise `DiskFull` where writing to `path` fails for want of room.

    The libraries that write weights report that in ways of their own: safetensors by its own error, torch by a
    `RuntimeError`.
    """
    try:
        yield
    except Exception as error:
        if not _means_full(error):
            raise
        raise DiskFull(f"{path} could not be written: {full(path)}") from error


def _means_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    message = str(error)
    if type(error).__name__ == "SafetensorError":
        return any(f"os error {code}" in message for code in FULL)
    return isinstance(error, RuntimeError) and any(
        sign in message for sign in ("file write failed", "unexpected pos", *map(os.strerror, FULL))
    )


@contextmanager
def explained(folder: Path, kind: type[Exception] = OSError, needed: int = 0) -> Iterator[None]:
    """Raise errors of the operating system in words, as `kind`, where it has no room or does not let us in.

    So too where `folder`, in which the block works, has gone. `needed` is how many bytes it writes, if that is known.
    """
    try:
        yield
    except DiskFull as error:
        raise kind(full(folder, needed) if needed else str(error)) from error
    except OSError as error:
        if (message := in_words(error, folder, needed)) is None:
            raise
        raise kind(message) from error


def in_words(error: OSError, folder: Path | None = None, needed: int = 0) -> str | None:
    """What an error of the operating system, on a path in `folder`, means for who caused it; None for others."""
    named = error.filename2 or error.filename or folder
    return None if named is None else _message(Path(os.fsdecode(named)), folder, error.errno, needed)


def _message(path: Path, folder: Path | None, number: int | None, needed: int) -> str | None:
    match number:
        case number if number in FULL:
            return full(path, needed)
        case errno.EACCES | errno.EPERM:
            return f"{path} may not be read or written by you (permission denied): ask its owner, or name another"
        case errno.EROFS:
            return f"{path} is on a read-only disk: name a folder on another one"
        case errno.ENOENT if folder is not None and not folder.exists():
            return gone(folder)
    return None


def full(path: Path, needed: int = 0) -> str:
    """That the disk of `path` is full: how much is free there, and how much is needed, if that is known."""
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    free = f"{_size(shutil.disk_usage(folder).free)} free" + (f", {_size(needed)} needed" if needed else "")
    return f"the disk of {folder} is full ({free}): make room and run again; what is stored stays"


def gone(path: Path) -> str:
    """That `path` is not there any more, and what of its folders is."""
    return f"{path} is gone ({standing(path.absolute().parent)} is there): was a folder moved, or a disk taken away?"


def standing(path: Path) -> Path:
    """What is there of `path`: itself, or the nearest of the folders that it would lie in."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _size(count: int) -> str:
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:,.4g} {name}"
    return f"{count} bytes"


def may_write(folder: Path) -> bool:
    """Whether files may be made in a folder that is there."""
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
