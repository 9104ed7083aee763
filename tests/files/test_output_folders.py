"""Output folders: held by one process at a time, and nothing in them removed but what a record of ours names."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import tiny
from deradiff.baking import bake, outputs
from deradiff.cli import app
from deradiff.files.folders import RunFolder, begin_or_resume, named_files
from deradiff.files.locks import PRIVATE, FolderInUse, taken
from deradiff.files.writing import write_json
from deradiff.sweep import drawing
from folder_contents import everything, file_names
from holding import another_process
from messages import naming
from programs import invoked

HELD = pytest.mark.attack("two processes, one folder")
KEPT = pytest.mark.attack("what a person keeps in an output folder")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a reference pipeline and of an anchor for it."""
    folder = tmp_path_factory.mktemp("models")
    pipe, anchor, _ = tiny.make("sd")
    pipe.save_pretrained(folder / "reference")
    anchor.save_pretrained(folder / "anchor")  # type: ignore[operator]
    return folder / "reference", folder / "anchor"


def generate(models: tuple[Path, Path], out: Path, *words: str) -> Any:
    fixed = ["generate", models[0], "-a", models[1], "-p", "a", "--lam", "1", "--steps", "1", "--out", out, *words]
    return CliRunner().invoke(app, list(map(str, fixed)))


# -- held --------------------------------------------------------------------------------------------------------------


@HELD
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "{reference}", "-a", "{anchor}", "-p", "a", "--lam", "1", "--out"],
        ["bake", "{reference}", "-a", "{anchor}", "--lam", "0.5", "--images", "0", "--out"],
        ["align", "digits", "--beta", "500", "--count", "8", "--out"],
        ["demo", "--out"],
        ["studies.closed_forms", "--quick", "--out"],
    ],
    ids=lambda words: words[0],
)
def test_who_comes_second_is_told_who_holds_the_folder(
    models: tuple[Path, Path], tmp_path: Path, words: list[str]
) -> None:
    out = tmp_path / "out"
    given = [word.format(reference=models[0], anchor=models[1]) for word in words]
    with another_process(out) as process:
        before = everything(out)
        refused = invoked([*given, str(out)])
        assert refused.exit_code == 2, refused.output
        told = " ".join(refused.output.split())
        assert str(process.pid) in told and "a test" in told and "since 20" in told
        assert everything(out) == before
    assert not out.exists()


