"""A folder that says it is finished is believed when its files are there and whole."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import small_study
import written_alignments
import written_files
from damaging import is_sentence
from deradiff.alignment import runs
from deradiff.cli import app
from deradiff.files import reading
from deradiff.files.inventory import Inventory, inventory, require_whole
from messages import naming

pytestmark = pytest.mark.attack("finished means whole")


def finished(folder: Path) -> dict[str, Any]:
    save_file({"a": torch.arange(400_000.0)}, folder / "large.safetensors")
    (folder / "small.json").write_text('{"a": 1}')
    (folder / "README.md").write_text("a card")
    return inventory(folder)


def checked(folder: Path, files: Any) -> None:
    require_whole(folder, reading.fit(Inventory, files, "the record", "inventory"), "model", "make it again")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: min(100, path.stat().st_size // 2)])


def no_header(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("name", ["large.safetensors", "small.json"])
@pytest.mark.parametrize("change", [Path.unlink, cut, no_header])
def test_a_file_that_is_not_what_was_written_is_found(tmp_path: Path, name: str, change: Any) -> None:
    files = finished(tmp_path)
    checked(tmp_path, files)
    (tmp_path / "README.md").write_text("a person's own words")
    checked(tmp_path, files)
    change(tmp_path / name)
    with pytest.raises(ValueError, match=naming(tmp_path, name, "make it again")):
        checked(tmp_path, files)


def test_what_an_earlier_version_finished_is_opened(tmp_path: Path) -> None:
    finished(tmp_path)
    require_whole(tmp_path, None, "model", "make it again")
    cut(tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match=naming("large.safetensors", "make it again")):
        require_whole(tmp_path, None, "model", "make it again")
    (tmp_path / "large.safetensors").unlink()
    with pytest.raises(ValueError, match=naming(tmp_path, "no .safetensors", "make it again")):
        require_whole(tmp_path, None, "model", "make it again")


HELD = (written_alignments.alignments, written_alignments.samples, written_files.builds, written_files.models)


@pytest.mark.parametrize("make", HELD, ids=lambda make: make.__name__)
@pytest.mark.cases(2)
def test_tensors_and_pictures_that_were_cut_are_not_used(tmp_path: Path, make: Any) -> None:
    files = [file for file in written_files.written(tmp_path, (make,)) if file.form in ("tensors", "picture")]
    assert files
    for file in files:
        for left in (file.content[:100], file.content[:-1], b""):
            file.path.write_bytes(left)
            with pytest.raises((ValueError, OSError)) as caught, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                file.read()
            assert is_sentence(caught.value), (file.kind, caught.value)
            assert any(str(name) in str(caught.value) for name in (file.path.name, *file.path.parents[:2])), file.kind
            file.restore()


def test_align_prints_no_path_of_a_model_that_is_not_whole(tmp_path: Path) -> None:
    settings = written_alignments.small_preset()
    [anchor] = runs.align_all(settings, [100.0], tmp_path, lambda *_: None, count=6, cpu=True)
    weights, record = next(anchor.glob("*.safetensors")), anchor / "alignment.json"
    content, made_of = weights.read_bytes(), json.loads(record.read_text())["made_of"]
    for earlier in (False, True):  # version 0.1 wrote no list of files
        if earlier:
            record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "files"}))
        runs.require_finished(anchor, made_of)
        for left in (content[:100], b"", None):
            weights.unlink()
            if left is not None:
                weights.write_bytes(left)
            with pytest.raises(ValueError, match=naming(anchor, "anew")):
                runs.require_finished(anchor, made_of)
            weights.write_bytes(content)
    weights.unlink()
    with pytest.raises(ValueError, match=naming(anchor, "anew")):
        runs.align_all(settings, [100.0], tmp_path, lambda *_: None, count=6, cpu=True)


def test_an_experiment_tells_of_images_that_are_gone(tmp_path: Path) -> None:
    out = small_study.experiment(tmp_path / "experiment")
    pictures = sorted((out / "images").rglob("*.png"))
    said = CliRunner().invoke(app, ["experiment", "status", str(out)], env={"COLUMNS": "200"})
    assert said.exit_code == 0 and "gone" not in said.output
    pictures[0].unlink()
    pictures[1].write_bytes(b"")
    said = CliRunner().invoke(app, ["experiment", "status", str(out)], env={"COLUMNS": "200"})
    assert said.exit_code == 0 and f"2 images in {out} are gone or were altered" in " ".join(said.output.split())
