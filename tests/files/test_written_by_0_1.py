"""What version 0.1 wrote is still read: images, records, an experiment's store, plans, alignments, baked models."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from deradiff.experiments.store import Store
from deradiff.files.records import read_png
from deradiff.study.plan import read_plan as read_study
from deradiff.sweep.alignment_records import known_beta
from deradiff.sweep.settings import Settings
from programs import invoked

WRITTEN = Path(__file__).parents[1] / "data" / "written_by_0_1"


def command(*words: object) -> str:
    result = invoked([str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.parametrize("folder", ["generate", "annealed", "blended"])
def test_images_and_records_tell_their_settings(folder: str) -> None:
    record = json.loads((WRITTEN / folder / "record.json").read_text())
    settings = Settings.model_validate(record["settings"])
    assert settings.reference == "digits" and settings.steps == 4
    for path in (WRITTEN / folder / "images").iterdir():
        told = read_png(path)
        assert Settings.model_validate(told["settings"]) == settings
        assert told["prompt"] in settings.prompts and told["seed"] in settings.seeds


def test_the_studio_opens_its_images() -> None:
    from deradiff.studio import scenes

    for path in (WRITTEN / "generate" / "images").iterdir():
        told = read_png(path)
        scene = scenes.of_record(told)
        assert (scene.prompts, scene.seeds) == ((told["prompt"],), (told["seed"],))
        assert scene.columns[0].lam == told["lam"]
    (annealed,) = (WRITTEN / "annealed" / "images").iterdir()
    assert scenes.of_record(read_png(annealed)).columns[0].schedule is not None
    (blended,) = (WRITTEN / "blended" / "images").iterdir()
    with pytest.raises(ValueError, match="interpolated"):
        scenes.of_record(read_png(blended))


def test_an_experiment_goes_on_with_nothing_drawn_anew(tmp_path: Path) -> None:
    """The identity of every image is what it was: the same plan finds them all."""
    folder = tmp_path / "experiment"
    shutil.copytree(WRITTEN / "experiment", folder)
    with Store(folder, write=False) as store:
        count = len(store.drawn())
    before = {path.name: path.read_bytes() for path in folder.rglob("*.png")}
    assert len(before) == count == 140
    said = command("experiment", "run", WRITTEN / "plan.yaml", "--out", folder, "--device", "cpu")
    assert "140 images drawn" not in said
    assert {p.name: p.read_bytes() for p in folder.rglob("*.png")} == before
    assert "2 particles" in command("experiment", "status", folder)
    command("experiment", "export", folder, "--out", tmp_path / "table")
    assert len((tmp_path / "table" / "images.csv").read_text().splitlines()) > 140


def test_a_study_s_plan_is_read() -> None:
    plan = read_study(WRITTEN / "study.yaml")
    assert plan.name == "written-by-0.1-beta-30-beta-250" and len(plan.configurations[0].prompts) == 2


def test_an_alignment_tells_its_strength() -> None:
    assert known_beta(str(WRITTEN / "aligned")) == 500


def test_the_pictures_are_those_that_were_hashed() -> None:
    """`benchmarks/same_bytes.py` compares with these hashes: they are of these files."""
    hashes = json.loads((WRITTEN / "hashes.json").read_text())
    for path in (WRITTEN / "generate" / "images").iterdir():
        with Image.open(path) as image:
            assert hashlib.sha256(image.tobytes()).hexdigest() == hashes["generate"][f"images/{path.name}"]
