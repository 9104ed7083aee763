"""Files and folders that are whole or not there."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk that is full, or a quota, is reported as."""


class DiskFull(OSError):
    """The disk, a quota or a limit on files leaves no room; the message says where, and how much there is."""


@contextmanager
def whole(path: Path, within: Path | None = None) -> Iterator[Path]:
    """Yield the name of a temporary file, renamed to `path` if the block succeeds and removed if it does not.

    It lies beside `path` or in the folder `within`, and no other process or thread has it.

    Raises `DiskFull`.
    """
    temporary = (within or path.parent) / f".{path.name[-100:]}.{secrets.token_hex(6)}.partial"
    try:
        with naming_a_full_disk(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, within: Path | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder, renamed to `path` if the block succeeds and removed if it does not.

    As `whole` for files. Raises `DiskFull`, and `OSError` where `path` holds files meanwhile.
    """
    temporary = (within or path.parent) / f".{path.name[-100:]}.{secrets.token_hex(6)}.partial"
    try:
        with naming_a_full_disk(path):
            temporary.mkdir(parents=True)
            yield temporary
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, record: Mapping[str, Any], within: Path | None = None) -> None:
    """Write `record` to `path` as indented JSON, whole or not at all."""
    with whole(path, within) as temporary:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Say which disk is full, and how much room it has, where writing to `path` fails for that.

    The libraries that write weights report it in ways of their own: safetensors by its own error, torch by a
    `RuntimeError`. All become `DiskFull`.
    """
    try:
        yield
    except Exception as error:
        if not _means_full(error):
            raise
        place = next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())
        free = shutil.disk_usage(place).free
        raise DiskFull(
            f"{path} could not be written: its disk is full ({free / 1e9:.3g} GB free), or a quota or a limit on the "
            "size of files is reached. Make room, then run again"
        ) from error


def _means_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    words = str(error)
    if type(error).__name__ == "SafetensorError":
        return any(f"os error {code}" in words for code in _FULL)
    return isinstance(error, RuntimeError) and any(
        sign in words for sign in ("file write failed", "unexpected pos", *map(os.strerror, _FULL))
    )
