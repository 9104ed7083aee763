"""What a command leaves behind: nobody else's file is replaced, and what belongs together is replaced together."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from deradiff.files import disks
from deradiff.files.locks import HOLDER, LOCK, discard, taken
from deradiff.files.reading import Record, read, sha256_of
from deradiff.files.writing import atomic_file, write_json

_NAME = r"[^/\\]*[^/\\.][^/\\]*"
"""A file in the folder itself."""


class Manifest(Record):
    """What lies in a folder of one kind's files, as `.deradiff-KIND.json` says."""

    files: dict[Annotated[str, Field(pattern=f"^{_NAME}$")], list[str]]
    """The SHA-256 of every file: two where one is about to take another's place."""


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
        FolderInUse: another process is about to do the same.
        OSError: `folder` cannot be written to, or its disk is full.
        ValueError: the record is not one of ours.
    """
    record = folder / f".deradiff-{kind}.json"
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder")
    place = disks.standing(folder)
    if not disks.may_write(place):
        raise PermissionError(f"{place} may not be written to by you (permission denied): name another with --out")
    held = folder / f".deradiff-{kind}"  # not `folder`, which somebody else may hold, as the server of a study does
    try:
        with disks.explained(folder), taken(held, f"the {kind} of {folder}") as private:
            _require_ours(folder, _known(record), first)
            for path in private.iterdir():
                if path.name not in (LOCK, HOLDER):  # left by one that was killed
                    discard(path)
            unfinished = private / "unfinished"
            unfinished.mkdir()
            try:
                yield unfinished
                _take(unfinished, record, first)
            finally:
                discard(unfinished)
    finally:
        with suppress(OSError):  # another process works there, or it has gone
            held.rmdir()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which becomes that file when the block ends well.

    Raises `FileExistsError` where there is one by that name, before the block and after it: nothing is replaced;
    `OSError` that names `path` where its disk is full.
    """
    require_new(path)
    with disks.explained(path.parent), atomic_file(path, put=_place) as temporary:
        yield temporary


def require_new(path: Path) -> None:
    """Raise `FileExistsError` where something has this name."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists, and is not replaced: name a new file, or move that one away")


def _known(record: Path) -> dict[str, list[str]]:
    if not record.exists():
        return {}
    return read(Manifest, record, "record of deradiff's files", "name another folder").files


def _require_ours(folder: Path, known: Mapping[str, list[str]], names: Iterable[str]) -> None:
    """Raise `FileExistsError` where one of these names is taken by a file that is not as we wrote it."""
    for name in names:
        if os.path.lexists(folder / name) and not _is_ours(folder, known, name):
            what = "was changed since deradiff wrote it" if name in known else "is not deradiff's"
            raise FileExistsError(f"{folder / name} {what}, and is not replaced: move it away, or name another folder")


def _is_ours(folder: Path, known: Mapping[str, list[str]], name: str) -> bool:
    file = folder / name
    return file.is_file() and not file.is_symlink() and sha256_of(file) in known.get(name, ())


def _take(unfinished: Path, record: Path, first: Collection[str]) -> None:
    """Put the files of `unfinished` in their places, those that were known `first` last: they lead to the others."""
    folder, old = record.parent, _known(record)
    new = {path.name: sha256_of(path) for path in sorted(unfinished.iterdir())}
    _require_ours(folder, old, new)
    both = {name: [*old.get(name, ()), *([new[name]] if name in new else ())] for name in {**old, **new}}
    write_json(record, {"files": both}, within=unfinished.parent)
    for name in sorted(new, key=lambda name: name in first):
        if name in old:
            os.replace(unfinished / name, folder / name)
        else:
            _place(unfinished / name, folder / name)
    for name in old.keys() - new.keys():
        if _is_ours(folder, old, name):
            (folder / name).unlink()
    write_json(record, {"files": {name: [digest] for name, digest in new.items()}}, within=unfinished.parent)


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
