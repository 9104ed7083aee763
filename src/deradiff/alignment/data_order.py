"""In which order training sees its data: seeded, resumable at any row, and the same for any number of processes.

A source knows its rows; a `DataOrder` hands them out in global batches. What it remembers is the *cursor* behind the
last row it handed out, a small JSON object from which the source can go on. Nothing is drawn in advance of a cursor
that it does not determine, so a run that was killed and restarted sees the very rows it would have seen.
"""

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from pydantic import Field, NonNegativeInt
from torch import Tensor

from deradiff.files.reading import Record, fit

UNREADABLE_IN_A_ROW = 100
"""So many unreadable rows one after another are not a few bad files but a bad source."""

Cursor = dict[str, Any]
"""A place in a source's order: plain numbers, strings, lists and dictionaries."""

Row = TypeVar("Row")
Item = TypeVar("Item", covariant=True)


Counts = dict[str, NonNegativeInt]
"""By reason."""


class DataOrderState(Record):
    """What a data order remembers."""

    source: Any
    held_out: NonNegativeInt
    seed: int
    cursor: dict[str, Any] | None
    left_out: Counts
    unreadable: Counts


class _Position(Record):
    position: NonNegativeInt = Field(lt=2**48)


Place = TypeVar("Place", bound=Record)


def read_cursor(kind: type[Place], cursor: Cursor) -> Place:
    """A cursor out of a file, as its source has them. Raises `ValueError`."""
    cure = "delete the checkpoint or the cache that it stands in, to begin anew"
    return fit(kind, cursor, f"{cursor!s:.80}", "place in these data", cure)


