"""Parquet files for tests: real ones where pyarrow is installed, else what answers as pyarrow does."""

import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

Write = Callable[[Path, Mapping[str, list[Any]]], Path]


def writer(monkeypatch: pytest.MonkeyPatch) -> Write:
    """What writes columns into a file, which the package then reads as Parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return _pretended(monkeypatch)

    def write(path: Path, columns: Mapping[str, list[Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path)
        return path

    return write


class _File:
    """The part of `pyarrow.parquet.ParquetFile` that is used, over JSON."""

    def __init__(self, path: Path) -> None:
        self._columns = json.loads(path.read_text())
        rows = len(next(iter(self._columns.values()), []))
        self.metadata = types.SimpleNamespace(num_row_groups=1, num_rows=rows)
        self.schema_arrow = types.SimpleNamespace(names=list(self._columns))

    def iter_batches(self, *, columns: list[str], **_: Any) -> Iterator[Any]:
        rows = [{name: _bytes(self._columns[name][row]) for name in columns} for row in range(self.metadata.num_rows)]
        yield _Batch(rows)


class _Batch:
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.num_rows, self._rows = len(rows), rows

    def slice(self, start: int) -> "_Batch":
        return _Batch(self._rows[start:])

    def to_pylist(self) -> list[dict[str, Any]]:
        return self._rows


def _bytes(value: Any) -> Any:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) and "hex" in value else value


def _pretended(monkeypatch: pytest.MonkeyPatch) -> Write:
    arrow, parquet = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    arrow.parquet = parquet  # type: ignore[attr-defined]
    parquet.ParquetFile = _File  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)

    def write(path: Path, columns: Mapping[str, list[Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {
            name: [{"hex": value.hex()} if isinstance(value, bytes) else value for value in values]
            for name, values in columns.items()
        }
        path.write_text(json.dumps(plain))
        return path

    return write
