"""Plans as YAML files: read by a safe loader, checked by pydantic, written so that a person can read them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict

from deradiff.files import comments, reading

T = TypeVar("T")

Several = Annotated[tuple[T, ...], Strict(False)]
"""A list in a file, a tuple here."""

Name = Annotated[str, Field(min_length=1)]
"""What something is called in a plan."""

TEXTS = ("negative_prompt", "title", "introduction", "text")
"""The keys of what plans hold in people's own words, beside their prompts."""


class PlanPart(BaseModel):
    """A part of a plan: it does not change, and a key that nobody knows is an error.

    So is a value of another kind: `true` and "1" are no numbers, 1.0 is no count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


Kind = TypeVar("Kind", bound=PlanPart)


def read(kind: type[Kind], path: Path, what: str, command: str) -> Kind:
    """The plan in a YAML file; `what` it is and the `command` that writes one stand in the messages.

    A warning tells of a prompt whose end is taken for a comment. Raises `OSError` for a file that cannot be read, and
    `ValueError` for what is no plan: the message names the first places that are wrong.
    """
    try:
        text = reading.text_of(path, what, reading.LARGEST_YAML)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no plan {path}: write one with `{command}`") from None
    content = reading.parse_yaml(text, str(path))
    comments.warn_of_cut_texts(text, str(path), lists=("prompts",), texts=TEXTS)
    return reading.fit(kind, content, str(path), what)


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


for _tag, _pattern in reading.NUMBERS:  # so that a text which would be read as a number is quoted
    _Dumper.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def _flat(value: Any) -> bool:
    return isinstance(value, list) and all(not isinstance(entry, list | dict) for entry in value)
