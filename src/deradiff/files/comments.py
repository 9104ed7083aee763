"""Where YAML takes the end of a text for a comment: `- a mug with #1` is the text "a mug with"."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator

import yaml

_COMMENT = re.compile(r"[ \t]+(#[^\r\n]*)")


def warn_of_cut_texts(text: str, where: str, *, lists: Collection[str] | None, texts: Collection[str]) -> None:
    """Warn of texts without quotation marks that a comment follows in the same line.

    It may be a comment; nobody but the author knows. So the line and what is left out of it are told.

    Args:
        text: YAML that can be read (`reading.parse_yaml`).
        where: the file, for the message.
        lists: the keys of lists whose entries are looked at; None for all lists.
        texts: the keys of texts that are looked at.
    """
    if "#" not in text:
        return
    for node in _texts(yaml.compose(text, Loader=yaml.SafeLoader), lists, texts, ""):
        if comment := _COMMENT.match(text, node.end_mark.index):
            warnings.warn(
                f"{where}, line {node.end_mark.line + 1}: the text {_end(node.value)} ends there, since YAML takes "
                f"{comment[1][:60]!r} for a comment: put the text into quotation marks if that belongs to it",
                stacklevel=1,
            )


def _texts(
    node: yaml.Node | None, lists: Collection[str] | None, texts: Collection[str], key: str
) -> Iterator[yaml.Node]:
    """The plain texts in the lists and under the keys that are wanted."""
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            if isinstance(entry, yaml.ScalarNode):
                if entry.style is None and (lists is None or key in lists):
                    yield entry
            else:
                yield from _texts(entry, lists, texts, key)
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            named = str(name.value)
            if isinstance(value, yaml.ScalarNode):
                if value.style is None and named in texts:
                    yield value
            else:
                yield from _texts(value, lists, texts, named)


def _end(text: str) -> str:
    return repr(text if len(text) <= 40 else f"... {text[-36:]}")
