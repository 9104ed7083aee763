"""Preference pairs too many to hold: hub datasets and Parquet files, read in shards and shuffled block by block.

A rolling shuffle buffer cannot be resumed without its content. Blocks can: rows are read in the order of a seeded
permutation of the shards, `OPEN_SHARDS` of them in turn, and every block of `buffer` rows is permuted by itself. The
cursor is where the block began and how much of it was handed out. To resume costs reading one block anew, and of each
open shard the part before it.
"""

import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from pydantic import Field, NonNegativeInt

from deradiff.alignment.data_order import Counts, Cursor, OrderedRow, read_cursor, readable, seeded
from deradiff.alignment.pair_rows import LeftOut, PreferencePair, UndecodedPair, decode_pair, pair_columns, read_row
from deradiff.alignment.prompts import hub_dataset
from deradiff.files.reading import Record
from deradiff.files.tables import open_parquet

OPEN_SHARDS = 4
"""Shards read in turn. More mix neighbouring rows better, and cost more to find again."""


@runtime_checkable
class Shards(Protocol):
    """Numbered pieces of a data set, each read from its start."""

    fingerprint: dict[str, Any]

    def __len__(self) -> int: ...

    def rows(self, shard: int, start: int) -> Iterator[Mapping[str, Any]]:
        """The rows of a shard from row `start` on."""
        ...

    def name(self, shard: int) -> str:
        """What messages call a shard."""
        ...


class HubShards:
    """A hub dataset by streaming: a shard is one of its files, downloaded as it is read.

    Raises:
        ImportError: the `datasets` library is not installed.
        OSError: the dataset cannot be reached.
    """

    def __init__(self, repo: str, split: str = "train", revision: str | None = None) -> None:
        self._dataset = hub_dataset(repo, split, revision)
        self.repo, self.split = repo, split
        self.fingerprint = {"kind": "hub", "repo": repo, "split": split, "revision": revision, "shards": len(self)}

    def __len__(self) -> int:
        return self._dataset.num_shards

    def rows(self, shard: int, start: int) -> Iterator[Mapping[str, Any]]:
        """The rows of a file from row `start` on; those before it are downloaded and dropped."""
        rows = self._dataset.shard(num_shards=len(self), index=shard)
        return iter(rows.skip(start) if start else rows)

    def name(self, shard: int) -> str:
        """The dataset, its split and the number of the file."""
        return f"{self.repo} ({self.split}), file {shard}"


