"""The files of a cache of latents as they must be to be read: its settings, its totals, and its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import PositiveInt

from deradiff.alignment.data_order import Counts, Cursor
from deradiff.files import tensors
from deradiff.files.inventory import Inventory
from deradiff.files.reading import Record

ANEW = "name another folder, or delete it and encode anew"
REWRITE = "delete it, and write the cache again: it goes on where it was"
DAMAGED = "delete it and those after it, and finished.json, and write the cache again; it goes on there"
"""What to do about each of its files."""

EMBEDDING = "prompt."
"""Begins the names of a shard's prompt tensors."""


class CacheSettings(Record):
    """What a cache was made of."""

    format: int
    source: dict[str, Any]
    base: str
    resolution: int
    limit: int | None
    flip: bool = False
    vae: str | None = None


class ShardState(Record):
    """What the header of a shard says: where its source goes on, and the prompts that are new in it."""

    cursor: Cursor
    unreadable: Counts
    left_out: Counts
    texts: list[str]


class Totals(Record):
    """The `finished.json` of a cache."""

    pairs: PositiveInt
    prompts: PositiveInt
    shards: PositiveInt
    unreadable: Counts
    left_out: Counts
    files: Inventory | None = None


class Shard(NamedTuple):
    """An opened shard, what its header says, how many pairs it has, and what a row of each tensor is."""

    file: Any
    state: ShardState
    pairs: int
    kinds: dict[str, tuple[Any, ...]]


def opened(path: Path, before: int) -> Shard:
    """A shard, behind others with so many prompts. Raises `ValueError` where it is damaged."""
    what = "shard of a cache"
    try:
        file = tensors.handle(path, what, DAMAGED)
        state = tensors.metadata(file, "state", ShardState, path, what, DAMAGED)
    except OSError as error:
        raise ValueError(f"{error}: {DAMAGED}") from None
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    rows = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    pairs, texts = rows.get("prompt", 0), len(state.texts)
    wrong = [name for name in ("latents", "time_ids") if rows.get(name) != pairs] if pairs else ["prompt"]
    wrong += [name for name in rows if name.startswith(EMBEDDING) and rows[name] != texts]
    if not wrong:
        numbers = file.get_tensor("prompt")
        wrong = [] if 0 <= int(numbers.min()) <= int(numbers.max()) < before + texts else ["prompt"]
    if wrong:
        raise ValueError(f"{path} is no whole {what}: {wrong[0]} does not fit the rest ({shapes}): {DAMAGED}")
    return Shard(file, state, pairs, {name: (shapes[name][1:], file.get_slice(name).get_dtype()) for name in shapes})


def require_alike(shard: Shard, first: Shard, path: Path) -> None:
    """Raise `ValueError` unless all tensors are there, and their rows are of the kind that the first shard's are."""
    needed = [name for name in first.kinds if shard.state.texts or not name.startswith(EMBEDDING)]
    for name in {*needed, *shard.kinds}:
        if shard.kinds.get(name) != first.kinds.get(name):
            raise ValueError(
                f"{path} is of another cache: a row of {name} is {shard.kinds.get(name)}, and in those before it "
                f"{first.kinds.get(name)}: {DAMAGED}"
            )
