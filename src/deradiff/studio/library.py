"""What a person keeps by name: curves and presets, a small JSON file each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deradiff.files.reading import parse, text_of
from deradiff.files.writing import write_json

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 _-]{0,58}[A-Za-z0-9_-])?")

DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
"""Names that Windows has for devices, whatever follows a dot."""

MOST = 500
"""Of one kind."""

LARGEST = 100_000
"""Bytes that a file of ours can have."""


class Library:
    """Things of one kind by name, in a folder that is made with the first of them."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what

    def names(self) -> list[str]:
        """What there is, in alphabetical order."""
        stems = (path.stem for path in self.folder.glob("*.json")) if self.folder.is_dir() else ()
        return sorted((name for name in stems if NAME.fullmatch(name)), key=str.lower)

    def save(self, name: str, content: Mapping[str, Any]) -> str:
        """Keep `content` as `name`, in place of what had that name; returns the name as it is kept.

        Raises `ValueError` for a name that is none, and where there are too many; `OSError` where it cannot be written.
        """
        file = self._file(name)
        alike = [held for held in self.names() if held.casefold() == file.stem.casefold() and held != file.stem]
        if alike:
            raise ValueError(
                f"there is a {self.what} called {alike[0]!r}, which many file systems do not tell from {file.stem!r}: "
                "take that name, or another"
            )
        if not file.exists() and len(self.names()) >= MOST:
            raise ValueError(f"there are {MOST} {self.what}s already: delete one first")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
        return file.stem

    def load(self, name: str) -> dict[str, Any]:
        """What was kept as `name`. Raises `ValueError` where there is nothing, or nothing that can be read."""
        file, what = self._file(name), f"{self.what} of the studio's"
        try:
            return parse(dict[str, Any], text_of(file, what, LARGEST), str(file), what, "delete it, or put it right")
        except FileNotFoundError:
            raise ValueError(f"there is no {self.what} called {name!r} any more") from None
        except OSError as error:
            raise ValueError(str(error)) from None

    def delete(self, name: str) -> None:
        """Forget `name`."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        tidy = " ".join(str(name).split())
        if not NAME.fullmatch(tidy) or tidy.casefold() in DEVICES:
            raise ValueError(
                f"a {self.what} needs a name of 1 to 60 letters, digits, spaces, - and _, beginning with a letter or "
                f"digit, and none of Windows' devices; got {name[:80]!r}"
            )
        return self.folder / f"{tidy}.json"
