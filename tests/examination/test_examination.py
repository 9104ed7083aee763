"""`deradiff examine` on the digits in small, its file, and what later runs make of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import deradiff
from deradiff.cli import app
from deradiff.examination.alignments import origin_of
from deradiff.examination.pairs import given
from deradiff.files.writing import write_json
from deradiff.sweep.alignment_records import Alignment
from deradiff.sweep.characters import load_character
from messages import naming

PROMPTS = ["a two", "a five", "a seven", "the digit nine", "the digit four"]


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a command that draws eight images of five prompts in three steps."""
    out = tmp_path_factory.mktemp("examined") / "character.json"
    command = ["examine", "digits", "--anchor", "digits:500", "--images", "8", "--steps", "3", "--out", str(out)]
    result = CliRunner().invoke(app, command + [part for text in PROMPTS for part in ("--prompt", text)])
    assert result.exit_code == 0, result.output
    assert "The anchor is" in result.output and "Stepwise?" in result.output and str(out) in result.output
    return out


def test_the_file_holds_the_kind_both_tests_and_what_they_were_made_with(examined):
    known = json.loads(examined.read_text())
    assert known["kind"] in ("tilt", "stepwise", "neither", "unknown") and known["aligned_by"] == "dpo"
    assert known["tilt"]["answer"] in ("yes", "no", "open") and [row["lam"] for row in known["tilt"]["at"]][2] == 0.5
    assert known["tilt"]["at"][0]["slope"][0] != known["tilt"]["at"][-1]["slope"][0]
    assert known["pairs"]["beta"] == 500 and known["pairs"]["pairs"] == 20 and known["reward"] == "bold and vivid"
    assert known["examined"] == {"scheduler": "DDPMScheduler", "guidance_scale": 1.0, "steps": 3}
    assert known["prompts"] == PROMPTS and len(known["sha256"]["anchor"]) == 64
    with Image.open(examined.with_suffix(".png")) as plot:
        assert plot.width > 2 * plot.height  # three panels


def test_a_later_run_goes_by_it_and_says_what_differs(examined, tmp_path):
    known = json.loads(examined.read_text()) | {"kind": "stepwise", "why": "of the test"}
    file = tmp_path / "character.json"
    write_json(file, known)
    command = ["generate", "digits", "-a", "digits:500", "-p", "a two", "--lam", "0.5", "-s", "0:8", "--steps", "3"]
    command += [
        "--scheduler",
        "euler-a",
        "--guidance-scale",
        "1",
        "--character",
        str(file),
        "--out",
        str(tmp_path / "o"),
    ]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    (judged,) = json.loads((tmp_path / "o" / "record.json").read_text())["verdicts"]
    assert judged["kind"] == "plain" and judged["words"].startswith("plain samples")
    assert "DDPMScheduler" in judged["words"] and "EulerAncestralDiscreteScheduler" in judged["words"]


def test_the_character_of_other_weights_is_refused_by_its_hash(examined):
    known = load_character(examined, "digits", "digits:500")
    assert known.remark("DDPMScheduler", 1.0) == ""
    assert all(part in known.remark("DDIMScheduler", 1.5) for part in ("DDPMScheduler", "DDIMScheduler", "1.5"))
    with pytest.raises(ValueError, match="digits:250"):
        deradiff.load_character(examined, "digits", "digits:250")
    with pytest.raises(FileNotFoundError):
        load_character(examined.parent / "none.json", "digits", "digits:500")
    broken = examined.parent / "broken.json"
    broken.write_text(json.dumps(json.loads(examined.read_text()) | {"kind": "splendid"}))
    with pytest.raises(ValueError, match="splendid"):
        load_character(broken, "digits", "digits:500")


def test_files_that_are_there_are_kept(examined):
    before = examined.read_bytes()
    result = CliRunner().invoke(app, ["examine", "digits", "--anchor", "digits:500", "--out", str(examined)])
    assert result.exit_code == 2 and "--force" in result.output and examined.read_bytes() == before


def test_what_nothing_can_be_examined_by(tmp_path):
    with pytest.raises(ValueError, match="reward"):
        deradiff.examine("digits", tmp_path / "unknown")
    with pytest.raises(ValueError, match="prompts"):
        deradiff.examine("nobody/nothing", "nobody/nowhere", reward="bold")
    with pytest.raises(ValueError, match=naming("digits:3")):
        deradiff.examine("digits", "digits:3", reward="bold")


# -- where an anchor comes from ---------------------------------------------------------------------------------------


def aligned(folder: Path, method: str, beta: float) -> str:
    folder.mkdir()
    record: dict[str, Any] = {"made_of": {"beta": beta, "settings": {"method": method, "reward": "ink"}}}
    write_json(folder / "alignment.json", record)
    return str(folder)


def test_an_anchor_is_known_by_its_record(tmp_path):
    assert origin_of("digits:250", None, None, None) == Alignment("dpo", 250.0, "digits")
    dpo, rwr = aligned(tmp_path / "dpo", "dpo", 500.0), aligned(tmp_path / "rwr", "rwr", 0.8)
    assert origin_of(dpo, None, None, None) == Alignment("dpo", 500.0, "ink")
    assert origin_of(rwr, None, None, "bold") == Alignment("rwr", None, "bold")  # its β is in points of the reward
    assert origin_of(str(tmp_path), "dpo", 100.0, None) == Alignment("dpo", 100.0, None)
    with pytest.raises(ValueError, match=naming(500, 100)):
        origin_of(dpo, None, 100.0, None)
    with pytest.raises(ValueError, match="rwr"):
        origin_of(rwr, "dpo", None, None)
    with pytest.raises(ValueError, match=naming(-1.0)):
        origin_of(dpo, None, -1.0, None)


def test_pairs_that_another_model_drew_are_refused(tmp_path):
    write_json(tmp_path / "settings.json", {"settings": {"base": "another/model"}, "versions": {}})
    with pytest.raises(ValueError, match="another/model"):
        given(tmp_path, "digits", 10)
