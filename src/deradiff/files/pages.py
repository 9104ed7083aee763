"""Reports as one HTML page that needs no other file: its shell, tables and pictures."""

from __future__ import annotations

import base64
from collections.abc import Container, Iterable, Sequence
from html import escape
from typing import Literal

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1d1d22; background: #fff;
       max-width: 1120px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.8rem; margin-bottom: .3rem; } h2 { margin-top: 2.8rem; font-size: 1.25rem; }
h3 { margin-top: 2.2rem; font-size: 1.05rem; }
p { max-width: 78ch; } .lead { color: #555; }
figure { margin: 1rem 0 2rem; } figure img { width: 100%; height: auto; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; margin: .8rem 0 1.6rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e8; white-space: nowrap;
         font-variant-numeric: tabular-nums; vertical-align: top; }
th { border-bottom: 1px solid #888; font-weight: 600; white-space: normal; vertical-align: bottom; }
td.words, th.words { text-align: left; white-space: normal; }
small { color: #666; } .met { color: #00664a; font-weight: 600; } .missed { color: #b03a00; font-weight: 600; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
"""


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A page of `parts`, which are HTML already; `style` is added to the shared one."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{style}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: Container[int] = (0,)) -> str:
    """A table of cells that are HTML already; the columns `words` are set as text."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="words"' if i in words else "" for i in range(len(cells))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    head = line("th", headings)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def figure(data: bytes, kind: Literal["png", "svg+xml"], description: str, *, width: int | None = None) -> str:
    """A picture that the page holds itself; as wide as the page, or at most `width` pixels."""
    limit = "" if width is None else f' style="max-width: {width}px"'
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{escape(description)}"{limit} src="{source}"></figure>'


def counted(count: int, noun: str) -> str:
    """So many of them, in the plural where there are not one."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
