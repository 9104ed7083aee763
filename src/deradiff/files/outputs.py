"""What a command leaves behind: nobody else's file is replaced, and what belongs together is replaced together."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deradiff.files import disks
from deradiff.files.writing import write_json

_NAME = r"[^/\\]*[^/\\.][^/\\]*"
"""A file in the folder itself."""


class Manifest(BaseModel):
    """What lies in a folder of one kind's files, as `.deradiff-KIND.json` says."""

    model_config = ConfigDict(extra="forbid")

    files: dict[Annotated[str, Field(pattern=f"^{_NAME}$")], list[str]] = {}
    """The SHA-256 of every file: two where one is about to take another's place."""
    unfinished: Annotated[str, Field(pattern=r"^\.deradiff-[a-z]+\.[0-9a-f]{16}$")] | None = None
    """The folder that the next ones are written into."""


@contextmanager
def replaced(folder: Path, kind: str, first: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder for a `kind`'s files (a report's, an analysis's), which then take the last ones' places.

    They come to lie in `folder` when the block has ended well. What is ours there, a record says: only files that it
    names are replaced or removed, and those only as we wrote them. Killed in between, the same command makes it good.

    Args:
        folder: made where there is none.
        kind: one word.
        first: names that are known before the work, and looked for then.

    Raises:
        FileExistsError: a file has the name of one of ours and is not ours, or was changed since.
        OSError: `folder` cannot be written to, or its disk is full.
    """
    file = folder / f".deradiff-{kind}.json"
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with disks.explained(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            record = _read(file)
            _require_ours(folder, record, first)
            if record.unfinished is not None:
                shutil.rmtree(folder / record.unfinished, ignore_errors=True)
            record.unfinished = f".deradiff-{kind}.{token_hex(8)}"
            write_json(file, record.model_dump())
            unfinished = folder / record.unfinished
            unfinished.mkdir()
            try:
                yield unfinished
                _take(unfinished, file, record, first)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
                record.unfinished = None
                write_json(file, record.model_dump())
                if not record.files:
                    file.unlink()
        finally:
            for path in made:
                with suppress(OSError):  # it is not empty
                    path.rmdir()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which becomes that file when the block ends well.

    Raises `FileExistsError` where there is one by that name, before the block and after it: nothing is replaced.
    """
    require_new(path)
    with disks.explained(path.parent):
        temporary = path.with_name(f".{path.name[:100]}.{token_hex(8)}.partial")
        try:
            yield temporary
            _place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def require_new(path: Path) -> None:
    """Raise `FileExistsError` where something has this name."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists, and is not replaced: name a new file, or move that one away")


def _read(file: Path) -> Manifest:
    if not file.exists():
        return Manifest()
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{file} is no record of deradiff's ({f'{where}: ' if where else ''}{first['msg']}): name another folder"
        ) from None


def _require_ours(folder: Path, record: Manifest, names: Iterable[str]) -> None:
    """Raise `FileExistsError` where one of these names is taken by a file that is not as we wrote it."""
    for name in names:
        if os.path.lexists(folder / name) and not _is_ours(folder, record, name):
            known = "was changed since deradiff wrote it" if name in record.files else "is not deradiff's"
            raise FileExistsError(f"{folder / name} {known}, and is not replaced: move it away, or name another folder")


def _is_ours(folder: Path, record: Manifest, name: str) -> bool:
    file = folder / name
    return file.is_file() and not file.is_symlink() and _digest(file) in record.files.get(name, ())


def _take(unfinished: Path, file: Path, record: Manifest, first: Collection[str]) -> None:
    """Put the files of `unfinished` in their places, those that were known `first` last: they lead to the others."""
    folder, old = unfinished.parent, record.files
    new = {path.name: _digest(path) for path in sorted(unfinished.iterdir())}
    _require_ours(folder, record, new)
    record.files = {name: [*old.get(name, ()), *([new[name]] if name in new else ())] for name in {**old, **new}}
    write_json(file, record.model_dump())
    for name in sorted(new, key=lambda name: name in first):
        if name in old:
            os.replace(unfinished / name, folder / name)
        else:
            _place(unfinished / name, folder / name)
    for name in old.keys() - new.keys():
        if _is_ours(folder, record, name):
            (folder / name).unlink()
    record.files = {name: [digest] for name, digest in new.items()}


def _place(source: Path, target: Path) -> None:
    """Give a file its name, unless there is one of that name by now. Raises `FileExistsError`."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise FileExistsError(f"{target} was made by somebody else meanwhile, and is not replaced") from None
    except OSError:  # a disk without hard links
        require_new(target)
        os.replace(source, target)
    else:
        source.unlink()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
