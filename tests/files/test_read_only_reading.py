"""Experiments and studies are read where nothing may be written, and what goes wrong is called what it is."""

import errno
import os
import re
import shutil
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deradiff.cli import app
from deradiff.experiments import running
from deradiff.experiments.store import Store, StoreError
from deradiff.files import databases, waiting
from deradiff.files.waiting import WaitedTooLong
from deradiff.study.votes import StudyError, connected, file_of
from messages import naming
from small_experiment import SMALL, Fake, silent, small
from small_study import begun, voted

NOBODY = 65534

read_only = pytest.mark.attack("a read-only experiment")
called_damaged = pytest.mark.attack("called damaged")

"".encode("utf-8-sig")  # user nobody may not be able to load what Python loads when it is first asked for


@contextmanager
def nobody(folder: Path) -> Iterator[None]:
    """Another user, who may read `folder` and not write there: root becomes nobody, others give up their rights."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    if os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    else:
        for path in paths:
            path.chmod(modes[path] & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
            os.setegid(0)
        else:
            for path in paths:
                path.chmod(modes[path])


@pytest.fixture(scope="module")
def shelf() -> Iterator[Path]:
    """A folder that everybody may look into, with an experiment and a study; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="deradiff-tests-"))
    folder.chmod(0o755)
    with begun(folder) as votes:
        voted(votes)
    for command in ("report", "study analyse"):  # what they import may lie where nobody may go
        run(*(word.format(shelf=folder, own=folder / "warm") for word in COMMANDS[command]))
    shutil.rmtree(folder / "warm")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def shared() -> Iterator[Path]:
    """An empty folder that everybody may look into."""
    folder = Path(tempfile.mkdtemp(prefix="deradiff-tests-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def own() -> Iterator[Path]:
    """A folder that everybody may write to."""
    folder = Path(tempfile.mkdtemp(prefix="deradiff-tests-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


COMMANDS: dict[str, tuple[str, ...]] = {
    "status": ("experiment", "status", "{shelf}/experiment"),
    "export": ("experiment", "export", "{shelf}/experiment", "--out", "{own}/tables"),
    "report": ("experiment", "report", "{shelf}/experiment", "--out", "{own}/report"),
    "study plan": ("study", "plan", "{shelf}/experiment", "-m", "strong,weak", "--out", "{own}/plan.yaml"),
    "study export": ("study", "export", "{shelf}/study", "--out", "{own}/votes.csv"),
    "study analyse": ("study", "analyse", "{shelf}/study", "--out", "{own}/analysis"),
}


@read_only
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.cases(2)
def test_what_may_be_read_is_read(command: str, shelf: Path, own: Path) -> None:
    words = [word.format(shelf=shelf, own=own) for word in COMMANDS[command]]
    before = {path: path.stat().st_mtime_ns for path in shelf.rglob("*")}
    with nobody(shelf):
        status, said = run(*words)
    assert status == 0, said
    assert {path: path.stat().st_mtime_ns for path in shelf.rglob("*")} == before


@read_only
@pytest.mark.parametrize("command", [("report", "{}"), ("run", "{}/../plan.yaml", "--out", "{}", "--workers", "1")])
def test_what_may_not_be_written_is_refused_as_that(command: tuple[str, ...], shelf: Path) -> None:
    (shelf / "plan.yaml").write_text(yaml.safe_dump(SMALL))
    words = [word.format(shelf / "experiment") for word in command]
    with nobody(shelf):
        status, said = run("experiment", *words)
    assert status == 2 and "denied" in said and str(shelf / "experiment") in said, said
    assert "damaged" not in said and "Traceback" not in said


@read_only
@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (("study", "export", "{shelf}/study"), "{shelf}/study .*--out"),
        (("experiment", "report", "{shelf}/experiment"), "{shelf}/experiment .*--out"),
        (("cost", "--json", "{shelf}/cost.json"), "--json {shelf}/cost.json .*{shelf} "),
    ],
)
def test_where_to_write_instead_is_said_before_the_work(command: tuple[str, ...], shown: str, shelf: Path) -> None:
    with nobody(shelf):
        status, said = run(*(word.format(shelf=shelf) for word in command))
    assert status == 2 and re.search(shown.format(shelf=re.escape(str(shelf))), said), said
    assert "Teraflops" not in said and ".partial" not in said and ".deradiff-" not in said


@read_only
def test_what_may_not_be_entered_is_said_in_words(shared: Path) -> None:
    (shared / "prompts.txt").write_text("a red seven")
    shared.chmod(0o700)
    with nobody(shared):
        status, said = run("generate", "digits", "-a", "digits:100", "--prompts", shared / "prompts.txt")
    assert status == 2 and str(shared) in said and "denied" in said and "Errno" not in said, said


@read_only
def test_what_a_killed_run_left_is_read_too(shared: Path, own: Path) -> None:
    with Store(own / "x", create=True) as store:
        store.remember("fact", "only in the log")
        for name in ("store.sqlite", "store.sqlite-wal"):
            shutil.copy(own / "x" / name, shared / name)
    with nobody(shared), Store(shared, write=False) as left:
        assert left.fact("fact") == "only in the log"
    assert sorted(path.name for path in shared.iterdir()) == ["store.sqlite", "store.sqlite-wal"]


@read_only
def test_a_run_that_goes_on_meanwhile_is_seen(shared: Path) -> None:
    with Store(shared / "x", create=True) as store:
        store.remember("fact", 1)
        with nobody(shared), Store(shared / "x", write=False) as reader:
            assert reader.fact("fact") == 1
        with Store(shared / "x", write=False) as reader:
            assert reader.fact("fact") == 1
            store.remember("fact", 2)
            assert reader.fact("fact") == 2


@read_only
def test_a_folder_that_may_not_be_entered(shared: Path) -> None:
    if os.geteuid():
        pytest.skip("needs another user")
    with Store(shared / "x", create=True) as store:
        store.remember("plan", {})
    (shared / "x" / "store.sqlite").chmod(0o600)
    with nobody(shared):
        status, said = run("experiment", "status", shared / "x")
    assert status == 2 and "denied" in said and "store.sqlite" in said, said
    (shared / "x").chmod(0o700)
    with nobody(shared):
        status, said = run("experiment", "status", shared / "x")
    assert status == 2 and "denied" in said and str(shared / "x") in said, said


@read_only
def test_reading_makes_no_files(tmp_path: Path) -> None:
    running.run(small(), tmp_path / "x", Fake, silent)
    before = sorted(tmp_path.rglob("*"))
    with Store(tmp_path / "x", write=False) as store:
        assert store.drawn()
        with pytest.raises(StoreError):
            store.remember("fact", 1)
    assert sorted(tmp_path.rglob("*")) == before


# -- what goes wrong is called what it is ------------------------------------------------------------------------------


def failing(number: int) -> Any:
    """What stands for writing a file where the system does not allow it."""

    def fails(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    return fails


@called_damaged
@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "denied"),
        (errno.EPERM, "denied"),
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "full"),
    ],
)
def test_errors_of_the_disk(number: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running.run(small(methods=[{"method": "reference"}]), tmp_path / "x", Fake, silent)
    monkeypatch.setattr(Path, "write_bytes", failing(number))
    with pytest.raises(StoreError, match=naming(tmp_path, word)) as caught:
        running.run(small(), tmp_path / "x", Fake, silent)
    assert "damaged" not in str(caught.value)
    if word == "full":
        assert " needed)" in str(caught.value) and " free" in str(caught.value)


@called_damaged
def test_a_lock_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "AFTER", 0.0)
    monkeypatch.setattr(databases, "LOOK", 0.05)
    with (
        Store(tmp_path / "x", create=True) as store,
        closing(sqlite3.connect(store.file, timeout=0, check_same_thread=False)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setenv(waiting.BOUND, "0.3")
        with pytest.raises(WaitedTooLong, match=naming(store.file, waiting.BOUND)):
            store.remember("fact", 1)
        monkeypatch.setenv(waiting.BOUND, "60")
        threading.Timer(0.2, other.execute, ("ROLLBACK",)).start()
        store.remember("fact", 2)
        assert store.fact("fact") == 2
    assert "store.sqlite" in caplog.text


@called_damaged
def test_a_folder_that_has_gone(tmp_path: Path) -> None:
    with Store(tmp_path / "x", create=True) as store:
        shutil.rmtree(tmp_path / "x")
        with pytest.raises(StoreError, match=naming(tmp_path / "x", "gone")) as caught:
            store.put([("abcd", b"png", {})], 1.0)
    assert "damaged" not in str(caught.value)


@called_damaged
def test_a_rule_of_ours_that_we_broke_is_no_damage(tmp_path: Path) -> None:
    with Store(tmp_path / "x", create=True) as store:
        store.add_batches([[("same", {})]])
        with pytest.raises(StoreError, match=naming("store.sqlite", "items.id")) as caught:
            store.add_batches([[("same", {})]])
    assert "damaged" not in str(caught.value)


@called_damaged
@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + bytes(200)])
def test_only_what_is_damaged_is_called_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "store.sqlite").write_bytes(content)
    with pytest.raises(StoreError, match=naming(tmp_path, "damaged" if content else "nothing")):
        Store(tmp_path, write=False)
    (tmp_path / "study.sqlite").write_bytes(content)
    if content:
        with pytest.raises(StudyError, match="damaged"):
            connected(file_of(tmp_path), write=False)


@called_damaged
@pytest.mark.parametrize("write", [False, True])
def test_what_is_damaged_is_told_with_the_place(tmp_path: Path, write: bool) -> None:
    running.run(small(), tmp_path / "x", Fake, silent)
    file = tmp_path / "x" / "store.sqlite"
    content = bytearray(file.read_bytes())
    for start in range(4096, len(content), 4096):
        content[start : start + 2000] = b"\xff" * 2000
    file.write_bytes(content)
    with (
        pytest.raises(StoreError, match=naming(file, "Page", ".recover")),
        Store(tmp_path / "x", write=write) as store,
    ):
        store.diagnostics()


@called_damaged
def test_a_study_that_may_not_be_written_or_read(shelf: Path) -> None:
    with nobody(shelf), pytest.raises(StudyError, match=naming("study.sqlite", "denied")) as caught:
        connected(file_of(shelf / "study"))
    assert "damaged" not in str(caught.value)
