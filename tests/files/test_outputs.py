"""Nobody else's file is replaced: not by a report, an analysis, an export, nor by the numbers of a command."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deradiff.files import outputs
from deradiff.files.outputs import new_file, replaced
from deradiff.sampling.full_steps import FullSteps
from deradiff.sampling.reuse import Reuse
from holding import files_of_at_most
from messages import naming
from programs import invoked
from small_study import begun, voted

attack = pytest.mark.attack("a person's file replaced")

THEIRS = "mine, and nobody else's"


def write(folder: Path, **files: str) -> None:
    with replaced(folder, "thing", ["a.txt"]) as inside:
        for name, text in files.items():
            (inside / f"{name}.txt").write_text(text)


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(".")}


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and not path.name.endswith(".json")]


def test_what_belongs_together_is_replaced_together(tmp_path: Path) -> None:
    write(tmp_path / "x", a="1", b="1")
    assert texts(tmp_path / "x") == {"a.txt": "1", "b.txt": "1"}
    (tmp_path / "x" / "notes.md").write_text(THEIRS)
    write(tmp_path / "x", a="2", c="2")
    assert texts(tmp_path / "x") == {"a.txt": "2", "c.txt": "2", "notes.md": THEIRS}
    assert left_over(tmp_path / "x") == []


@attack
@pytest.mark.parametrize("name", ["a.txt", "b.txt"])
def test_a_file_of_theirs_stays_and_ours_stay_as_they_were(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "x"
    write(folder, a="1")
    (folder / name).write_text(THEIRS)  # a new one, or one of ours that they changed
    before = texts(folder)
    with pytest.raises(FileExistsError, match=f"x/{name} "):
        write(folder, a="2", b="2")
    assert texts(folder) == before and left_over(folder) == []


@attack
def test_a_file_that_is_saved_during_the_work_stays(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"a\.txt"), replaced(tmp_path / "x", "thing", ["a.txt"]) as inside:
        (inside / "a.txt").write_text("ours")
        (tmp_path / "x" / "a.txt").write_text(THEIRS)
    assert texts(tmp_path / "x") == {"a.txt": THEIRS} and left_over(tmp_path / "x") == []
    with pytest.raises(FileExistsError, match=r"x\.json"), new_file(tmp_path / "x.json") as temporary:
        temporary.write_text("ours")
        (tmp_path / "x.json").write_text(THEIRS)
    assert (tmp_path / "x.json").read_text() == THEIRS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.json"]


@attack
def test_links_folders_and_stale_files_of_theirs_stay(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write(folder, a="1", b="1")
    (tmp_path / "theirs.txt").write_text("1")  # even with the same content, it is another file
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(tmp_path / "theirs.txt")
    with pytest.raises(FileExistsError, match=r"a\.txt"):
        write(folder, a="2")
    (folder / "a.txt").unlink()
    (folder / "b.txt").write_text(THEIRS)
    write(folder, a="2")  # has no b.txt any more, but theirs is not for us to remove
    assert texts(folder) == {"a.txt": "2", "b.txt": THEIRS}
    (folder / "a.txt").unlink()
    (folder / "a.txt").mkdir()
    with pytest.raises(FileExistsError, match=r"a\.txt"):
        write(folder, a="3")


@attack
@pytest.mark.parametrize(
    "record",
    [
        "[]",
        "{}",
        "{}x",
        "",
        '{"files": {"../theirs.txt": []}}',
        '{"files": {"/x": ["a"]}}',
        '{"files": {"..": ["a"]}}',
        '{"files": {"images": []}, "files": {}}',
        "[" * 100_000,
        '{"files": {"a.txt": [1e999]}}',
        "\udcff",
    ],
)
def test_a_record_that_is_none_of_ours_removes_nothing(tmp_path: Path, record: str) -> None:
    folder, theirs = tmp_path / "x", tmp_path / "theirs.txt"
    write(folder, a="1")
    theirs.write_text(THEIRS)
    (folder / "images").mkdir()
    (folder / ".deradiff-thing.json").write_bytes(record.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"\.deradiff-thing\.json"):
        write(folder, a="2")
    assert theirs.read_text() == THEIRS and (folder / "images").is_dir() and texts_of(folder / "a.txt") == "1"


def texts_of(path: Path) -> str:
    return path.read_text()


class Killed(BaseException):
    pass


@attack
@pytest.mark.parametrize("step", range(24))
def test_killed_at_any_step_it_is_made_good(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill is an exception that nothing can clean up after: no step after it is taken."""
    folder, count = tmp_path / "x", 0
    write(folder, a="1", b="1", old="1")
    (folder / "notes.md").write_text(THEIRS)

    def killing(own: Callable[..., Any]) -> Callable[..., Any]:
        def step_or_die(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return own(*arguments, **options)

        return step_or_die

    with monkeypatch.context() as patched:
        for module, name in ((os, "replace"), (os, "link"), (shutil, "rmtree"), (Path, "unlink"), (Path, "rmdir")):
            patched.setattr(module, name, killing(getattr(module, name)))
        with suppress(Killed):
            write(folder, a="2", b="2", new="2")
    held = texts(folder)
    assert held.pop("notes.md") == THEIRS
    assert all(text in ("1", "2") for text in held.values())
    if held["a.txt"] == "2":  # it leads to the others, and comes after them
        assert held["b.txt"] == held["new.txt"] == "2"
    write(folder, a="3", c="3")
    assert texts(folder) == {"a.txt": "3", "c.txt": "3", "notes.md": THEIRS} and left_over(folder) == []


def test_an_error_in_the_work_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "x", a="1")
    for folder in (tmp_path / "x", tmp_path / "new" / "er"):
        with pytest.raises(ZeroDivisionError), replaced(folder, "thing") as inside:
            (inside / "a.txt").write_text("2")
            raise ZeroDivisionError
    assert texts(tmp_path / "x") == {"a.txt": "1"} and left_over(tmp_path / "x") == []
    assert not (tmp_path / "new").exists()


