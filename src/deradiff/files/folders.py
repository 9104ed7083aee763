"""Output folders: how one is taken, filled and finished."""

import json
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from PIL import Image

from deradiff.files.reading import Record, read
from deradiff.files.records import read_png, versions, write_png
from deradiff.files.writing import write_json

_PARTIAL = re.compile(r"\..+\.(png|json)\.\d+\.partial")
"""What `whole` leaves behind where its process was killed."""


class Claim(Record):
    """The `settings.json` of a folder."""

    settings: dict[str, Any]
    versions: dict[str, str]


def claim(folder: Path, settings: Mapping[str, Any], what: str) -> None:
    """Make `folder` a `what` (a cache, a comparison, ...) with `settings`, or check that it is one: work goes on there.

    `settings.json`, written first, says what the folder is. A warning tells of other versions.

    Raises:
        FileExistsError: `folder` is a file, or holds files of something else.
        ValueError: it was begun with other settings.
    """
    file, mine = folder / "settings.json", json.loads(json.dumps(settings))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder")
    if not file.exists():
        if folder.exists() and any(not path.match(".*.partial") for path in folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty and holds no {what}: name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {"settings": mine, "versions": versions()})
    held = read(Claim, file, f"settings of a {what}", "name another folder, or delete it")
    require_same(folder, what, held.settings, mine)
    if held.versions != versions():
        warnings.warn(f"{folder} was begun with other versions: {held.versions}, now {versions()}", stacklevel=3)


def require_same(folder: Path, what: str, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise `ValueError` that says where they differ unless the settings of the `what` in `folder` are `mine`."""
    different = _differences(theirs, mine)
    if different:
        listed = "; ".join(f"{name} {_short(old)}, now {_short(new)}" for name, old, new in different)
        raise ValueError(f"{folder} holds a {what} with other settings: {listed}. Name another folder, or delete it")


def _differences(theirs: Any, mine: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """What differs, by dotted names."""
    if not (isinstance(theirs, Mapping) and isinstance(mine, Mapping)):
        return [] if theirs == mine else [(name, theirs, mine)]
    below = [
        _differences(theirs.get(key), mine.get(key), f"{name}.{key}".lstrip(".")) for key in sorted({*mine, *theirs})
    ]
    return [found for part in below for found in part]


def _short(value: Any, longest: int = 200) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"


class RunFolder:
    """The folder of one run: `sheet.png`, `record.json` and `images/`.

    A folder that holds anything is refused (`FileExistsError`), unless `force` is set and every file in it is a run's;
    `kind` then asks for a finished run whose record has that key. A folder that cannot be written to is refused too
    (`OSError`). Nothing is touched before the first image: a run that fails early leaves the older one as it was.
    """

    def __init__(self, path: str | Path, *, force: bool = False, kind: str | None = None) -> None:
        self.path = Path(path)
        self.images, self.sheet, self.record = self.path / "images", self.path / "sheet.png", self.path / "record.json"
        self._cleared = False
        _require_writable(self.path)
        older = self._files()
        if older and not force:
            raise FileExistsError(
                f"{self.path} already holds files. Name another folder, or replace its run with --force."
            )
        foreign = next((file for file in older if not self._is_ours(file)), None)
        if foreign:
            raise FileExistsError(f"{foreign} was not written by a run, so nothing in {self.path} is replaced.")
        if older and kind is not None and kind not in _record(self.record):
            raise FileExistsError(
                f"{self.path} holds another run, or one that was not finished, which is not replaced: name another "
                "folder with --out, or delete that one."
            )

    def _files(self) -> list[Path]:
        return sorted(file for file in self.path.rglob("*") if not file.is_dir()) if self.path.exists() else []

    def _is_ours(self, file: Path) -> bool:
        if file.parent not in (self.path, self.images):
            return False
        if file == self.record:
            return _record(file).keys() >= {"settings", "versions", "images"}
        if _PARTIAL.fullmatch(file.name):
            return True
        try:
            return (file == self.sheet or file.parent == self.images) and bool(read_png(file))
        except (ValueError, OSError):
            return False

    def add(self, name: str, image: Image.Image, settings: Mapping[str, Any]) -> str:
        """Write one image of the run; returns its path relative to the folder."""
        if not self._cleared:
            for file in self._files():
                file.unlink()
            self.images.mkdir(parents=True, exist_ok=True)
            self._cleared = True
        file = self.images / name
        write_png(file, image, settings)
        return file.relative_to(self.path).as_posix()

    def finish(self, sheet: Image.Image, record: Mapping[str, Any]) -> None:
        """Write the contact sheet and, last of all, the record: a folder with a record is a finished run."""
        write_png(self.sheet, sheet, record)
        write_json(self.record, record)


def _record(file: Path) -> dict[str, Any]:
    """What a run's record holds; nothing where there is none, or something else."""
    try:
        return read(dict[str, Any], file, "record of a run", "")
    except (ValueError, OSError):
        return {}


def _require_writable(folder: Path) -> None:
    """Raise `OSError` for a folder that cannot be made or written to; leaves nothing behind."""
    made: list[Path] = []
    try:
        if folder.is_file():
            raise FileExistsError(f"{folder} is a file; --out needs a folder.")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(f"{folder} cannot be written to ({error.strerror}): name another folder.") from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
