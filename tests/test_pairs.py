"""Pairs from Pick-a-Pic's rows, folders and Parquet; the order they come in; the pixels they become."""

import io
import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff.alignment.feeds import Feed, Unreadable
from deradiff.alignment.image_transforms import pair_pixels
from deradiff.alignment.pair_rows import LeftOut, PairRow, decode_pair, read_row
from deradiff.alignment.pair_streams import OPEN_SHARDS, PairStream, ParquetShards
from deradiff.alignment.pairs import Pair, PairFolder, open_pairs

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


def prompts(feed: Feed[Pair], counts: list[int]) -> list[str]:
    return [pair.prompt for count in counts for pair in feed.take(count)]


def colour(image: Image.Image) -> tuple[int, int, int]:
    found = image.getpixel((0, 0))
    assert isinstance(found, tuple)
    return (int(found[0]), int(found[1]), int(found[2]))


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("forgotten", [[], ["label_1"], ["has_label", "label_1"]])
def test_both_orders_of_preference_give_the_preferred_image_as_winner(label: float, forgotten: list[str]) -> None:
    row = {key: value for key, value in pick("a cat", label).items() if key not in forgotten}
    pair = decode_pair(read_row(row, "row 0"))
    assert (pair.prompt, colour(pair.winner), colour(pair.loser)) == ("a cat", GOOD, BAD)