def test_two_kinds_share_a_folder(tmp_path: Path) -> None:
    write(tmp_path, a="1")
    with replaced(tmp_path, "other") as inside:
        (inside / "b.txt").write_text("1")
    write(tmp_path, c="2")
    assert texts(tmp_path) == {"c.txt": "2", "b.txt": "1"}
    with pytest.raises(FileExistsError, match=r"c\.txt"), replaced(tmp_path, "other") as inside:
        (inside / "c.txt").write_text("1")


@attack
def test_a_disk_without_hard_links_does_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", cannot)
    write(tmp_path / "x", a="1")
    with pytest.raises(FileExistsError), new_file(tmp_path / "y") as temporary:
        temporary.write_text("ours")
        (tmp_path / "y").write_text(THEIRS)
    assert texts(tmp_path / "x") == {"a.txt": "1"} and (tmp_path / "y").read_text() == THEIRS


@attack
def test_a_full_disk_says_where_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x", a="1")
    with (
        pytest.raises(OSError, match=naming(tmp_path / "x", "free")),
        replaced(tmp_path / "x", "thing") as inside,
    ):
        raise OSError(28, "No space left on device", str(inside / "b.txt"))
    assert texts(tmp_path / "x") == {"a.txt": "1"}


# -- the commands ------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    result = invoked([*map(str, arguments)])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment, a study of it with votes, and the study's plan."""
    folder = tmp_path_factory.mktemp("outputs")
    with begun(folder) as votes:
        voted(votes)
    return folder


COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "experiment report": (("experiment", "report", "{study}/experiment", "--out", "{out}"), "report.html"),
    "experiment export": (("experiment", "export", "{study}/experiment", "--out", "{out}"), "images.csv"),
    "experiment plan": (("experiment", "plan", "--preset", "digits", "--out", "{out}/plan.yaml"), "plan.yaml"),
    "study plan": (("study", "plan", "{study}/experiment", "-m", "strong,weak", "--out", "{out}/p.yaml"), "p.yaml"),
    "study analyse": (("study", "analyse", "{study}/study", "--out", "{out}"), "summary.txt"),
    "study export": (("study", "export", "{study}/study", "--out", "{out}/votes.csv"), "votes.csv"),
    "cost": (("cost", "--json", "{out}/cost.json"), "cost.json"),
    "studies.digits quality": (("studies.digits", "quality", "--json", "{out}/quality.json"), "quality.json"),
}


@attack
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_leave_their_files(command: str, study: Path, tmp_path: Path) -> None:
    words, name = COMMANDS[command]
    (tmp_path / name).write_text(THEIRS)
    status, said = run(*(word.format(study=study, out=tmp_path) for word in words))
    assert status == 2 and str(tmp_path / name) in said, said
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == THEIRS


@attack
@pytest.mark.parametrize("command", ["experiment export", "study analyse"])
def test_commands_replace_their_own(command: str, study: Path, tmp_path: Path) -> None:
    words, name = COMMANDS[command]
    words = tuple(word.format(study=study, out=tmp_path) for word in words)
    assert run(*words)[0] == 0 == run(*words)[0]
    (tmp_path / name).write_text(THEIRS)
    assert run(*words)[0] == 2 and (tmp_path / name).read_text() == THEIRS


@attack
def test_the_votes_in_the_folder_of_a_study_are_ours_as_long_as_nobody_edits_them(study: Path) -> None:
    file = study / "study" / "votes.csv"
    assert run("study", "export", study / "study")[0] == 0 == run("study", "export", study / "study")[0]
    file.write_text(THEIRS)
    status, said = run("study", "export", study / "study")
    assert status == 2 and str(file) in said and file.read_text() == THEIRS


@attack
def test_only_a_list_of_full_steps_is_replaced_by_one(tmp_path: Path) -> None:
    full_steps = FullSteps(Reuse(steps=(0, 2)), 0.05, 0.04, 0.1, 1.3, "ddim", 4, 8)
    file = tmp_path / "full_steps.json"
    full_steps.save(file)
    full_steps.save(file)
    assert FullSteps.load(file) == full_steps
    file.write_text(THEIRS)
    with pytest.raises(FileExistsError, match=r"full_steps\.json"):
        full_steps.save(file)
    assert file.read_text() == THEIRS


def test_a_full_disk_is_told_of_the_file_that_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    with files_of_at_most(20):
        status, said = run("cost", "--json", file)
    assert status == 2 and f"{file} could not be written" in said and "partial" not in said, said
    assert list(tmp_path.iterdir()) == []


def test_the_record_names_what_lies_there(tmp_path: Path) -> None:
    write(tmp_path, a="1")
    record = json.loads((tmp_path / ".deradiff-thing.json").read_text())
    assert record["files"] == {"a.txt": [hashlib.sha256(b"1").hexdigest()]}
    assert outputs.Manifest.model_validate(record).files.keys() == {"a.txt"}