@HELD
def test_a_folder_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with another_process(out) as process:
        with pytest.raises(FolderInUse, match=str(process.pid)), taken(out, "mine"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with taken(out, "mine") as private:
            assert json.loads((private / "holder.json").read_text())["process"] == os.getpid()
    assert not list(out.iterdir())


@HELD
def test_one_thread_holds_a_folder_as_often_as_it_likes_and_another_not_at_all(tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def other() -> None:
        try:
            with taken(tmp_path / "out", "another"):
                pass
        except FolderInUse as error:
            refused.append(error)

    with taken(tmp_path / "out", "one"), taken(tmp_path / "nowhere" / ".." / "out", "two") as private:
        assert private.is_dir()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and not (tmp_path / "out").exists()


@HELD
def test_many_processes_that_race_for_a_folder_take_turns(tmp_path: Path) -> None:
    """The lock's own file goes with its folder: whoever has locked a file that is gone must not believe it."""
    racing = """
import sys
from pathlib import Path
from deradiff.files.locks import FolderInUse, taken
out, alone = Path(sys.argv[1]), 0
for _ in range(200):
    try:
        with taken(out, "a race"):
            (out / "mark").touch(exist_ok=False)
            alone += 1
            (out / "mark").unlink()
    except FolderInUse:
        pass
print(alone)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", racing, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    counts = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0] and min(counts) > 0
    assert not list(tmp_path.glob("out/*"))


@HELD
def test_what_is_in_the_way_of_the_lock_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / PRIVATE).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / PRIVATE).write_text("mine")
    (tmp_path / "out").write_text("mine")
    for folder in ("link", "file", "out"):
        with pytest.raises(FileExistsError), taken(tmp_path / folder, "a test"):
            pass
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "file" / PRIVATE).read_text() == "mine"


# -- what a person keeps there -----------------------------------------------------------------------------------------


def coming_in(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Have a person save `file` while the models load."""
    load = drawing.realigned

    def slowly(settings: Any) -> Any:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        return load(settings)

    monkeypatch.setattr(drawing, "realigned", slowly)


@KEPT
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["thesis.docx", "images/thesis.png", "sub/thesis.docx"])
@pytest.mark.cases(2)
def test_a_file_that_is_saved_while_models_load_stays(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool, name: str
) -> None:
    out = tmp_path / "out"
    if force:
        assert generate(models, out).exit_code == 0
    coming_in(monkeypatch, out / name)
    result = generate(models, out, *(["--force"] if force else []))
    assert result.exit_code == 0, result.output
    assert (out / name).read_text() == "mine"
    assert len(json.loads((out / "record.json").read_text())["images"]) == 1
    assert not (out / PRIVATE).exists()


@KEPT
@pytest.mark.parametrize("name", ["sheet.png", "record.json", "images/000-a-seed0-00-lam1.png"])
def test_a_file_that_takes_a_name_of_the_run_is_not_written_over(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = tmp_path / "out"
    coming_in(monkeypatch, out / name)
    result = generate(models, out)
    assert result.exit_code == 2 and name.rpartition("/")[2] in result.output.replace("\n", "")
    assert (out / name).read_text() == "mine"


@KEPT
def test_force_replaces_what_the_record_names_and_refuses_the_rest(models: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert generate(models, out, "--seed", "0:1").exit_code == 0
    stranger = out / "images" / "another.png"
    stranger.write_bytes((out / "images" / "000-a-seed0-00-lam1.png").read_bytes())  # another run's, by its looks
    before = everything(out)
    assert generate(models, out, "--force").exit_code == 2
    assert everything(out) == before
    stranger.unlink()
    assert generate(models, out, "--force").exit_code == 0
    assert [path.name for path in (out / "images").iterdir()] == ["000-a-seed0-00-lam1.png"]


@KEPT
@pytest.mark.parametrize("names", [["../precious.png"], ["/etc/passwd"], ["images/../../precious.png"], [None, 3, {}]])
def test_a_record_that_names_files_elsewhere_removes_none(tmp_path: Path, names: list[Any]) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious.png"
    with RunFolder(out) as folder:
        folder.add("a.png", Image.new("RGB", (4, 4)), {"settings": 1})
        folder.finish(Image.new("RGB", (4, 4)), {"settings": {}, "versions": {}, "images": [{"file": "images/a.png"}]})
    precious.write_bytes((out / "images" / "a.png").read_bytes())
    record = json.loads((out / "record.json").read_text())
    record["images"] += [{"file": name} for name in names]
    (out / "record.json").write_text(json.dumps(record))
    with RunFolder(out, force=True) as folder:
        folder.add("b.png", Image.new("RGB", (4, 4)), {"settings": 1})
    assert precious.exists() and [path.name for path in (out / "images").iterdir()] == ["b.png"]


@KEPT
def test_what_lies_beside_a_baked_model_is_a_persons_whatever_its_name(tmp_path: Path) -> None:
    pipe, anchor, _ = tiny.make("sd")
    beside = [tmp_path / name / "thesis.docx" for name in ("out.unfinished", ".out.partial", ".out.former", "out.tmp")]
    for file in beside:
        file.parent.mkdir()
        file.write_text("mine")
    bake(pipe, anchor, 0.5, tmp_path / "out", images=0)
    assert [file.read_text() for file in beside] == ["mine"] * 4
    assert not (tmp_path / "out" / PRIVATE).exists() and (tmp_path / "out" / "model_index.json").is_file()


@KEPT
def test_baking_anew_removes_what_the_record_names_alone(tmp_path: Path) -> None:
    pipe, anchor, _ = tiny.make("sd")
    bake(pipe, anchor, 0.5, tmp_path / "out", images=0)
    before = everything(tmp_path / "out")
    note = tmp_path / "out" / "unet" / "note.txt"
    note.write_text("mine")
    with pytest.raises(FileExistsError):
        bake(pipe, anchor, 0.9, tmp_path / "out", images=0)
    bake(pipe, anchor, 0.9, tmp_path / "out", images=0, force=True)
    after = everything(tmp_path / "out")
    assert note.read_text() == "mine" and set(after) == {*before, "unet/note.txt"}
    assert json.loads(after["baking.json"])["made_of"]["lam"] == {"anchor": 0.9}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert after[weights] != before[weights]


@KEPT
def test_a_baked_model_without_a_list_of_its_files_is_not_replaced(tmp_path: Path) -> None:
    pipe, anchor, _ = tiny.make("sd")
    out = tmp_path / "out"
    out.mkdir()
    (out / outputs.RECORD).write_text('{"made_of": {}}')  # as deradiff 0.1 wrote it
    with pytest.raises(FileExistsError, match=r"baking\.json"):
        bake(pipe, anchor, 0.5, out, images=0, force=True)
    assert file_names(out) == [outputs.RECORD]


@KEPT
def test_an_interrupted_distillation_stays_when_another_method_is_tried(tmp_path: Path) -> None:
    pipe, anchor, _ = tiny.make("sd")
    with pytest.raises(KeyboardInterrupt), outputs.baking_folder(tmp_path / "out", "distill", False) as (_, work):
        work.mkdir()
        (work / "hours").write_text("of work")
        raise KeyboardInterrupt
    with pytest.raises(FileExistsError, match="distillation"):
        bake(pipe, anchor, 0.5, tmp_path / "out", images=0)
    with outputs.baking_folder(tmp_path / "out", "distill", False) as (folder, work):
        assert (work / "hours").read_text() == "of work"
        write_json(folder / outputs.RECORD, {"files": {}})
    assert file_names(tmp_path / "out") == [outputs.RECORD]


@KEPT
def test_a_folder_of_something_else_is_not_claimed(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("mine")
    with pytest.raises(FileExistsError):
        begin_or_resume(tmp_path, {}, "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]
    begin_or_resume(tmp_path / "cache", {"resolution": 8}, "cache")
    with pytest.raises(ValueError, match=naming("resolution 8", 16)):
        begin_or_resume(tmp_path / "cache", {"resolution": 16}, "cache")


def test_a_record_names_its_files(tmp_path: Path) -> None:
    write_json(tmp_path / "made.json", {"files": {"a": 1, "../b": 2, "c/d": 3}})
    assert named_files(tmp_path, "made.json") == [tmp_path / "a", tmp_path / "c/d", tmp_path / "made.json"]