@pytest.mark.parametrize(
    "row, reason",
    [
        (pick("a", 0.5), "tie"),
        (pick("a", None), "unlabelled"),
        (pick("a", float("nan")), "unlabelled"),
        (pick("a", 1.0, has_label=False), "unlabelled"),
        (pick(None), "no prompt"),
        (pick("  "), "no prompt"),
    ],
)
def test_rows_without_a_preference_are_left_out(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(LeftOut, match=reason):
        read_row(row, "row 0")


def test_rows_of_other_columns_are_refused_with_their_names() -> None:
    with pytest.raises(ValueError, match=r"shard 3, row 1 .*\['image', 'text'\]"):
        read_row({"text": "a", "image": b""}, "shard 3, row 1")
    with pytest.raises(ValueError, match=r"row 0: an image must be bytes.*got str"):
        read_row({"prompt": "a", "winner": "w.png", "loser": b""}, "row 0")


def test_the_hubs_image_columns_are_read() -> None:
    row = {"prompt": "a", "winner": {"bytes": WINNER, "path": None}, "loser": Image.new("L", (2, 2), 7)}
    pair = decode_pair(read_row(row, "row 0"))
    assert colour(pair.winner) == GOOD and colour(pair.loser) == (7, 7, 7)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_no_damage_to_an_image_ends_a_run(form: str) -> None:
    content = encoded(GOOD, form, (32, 32))
    damaged = [content[:length] for length in range(0, len(content) - 2, 7)] + [b"<html>", content[:30] + b"\xff" * 200]
    for data in damaged:
        try:
            decode_pair(PairRow("a", data, LOSER, "row 5"))
        except Unreadable as error:
            assert error.reason == "corrupt image" and "row 5: the winner" in str(error)
    with pytest.raises(Unreadable, match="row 5: the loser has no image"):
        decode_pair(PairRow("a", WINNER, None, "row 5"))


# -- the order --------------------------------------------------------------------------------------------------------


def test_an_epoch_of_a_stream_holds_every_readable_pair_and_counts_the_rest() -> None:
    feed = Feed(stream(), seed=1)
    seen = prompts(feed, [3, 5, 7])
    # The places of the two unreadable rows are taken by the rows that follow them.
    assert len(seen) == 15 and set(seen) == READABLE
    assert feed.skipped == {"corrupt image": 1, "no image": 1, "no prompt": 1, "tie": 1, "unlabelled": 1}
    assert all(colour(pair.winner) == GOOD for pair in feed.take(13))


@pytest.mark.parametrize("kind", ["stream", "folder"])
def test_killed_at_any_position_the_sequence_goes_on_as_it_was(kind: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path)

    def feed() -> Feed[Pair]:
        return Feed(stream(held_out=2) if kind == "stream" else PairFolder(path, held_out=2), seed=3)

    whole, states = feed(), []
    for _ in range(36):
        states.append((json.dumps(whole.state_dict()), whole.skipped))
        whole.take(1)
    unbroken = prompts(feed(), [1] * 44)
    for done, (state, skipped) in enumerate(states):
        resumed = feed()
        resumed.load_state_dict(json.loads(state))
        assert resumed.skipped == skipped
        assert prompts(resumed, [1] * 8) == unbroken[done : done + 8]
        assert len(state) < 600
    assert prompts(feed(), [5, 1, 20, 18]) == unbroken, "the size of batches changes nothing"


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_the_global_batch_and_decode_only_their_own(world: int) -> None:
    alone = Feed(stream(), seed=2)
    batches = [[pair.prompt for pair in alone.take(6)] for _ in range(5)]
    opened = []

    class Watched(PairStream):
        def open(self, row: PairRow) -> Pair:
            opened.append(row.prompt)
            return super().open(row)

    source = stream().shards
    feeds = [Feed(Watched(source, buffer=5), seed=2) for _ in range(world)]
    for batch in batches:
        shares = [[pair.prompt for pair in feed.take(6, rank, world)] for rank, feed in enumerate(feeds)]
        assert shares == [batch[rank * 6 // world : (rank + 1) * 6 // world] for rank in range(world)]
    assert len(opened) == 30 + sum(prompt in UNREADABLE for prompt in opened)
    totals = [sum(feed.skipped.get(reason, 0) for feed in feeds) for reason in ("corrupt image", "no image")]
    assert totals == [alone.skipped[reason] for reason in ("corrupt image", "no image")]
    assert all(feed.skipped["tie"] == alone.skipped["tie"] for feed in feeds)


def test_unreadable_rows_one_after_another_are_counted_once_each() -> None:
    rows = [pick("a"), pick("b", jpg_0=b""), pick("c", jpg_1=b"no"), pick("d")]
    feed = Feed(PairStream(Rows(rows), buffer=1))
    assert prompts(feed, [4]) == ["a", "d", "d", "d"] and feed.skipped == {"corrupt image": 2}


def test_epochs_and_seeds_differ_and_folders_are_permuted(tmp_path: Path) -> None:
    source = PairFolder(folder_of(tmp_path, 12))
    first = prompts(Feed(source, seed=0), [12, 12])
    other = prompts(Feed(source, seed=1), [12])
    listed = [str(i) for i in range(12)]
    assert sorted(first[:12], key=int) == sorted(first[12:], key=int) == sorted(other, key=int) == listed
    assert len({tuple(listed), tuple(first[:12]), tuple(first[12:]), tuple(other)}) == 4


def test_streams_mix_shards_and_blocks() -> None:
    shards = Rows(*[[pick(f"{shard} {row}") for row in range(20)] for shard in range(2 * OPEN_SHARDS)])
    order = prompts(Feed(PairStream(shards, buffer=40), seed=0), [160, 160])
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
        trained = set(prompts(Feed(source, seed), [40]))
        assert len(apart) == count and trained == everything - set(apart)


def test_another_run_s_order_is_refused(tmp_path: Path) -> None:
    source = PairFolder(folder_of(tmp_path / "a"))
    state = Feed(source, seed=0).state_dict()
    with pytest.raises(ValueError, match="another seed: 0, now 1"):
        Feed(source, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="other data"):
        Feed(PairFolder(folder_of(tmp_path / "b", 8)), seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="other held-out rows: 0, now 2"):
        Feed(PairFolder(tmp_path / "a", held_out=2), seed=0).load_state_dict(state)


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

    feed = Feed(PairStream(shards(Flaky), buffer=3))
    seen: list[str] = []
    with pytest.raises(ConnectionError):
        while True:
            seen += [pair.prompt for pair in feed.take(2)]
    seen += [pair.prompt for pair in feed.take(12)]
    assert seen == prompts(Feed(PairStream(shards(Rows), buffer=3)), [len(seen)])


def test_data_without_a_usable_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no pair to train on.*'tie': 2"):
        Feed(PairStream(Rows([pick("a", 0.5)], [pick("b", 0.5)]))).take(1)
    with pytest.raises(ValueError, match="no pair to train on"):
        Feed(PairStream(Rows())).take(1)
    with pytest.raises(ValueError, match="2 pairs cannot be held out: the data have fewer"):
        PairStream(Rows([pick("a")]), held_out=2)
    broken = Feed(PairStream(Rows([pick("a", jpg_0=b"no"), pick("b", jpg_1=b"no")])))
    with pytest.raises(ValueError, match=r"100 rows in succession could not be read.*shard 0, row"):
        broken.take(2)
    with pytest.raises(ValueError, match="cannot take 4 rows as process 2 of 2"):
        broken.take(4, 2, 2)


# -- the hub ----------------------------------------------------------------------------------------------------------


class FakeDataset:
    def __init__(self, shards: list[list[dict[str, Any]]]) -> None:
        self.shards, self.num_shards = shards, len(shards)

    def shard(self, num_shards: int, index: int) -> "FakeDataset":
        assert num_shards == self.num_shards
        return FakeDataset([self.shards[index]])

    def skip(self, count: int) -> "FakeDataset":
        return FakeDataset([[row for shard in self.shards for row in shard][count:]])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for shard in self.shards for row in shard)


def install(monkeypatch: pytest.MonkeyPatch, load: Any) -> list[tuple[Any, ...]]:
    """A `datasets` library whose `load_dataset` is `load`; returns the calls it got."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(repo: str, *, split: str, revision: str | None = None, streaming: bool = False) -> Any:
        calls.append((repo, split, revision, streaming))
        return load()

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    return calls


def test_pick_a_pic_streams_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [[pick("a"), pick("tied", 0.5), pick("b", 0.0)], [pick("c", 1.0)], [pick("d"), pick("e")]]
    calls = install(monkeypatch, lambda: FakeDataset(shards))
    feed = Feed(open_pairs("pickapic-v2", held_out=1, revision="abc"))
    assert calls == [("yuvalkirstain/pickapic_v2", "train", "abc", True)]
    assert sorted(prompts(feed, [2, 2])) == ["b", "c", "d", "e"] and feed.skipped == {"tie": 1}
    again = Feed(open_pairs("pickapic-v2", held_out=1, revision="abc"))
    again.load_state_dict(feed.state_dict())
    assert prompts(again, [3]) == prompts(feed, [3])
    open_pairs("pickapic-v1", split="validation_unique")
    open_pairs("someone/else")
    assert [call[:2] for call in calls[2:]] == [
        ("yuvalkirstain/pickapic_v1", "validation_unique"), ("someone/else", "train"),
    ]  # fmt: skip


def test_what_is_missing_for_the_hub_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"yuvalkirstain/pickapic_v1 .*deradiff\[align\]"):
        open_pairs("pickapic-v1")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow.*deradiff\[align\]"):
        open_pairs(tmp_path)

    def unreachable() -> Any:
        raise ConnectionError("no route")

    install(monkeypatch, unreachable)
    with pytest.raises(OSError, match=r"pickapic_v1 cannot be reached \(no route\)"):
        open_pairs("pickapic-v1")


# -- folders ----------------------------------------------------------------------------------------------------------


def test_the_three_lists_say_the_same(tmp_path: Path) -> None:
    jsonl = folder_of(tmp_path / "jsonl", 3)
    rows = [json.loads(line) for line in (jsonl / "pairs.jsonl").read_text().splitlines()]
    rows[1]["prompt"] = 'a "quoted", twofold\nprompt'
    (jsonl / "pairs.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    other = {"csv": "prompt,winner,loser\r\n", "json": json.dumps(rows)}
    for row in rows:
        quoted = row["prompt"].replace('"', '""')
        other["csv"] += f'"{quoted}",{row["winner"]},{row["loser"]}\r\n'
    for form, content in other.items():
        (folder_of(tmp_path / form, 3) / "pairs.jsonl").unlink()
        (tmp_path / form / f"pairs.{form}").write_bytes(b"\xef\xbb\xbf" + content.encode())
    read = [
        [pair.prompt for pair in map(source.open, range(3))] for source in map(open_of(tmp_path), [*other, "jsonl"])
    ]
    assert read == [[row["prompt"] for row in rows]] * 3


def open_of(root: Path) -> Any:
    return lambda name: PairFolder(root / name)


@pytest.mark.parametrize("path", ["../outside.png", "images/../../outside.png", "link.png", "ABSOLUTE", "images", ""])
def test_paths_that_leave_the_folder_are_refused(path: str, tmp_path: Path) -> None:
    folder, outside = folder_of(tmp_path / "pairs", 2), tmp_path / "outside.png"
    outside.write_bytes(WINNER)
    (folder / "link.png").symlink_to(outside)
    row = {"prompt": "a", "winner": "images/0w.png", "loser": str(outside) if path == "ABSOLUTE" else path}
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises((ValueError, FileNotFoundError), match="line 1: the loser"):
        PairFolder(folder)


def test_a_missing_image_is_named_with_its_row(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    source = PairFolder(folder)
    (folder / "images/3l.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"pairs.jsonl, line 4: the loser 'images/3l.jpg' is missing.*3l.jpg"):
        PairFolder(folder)
    with pytest.raises(FileNotFoundError, match=r"line 4: the loser cannot be read from .*3l.jpg"):
        Feed(source).take(7)


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("pairs.jsonl", b"", "lists no pair"),
        ("pairs.jsonl", b"{}\nnope", "line 2 is not JSON"),
        ("pairs.jsonl", b'{"prompt": 3, "winner": "a", "loser": "b"}', "line 1 must give prompt, winner and loser"),
        ("pairs.jsonl", b'{"prompt": " ", "winner": "a", "loser": "b"}', "line 1 has an empty prompt"),
        ("pairs.jsonl", b"\xff\xfe", "not text in UTF-8"),
        ("pairs.json", b'{"prompt": "a"}', "must hold a list"),
        ("pairs.csv", b"prompt,winner\na,b\n", "line 2 must give prompt, winner and loser"),
        ("images.txt", b"", "has no list of pairs"),
    ],
)
def test_unreadable_lists_are_refused(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        open_pairs(tmp_path)


def test_sources_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for source in (tmp_path / "none", "pickapic-v3", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match="pickapic-v1"):
            open_pairs(source)
    folder = folder_of(tmp_path, 2)
    (folder / "pairs.csv").write_text("")
    with pytest.raises(ValueError, match=r"pairs.jsonl and pairs.csv: keep one"):
        open_pairs(folder)
    (folder / "pairs.csv").unlink()
    with pytest.raises(ValueError, match="2 of 2 pairs cannot be held out"):
        open_pairs(folder, held_out=2)


# -- Parquet and the real library, where they are installed -----------------------------------------------------------


def parquet_of(root: Path) -> list[str]:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [pick(str(i), [0.0, 1.0, 0.5][i % 3]) for i in range(20)]
    for part in range(2):
        table = arrow.Table.from_pylist(rows[part * 10 : part * 10 + 10])
        parquet.write_table(table, root / f"train-{part}.parquet", row_group_size=4)
    return [row["caption"] for row in rows if row["label_0"] != 0.5]


def test_parquet_files_stream_by_row_group(tmp_path: Path) -> None:
    expected = parquet_of(tmp_path)
    shards = ParquetShards(list(tmp_path.glob("*.parquet")))
    assert [len(list(shards.rows(shard, 1))) for shard in range(len(shards))] == [3, 3, 1] * 2
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([pick(str(i)) for i in range(80)]), tmp_path.parent / "long.parquet")
    long = ParquetShards([tmp_path.parent / "long.parquet"])
    for start in (0, 31, 32, 33, 70, 80):
        assert [row["caption"] for row in long.rows(0, start)] == [str(i) for i in range(start, 80)]
    source = open_pairs(tmp_path)
    assert isinstance(source, PairStream)
    assert [source.open(step.row).prompt for step in source.in_order(None)] == expected
    assert sorted(prompts(Feed(source), [len(expected)])) == sorted(expected)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"train-0.parquet cannot be read as Parquet"):
        open_pairs(tmp_path)


def test_the_datasets_library_is_called_as_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    expected = parquet_of(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    from deradiff.alignment.pair_streams import HubShards

    source = PairStream(HubShards(f"./{tmp_path.name}"), held_out=2, buffer=4)
    assert len(source.shards) == 2
    assert [source.open(step.row).prompt for step in source.in_order(None)] == expected
    feed = Feed(source)
    before = prompts(feed, [5])
    resumed = Feed(source)
    resumed.load_state_dict(json.loads(json.dumps(feed.state_dict())))
    after = prompts(resumed, [len(expected) - 7])
    assert after == prompts(feed, [len(after)]) and sorted(before + after) == sorted(expected[2:])


# -- pixels -----------------------------------------------------------------------------------------------------------


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the column and green the row, in pixels."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x, y, 0) for y in range(height) for x in range(width)])
    return image


def read_back(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels + 1) * 127.5


def test_the_crop_is_where_the_time_ids_say() -> None:
    pair = Pair("a", ramp(40, 24), ramp(24, 60))
    found = pair_pixels(pair, 24)
    assert found.time_ids.tolist() == [[24, 40, 0, 8, 24, 24], [60, 24, 18, 0, 24, 24]]
    for random in range(5):
        generator = torch.Generator().manual_seed(random)
        found = pair_pixels(pair, 24, crop="random", generator=generator)
        for pixels, (_, _, top, left, *_) in zip(read_back(found.pixels), found.time_ids.tolist(), strict=True):
            torch.testing.assert_close(pixels[0], torch.arange(left, left + 24).expand(24, 24), atol=1e-3, rtol=0)
            torch.testing.assert_close(
                pixels[1], torch.arange(top, top + 24)[:, None].expand(24, 24), atol=1e-3, rtol=0
            )
    places = {tuple(pair_pixels(pair, 24, crop="random", generator=generator).time_ids[:, 2:4].flatten().tolist())
              for _ in range(20)}  # fmt: skip
    assert len(places) > 10


def test_pixels_are_the_resized_image_from_minus_one_to_one() -> None:
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    pair = Pair("a", image, Image.new("RGB", (5, 5), (255, 0, 128)))
    found = pair_pixels(pair, 30).pixels
    resized = image.resize((45, 30), Image.Resampling.BILINEAR).crop((7, 0, 37, 30))
    expected = torch.from_numpy(np.array(resized)).float().permute(2, 0, 1)
    # Antialiasing at the border of the crop sees one pixel less.
    torch.testing.assert_close(read_back(found[0])[:, :, 1:-1], expected[:, :, 1:-1], atol=1.01, rtol=0)
    torch.testing.assert_close(found[1].mean((1, 2)), torch.tensor([1.0, -1.0, 1 / 255]), atol=1e-5, rtol=0)


def test_a_flip_mirrors_the_pair_together_half_of_the_time() -> None:
    pair, generator = Pair("a", ramp(16, 16), ramp(16, 16)), torch.Generator().manual_seed(0)
    plain = pair_pixels(pair, 16).pixels
    mirrored = 0
    for _ in range(60):
        found = pair_pixels(pair, 16, flip=True, generator=generator).pixels
        torch.testing.assert_close(found[0], found[1])
        flipped = not torch.equal(found, plain)
        torch.testing.assert_close(found, plain.flip(-1) if flipped else plain)
        mirrored += flipped
    assert 15 < mirrored < 45


def test_unseeded_choices_and_odd_sizes() -> None:
    pair = Pair("a", Image.new("RGB", (1, 3000)), Image.new("RGB", (333, 500)))
    for choice in ({"crop": "random"}, {"flip": True}):
        with pytest.raises(ValueError, match="needs a generator"):
            pair_pixels(pair, 8, **choice)
    with pytest.raises(ValueError, match="resolution must be at least 1, got 0"):
        pair_pixels(pair, 0)
    assert pair_pixels(pair, 256).pixels.shape == (2, 3, 256, 256)
