"""Plans as YAML files: read by a safe loader, checked by pydantic, written so that a person can read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict

from deradiff.files.reading import LARGEST_YAML, fit, parse_yaml, text_of


class Part(BaseModel):
    """A part of a plan: it does not change, and a key that nobody knows is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Kind = TypeVar("Kind", bound=Part)


def read(kind: type[Kind], path: Path, what: str, command: str) -> Kind:
    """The plan in a YAML file; `what` it is and the `command` that writes one stand in the messages.

    Raises `OSError` for a file that cannot be read, and `ValueError` for what is no plan: the message names the first
    places that are wrong.
    """
    try:
        text = text_of(path, what, LARGEST_YAML)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no plan {path}: write one with `{command}`") from None
    return parse(kind, parse_yaml(text, str(path)), str(path), what)


def parse(kind: type[Kind], content: Any, where: str, what: str) -> Kind:
    """The plan that is plain data. Raises `ValueError` that names the first places that are wrong in `where`."""
    return fit(kind, content, where, what)


def write(data: Any) -> str:
    """Plain data as YAML that `read` reads, lists and mappings of plain values on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def seed_range(seeds: list[int]) -> str | list[int]:
    """Seeds in a row as `first:last`, which a plan reads too."""
    first, last = seeds[0], seeds[-1]
    return f"{first}:{last}" if len(seeds) > 2 and seeds == list(range(first, last + 1)) else seeds


class _Dumper(yaml.SafeDumper):
    """Lists and mappings of plain values on one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=_flat(sequence))

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        nested = [value for value in mapping.values() if isinstance(value, list | dict)]
        return super().represent_mapping(tag, mapping, flow_style=len(mapping) < 7 and all(map(_flat, nested)))

    def ignore_aliases(self, data: Any) -> bool:
        """No anchors of YAML's: they would look like ours."""
        return True


def _flat(value: Any) -> bool:
    return isinstance(value, list) and all(not isinstance(one, list | dict) for one in value)
