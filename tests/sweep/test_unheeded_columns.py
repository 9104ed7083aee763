"""Splits, labels and columns that were asked for are those that are read, or a sentence says which there are."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deradiff.alignment.data_order import DataOrder
from deradiff.alignment.pair_rows import LeftOut, first_wins, read_row
from deradiff.alignment.pairs import open_pairs, split_of
from deradiff.alignment.prompts import load_prompts
from deradiff.experiments.plan import Prompts
from deradiff.experiments.sources import resolve
from messages import naming
from pair_rows import LOSER, WINNER, folder_of, pick
from parquet_files import Write, writer

pytestmark = pytest.mark.attack("an argument that does not apply is dropped")


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Write:
    return writer(monkeypatch)


# -- splits ------------------------------------------------------------------------------------------------------------


def pairs_of(*captions: str) -> Mapping[str, list[Any]]:
    rows = [pick(caption) for caption in captions]
    return {name: [row[name] for row in rows] for name in rows[0]}


def captions(folder: Path, split: str | None = None) -> list[str]:
    source: Any = open_pairs(folder, split=split)
    return [step.row.prompt for step in source.in_order(None)]


def test_a_split_of_local_parquet_is_that_split(tmp_path: Path, write: Write) -> None:
    for split in ("train", "validation", "test_unique"):
        for part in range(2):
            write(tmp_path / "data" / f"{split}-0000{part}-of-00002.parquet", pairs_of(f"{split} {part}"))
    assert captions(tmp_path) == captions(tmp_path, "train") == ["train 0", "train 1"]
    assert captions(tmp_path, "validation") == ["validation 0", "validation 1"]
    assert captions(tmp_path, "test_unique") == ["test_unique 0", "test_unique 1"]
    with pytest.raises(ValueError, match=naming("'test'", "test_unique, train, validation")):
        open_pairs(tmp_path, split="test")
    one = tmp_path / "data" / "validation-00000-of-00002.parquet"
    assert captions(one) == captions(one, "validation") == ["validation 0"]
    with pytest.raises(ValueError, match=naming(one, "'train'", "validation")):
        open_pairs(one, split="train")


def test_files_of_which_none_is_meant_are_not_mixed(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "validation.parquet", pairs_of("v"))
    assert captions(tmp_path) == ["v"]  # all there is
    write(tmp_path / "test.parquet", pairs_of("t"))
    with pytest.raises(ValueError, match=naming("test, validation")):
        open_pairs(tmp_path)
    write(tmp_path / "train.parquet", pairs_of("a"))
    write(tmp_path / "more.parquet", pairs_of("m"))
    with pytest.raises(ValueError, match=naming("test, train, validation", tmp_path / "more.parquet")):
        open_pairs(tmp_path)
    assert captions(tmp_path, "train") == ["a"]


def test_a_split_or_revision_of_what_has_none(tmp_path: Path, write: Write) -> None:
    listed = folder_of(tmp_path / "listed", 2)
    file = write(tmp_path / "plain" / "mine.parquet", pairs_of("a"))
    for source in (file, file.parent):
        with pytest.raises(ValueError, match=naming(source, "'train'")):
            open_pairs(source, split="train")
    with pytest.raises(ValueError, match=naming(listed, "split='train'")):
        open_pairs(listed, split="train")
    with pytest.raises(ValueError, match=naming(listed, "revision 'main'")):
        open_pairs(listed, revision="main")
    write(listed / "mine.parquet", pairs_of("a"))
    with pytest.raises(ValueError, match=naming("pairs.jsonl", listed / "mine.parquet")):
        open_pairs(listed)
    (tmp_path / "p.txt").write_text("a")
    with pytest.raises(ValueError, match=naming("p.txt", "'test'")):
        load_prompts(tmp_path / "p.txt", split="test")
    with pytest.raises(ValueError, match=naming("digits", "'test'")):
        resolve(Prompts(source="digits", split="test"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00004-a1b2.parquet", "train"),
        ("Validation.parquet", "validation"),
        ("train_3.parquet", "train"),
        ("test_unique-1.parquet", "test_unique"),
        ("train/0000.parquet", "train"),
        ("trainer.parquet", None),
        ("mine.parquet", None),
        ("preferences-00000-of-00001.parquet", "preferences"),
    ],
)
def test_which_split_a_file_is_of(name: str, split: str | None) -> None:
    assert split_of(Path("somewhere") / name) == split


# -- labels and columns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [["prompt", "chosen", "rejected"], ["prompt", "path1", "path2", "confidence"]])
def test_other_columns_are_named_before_anything_is_read(columns: list[str], tmp_path: Path, write: Write) -> None:
    with pytest.raises(ValueError) as refused:
        open_pairs(write(tmp_path / "a.parquet", {name: ["x"] for name in columns}))
    assert all(repr(name) in str(refused.value) for name in columns)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"label_0": "1"}, ["row 7", "label_0", "'1'", "str"]),
        ({"label_0": "win", "label_1": "lose"}, ["row 7", "label_0", "'win'"]),
        ({"label_1": "0"}, ["row 7", "label_1", "'0'"]),
        ({"label_0": b"1"}, ["row 7", "label_0", b"1"]),
        ({"label_0": [1.0]}, ["row 7", "label_0", [1.0]]),
        ({"label_0": 5}, ["row 7", "label_0", 5]),
        ({"label_0": -1.0}, ["row 7", "label_0", -1.0]),
        ({"label_0": math.inf}, ["row 7", "label_0", "inf"]),
        ({"has_label": "False"}, ["row 7", "has_label", "'False'"]),
        ({"caption": 3}, ["row 7", "caption", 3]),
    ],
)
def test_labels_that_are_no_numbers_are_refused_with_row_column_and_value(
    changes: dict[str, Any], values: list[Any]
) -> None:
    with pytest.raises(ValueError, match=naming(*values)):
        read_row(pick("a") | changes, "row 7")


def test_labels_that_are_numbers_of_any_kind_are_read() -> None:
    from decimal import Decimal

    for label in (1, 1.0, True, Decimal(1)):
        assert first_wins({"label_0": label, "label_1": None})
    for row in ({"label_0": None}, {"label_0": 1.0, "has_label": False}, {"label_0": 1, "has_label": 0}):
        with pytest.raises(LeftOut, match="unlabelled"):
            first_wins(row)


def test_text_labels_in_a_file_end_in_a_sentence(tmp_path: Path, write: Write) -> None:
    images = {"jpg_0": [WINNER], "jpg_1": [LOSER]}
    columns: dict[str, list[Any]] = {"caption": ["x"], **images, "label_0": ["1"], "label_1": ["0"]}
    with pytest.raises(ValueError, match=naming("a.parquet", "row 0", "label_0", "'1'")):
        DataOrder(open_pairs(write(tmp_path / "a.parquet", columns))).take(1)


@pytest.mark.parametrize(
    ("row", "values"),
    [
        (
            '{"caption": "a", "jpg_0": "x", "label_0": 1}',
            ["line 1", "prompt", "winner", "loser", "'caption', 'jpg_0', 'label_0'"],
        ),
        ('{"prompt": "a", "winner": "a.png", "loser": null}', ["line 1", "loser", None]),
        ("[1]", ["line 1", [1]]),
    ],
)
def test_rows_of_lists_name_what_they_have(row: str, values: list[Any], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(row)
    with pytest.raises(ValueError, match=naming(*values)):
        open_pairs(tmp_path)
