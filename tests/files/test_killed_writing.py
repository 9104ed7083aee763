"""Writing that was killed at any place, or that filled the disk, is completed or leaves what was there."""

import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deradiff.files import folders
from deradiff.files.disks import DiskFull
from deradiff.files.folders import RunFolder, assembled, finish_moving
from deradiff.files.locks import PRIVATE, taken
from deradiff.files.records import read_png
from deradiff.files.writing import atomic_file, atomic_folder
from folder_contents import everything, file_names
from messages import naming

KILLED = pytest.mark.attack("a kill while a folder is filled")
FULL = pytest.mark.attack("a full disk")

# -- a kill at any place -----------------------------------------------------------------------------------------------


class Kill(BaseException):
    """What nothing catches, as a kill is not caught."""


def killing(monkeypatch: pytest.MonkeyPatch, method: str, after: int) -> Callable[[], bool]:
    """Have `Path.<method>` end everything at its call number `after`; tells whether it came to that."""
    real, calls = getattr(Path, method), []

    def call(self: Path, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) > after:
            raise Kill
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, method, call)
    return lambda: len(calls) > after


def filled(out: Path, content: str) -> None:
    with taken(out, "a test") as private:
        finish_moving(out, private, "made.json")
        with assembled(out, private, "made.json") as folder:
            for name in ("a/one", "a/two", f"a/{content}", "three"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(content)
            (folder / "made.json").write_text(json.dumps({"files": dict.fromkeys(file_names(folder))}))


@KILLED
@pytest.mark.parametrize("method", ["replace", "unlink"])
def test_a_model_that_a_kill_cut_short_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Killed at every renaming and every removal, while the new model takes the place of the old one."""
    for after in range(20):
        out = tmp_path / f"{method}-{after}"
        filled(out, "old")
        with monkeypatch.context() as patched:
            killed = killing(patched, method, after)
            try:
                filled(out, "new")
            except Kill:
                (out / "mine.txt").write_text("mine")
        if not killed():
            break
        with taken(out, "a test") as private:
            finish_moving(out, private, "made.json")
        content = {name: text.decode() for name, text in everything(out).items() if not name.startswith(PRIVATE)}
        assert content.pop("mine.txt") == "mine"
        made = json.loads(content.pop("made.json"))["files"]
        [model] = set(content.values())
        assert model in ("old", "new") and set(content) == {"a/one", "a/two", f"a/{model}", "three"} == set(made)
    else:
        pytest.fail("no end of calls")
    assert after > 3


@KILLED
def test_a_model_whose_files_have_all_moved_is_not_taken_for_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the last renaming, before what is left of the result's folders goes."""
    real = folders.discard

    def discard(path: Path) -> None:
        if path.is_dir() and not file_names(path) and (tmp_path / "made.json").exists():
            raise Kill
        real(path)

    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr(folders, "discard", discard)
        filled(tmp_path, "new")
    with taken(tmp_path, "a test") as private:
        finish_moving(tmp_path, private, "made.json")
    assert file_names(tmp_path) == ["a/new", "a/one", "a/two", "made.json", "three"]


@KILLED
def test_a_file_that_came_after_the_kill_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(Kill):
        killing(patched, "replace", 2)
        filled(tmp_path, "new")
    waiting = next(name for name in ("a/one", "a/two", "a/new", "three") if not (tmp_path / name).exists())
    (tmp_path / waiting).write_text("a person's")
    with taken(tmp_path, "a test") as private:
        with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / waiting))):
            finish_moving(tmp_path, private, "made.json")
        assert (tmp_path / waiting).read_text() == "a person's" and not (tmp_path / "made.json").exists()
        (tmp_path / waiting).unlink()
        finish_moving(tmp_path, private, "made.json")
    assert file_names(tmp_path) == ["a/new", "a/one", "a/two", "made.json", "three"]


@KILLED
def test_a_run_that_was_killed_is_replaced_by_force_alone(tmp_path: Path) -> None:
    out, image = tmp_path / "out", Image.new("RGB", (4, 4))
    code = f"""
import os, signal
from PIL import Image
from deradiff.files import folders
from deradiff.files.disks import DiskFull
from deradiff.files.folders import RunFolder
with RunFolder({str(out)!r}) as folder:
    for name in "abc":
        folder.add(name + ".png", Image.new("RGB", (4, 4)), {{"name": name}})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    with pytest.raises(FileExistsError), RunFolder(out):
        pass
    assert len(list((out / "images").iterdir())) == 3
    with RunFolder(out, force=True) as folder:
        folder.add("d.png", image, {"name": "d"})
        folder.finish(image, {"settings": {}, "versions": {}, "images": [{"file": "images/d.png"}]})
    assert sorted(file_names(out)) == ["images/d.png", "record.json", "sheet.png"]
    assert read_png(out / "images" / "d.png") == {"name": "d"}


@KILLED
def test_a_run_that_is_killed_while_it_removes_the_older_one_can_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", (4, 4))
    for after in range(4):
        out = tmp_path / f"out{after}"
        with RunFolder(out) as folder:
            listed = [{"file": folder.add(f"{name}.png", image, {"name": name})} for name in "abc"]
            folder.finish(image, {"settings": {}, "versions": {}, "images": listed})
        removing: list[Path] = []

        def unlink(
            path: Path, real: Any = Path.unlink, own: Path = out, gone: list[Path] = removing, **kw: Any
        ) -> None:
            if PRIVATE not in path.parts and own in path.parents and path.suffix != ".partial":
                gone.append(path)
                if len(gone) > after:  # noqa: B023
                    raise Kill
            real(path, **kw)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", unlink)
            with pytest.raises(Kill), RunFolder(out, force=True) as folder:
                folder.add("d.png", image, {"name": "d"})
        with RunFolder(out, force=True) as folder:
            folder.add("e.png", image, {"name": "e"})
        assert file_names(out / "images") == ["e.png"] and not (out / "record.json").exists()


@KILLED
def test_a_name_for_what_is_not_finished_is_nobody_elses(tmp_path: Path) -> None:
    names: set[str] = set()
    for _ in range(50):
        with atomic_file(tmp_path / "file") as first, atomic_file(tmp_path / "file") as second:
            names |= {first.name, second.name}
            first.write_text("1")
            second.write_text("2")
    assert len(names) == 100 and (tmp_path / "file").read_text() == "1"


# -- a full disk -------------------------------------------------------------------------------------------------------


@FULL
@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_a_full_disk_is_named_with_the_room_it_has(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskFull, match=naming(tmp_path / "model")), atomic_folder(tmp_path / "model"):
        raise error
    assert not list(tmp_path.iterdir())


@FULL
def test_what_safetensors_says_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with (
            pytest.raises(DiskFull, match=naming(tmp_path / "weights")),
            atomic_file(tmp_path / "weights") as temporary,
        ):
            save_file({"a": torch.zeros(1000)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@FULL
def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), atomic_file(tmp_path / "file"):
        raise RuntimeError("shapes differ")
    with pytest.raises(PermissionError), atomic_file(tmp_path / "file"):
        raise PermissionError(13, "Permission denied")
