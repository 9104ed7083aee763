"""Rows, streams and folders of preference pairs for tests: the preferred image is green."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from deradiff.alignment.data_order import DataOrder
from deradiff.alignment.pair_rows import PreferencePair
from deradiff.alignment.pair_streams import PairStream

GOOD, BAD = (0, 200, 0), (200, 0, 0)


def encoded(colour: tuple[int, int, int], form: str = "PNG", size: tuple[int, int] = (4, 4)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, form)
    return content.getvalue()


WINNER, LOSER = encoded(GOOD), encoded(BAD)


def pick(caption: Any, label: Any = 1.0, **others: Any) -> dict[str, Any]:
    """A row of Pick-a-Pic whose preferred image is the green one."""
    images = {"jpg_0": LOSER, "jpg_1": WINNER} if label == 0 else {"jpg_0": WINNER, "jpg_1": LOSER}
    other = None if label is None else 1 - label
    return {"caption": caption, **images, "label_0": label, "label_1": other, "has_label": label is not None} | others


class Rows:
    """Shards held in memory."""

    def __init__(self, *shards: list[dict[str, Any]]) -> None:
        self.shards = shards
        self.fingerprint = {"kind": "test", "rows": [len(shard) for shard in shards]}

    def __len__(self) -> int:
        return len(self.shards)

    def rows(self, shard: int, start: int) -> Iterator[Mapping[str, Any]]:
        return iter(self.shards[shard][start:])

    def name(self, shard: int) -> str:
        return f"shard {shard}"


def stream(held_out: int = 0, buffer: int = 5) -> PairStream:
    """Six shards of 0 to 6 rows, with every kind of row that is left out; 15 usable rows, two of them unreadable."""
    shards = [[pick(f"{shard}-{row}", float(row % 2)) for row in range(shard + 1)] for shard in range(5)]
    shards[1].insert(1, pick("tied", 0.5))
    shards[2].append(pick("unlabelled", None))
    shards[3].append(pick("", 1.0))
    shards[3][2] |= {"jpg_0": WINNER[:40]}
    shards[4][1] |= {"jpg_1": None}
    return PairStream(Rows(*shards[:2], [], *shards[2:]), held_out, buffer)


UNREADABLE = {"3-2", "4-1"}
READABLE = {f"{shard}-{row}" for shard in range(5) for row in range(shard + 1)} - UNREADABLE


def folder_of(root: Path, count: int = 7) -> Path:
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        (root / f"images/{i}w.png").write_bytes(WINNER)
        (root / f"images/{i}l.jpg").write_bytes(encoded(BAD, "JPEG"))
        rows.append({"prompt": str(i), "winner": f"images/{i}w.png", "loser": f"images/{i}l.jpg"})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def prompts(order: DataOrder[PreferencePair], counts: list[int]) -> list[str]:
    return [pair.prompt for count in counts for pair in order.take(count)]


def colour(image: Image.Image) -> tuple[int, int, int]:
    found = image.getpixel((0, 0))
    assert isinstance(found, tuple)
    return (int(found[0]), int(found[1]), int(found[2]))
