"""Files of ours read back: bounded, through one schema for each kind, and refused in words.

Whatever stands in a file, what comes out is plain data that fits its schema, or an error that a person can act on:
which file, what it should be, what is wrong in it, and what to do. What a schema does not know, a record may hold all
the same (a later version wrote it); a plan may not (`plans.PlanPart`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

LARGEST = 32 << 20
"""Bytes of a text of ours: a record of a thousand images has one of them."""

LARGEST_YAML = 4 << 20
"""YAML is read a hundred times slower."""

DEEPEST = 64
"""Levels of lists and objects in each other."""

MOST_NODES = 500_000
"""Of a YAML file, aliases counted as what they stand for."""

LONGEST_INTEGER = 20
"""Digits; 64 bits have no more."""

SHOWN = 4
"""Places that a message names."""

Kind = TypeVar("Kind")

Schema = Callable[..., Kind]
"""A model of pydantic's, or a type of plain data such as `dict[str, Any]`."""


class Record(BaseModel):
    """What a file of ours must hold. Other keys are passed over, values are not converted: "1" is no number."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


def read(kind: Schema[Kind], path: Path, what: str, cure: str) -> Kind:
    """The content of a JSON file as `kind`.

    `what` the file is and the `cure` for one that is wrong stand in the messages.

    Raises `OSError` where it cannot be read (`FileNotFoundError` where it is not there), and `ValueError` where it is
    not what it should be.
    """
    return parse(kind, text_of(path, what), str(path), what, cure)


def parse(kind: Schema[Kind], text: object, where: str, what: str, cure: str) -> Kind:
    """`read` for JSON that stands elsewhere than in a file: `where` says so. Raises `ValueError`."""
    if not isinstance(text, str):
        raise ValueError(f"{where} is no {what}: it holds {_shown(text)} in place of a text{_then(cure)}")
    try:
        content = json.loads(text, parse_int=_integer, object_pairs_hook=_object)
        _require_bounded(content)
    except RecursionError:
        raise ValueError(f"{where} is no {what}: {_too_deep()}{_then(cure)}") from None
    except ValueError as error:
        raise ValueError(f"{where} is no {what}: not JSON that can be read ({error}){_then(cure)}") from None
    return fit(kind, content, where, what, cure)


YAML_BREAKS = {"\x85": r"\N", "\u2028": r"\L", "\u2029": r"\P"}
"""What ends a line for YAML 1.1 alone, and how that is written between double quotes: it would cut a prompt in two."""


def parse_yaml(text: str, where: str) -> Any:
    """The plain data of a YAML text. Raises `ValueError`."""
    if len(text) > LARGEST_YAML:
        raise ValueError(f"{where} has {len(text):,} characters, more than the {LARGEST_YAML:,} that are read of YAML")
    for number, line in enumerate(text.split("\n"), 1):
        if strange := next((letter for letter in line if letter in YAML_BREAKS), None):
            raise ValueError(
                f"{where} has U+{ord(strange):04X} in line {number}, where YAML would end the line and no editor shows "
                f'it: write a space, or "{YAML_BREAKS[strange]}" between double quotes'
            )
    try:
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
        _require_bounded(content)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where} is not YAML that can be read: {' '.join(str(error).split())}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError):  # PyYAML's, of `!!bool x` or `!!timestamp x`
        raise ValueError(
            f"{where} is not YAML that can be read: a value is none of the kind that its !! says"
        ) from None
    return content


def fit(kind: Schema[Kind], content: Any, where: str, what: str, cure: str = "") -> Kind:
    """Plain data as `kind`. Raises `ValueError` that names the first places that are wrong."""
    try:
        return _adapter(kind).validate_python(content, strict=None if _is_model(kind) else True)
    except ValidationError as error:
        wrong = [_wrong(place) for place in error.errors(include_url=False)]
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"{where} is no {what}: {'; '.join(wrong[:SHOWN])}{more}{_then(cure)}") from None


def text_of(path: Path, what: str, largest: int = LARGEST) -> str:
    """The text of a file in UTF-8, a byte order mark left out.

    Raises `OSError` where the file is not there, may not be read or is no file; `ValueError` where it is no such text.
    """
    content = bytes_of(path, what, largest)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise ValueError(f"{path} is no {what}: it is not text in UTF-8 ({wrong})") from None


def bytes_of(path: Path, what: str, largest: int = LARGEST) -> bytes:
    """The bytes of a regular file. Raises as `text_of` does."""
    require_file(path, what)
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise _unreadable(error, path, what) from None
    if len(content) > largest:
        raise ValueError(f"{path} is no {what}: it has more than {largest:,} bytes")
    return content


def require_file(path: Path, what: str) -> os.stat_result:
    """Raise `OSError` unless `path` is a regular file: a FIFO would be waited for, a device never ends."""
    try:
        state = path.stat()
    except OSError as error:
        raise _unreadable(error, path, what) from None
    except ValueError:  # a NUL in its name
        raise FileNotFoundError(f"there is no {what} {str(path)!r}") from None
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(f"{path} is a folder, not a {what}")
    if not stat.S_ISREG(state.st_mode):
        raise OSError(f"{path} is a device, a pipe or a socket, not a {what}: nothing is read of it")
    return state


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits. Raises `OSError`."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _unreadable(error: OSError, path: Path, what: str) -> OSError:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"there is no {what} {path}")
    if isinstance(error, PermissionError):
        return PermissionError(f"you may not read the {what} {path} (permission denied): ask its owner")
    return OSError(f"the {what} {path} cannot be read ({error.strerror or error})")


# -- plain data --------------------------------------------------------------------------------------------------------


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > LONGEST_INTEGER:
        raise ValueError(f"{digits[:8]}... is a number of {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require_once([name for name, _ in pairs])
    return dict(pairs)


def _require_once(names: Collection[str]) -> None:
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{_shown(twice)} stands there twice")


def _require_bounded(content: Any) -> None:
    """Raise `ValueError` where plain data is too deep, or holds numbers or characters that nothing else can take."""
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(_too_deep())
        level = [part for value in level for part in _parts(value)]


def _parts(value: Any) -> Iterable[Any]:
    match value:
        case dict():
            return [*value.keys(), *value.values()]
        case list() | tuple() | set():
            return value
        case str():
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ValueError(f"{_shown(value)} holds half a character (a lone surrogate)")
        case bool():
            pass
        case int():
            if not -(2**63) <= value < 2**64:
                raise ValueError(f"{_shown(value)} is no number of 64 bits")
    return ()


def _too_deep() -> str:
    return f"its lists are nested more than {DEEPEST} deep"


class _Loader(yaml.SafeLoader):
    """YAML whose depth and size are bounded before anything is made of it, and that names nothing twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth, self._nodes = 0, 0
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise yaml.YAMLError(f"*{event.anchor} stands inside of what it stands for")
            self._count(self._sizes.get(event.anchor, 0))
            return super().compose_node(parent, index)
        before = self._nodes
        self._count(1)
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(_too_deep())
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        return node

    def _count(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MOST_NODES:
            raise yaml.YAMLError(f"it holds more than {MOST_NODES:,} values, aliases counted as what they stand for")

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        _require_once([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"])
        return node

    def construct_yaml_int(self, node: Any) -> Any:
        if len(node.value) > 2 * LONGEST_INTEGER:
            raise yaml.YAMLError(f"{node.value[:8]}... is a number of {len(node.value)} digits")
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)

NUMBERS = (
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z")),
    ("tag:yaml.org,2002:float", re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z")),
    ("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+\Z")),
    ("tag:yaml.org,2002:float", re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")),
)
"""Numbers as YAML 1.2 has them: in 1.1 the seeds 1:8 are the number 68, 010 is 8, and the rate 1e-4 is a text."""

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in dict(NUMBERS)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in NUMBERS:
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


# -- schemas and words -------------------------------------------------------------------------------------------------


_adapter: Callable[[Any], TypeAdapter[Any]] = lru_cache(maxsize=256)(TypeAdapter)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _wrong(error: Any) -> str:
    place, given = ".".join(_plain(str(part)) for part in error["loc"]), error["input"]
    message = _plain(error["msg"].removeprefix("Value error, "), 400)
    if error["type"] == "model_type":
        message = "names with values are wanted there"
    own = error["type"] in ("missing", "value_error", "extra_forbidden") or isinstance(given, dict | list | tuple)
    return (f"{place}: {message}" if place else message) + ("" if own else f", got {_shown(given)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _plain(text: str, longest: int = 60) -> str:
    """A text out of a file as a piece of one line: nothing in it reaches the terminal's controls."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= longest else f"{line[: longest - 4]} ..."


def _then(cure: str) -> str:
    return f": {cure}" if cure else ""
