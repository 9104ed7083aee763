"""One reader of prompts for every command, and tables that drop nothing."""

import json
import warnings
from pathlib import Path

import pytest

from deradiff.alignment.pairs import PairFolder, open_pairs
from deradiff.alignment.prompts import load_prompts
from deradiff.cli import arguments
from deradiff.cli.search import _prompts as searched
from deradiff.experiments.plan import Prompts
from deradiff.experiments.sources import resolve
from deradiff.files import tables
from deradiff.files.prompts import read_prompts
from deradiff.study.plan import read_plan as read_study
from messages import naming
from pair_rows import WINNER
from parquet_files import writer
from small_study import data as study_data

pytestmark = pytest.mark.attack("two readers for one kind of file")

ODD = "a\u2028cat,\u2029in\x85the\x0brain\x0cof\x1cwords\x1dand\x1esigns"


def written(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


BOMB = "n0: &n0 [x, x]\n" + "".join(f"n{i}: &n{i} [*n{i - 1}, *n{i - 1}]\n" for i in range(1, 26))

FILES = {
    "PartiPrompts.tsv": 'Prompt\tCategory\tNote\r\na red seven\tAbstract\t\r\nthe word "yes"\tWords\t"\r\n',
    "p.CSV": '\ufeffprompt,category\r\n\r\na red seven,x\r\n"the word ""yes""","y, z"\r\n',
    "p.jsonl": '{"prompt": "a red seven", "category": "x"}\r\r{"Caption": "the word \\"yes\\""}',
    "p.txt": '# colours\r a red seven \r\n\nthe word "yes"\na red seven\n',
    "p": 'a red seven\nthe word "yes"',
    "p.yml": "prompts: [a red seven, 'the word \"yes\"', a red seven]",
    "p.json": '{"x": ["a red seven"], "y": [{"text": "the word \\"yes\\""}]}',
}


@pytest.mark.parametrize("name", FILES)
def test_every_command_reads_the_same_prompts(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, name, FILES[name])
    expected = ("a red seven", 'the word "yes"')
    assert load_prompts(file).prompts == expected
    assert arguments.prompts([], file) == expected
    assert resolve(Prompts(source=str(file))) == expected
    assert resolve(Prompts(**searched([], str(file), None))) == expected


def test_parquet_is_read_like_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = writer(monkeypatch)
    file = write(tmp_path / "p.parquet", {"id": [1, 2], "Prompt": ["a cat", ODD], "style": ["x", "y"]})
    assert [entry[:2] for entry in read_prompts(file)] == [("a cat", "x"), (ODD, "y")]
    with pytest.raises(ValueError, match=naming("'words', 'rank'", "prompt, caption, text")):
        read_prompts(write(tmp_path / "q.parquet", {"words": ["a"], "rank": [1]}))
    with pytest.raises(ValueError, match=naming("r.parquet", "row 1", None)):
        read_prompts(write(tmp_path / "r.parquet", {"prompt": ["a", None]}))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=naming("p.parquet", "pyarrow", "deradiff[align]")):
        read_prompts(file)


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.tsv", "p.jsonl", "p.json"])
def test_only_line_breaks_break_lines(name: str, tmp_path: Path) -> None:
    content = {
        "p.txt": f"{ODD}\nb",
        "p.csv": f'prompt\n"{ODD}"\nb\n',
        "p.tsv": f"prompt\n{ODD}\nb",
        "p.jsonl": "\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in (ODD, "b")),
        "p.json": json.dumps([ODD, "b"], ensure_ascii=False),
    }
    assert load_prompts(written(tmp_path, name, content[name])).prompts == (ODD, "b")


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (
            "prompt\na cat, in the rain\n",
            ["line 2", 2, "'a cat', ' in the rain'", 1, "'prompt'"],
        ),
        ("prompt,style\n\na\n", ["line 3", 1, "'a'", 2]),
        ('prompt\na fox\n"a cat\na dog\na fox\n', ["line 3", "'a cat"]),
        ('prompt,style\n"a\nb","c\n', ["line 3", "'c"]),
        ('prompt\n"a cat\n"a dog"\n', ["line 3", "'a dog\"'", "line 2"]),
        ("prompt,Prompt\na,b\n", ["line 1", "'prompt'"]),
        ("prompt,\na cat, in the rain\n", ["line 1", "2 of 2"]),
        ("a cat\na dog\n", ["line 2", "'a cat'"]),
        ("", ["prompt"]),
        (b"prompt\na\0b\n", ["line 2", "NUL"]),
        ("prompt\nein B\u00e4r\n".encode("latin-1"), ["UTF-8", "0xe4"]),
        ("prompt\na\n".encode("utf-16"), ["UTF-8", "0xff"]),
        ("prompt\na\n".encode("utf-16-le"), ["NUL", "UTF-16"]),
    ],
)
def test_a_table_drops_nothing(content: str | bytes, values: list[object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("p.csv", *values)):
        load_prompts(written(tmp_path, "p.csv", content))


def test_a_row_of_tabs_fits_its_header(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("p.tsv", "line 3", 3, "'b', 'c', 'd'", 2)):
        load_prompts(written(tmp_path, "p.tsv", "prompt\tstyle\na\tx\nb\tc\td\n"))


def test_cells_in_quotation_marks_are_read_as_they_were_written() -> None:
    rows = tables.read_csv('a,b\r\n"1, ""2""\r\n3",5" nail\r"",\n,x\n', "it")
    assert [row.cells for row in rows] == [
        {"a": '1, "2"\r\n3', "b": '5" nail'},
        {"a": "", "b": ""},
        {"a": "", "b": "x"},
    ]
    assert [row.line for row in rows] == [2, 4, 5]


def test_lists_of_pairs_are_read_by_the_same_reader(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(WINNER)
    rows = ["prompt,winner,loser", f'"{ODD}",a.png,a.png']
    list_of_pairs = written(tmp_path, "pairs.csv", "\n".join(rows))
    assert PairFolder(tmp_path).open(0).prompt == ODD
    list_of_pairs.write_text("winner,loser,prompt\na.png,a.png,a cat, in the rain\n")
    with pytest.raises(ValueError, match=naming("pairs.csv", "line 2", 4)):
        open_pairs(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "values"),
    [
        ("a.yaml", "[" * 100_000, ["YAML"]),
        ("a.json", "[" * 100_000, [64]),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000, [64]),
        ("a.yaml", BOMB, ["YAML"]),
        ("a.yaml", "&a [*a]", ["YAML"]),
        ("a.yaml", f"- {10**400}", ["YAML"]),
        ("a.json", f"[{10**400}]", [401]),
        ("a.json", '{"x": ["a"], "x": ["b"]}', ["'x'"]),
        ("a.yaml", "x: [a]\nx: [b]", ["YAML", "'x'"]),
        ("a.json", '[{"prompt": "a", "Prompt": "b"}]', ["'prompt'"]),
        ("a.json", '["\\ud800"]', [r"'\ud800'"]),
        ("a.json", '["a\\u0000"]', ["NUL"]),
        ("a.yaml", "- two owls: asleep\n", ["'two owls'", "colon"]),
        ("a.yaml", "- #1 mug\n", ["entry 1", None]),
        ("a.md", "a", [".txt"]),
    ],
)
def test_what_cannot_be_a_list_is_said_in_a_sentence(
    name: str, content: str, values: list[object], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=naming(name, *values)):
        load_prompts(written(tmp_path, name, content))


