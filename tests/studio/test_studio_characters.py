"""The studio's verdicts go by the kind of anchor that was examined, and files of other weights are refused."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from character_files import character_file
from deradiff.cli import app
from deradiff.studio import html, scenes
from deradiff.studio.examined_anchors import ExaminedAnchors
from deradiff.studio.image_requests import Desk
from deradiff.studio.models import LoadedModels, MachineSettings
from deradiff.studio.sources import Sources
from deradiff.sweep.settings import Settings
from deradiff.worlds import digits
from messages import naming

OPENED = ["digits", "digits:100"]


def scene(lam: float = 0.5, anchors: tuple[str, ...] = ("digits:100",), **changes: Any) -> Settings:
    settings = {"scheduler": "ddpm", "guidance_scale": 1.0, "steps": 3, **changes}
    return scenes.scene("digits", list(anchors), "a red seven", [lam] * len(anchors), **settings)


def last(news: Iterator[Any]) -> Any:
    *_, outcome = news
    return outcome


@pytest.fixture(scope="module")
def models() -> LoadedModels:
    return LoadedModels(Sources(), MachineSettings(device="cpu"), lambda: 1.0)


@pytest.fixture
def desk(models: LoadedModels, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Desk]:
    file = character_file(tmp_path / "character.json", request.param)
    desk = Desk(models, ("legible", "colours"), ExaminedAnchors([file], models.sources, OPENED))
    yield desk
    desk.close()


# -- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("desk", ["stepwise"], indirect=True)
def test_of_a_stepwise_anchor_plain_samples_are_the_estimate(desk: Desk) -> None:
    [found] = last(desk.drawn("page", scene()))
    assert found.kind == "plain" and found.verdict.startswith("plain samples") and "DDPM" not in found.verdict
    assert "stepwise" in html.facts(found)
    assert last(desk.judged("page", scene())) == [found.verdict]  # one line for both rewards
    [otherwise] = last(desk.drawn("page", scene(scheduler="euler-a", guidance_scale=2.0)))
    assert otherwise.kind == "plain"
    assert all(part in otherwise.verdict for part in ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "at 2"))
    [alone] = last(desk.drawn("page", scene(1.0, scheduler="euler-a")))
    assert alone.kind == "exact" and "DDPMScheduler" not in alone.verdict


@pytest.mark.parametrize("desk", ["neither"], indirect=True)
def test_of_a_hacked_anchor_nothing_is_claimed_and_others_are_as_before(desk: Desk) -> None:
    [claim] = last(desk.judged("page", scene()))
    assert claim.startswith("no claim")
    [other] = last(desk.drawn("page", scene(anchors=("digits:500",))))
    assert other.kind == "few" and other.anchor == ""
    [several] = last(desk.drawn("page", scene(0.3, ("digits:100", "digits:500"))))
    assert several.anchor == "" and several.verdict


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_of_the_models_that_it_names_however_these_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits.anchor_path(30), tmp_path / "models" / "strong")
    file = character_file(tmp_path / "strong.json", "tilt", "models/strong")
    examined = ExaminedAnchors([file], Sources([Path("models")]), OPENED)
    known = examined.of(scene(anchors=(str(tmp_path / "models" / "strong"),)))
    assert known is not None and known.character.kind == "tilt"
    assert examined.of(scene()) is None


def test_a_model_that_was_moved_since_is_known_by_its_weights(tmp_path: Path) -> None:
    file = character_file(tmp_path / "moved.json", "tilt", reference="/gone", why="w")
    known = ExaminedAnchors([file], Sources(), OPENED).of(scene())
    assert known is not None and known.character.why == "w"


def test_files_that_fit_no_model_of_the_studio_are_refused(tmp_path: Path) -> None:
    hashes = {"reference": "0" * 64, "anchor": "1" * 64}
    other = character_file(tmp_path / "other.json", "tilt", sha256=hashes)
    with pytest.raises(ValueError, match=naming(str(other), "0" * 12)):
        ExaminedAnchors([other], Sources(), OPENED)
    elsewhere = character_file(tmp_path / "elsewhere.json", "tilt", "digits:30", reference="/gone")
    with pytest.raises(ValueError, match=naming(str(elsewhere), "digits:100")):
        ExaminedAnchors([elsewhere], Sources(), OPENED)
    with pytest.raises(ValueError, match=naming(str(elsewhere), "digits:30", "--anchor")):
        ExaminedAnchors([elsewhere], Sources(), [*OPENED, "digits:500"])
    twice = [character_file(tmp_path / f"{name}.json", "tilt") for name in "ab"]
    with pytest.raises(ValueError, match=naming(str(twice[1]), "digits:100")):
        ExaminedAnchors(twice, Sources(), OPENED)


def test_the_command_refuses_before_it_opens(tmp_path: Path) -> None:
    wrong = character_file(tmp_path / "wrong.json", "tilt", sha256={"reference": "0" * 64, "anchor": "1" * 64})
    result = CliRunner().invoke(
        app, ["studio", "--port", "0", "--library", str(tmp_path / "l"), "--character", str(wrong)]
    )
    assert result.exit_code == 2 and "wrong.json" in result.output and "is open" not in result.output
