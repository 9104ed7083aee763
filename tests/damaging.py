"""Damage to files that were written, and what a refusal of it has to be."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from deradiff.files.records import read_png, write_png
from restorable import Written

# -- damage ------------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    [],
    {},
    None,
    True,
    False,
    "",
    0,
    -1,
    1e308,
    -0.5,
    10**400,
    10**19,
    2**63,
    float("nan"),
    float("inf"),
    "NaN",
    "1",
    [[]],
    [{}],
    {"": {}},
    [None],
    "x" * 5000,
    "\x00",
    "\x1b[31m",
    "../../x",
    "🙂",
    ["a"],
    [1.5],
    {"a": 1},
    1,
    3,
)


def damaged(content: bytes, form: str, random: random.Random) -> bytes:
    """The content of a file with something wrong in it."""
    if form in ("json", "yaml", "text") and random.random() < 0.7:
        return _damaged_text(content.decode(), form, random)
    return _damaged_bytes(content, random)


def _damaged_bytes(content: bytes, random: random.Random) -> bytes:
    match random.randrange(5):
        case 0:
            return content[: random.randrange(len(content))]
        case 1:
            return b""
        case 2:
            place = random.randrange(len(content))
            return content[:place] + random.choice([b"\xff", b"\x00", b"\xc3", b"[[", b"}"]) + content[place:]
        case 3:  # in the beginning, where headers are
            place = random.randrange(min(400, len(content)))
            return content[:place] + bytes([random.randrange(256)]) + content[place + 1 :]
    changed = bytearray(content)
    for _ in range(random.randrange(1, 9)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def _damaged_text(text: str, form: str, random: random.Random) -> bytes:
    import yaml

    lines = form == "json" and text.count("\n") > 1 and text.startswith("{") and not text.startswith("{\n")
    content = (
        [json.loads(line) for line in text.splitlines()]
        if lines
        else (json.loads(text) if form == "json" else yaml.safe_load(text))
    )
    match random.randrange(8):
        case 0:
            depth = random.choice([200, 5000, 100_000])
            return (random.choice(["[", '{"a":', "- "]) * depth).encode()
        case 1:
            return json.dumps(random.choice(ODD)).encode()
        case 2:
            deep: Any = 1
            for _ in range(random.choice([70, 300])):
                deep = [deep]
            content = replaced(content, deep, random)
        case _:
            for _ in range(random.randrange(1, 3)):
                content = replaced(content, random.choice(ODD), random)
    if lines and isinstance(content, list):
        return "\n".join(json.dumps(row) for row in content).encode()
    return json.dumps(content).encode()  # which is YAML as well


def replaced(content: Any, odd: Any, random: random.Random) -> Any:
    """Plain data with one of its parts replaced by another, removed, or beside another."""
    if not isinstance(content, dict | list) or not content or random.random() < 0.1:
        return odd
    copy = dict(content) if isinstance(content, dict) else list(content)
    place = random.choice(list(copy)) if isinstance(copy, dict) else random.randrange(len(copy))
    match random.randrange(6):
        case 0:
            del copy[place]
        case 1 if isinstance(copy, dict):
            copy[random.choice(["other", "", "\x1b", "extra"])] = odd
        case 1 if isinstance(copy, list):
            copy.insert(place, odd)
        case 2:
            copy[place] = odd
        case _:
            copy[place] = replaced(copy[place], odd, random)
    return copy


def damaged_picture(path: Path, random: random.Random) -> None:
    """Another text, or something else, in the chunk that holds an image's settings."""
    about = replaced(read_png(path), random.choice(ODD), random)
    with Image.open(path) as opened:
        image = opened.copy()
    if random.random() < 0.7:
        write_png(path, image, about)
        return
    from PIL import PngImagePlugin

    info, text = PngImagePlugin.PngInfo(), random.choice(["[]", "", "{", "[" * 100_000, "x" * 3_000_000, "null"])
    if random.random() < 0.5:
        info.add_text("deradiff", text, zip=random.random() < 0.7)
    else:
        info.add_itxt("deradiff", text, zip=random.random() < 0.7)
    image.save(path, format="PNG", pnginfo=info)


def damaged_cell(path: Path, random: random.Random) -> None:
    """Another value in one cell of a database."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        table = random.choice([name for name in tables if db.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0]])
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        column = random.choice(columns)
        cells = [row[0] for row in db.execute(f"SELECT {column} FROM {table}")]
        cell = random.choice(cells)
        value: Any = random.choice([None, "", b"\xff\x00", 1, -1, 2**62, 1.5, "x", "[]", "[" * 5000, "{}", "null"])
        if isinstance(cell, str) and cell.startswith(("[", "{")) and random.random() < 0.7:
            value = _damaged_text(cell, "json", random).decode("utf-8", "surrogateescape")
        with suppress(sqlite3.Error, UnicodeError):  # what the tables themselves do not allow
            db.execute(f"UPDATE OR IGNORE {table} SET {column} = ? WHERE {column} IS ?", (value, cell))


def damage(file: Written, random: random.Random) -> None:
    """Put something wrong into a file."""
    if file.form == "cells":
        damaged_cell(file.path, random)
    elif file.form == "chunk":
        damaged_picture(file.path, random)
    else:
        file.path.write_bytes(damaged(file.content, file.form, random))


def is_sentence(error: BaseException) -> bool:
    """Whether a command says this error as a sentence (`cli.talking.refusing_wrong_input`), in words of ours."""
    if isinstance(error, UnicodeError | json.JSONDecodeError):
        return False
    ours = type(error).__module__.startswith("deradiff.")
    return bool(str(error).strip()) and (ours or isinstance(error, ValueError | OSError | ImportError))