def test_a_comment_that_cuts_a_prompt_is_told_with_its_line(tmp_path: Path) -> None:
    file = written(
        tmp_path, "p.yaml", "# of mugs\n- a mug with #1\n- 'a mug #2'\n- a#3\n- prompt: a mug, #4\n- |\n  a #5\n"
    )
    with pytest.warns(UserWarning) as told:
        assert load_prompts(file).prompts == ("a mug with", "a mug #2", "a#3", "a mug,", "a #5")
    said = [str(warning.message) for warning in told]
    assert len(said) == 2
    assert "line 2" in said[0] and "'a mug with'" in said[0] and "'#1'" in said[0]
    assert "line 5" in said[1] and "'a mug,'" in said[1] and "'#4'" in said[1]


def test_a_comment_that_cuts_a_plan_s_prompt_is_told(tmp_path: Path) -> None:
    configuration = {**study_data()["configurations"][0], "prompts": ["PROMPT", "b", "c"]}
    text = json.dumps({**study_data(), "configurations": [configuration]}, indent=1)
    file = written(tmp_path, "study.yaml", text.replace('"PROMPT"', "a mug with #1\n"))
    with pytest.warns(UserWarning, match=naming("line 17", "'a mug with'", "'#1'")):
        assert read_study(file).configurations[0].prompts == ("a mug with", "b", "c")


def test_a_line_that_begins_with_a_sign_of_comments_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=naming(2, "line 2", "'#1 dad mug'")):
        assert load_prompts(written(tmp_path, "p.txt", "# mugs\n#1 dad mug\na\n#b\n")).prompts == ("a",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_prompts(written(tmp_path, "p.txt", "# mugs\na\n## more\n")).prompts == ("a",)
    assert load_prompts(written(tmp_path, "p.csv", "prompt\n#1 dad mug\n")).prompts == ("#1 dad mug",)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming(tmp_path, "folder")):
        arguments.prompts([], tmp_path)
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "none.txt")):
        arguments.prompts([], tmp_path / "none.txt")
    import os

    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(OSError, match="pipe"):
        arguments.prompts([], tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=naming(tmp_path / "empty.txt", "prompt")):
        arguments.prompts([], written(tmp_path, "empty.txt", ""))


@pytest.mark.parametrize("text", ["1:8", "010", "1e-4", ".5", "1_000", "0x10", "12:30:45"])
def test_numbers_in_plans_mean_what_they_look_like(text: str) -> None:
    from deradiff.files.plans import write
    from deradiff.files.reading import parse_yaml

    read = parse_yaml(f"a: {text}", "it")["a"]
    assert read == {"1e-4": 1e-4, ".5": 0.5}.get(text, text)
    assert parse_yaml(write({"a": text}), "it") == {"a": text}  # a text that looks like a number stays a text


@pytest.mark.parametrize(("letter", "escape"), [("\x85", r"\N"), ("\u2028", r"\L"), ("\u2029", r"\P")])
def test_what_ends_a_line_for_yaml_alone_cuts_no_prompt(letter: str, escape: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(f"- a dog\n- a cat{letter}  - a hat\n", encoding="utf-8", newline="")
    with pytest.raises(ValueError, match=naming(f"U+{ord(letter):04X}", "line 2", escape)):
        read_prompts(file)
    file.write_text(f'- a dog\n- "a cat{escape}- a hat"\n', encoding="utf-8")
    assert [entry[0] for entry in read_prompts(file)] == ["a dog", f"a cat{letter}- a hat"]
