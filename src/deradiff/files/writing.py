"""Files and folders that are whole or not there."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deradiff.files.disks import naming_a_full_disk


@contextmanager
def atomic_file(
    path: Path, within: Path | None = None, put: Callable[[Path, Path], object] = os.replace
) -> Iterator[Path]:
    """Yield the name of a temporary file, which `put` renames to `path` if the block succeeds; else it is removed.

    It lies beside `path` or in the folder `within`, and no other process or thread has it.

    Raises `DiskFull`.
    """
    temporary = _temporary(path, within)
    try:
        with naming_a_full_disk(path):
            yield temporary
            with_usual_rights(temporary)
            put(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, within: Path | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder, renamed to `path` if the block succeeds and removed if it does not.

    As `atomic_file` for files. Raises `DiskFull`, and `OSError` where `path` holds files meanwhile.
    """
    temporary = _temporary(path, within)
    try:
        with naming_a_full_disk(path):
            temporary.mkdir(parents=True)
            yield temporary
            with_usual_rights(temporary)
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def with_usual_rights(path: Path) -> None:
    """Give a file, or all in a folder, the rights of any new one: safetensors makes files for their owner alone."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and file.stat().st_mode & 0o777 == _OWN:
            file.chmod(_USUAL)


def _umask() -> int:
    """That of the process, which can only be read by setting it."""
    before = os.umask(0)
    os.umask(before)
    return before


_OWN, _USUAL = 0o600, 0o666 & ~_umask()


def _temporary(path: Path, within: Path | None) -> Path:
    return (within or path.parent) / f".{path.name[-100:]}.{secrets.token_hex(6)}.partial"


def write_json(path: Path, record: Mapping[str, Any], within: Path | None = None) -> None:
    """Write `record` to `path` as indented JSON, whole or not at all."""
    with atomic_file(path, within) as temporary:
        temporary.write_text(json_text(record), encoding="utf-8")


def json_text(record: Mapping[str, Any]) -> str:
    """`record` as indented JSON."""
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
