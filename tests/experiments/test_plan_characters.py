"""A plan names what kind of anchor its models are: verdicts go by it, and files of other weights are refused."""

from pathlib import Path
from typing import Any

import pytest

from character_files import character_file
from deradiff.experiments import executors, running
from deradiff.experiments.check import Need, needs
from deradiff.experiments.plan import Plan
from deradiff.experiments.reporting import trust_exhibits
from deradiff.experiments.results import Results
from deradiff.experiments.store import Store
from messages import naming
from small_experiment import SMALL, Fake, silent, small

SAMPLING = {"memoryless": {"scheduler": "ddpm", "steps": 2, "guidance_scale": 1.0}}
METHODS = [{"method": "reference"}, {"method": "realign", "lam": [0.5, 1]}]


def plan_of(file: Path, **changes: Any) -> Plan:
    """The small plan, whose strong anchor was examined."""
    models = {**SMALL["models"], "strong": {**SMALL["models"]["strong"], "character": str(file)}}
    return small(models=models, **{"sampling": SAMPLING, "methods": METHODS, **changes})


def characters(plan: Plan) -> list[Need]:
    return [need for need in needs(plan) if need.what.startswith("character")]


# -- before anything is drawn -----------------------------------------------------------------------------------------


def test_a_check_names_the_file_and_the_command_that_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "strong.json"
    [absent] = characters(plan_of(file))
    assert "'strong'" in absent.what and str(file) in absent.what and absent.missing
    assert absent.how == (f"deradiff examine digits --anchor digits:30 --out {file}",)
    character_file(file, "tilt", "digits:30")
    assert characters(plan_of(file)) == [Need(f"character of model 'strong', {file}")]
    character_file(file, "tilt", "digits:100")
    [other] = characters(plan_of(file))
    assert "digits:30" in other.missing and "digits:100" in other.missing and other.how[0].endswith("--force")
    file.write_text("{}")
    assert characters(plan_of(file))[0].missing


def test_a_check_asks_nothing_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked"))
    file = character_file(tmp_path / "c.json", "tilt", "digits:30")
    models = {"far": {"source": "nobody/nowhere", "beta": 2, "character": str(file), "reward": "clip"}}
    [unknown] = characters(small(models=models, reference="nobody/nothing", methods=[{"method": "reference"}]))
    assert not unknown.missing  # of weights that are not here nothing can be said yet
    file.unlink()
    [absent] = characters(small(models=models, reference="nobody/nothing", methods=[{"method": "reference"}]))
    assert "--prompts" in absent.missing and "--reward clip" in absent.how[0]
    snapshot = tmp_path / "cache" / "models--nobody--nowhere" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c0ffee")
    character_file(file, "tilt", sha256={"reference": "a" * 40, "anchor": "b" * 40})
    [other] = characters(small(models=models, reference="nobody/nothing", methods=[{"method": "reference"}]))
    assert "c0ffee" in other.missing and "b" * 12 in other.missing


def test_a_run_refuses_the_character_of_other_weights_before_it_draws(tmp_path: Path) -> None:
    plan, workers = plan_of(character_file(tmp_path / "weak.json", "tilt", "digits:500")), Fake()
    with pytest.raises(ValueError, match=naming("weak.json", "digits:30", "digits:500")):
        running.run(plan, tmp_path / "out", lambda: workers, silent)
    assert not workers.draws
    with pytest.raises(FileNotFoundError, match=naming("none.json")):
        running.run(plan_of(tmp_path / "none.json"), tmp_path / "out", lambda: workers, silent)


# -- what comes of it -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An experiment on the digits, and the file of its strong anchor's character."""
    folder = tmp_path_factory.mktemp("characters")
    file = character_file(folder / "strong.json", "stepwise", "digits:30")
    plan = plan_of(file)
    running.run(plan, folder / "out", lambda: executors.InProcess(plan, "cpu", 1), silent)
    return folder / "out", file


def table(folder: Path, plan: Plan) -> dict[str, dict[str, Any]]:
    """The report's lines on trust at λ = ½, by anchor; the kinds of anchors under ""."""
    with Store(folder, write=False) as store:
        lines, *kinds = trust_exhibits.exhibits(Results(plan, store))
    named = [dict(zip(lines.header, row, strict=True)) for row in lines.rows]
    assert [line["λ"] for line in named] == [0.5] * len(named)  # λ = 1 is one model alone
    return {line["anchor"]: line for line in named} | {"": {"caption": lines.caption, "kinds": kinds}}


def test_the_report_has_a_line_for_every_anchor_and_lam(drawn: tuple[Path, Path]) -> None:
    folder, file = drawn
    said = table(folder, plan_of(file))
    assert said["strong"]["in words"].startswith("plain samples") and said["strong"]["β/λ"] == 60
    assert "cannot tell: 2 images" in said["weak"]["in words"] and "deradiff examine" in said[""]["caption"]
    [kinds] = said[""]["kinds"]
    assert [(row[0], row[1].partition(":")[0]) for row in kinds.rows] == [("strong", "stepwise")]


def test_another_character_changes_the_words_and_no_image(drawn: tuple[Path, Path]) -> None:
    folder, file = drawn
    for kind, words in (("neither", "no claim"), ("tilt", "cannot tell")):
        plan = plan_of(character_file(file, kind, "digits:30"))
        assert running.run(plan, folder, Fake, silent).drawn == 0
        said = table(folder, plan)["strong"]
        assert said["in words"].startswith(words)
        assert (said["β/λ"] is None) == (kind == "neither")  # where λ says how much of the anchor, and no more


def test_a_run_by_another_sampler_is_told(drawn: tuple[Path, Path]) -> None:
    folder, file = drawn
    otherwise = {"scheduler": "DDIMScheduler", "guidance_scale": 1.5, "steps": 9}
    plan = plan_of(character_file(file, "stepwise", "digits:30", examined=otherwise))
    running.run(plan, folder, Fake, silent)
    words = table(folder, plan)["strong"]["in words"]
    assert all(part in words for part in ("DDIMScheduler", "DDPMScheduler", "1.5"))


def test_a_report_needs_neither_the_file_nor_the_weights(drawn: tuple[Path, Path]) -> None:
    folder, file = drawn
    plan = plan_of(character_file(file, "stepwise", "digits:30"))
    running.run(plan, folder, Fake, silent)
    file.unlink()
    assert table(folder, plan)["strong"]["in words"].startswith("plain samples")
