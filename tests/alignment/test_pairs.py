"""Pairs from Pick-a-Pic's rows, from the hub, folders and Parquet."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deradiff.alignment.data_order import DataOrder, Unreadable
from deradiff.alignment.pair_rows import LeftOut, UndecodedPair, decode_pair, read_row
from deradiff.alignment.pair_streams import PairStream, ParquetShards
from deradiff.alignment.pairs import PairFolder, open_pairs
from messages import naming
from pair_rows import BAD, GOOD, LOSER, WINNER, colour, encoded, folder_of, pick, prompts

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
    with pytest.raises(ValueError, match=naming("shard 3, row 1", ["image", "text"])):
        read_row({"text": "a", "image": b""}, "shard 3, row 1")
    with pytest.raises(ValueError, match=naming("row 0", "str")):
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
            decode_pair(UndecodedPair("a", data, LOSER, "row 5"))
        except Unreadable as error:
            assert error.reason == "corrupt image" and "row 5" in str(error) and "winner" in str(error)
    with pytest.raises(Unreadable, match=naming("row 5", "loser")):
        decode_pair(UndecodedPair("a", WINNER, None, "row 5"))


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
    order = DataOrder(open_pairs("pickapic-v2", held_out=1, revision="abc"))
    assert calls == [("liuhuohuo2/pick-a-pic-v2", "train", "abc", True)]
    assert sorted(prompts(order, [2, 2])) == ["b", "c", "d", "e"] and order.skipped == {"tie": 1}
    again = DataOrder(open_pairs("pickapic-v2", held_out=1, revision="abc"))
    again.load_state_dict(order.state_dict())
    assert prompts(again, [3]) == prompts(order, [3])
    open_pairs("pickapic-v1", split="validation_unique")
    open_pairs("someone/else")
    assert [call[:2] for call in calls[2:]] == [
        ("pickapic-anonymous/pickapic_v1", "validation_unique"),
        ("someone/else", "train"),
    ]


def test_what_is_missing_for_the_hub_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=naming("pickapic-anonymous/pickapic_v1", "deradiff[align]")):
        open_pairs("pickapic-v1")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=naming("pyarrow", "deradiff[align]")):
        open_pairs(tmp_path)

    def unreachable() -> Any:
        raise ConnectionError("no route")

    install(monkeypatch, unreachable)
    with pytest.raises(OSError, match=naming("pickapic-anonymous/pickapic_v1", "no route")):
        open_pairs("pickapic-v1")

    def gated() -> Any:
        raise OSError("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it.")

    install(monkeypatch, gated)
    page = "huggingface.co/datasets/pickapic-anonymous/pickapic_v1"
    with pytest.raises(OSError, match=naming(page, "hf auth login")):
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
    with pytest.raises((ValueError, FileNotFoundError), match=naming("line 1", "loser")):
        PairFolder(folder)


def test_a_missing_image_is_named_with_its_row(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    source = PairFolder(folder)
    (folder / "images/3l.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=naming("pairs.jsonl", "line 4", "'images/3l.jpg'", folder / "images/3l.jpg")
    ):
        PairFolder(folder)
    with pytest.raises(FileNotFoundError, match=naming("line 4", "loser", folder / "images/3l.jpg")):
        DataOrder(source).take(7)


@pytest.mark.parametrize(
    "name, content, values",
    [
        ("pairs.jsonl", b"", ["pairs.jsonl", "pair"]),
        ("pairs.jsonl", b"{}\nnope", ["line 2", "JSON"]),
        ("pairs.jsonl", b'{"prompt": 3, "winner": "a", "loser": "b"}', ["line 1", "prompt"]),
        ("pairs.jsonl", b'{"prompt": " ", "winner": "a", "loser": "b"}', ["line 1", "empty"]),
        ("pairs.jsonl", b"\xff\xfe", ["UTF-8"]),
        ("pairs.json", b'{"prompt": "a"}', ["pairs.json", "list"]),
        ("pairs.csv", b"prompt,winner\na,b\n", ["line 2", "loser"]),
        ("images.txt", b"", ["pairs.jsonl", "pairs.csv"]),
    ],
)
def test_unreadable_lists_are_refused(name: str, content: bytes, values: list[object], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=naming(*values)):
        open_pairs(tmp_path)


def test_sources_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for source in (tmp_path / "none", "pickapic-v3", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=naming(source, "pickapic-v1")):
            open_pairs(source)
    folder = folder_of(tmp_path, 2)
    (folder / "pairs.csv").write_text("")
    with pytest.raises(ValueError, match=naming("pairs.jsonl", "pairs.csv")):
        open_pairs(folder)
    (folder / "pairs.csv").unlink()
    with pytest.raises(ValueError, match=naming("2 of 2")):
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
    assert sorted(prompts(DataOrder(source), [len(expected)])) == sorted(expected)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=naming("train-0.parquet", "Parquet")):
        open_pairs(tmp_path)


def test_the_datasets_library_is_called_as_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    expected = parquet_of(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    from deradiff.alignment.pair_streams import HubShards

    source = PairStream(HubShards(f"./{tmp_path.name}"), held_out=2, buffer=4)
    assert len(source.shards) == 2
    assert [source.open(step.row).prompt for step in source.in_order(None)] == expected
    order = DataOrder(source)
    before = prompts(order, [5])
    resumed = DataOrder(source)
    resumed.load_state_dict(json.loads(json.dumps(order.state_dict())))
    after = prompts(resumed, [len(expected) - 7])
    assert after == prompts(order, [len(after)]) and sorted(before + after) == sorted(expected[2:])