class ParquetShards:
    """Local Parquet files: a shard is one row group.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: a file cannot be read as Parquet, or has other columns than a pair's.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._groups: list[tuple[Path, int]] = []
        described = []
        for file in sorted(files):
            opened = open_parquet(file)
            pair_columns(opened.schema_arrow.names, f"{file}, row 0")
            self._groups += [(file, group) for group in range(opened.metadata.num_row_groups)]
            described.append([file.name, file.stat().st_size, opened.metadata.num_rows])
        digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        self.fingerprint = {"kind": "parquet", "rows": sum(rows for *_, rows in described), "sha256": digest}

    def __len__(self) -> int:
        return len(self._groups)

    def rows(self, shard: int, start: int) -> Iterator[Mapping[str, Any]]:
        """The rows of a row group from row `start` on, only the columns that a pair needs."""
        file, group = self._groups[shard]
        opened = open_parquet(file)
        names = opened.schema_arrow.names
        columns = [column for column in pair_columns(names, self.name(shard)) if column in names]
        for batch in opened.iter_batches(batch_size=32, row_groups=[group], columns=columns):
            yield from batch.slice(start).to_pylist()
            start = max(0, start - batch.num_rows)

    def name(self, shard: int) -> str:
        """The file and the number of the row group."""
        file, group = self._groups[shard]
        return f"{file}, row group {group}"


class _InOrder(Record):
    shard: NonNegativeInt
    next: NonNegativeInt
    skipped: Counts


class _Shuffled(Record):
    epoch: NonNegativeInt
    block: NonNegativeInt
    taken: NonNegativeInt
    open: list[Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]]
    opened: NonNegativeInt
    skipped: Counts


class PairStream:
    """Pairs of numbered shards, in a seeded order that resumes exactly.

    Every process reads every row and decodes only its own: several processes download a hub dataset several times.

    Args:
        shards: where rows come from.
        held_out: the first so many usable rows, in the order of the files, never train.
        buffer: rows shuffled together, held undecoded (Pick-a-Pic: about 0.35 MB each).

    Raises:
        ValueError: there are fewer usable rows than `held_out`, or the columns are not a pair's.
    """

    def __init__(self, shards: Shards, held_out: int = 0, buffer: int = 1000) -> None:
        if held_out < 0 or buffer < 1:
            raise ValueError(f"held_out must be at least 0 and buffer at least 1, got {held_out} and {buffer}")
        self.shards, self.held_out_rows, self.buffer = shards, held_out, buffer
        self.fingerprint = shards.fingerprint | {"buffer": buffer}
        self._first_shard, self._first_row = self._behind_held_out()

    def _behind_held_out(self) -> tuple[int, int]:
        if not self.held_out_rows:
            return 0, 0
        skipped: Mapping[str, int] = {}
        for count, step in enumerate(self.in_order(None), 1):
            skipped = step.skipped
            if count == self.held_out_rows:
                return step.cursor["shard"], step.cursor["next"]
        raise ValueError(
            f"{self.held_out_rows} pairs cannot be held out: the data have fewer (left out: {dict(skipped)})"
        )

    def open(self, row: UndecodedPair) -> PreferencePair:
        """The pair of a row. Raises `Unreadable` where an image is missing from the row or damaged."""
        return decode_pair(row)

    def in_order(self, cursor: Cursor | None) -> Iterator[OrderedRow[UndecodedPair]]:
        """Every usable row once, in the order of the files, the held-out ones first."""
        at: Cursor = self._read(_InOrder, cursor) if cursor else {"shard": 0, "next": 0, "skipped": {}}
        skipped: Counter[str] = Counter(at["skipped"])
        start = at["next"]
        for shard in range(at["shard"], len(self.shards)):
            for number, raw in enumerate(self.shards.rows(shard, start), start):
                try:
                    row = read_row(raw, f"{self.shards.name(shard)}, row {number}")
                except LeftOut as reason:
                    skipped[str(reason)] += 1
                else:
                    counts = dict(skipped)
                    yield OrderedRow(row, {"shard": shard, "next": number + 1, "skipped": counts}, counts)
            start = 0

    def held_out(self) -> Iterator[PreferencePair]:
        """The held-out pairs, decoded as they are asked for; those that cannot be decoded are left out."""
        rows = (step.row for step in self.in_order(None))
        return readable(self.open, itertools.islice(rows, self.held_out_rows))

    def steps(self, seed: int, cursor: Cursor | None) -> Iterator[OrderedRow[UndecodedPair]]:
        """Training rows without end, from `cursor` on. Raises `ValueError` after an epoch without a usable row."""
        start: Cursor = {"epoch": 0, "block": 0, "taken": 0, "open": [], "opened": 0, "skipped": {}}
        at = self._read(_Shuffled, cursor) if cursor else start
        while True:
            epoch, block, taken = at["epoch"], at["block"], at["taken"]
            began = {key: at[key] for key in ("open", "opened", "skipped")}
            reading = self._interleaved(self._shard_order(seed, epoch), began["open"], began["opened"])
            while True:
                rows, ended = self._block(reading, began)
                if not rows:
                    break
                order = torch.randperm(len(rows), generator=seeded(seed, f"block {block} of epoch {epoch}")).tolist()
                for i in range(taken, len(rows)):
                    place = {"epoch": epoch, "block": block, "taken": i + 1, **began}
                    yield OrderedRow(rows[order[i]], place, ended["skipped"])
                rows.clear()  # the next block is read into the room of this one
                block, taken, began = block + 1, 0, ended
            if block == 0:
                raise ValueError(
                    f"there is no pair to train on ({self.fingerprint}): {self.held_out_rows} rows are held out, the "
                    f"others were left out: {ended['skipped']}"
                )
            empty = {"open": [], "opened": 0}
            at = {"epoch": epoch + 1, "block": 0, "taken": 0, **empty, "skipped": ended["skipped"]}

    def _read(self, kind: type[Record], cursor: Cursor) -> Cursor:
        """A cursor as `kind` has them, whose shards there are."""
        at = read_cursor(kind, cursor).model_dump()
        if any(shard >= len(self.shards) for shard, _ in [*at.get("open", []), (at.get("shard", 0), 0)]):
            raise ValueError(f"{cursor!s:.80} is no place in these data, which have {len(self.shards)} shards")
        return at

    def _block(self, reading: Iterator[tuple[Any, str, Cursor]], began: Cursor) -> tuple[list[UndecodedPair], Cursor]:
        """The next `buffer` usable rows, and where the reading stands behind them."""
        rows: list[UndecodedPair] = []
        skipped: Counter[str] = Counter(began["skipped"])
        ended = began
        for raw, name, place in reading:
            ended = place
            try:
                rows.append(read_row(raw, name))
            except LeftOut as reason:
                skipped[str(reason)] += 1
            if len(rows) == self.buffer:
                break
        return rows, {**ended, "skipped": dict(skipped)}

    def _shard_order(self, seed: int, epoch: int) -> list[int]:
        shards = list(range(self._first_shard, len(self.shards)))
        order = torch.randperm(len(shards), generator=seeded(seed, f"shards of epoch {epoch}")).tolist()
        return [shards[i] for i in order]

    def _interleaved(
        self, order: list[int], places: list[list[int]], opened: int
    ) -> Iterator[tuple[Mapping[str, Any], str, Cursor]]:
        """Rows of `OPEN_SHARDS` shards in turn, each with its name and the place behind it.

        A place is the queue of open shards, each with its next row, and how many of `order` have been opened.
        """
        queue = deque((shard, row, self.shards.rows(shard, row)) for shard, row in places)
        while True:
            while len(queue) < OPEN_SHARDS and opened < len(order):
                start = self._first_row if order[opened] == self._first_shard else 0
                queue.append((order[opened], start, self.shards.rows(order[opened], start)))
                opened += 1
            if not queue:
                return
            shard, row, rows = queue.popleft()
            raw = next(rows, None)
            if raw is not None:
                queue.append((shard, row + 1, rows))
                place = {"open": [[number, following] for number, following, _ in queue], "opened": opened}
                yield raw, f"{self.shards.name(shard)}, row {row}", place
