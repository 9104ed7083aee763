"""The order in which training sees its pairs: seeded, resumable, the same for any number of processes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from deradiff.alignment.data_order import DataOrder
from deradiff.alignment.pair_rows import PreferencePair, UndecodedPair
from deradiff.alignment.pair_streams import OPEN_SHARDS, PairStream
from deradiff.alignment.pairs import PairFolder
from messages import naming
from pair_rows import GOOD, READABLE, UNREADABLE, Rows, colour, folder_of, pick, prompts, stream


def test_an_epoch_of_a_stream_holds_every_readable_pair_and_counts_the_rest() -> None:
    order = DataOrder(stream(), seed=1)
    seen = prompts(order, [3, 5, 7])
    # The places of the two unreadable rows are taken by the rows that follow them.
    assert len(seen) == 15 and set(seen) == READABLE
    assert order.skipped == {"corrupt image": 1, "no image": 1, "no prompt": 1, "tie": 1, "unlabelled": 1}
    assert all(colour(pair.winner) == GOOD for pair in order.take(13))


@pytest.mark.parametrize("kind", ["stream", "folder"])
def test_killed_at_any_position_the_sequence_goes_on_as_it_was(kind: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path)

    def order() -> DataOrder[PreferencePair]:
        return DataOrder(stream(held_out=2) if kind == "stream" else PairFolder(path, held_out=2), seed=3)

    whole, states = order(), []
    for _ in range(36):
        states.append((json.dumps(whole.state_dict()), whole.skipped))
        whole.take(1)
    unbroken = prompts(order(), [1] * 44)
    for done, (state, skipped) in enumerate(states):
        resumed = order()
        resumed.load_state_dict(json.loads(state))
        assert resumed.skipped == skipped
        assert prompts(resumed, [1] * 8) == unbroken[done : done + 8]
        assert len(state) < 600
    assert prompts(order(), [5, 1, 20, 18]) == unbroken, "the size of batches changes nothing"


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_the_global_batch_and_decode_only_their_own(world: int) -> None:
    alone = DataOrder(stream(), seed=2)
    batches = [[pair.prompt for pair in alone.take(6)] for _ in range(5)]
    opened = []

    class Watched(PairStream):
        def open(self, row: UndecodedPair) -> PreferencePair:
            opened.append(row.prompt)
            return super().open(row)

    source = stream().shards
    orders = [DataOrder(Watched(source, buffer=5), seed=2) for _ in range(world)]
    for batch in batches:
        shares = [[pair.prompt for pair in order.take(6, rank, world)] for rank, order in enumerate(orders)]
        assert shares == [batch[rank * 6 // world : (rank + 1) * 6 // world] for rank in range(world)]
    assert len(opened) == 30 + sum(prompt in UNREADABLE for prompt in opened)
    totals = [sum(order.skipped.get(reason, 0) for order in orders) for reason in ("corrupt image", "no image")]
    assert totals == [alone.skipped[reason] for reason in ("corrupt image", "no image")]
    assert all(order.skipped["tie"] == alone.skipped["tie"] for order in orders)


def test_unreadable_rows_one_after_another_are_counted_once_each() -> None:
    rows = [pick("a"), pick("b", jpg_0=b""), pick("c", jpg_1=b"no"), pick("d")]
    order = DataOrder(PairStream(Rows(rows), buffer=1))
    assert prompts(order, [4]) == ["a", "d", "d", "d"] and order.skipped == {"corrupt image": 2}


def test_epochs_and_seeds_differ_and_folders_are_permuted(tmp_path: Path) -> None:
    source = PairFolder(folder_of(tmp_path, 12))
    first = prompts(DataOrder(source, seed=0), [12, 12])
    other = prompts(DataOrder(source, seed=1), [12])
    listed = [str(i) for i in range(12)]
    assert sorted(first[:12], key=int) == sorted(first[12:], key=int) == sorted(other, key=int) == listed
    assert len({tuple(listed), tuple(first[:12]), tuple(first[12:]), tuple(other)}) == 4


def test_streams_mix_shards_and_blocks() -> None:
    shards = Rows(*[[pick(f"{shard} {row}") for row in range(20)] for shard in range(2 * OPEN_SHARDS)])
    order = prompts(DataOrder(PairStream(shards, buffer=40), seed=0), [160, 160])
    assert sorted(order[:160]) == sorted(order[160:]) and order[:160] != order[160:]
    assert len({prompt.split()[0] for prompt in order[:40]}) == OPEN_SHARDS
    rows = [int(prompt.split()[1]) for prompt in order[:40]]
    assert rows != sorted(rows)


@pytest.mark.parametrize("kind", ["stream", "folder"])
@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_pairs_never_train(kind: str, seed: int, tmp_path: Path) -> None:
    folder_of(tmp_path)
    sources = {
        count: stream(held_out=count) if kind == "stream" else PairFolder(tmp_path, held_out=count)
        for count in (0, 1, 3, 4)
    }
    everything = READABLE if kind == "stream" else {str(i) for i in range(7)}
    for count, source in sources.items():
        apart = [pair.prompt for pair in source.held_out()]
        trained = set(prompts(DataOrder(source, seed), [40]))
        assert len(apart) == count and trained == everything - set(apart)


def test_another_run_s_order_is_refused(tmp_path: Path) -> None:
    source = PairFolder(folder_of(tmp_path / "a"))
    state = DataOrder(source, seed=0).state_dict()
    with pytest.raises(ValueError, match=naming("seed", 0, 1)):
        DataOrder(source, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="data:"):
        DataOrder(PairFolder(folder_of(tmp_path / "b", 8)), seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match=naming("held-out rows", 0, 2)):
        DataOrder(PairFolder(tmp_path / "a", held_out=2), seed=0).load_state_dict(state)


def test_a_feed_survives_a_failed_read() -> None:
    class Flaky(Rows):
        failures = 1

        def rows(self, shard: int, start: int) -> Iterator[Mapping[str, Any]]:
            for number, row in enumerate(super().rows(shard, start), start):
                if (shard, number) == (1, 3) and self.failures:
                    self.failures -= 1
                    raise ConnectionError("the hub hung up")
                yield row

    def shards(kind: type[Rows]) -> Rows:
        return kind(*[[pick(f"{shard}{row}") for row in range(6)] for shard in range(2)])

    order = DataOrder(PairStream(shards(Flaky), buffer=3))
    seen: list[str] = []
    with pytest.raises(ConnectionError):
        while True:
            seen += [pair.prompt for pair in order.take(2)]
    seen += [pair.prompt for pair in order.take(12)]
    assert seen == prompts(DataOrder(PairStream(shards(Rows), buffer=3)), [len(seen)])


def test_data_without_a_usable_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=naming({"tie": 2})):
        DataOrder(PairStream(Rows([pick("a", 0.5)], [pick("b", 0.5)]))).take(1)
    with pytest.raises(ValueError, match=naming(0, {})):
        DataOrder(PairStream(Rows())).take(1)
    with pytest.raises(ValueError, match=naming("2 pairs")):
        PairStream(Rows([pick("a")]), held_out=2)
    broken = DataOrder(PairStream(Rows([pick("a", jpg_0=b"no"), pick("b", jpg_1=b"no")])))
    with pytest.raises(ValueError, match=naming(100, "shard 0")):
        broken.take(2)
    with pytest.raises(ValueError, match=naming("4 rows", "2 of 2")):
        broken.take(4, 2, 2)
