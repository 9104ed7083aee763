"""Whole files and folders have the rights of any other new file, whoever wrote into them."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from deradiff.files.folders import assembled
from deradiff.files.writing import atomic_file, atomic_folder, write_json


def rights(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_files_of_tensors_are_read_by_whom_other_files_are(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic_file(tmp_path / "file.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    with atomic_folder(tmp_path / "folder") as fresh:
        (fresh / "unet").mkdir()
        save_file({"a": torch.zeros(2)}, fresh / "unet" / "weights.safetensors")
    with assembled(tmp_path / "model", tmp_path / "private", "record.json") as built:
        save_file({"a": torch.zeros(2)}, built / "weights.safetensors")
        write_json(built / "record.json", {"files": {"weights.safetensors": ""}})
    made = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(made) == 5
    assert {rights(file) for file in made} == {rights(tmp_path / "plain")}


def test_rights_that_were_chosen_are_kept(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "program") as temporary:
        temporary.touch()
        temporary.chmod(0o750)
    assert rights(tmp_path / "program") == 0o750
