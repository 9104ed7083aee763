"""A file that was written, that a command reads back, and whose folder can be made what it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from deradiff.worlds import digits


@dataclass
class Written:
    """A valid file, and how a command reads it."""

    kind: str
    path: Path
    read: Callable[[], object]
    form: str
    """json, yaml, text, tensors, picture or sqlite: how it can be damaged."""
    weight: int = 10
    """How often it is damaged, compared with others: less often where reading takes long."""
    folder: Path = Path()
    content: bytes = b""
    _others: dict[Path, tuple[bytes, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.content = self.path.read_bytes()
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        self._others = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    def restore(self) -> None:
        """Make the folder what it was."""
        for path in [path for path in self.folder.rglob("*") if path.is_file() and path not in self._others]:
            path.unlink(missing_ok=True)  # SQLite removes its own
        for path, (content, time) in self._others.items():
            if not path.is_file() or path.stat().st_mtime_ns != time:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                os.utime(path, ns=(time, time))


Maker = Callable[[Path], Iterator[Written]]


@lru_cache(maxsize=1)
def pipe() -> Any:
    """The digits, once."""
    return digits.load_pipeline()
