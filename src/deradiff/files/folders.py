"""Output folders: how one is taken, filled and finished.

What stands there and was not written by us is never replaced or removed: only what a record of ours names is.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from deradiff.files.disks import DiskFull, naming_a_full_disk, standing
from deradiff.files.locks import PRIVATE, discard, taken
from deradiff.files.reading import Record, read
from deradiff.files.records import read_png, versions, write_png
from deradiff.files.writing import with_usual_rights, write_json


class FolderSettings(Record):
    """The `settings.json` of a folder."""

    settings: dict[str, Any]
    versions: dict[str, str]


def begin_or_resume(folder: Path, settings: Mapping[str, Any], what: str) -> None:
    """Make `folder` a `what` (a cache, a comparison, ...) with `settings`, or check that it is one: work goes on there.

    `settings.json`, written first, says what the folder is. A warning tells of other versions. To work there, take it
    (`locks.taken`).

    Raises:
        FileExistsError: `folder` is a file, or holds files of something else.
        FolderInUse: it is new, and another process has begun to use it.
        ValueError: it was begun with other settings.
    """
    file, now = folder / "settings.json", json.loads(json.dumps(settings))
    if not file.exists():
        with taken(folder, f"a {what}") as private:
            if not file.exists():
                if contents(folder):
                    raise FileExistsError(f"{folder} is not empty and holds no {what}: name another folder")
                write_json(file, {"settings": now, "versions": versions()}, within=private)
    held = read(FolderSettings, file, f"settings of a {what}", "name another folder, or delete it")
    require_same(folder, what, held.settings, now)
    if held.versions != versions():
        warnings.warn(f"{folder} was begun with other versions: {held.versions}, now {versions()}", stacklevel=3)


def contents(folder: Path) -> list[Path]:
    """What stands in `folder`, in order; what is ours alone and not finished does not count."""
    return sorted(path for path in folder.iterdir() if path.name != PRIVATE) if folder.exists() else []


def require_same(folder: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `ValueError` that says where the settings of the `what` in `folder` differ from those of now."""
    different = _differences(before, now)
    if different:
        listed = "; ".join(f"{name} {_short(old)}, now {_short(new)}" for name, old, new in different)
        raise ValueError(f"{folder} holds a {what} with other settings: {listed}. Name another folder, or delete it")


