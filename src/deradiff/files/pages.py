"""Pages from Jinja's templates, which lie beside the code that fills them; `page.html` and `macros.html` are shared."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path

import jinja2


@cache
def templates(folder: Path) -> jinja2.Environment:
    """The templates in `folder`, and the shared ones; whatever is filled in is escaped, and nothing may be missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment


def counted(count: int, noun: str) -> str:
    """So many of them, in the plural where there are not one."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