class Unreadable(Exception):
    """A row that cannot become an item, through no fault of the rest; `reason` is what it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class OrderedRow(Generic[Row]):
    """One row, the cursor behind it, and how many rows its source has left out so far, by reason."""

    row: Row
    cursor: Cursor
    skipped: Mapping[str, int]


@runtime_checkable
class Source(Protocol[Row, Item]):
    """Rows in an order that depends on a seed alone, and how a row becomes an item."""

    fingerprint: dict[str, Any]
    held_out_rows: int

    def steps(self, seed: int, cursor: Cursor | None) -> Iterator[OrderedRow[Row]]:
        """Training rows without end, epoch after epoch, from `cursor` on (None: from the start)."""
        ...

    def open(self, row: Row) -> Item:
        """The item of a row. Raises `Unreadable` where it has none."""
        ...


class DataOrder(Generic[Item]):
    """Global batches of a source's items, in an order that a seed decides and a small state resumes.

    An unreadable row is skipped: its place is taken by the next readable row of the order. Which row that is depends on
    the data alone, so that processes agree without talking to each other, each decoding only its own rows.

    Args:
        source: where rows come from; see `deradiff.alignment.pairs.open_pairs`.
        seed: decides the order; the held-out rows do not depend on it.
    """

    def __init__(self, source: Source[Any, Item], seed: int = 0) -> None:
        self.source, self.seed = source, seed
        self._cursor: Cursor | None = None
        self._unreadable: Counter[str] = Counter()
        self._left_out: Mapping[str, int] = {}
        self._restart()

    def _restart(self) -> None:
        self._steps = self.source.steps(self.seed, self._cursor)
        self._ahead: deque[OrderedRow[Any]] = deque()

    @property
    def skipped(self) -> dict[str, int]:
        """Rows met and not used, by reason, each epoch anew.

        What the labels tell (ties, unlabelled rows) is counted alike in every process; an unreadable image is counted
        by the process whose row it was.
        """
        return dict(sorted((Counter(self._left_out) + self._unreadable).items()))

    def take(self, count: int, rank: int = 0, world: int = 1) -> list[Item]:
        """This process's share of the next `count` rows: the `rank`-th of `world` equal parts of the global batch.

        Every process must take the same `count`. Raises `ValueError` where `UNREADABLE_IN_A_ROW` rows in succession
        cannot be read; the order then stands where it stood before.
        """
        if count < 1 or count % world or not 0 <= rank < world:
            raise ValueError(
                f"cannot take {count} rows as process {rank} of {world}: count must be a positive multiple of world, "
                "rank in [0, world)"
            )
        share = count // world
        unreadable: Counter[str] = Counter()
        try:
            items = [self._open(place, unreadable) for place in range(rank * share, (rank + 1) * share)]
            self._peek(count - 1)
        except BaseException:
            # A generator that raised is spent: the next try begins at the cursor again.
            self._restart()
            raise
        last = [self._ahead.popleft() for _ in range(count)][-1]
        self._cursor, self._left_out = last.cursor, last.skipped
        self._unreadable += unreadable
        return items

    def _open(self, place: int, unreadable: Counter[str]) -> Item:
        for ahead in range(place, place + UNREADABLE_IN_A_ROW):
            try:
                return self.source.open(self._peek(ahead).row)
            except Unreadable as error:
                last = error
                if ahead == place:
                    unreadable[error.reason] += 1
        raise ValueError(
            f"{UNREADABLE_IN_A_ROW} rows in succession could not be read, the last because: {last}. Check the data."
        ) from last

    def _peek(self, ahead: int) -> OrderedRow[Any]:
        while len(self._ahead) <= ahead:
            self._ahead.append(next(self._steps))
        return self._ahead[ahead]

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, as plain JSON: the same for every process, but for the count of unreadable rows."""
        return {
            "source": self.source.fingerprint,
            "held_out": self.source.held_out_rows,
            "seed": self.seed,
            "cursor": self._cursor,
            "left_out": dict(self._left_out),
            "unreadable": dict(self._unreadable),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises `ValueError` where it was saved with other data, held-out rows or seed."""
        current, cure = self.state_dict(), "delete the checkpoint to begin anew"
        saved = fit(DataOrderState, state, "the order of the data", "state of a data order", cure)
        for key, what in [("source", "other data"), ("held_out", "other held-out rows"), ("seed", "another seed")]:
            if getattr(saved, key) != current[key]:
                raise ValueError(
                    f"this data order was saved with {what}: {getattr(saved, key)!r}, now {current[key]!r}. Continue "
                    "with what the run began with, or start a new run"
                )
        self._cursor, self._left_out, self._unreadable = saved.cursor, saved.left_out, Counter(saved.unreadable)
        self._restart()


def seeded(seed: int, purpose: str) -> torch.Generator:
    """A generator for one purpose under one seed; purposes do not share their numbers."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def split_held_out(rows: int, held_out: int) -> tuple[Int[Tensor, " train"], Int[Tensor, " held_out"]]:
    """Which of `rows` rows train and which never do, both ascending; the same for every seed of a run.

    Runs that differ in seed or β can then be compared on the same held-out rows. Raises `ValueError` if none is left to
    train on.
    """
    if held_out < 0 or held_out >= rows:
        raise ValueError(
            f"{held_out} of {rows} pairs cannot be held out: choose a number from 0 to {rows - 1}, or add pairs"
        )
    order = torch.randperm(rows, generator=seeded(0, "held-out rows"))
    return order[held_out:].sort().values, order[:held_out].sort().values


def permuted(rows: Int[Tensor, " row"], seed: int, cursor: Cursor | None) -> Iterator[OrderedRow[int]]:
    """`rows` without end, each epoch in a fresh seeded permutation; the cursor is the position in that sequence."""
    for position in itertools.count(read_cursor(_Position, cursor).position if cursor else 0):
        yield OrderedRow(
            int(rows[order(len(rows), seed, range(position, position + 1))[0]]), {"position": position + 1}, {}
        )


def order(length: int, seed: int, positions: range) -> list[int]:
    """Which of `length` rows stand at `positions` of an endless sequence of shuffled epochs.

    A function of its arguments alone, so that resuming needs no state and processes need not speak to each other.
    """
    return [int(_epoch(length, seed, position // length)[position % length]) for position in positions]


def passes(count: int, size: int) -> list[range]:
    """0 to `count` in ranges of `size`, the last one shorter: what is evaluated together where nothing is trained."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@lru_cache(maxsize=2)
def _epoch(length: int, seed: int, epoch: int) -> Int[Tensor, " row"]:
    return torch.randperm(length, generator=seeded(seed, f"epoch {epoch}"))


def readable(open: Callable[[Row], Item], rows: Iterable[Row]) -> Iterator[Item]:
    """The items of `rows`, opened as they are asked for; those that are `Unreadable` are left out."""
    for row in rows:
        with suppress(Unreadable):
            yield open(row)


def row_generators(seed: int, positions: range, purpose: str = "row") -> list[torch.Generator]:
    """The randomness of what stands at each position: it does not depend on what else is in the batch."""
    return [seeded(seed, f"{purpose} {position}") for position in positions]
