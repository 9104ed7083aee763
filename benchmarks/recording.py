"""What a benchmark measured, part by part, in one JSON file that keeps the other parts."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deradiff.files.records import versions
from deradiff.files.writing import write_json


def keep_parts(parts: Iterable[tuple[str, Any]], out: Path) -> dict[str, Any]:
    """Write each part's numbers into `out` as soon as they are there; returns all that the file holds then."""
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for part, numbers in parts:
        print(part, json.dumps(numbers, indent=1))
        found |= {part: numbers, "versions": versions()}
        write_json(out, found)
    return found