def _differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """What differs, by dotted names."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [] if before == now else [(name, before, now)]
    below = [
        _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in sorted({*now, *before})
    ]
    return [difference for part in below for difference in part]


def _short(value: Any, longest: int = 200) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"


def require_room(folder: Path, needed: int) -> None:
    """Raise `DiskFull` where the disk under `folder` has less than `needed` bytes free: before the work, not after."""
    free = shutil.disk_usage(standing(folder)).free
    if free < needed:
        raise DiskFull(
            f"{folder} needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free: make room, or name a "
            "folder on another disk"
        )


# -- a result that takes its folder when it is complete ----------------------------------------------------------------

_BUILT, _COMPLETE = "result.partial", "result"


@contextmanager
def assembled(folder: Path, private: Path, record: str) -> Iterator[Path]:
    """Yield an empty folder in `private` whose files move into `folder`, which is taken, if the block succeeds.

    The JSON file `record` is among them and names the others (see `named_files`); it moves last. What an older `record`
    in `folder` names is removed before. A kill while files move leaves what is missing in `private`: `finish_moving`
    goes on with it.

    Raises as `finish_moving` does.
    """
    built = private / _BUILT
    discard(built)
    try:
        with naming_a_full_disk(folder):
            built.mkdir(parents=True)
            yield built
    except BaseException:
        discard(built)
        raise
    discard(private / _COMPLETE)
    with_usual_rights(built)
    built.rename(private / _COMPLETE)
    finish_moving(folder, private, record)


def finish_moving(folder: Path, private: Path, record: str) -> None:
    """Move a complete result into `folder`, or what a killed process had not moved yet; nothing where there is none.

    Raises `FileExistsError` where a file of somebody else has taken a name meanwhile; the result then waits in
    `private`.
    """
    complete = private / _COMPLETE
    if not (complete / record).is_file():  # it moves last: the record in `folder` is that of the result itself
        discard(complete)
        return
    older = set(named_files(folder, record))
    files = sorted(_files(complete), key=lambda path: (path.name == record, -len(path.parts), path))
    targets = [folder / file.relative_to(complete) for file in files]
    for target in targets:
        if target.exists() and target not in older:
            raise FileExistsError(
                f"{target} was not written by deradiff and is not replaced: move it away, then run again. The result "
                f"is in {complete}"
            )
    _remove_named(folder, record)
    for file, target in zip(files, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    discard(complete)


def _remove_named(folder: Path, record: str) -> None:
    """Remove the files that `record` in `folder` names, and itself at last; nothing where there is none."""
    files = named_files(folder, record)
    for file in files:
        file.unlink(missing_ok=True)
    for parent in sorted({parent for file in files for parent in file.parents}, reverse=True):
        if parent != folder and folder in parent.parents and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
    (folder / record).unlink(missing_ok=True)


def named_files(folder: Path, record: str) -> list[Path]:
    """The files in `folder` that its JSON file `record` names under `files` and `card`, and that file.

    What leads out of the folder is none of them.
    """
    content = _record(folder / record)
    listed = content.get("files")
    names = [*(listed if isinstance(listed, dict) else ()), content.get("card")]
    paths = [folder / name for name in names if isinstance(name, str)]
    inside = [path for path in paths if path.resolve().is_relative_to(folder.resolve()) and not path.is_dir()]
    return [*inside, folder / record] if (folder / record).is_file() else []


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


# -- the folder of a run -----------------------------------------------------------------------------------------------


class RunFolder:
    """The folder of one run: `sheet.png`, `record.json` and `images/`; a context manager, which holds it.

    A folder that holds anything is refused (`FileExistsError`), unless `force` is set and the record of a run names
    every file in it; `kind` then asks for a finished run whose record has that key. A folder that cannot be written to
    is refused too (`OSError`), or that another process holds (`FolderInUse`). Nothing is touched before the first
    image: a run that fails early leaves the older one as it was. Then what the older record names is removed, and
    nothing else: what has come into the folder meanwhile stays, and is not written over.
    """

    def __init__(self, path: str | Path, *, force: bool = False, kind: str | None = None) -> None:
        self.path = Path(path)
        self.images, self.sheet, self.record = self.path / "images", self.path / "sheet.png", self.path / "record.json"
        self._force, self._kind = force, kind
        self._older: list[Path] | None = []
        self._written: set[Path] = set()
        self._holding = ExitStack()

    def __enter__(self) -> "RunFolder":
        with ExitStack() as holding:
            self._private = holding.enter_context(taken(self.path, "a run"))
            self._older = self._replaceable()
            self._holding = holding.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._holding.close()

    @property
    def _list(self) -> Path:
        """The names of what this run has written, or is about to: what it is known by if it is not finished."""
        return self._private / "written.jsonl"

    def _replaceable(self) -> list[Path]:
        """The files of the older run, which are all that there are."""
        there = [file for path in contents(self.path) for file in ([path] if not path.is_dir() else _files(path))]
        if not there:
            return []
        if not self._force:
            raise FileExistsError(
                f"{self.path} already holds files. Name another folder, or replace its run with --force."
            )
        record = _record(self.record)
        if self._kind is not None and self._kind not in record:
            raise FileExistsError(
                f"{self.path} holds another run, or one that was not finished, which is not replaced: name another "
                "folder with --out, or delete that one."
            )
        older = [file for file in there if file in self._named(record)]
        foreign = [file for file in there if file not in older]
        if foreign:
            raise FileExistsError(f"{foreign[0]} was not written by a run, so nothing in {self.path} is replaced.")
        return older

    def _named(self, record: Mapping[str, Any]) -> set[Path]:
        """The files that a finished run's record names, or an unfinished run's list; of images, only a run's."""
        names = self._noted()
        if record.keys() >= {"settings", "versions", "images"} and isinstance(record["images"], list):
            names += [image.get("file") for image in record["images"] if isinstance(image, dict)]
            names += [self.record.name, self.sheet.name]
        paths = {self.path / name for name in names if isinstance(name, str)}
        return {path for path in paths if path.parent in (self.path, self.images) and self._is_ours(path)}

    def _is_ours(self, file: Path) -> bool:
        try:
            return file == self.record or bool(read_png(file))
        except (ValueError, OSError):
            return False

    def add(self, name: str, image: Image.Image, settings: Mapping[str, Any]) -> str:
        """Write one image of the run; returns its path relative to the folder.

        Raises `FileExistsError` where something else has taken its name meanwhile.
        """
        self._clear()
        self.images.mkdir(parents=True, exist_ok=True)
        file = self.images / name
        self._take_name(file)
        write_png(file, image, settings, within=self._private)
        return file.relative_to(self.path).as_posix()

    def finish(self, sheet: Image.Image, record: Mapping[str, Any]) -> None:
        """Write the contact sheet and, last of all, the record: a folder with a record is a finished run."""
        self._clear()
        for file in (self.sheet, self.record):
            self._take_name(file)
        write_png(self.sheet, sheet, record, within=self._private)
        write_json(self.record, record, within=self._private)
        self._list.unlink()

    def _clear(self) -> None:
        """Remove the older run, once; should this be cut short, its list still names what is left."""
        if self._older is not None:
            self._note(self._older)
            for file in self._older:
                file.unlink(missing_ok=True)
            self._older = None

    def _take_name(self, file: Path) -> None:
        if file not in self._written and file.exists():
            raise FileExistsError(f"{file} has come into the folder since the run began, and is not written over.")
        self._written.add(file)
        self._note([file])

    def _note(self, files: list[Path]) -> None:
        with self._list.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(file.relative_to(self.path).as_posix()) + "\n" for file in files)

    def _noted(self) -> list[Any]:
        if not self._list.exists():
            return []
        names = []
        for line in self._list.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError):  # the last line, where a kill has cut it
                names.append(json.loads(line))
        return names


def _record(file: Path) -> dict[str, Any]:
    """What a record holds; nothing where there is none, or something else."""
    try:
        return read(dict[str, Any], file, "record", "")
    except (ValueError, OSError):
        return {}
