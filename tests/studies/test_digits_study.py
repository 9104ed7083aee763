"""The comparison on the digits, with shipped anchors standing in for models trained at the target."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from deradiff.worlds import digits
from deradiff.worlds.digits import captions
from messages import naming
from programs import invoked
from studies.digits.truth import Case, Plan, cases, needed, prompts, run
from studies.digits.truth_report import rows, summary, table

PLAN = Plan(prompts=3, images=3, counts=(2,), guided_counts=(), steps=3, guidance_scales=(1.0,))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    (folder / "weighted").mkdir(parents=True)
    for name, beta in (("bold-1", 250.0), ("bold-0.5", 500.0), ("ink-0.5", 500.0), ("control", 1000.0)):
        (folder / "weighted" / name).symlink_to(digits.anchor_path(beta))
    return folder


def test_targets_are_those_with_an_anchor(trained):
    assert cases(trained, PLAN) == [Case("weighted", {"bold": 0.5}, 1.0)]
    (trained / "weighted" / "ink-1").symlink_to(digits.anchor_path(250.0))
    (trained / "weighted" / "bold-0.5+ink-0.5").symlink_to(digits.anchor_path(500.0))
    both = cases(trained, Plan(guidance_scales=(1.0, 1.5)))
    assert [case.target for case in both[:3]] == [{"bold": 0.5}, {"ink": 0.5}, {"bold": 0.5, "ink": 0.5}]
    assert [case.guidance_scale for case in both] == [1.0] * 3 + [1.5] * 3


def test_prompts_leave_the_ink_open():
    parts = [captions.parse(text) for text in prompts(Plan())]
    assert all(part.ink is None for part in parts) and len({part.digit for part in parts}) == 10
    assert sum(part.paper is None for part in parts) > 10


def test_a_case_holds_every_arm_beside_the_retrained_model(trained, tmp_path):
    [record] = run(trained, tmp_path / "out", PLAN, lambda *_: None, workers=1)
    arms = record["arms"]
    assert {"reference", "retrained", "anchor bold", "algorithm 1", "weighted", "particles 2"} <= set(arms)
    assert "interpolated" in arms
    for arm in arms.values():
        assert sum(share["value"] for share in arm["inks"].values()) == pytest.approx(1)
        assert sum(arm["by_prompt"]["bold"]) / 3 == pytest.approx(arm["bold"]["value"], abs=1e-5)
    gap = record["errors"]["bold"]["gaps"]["algorithm 1"]
    assert gap["value"] == pytest.approx(
        arms["algorithm 1"]["bold"]["value"] - arms["retrained"]["bold"]["value"], abs=1e-4
    )
    assert gap["error"] > 0 and not math.isnan(gap["error"])
    assert arms["weighted"]["bold"] != arms["algorithm 1"]["bold"]
    assert record["verdicts"]["bold"]["images"] == 9 and record["verdicts"]["bold"]["prompts"] == 3
    assert 1 <= arms["particles 2"]["effective"] <= 2


def test_a_study_goes_on_where_it_was(trained, tmp_path):
    seen: list[tuple[str, int, int]] = []

    def report(stage: str, done: int, planned: int, line: str) -> None:
        seen.append((stage, done, planned))

    first = run(trained, tmp_path / "out", PLAN, report, workers=1)
    file = tmp_path / "out" / f"{cases(trained, PLAN)[0].name}.json"
    written = file.stat().st_mtime_ns
    assert run(trained, tmp_path / "out", PLAN, lambda *_: None, workers=1) == first
    assert file.stat().st_mtime_ns == written and json.loads(file.read_text()) == first[0]
    assert seen == [("models as they are", i, 3) for i in (1, 2, 3)] + [("comparing", 1, 1)]
    with pytest.raises(ValueError, match=naming(tmp_path / "out", "counts")):
        run(trained, tmp_path / "out", Plan(), lambda *_: None, workers=1)
    with pytest.raises(ValueError, match=naming(tmp_path / "nothing")):
        run(tmp_path / "nothing", tmp_path / "other", PLAN, lambda *_: None, workers=1)


def test_the_command_trains_compares_and_prints(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("studies.digits.truth_models.train_truth", lambda folder, *_: trained.rename(folder))
    monkeypatch.setattr("studies.digits.truth.Plan", lambda: PLAN)
    (tmp_path / "out").mkdir()
    result = invoked(
        ["studies.digits", "truth", "--workers", "1", "--out", str(tmp_path / "out")], env={"COLUMNS": "160"}
    )
    assert result.exit_code == 0, result.output
    assert "weighted: bold at λ = 0.5, guidance 1" in result.output and "particles 2" in result.output
    assert (tmp_path / "out" / "results" / "weighted_bold-0.5_guidance1.json").exists()
    told = json.loads((tmp_path / "out" / "truth.json").read_text())
    assert len(told["cases"]) == 1 and "by_prompt" not in told["cases"][0]["arms"]["retrained"]
    assert (tmp_path / "out" / "errors.png").stat().st_size > 10_000


@pytest.mark.cases(0)
def test_two_processes_compute_what_one_does_and_guidance_has_its_own_counts(trained, tmp_path):
    plan = replace(PLAN, guidance_scales=(1.0, 1.5))
    alone = run(trained, tmp_path / "alone", plan, lambda *_: None, workers=1)
    assert run(trained, tmp_path / "together", plan, lambda *_: None, workers=2) == alone
    assert [("particles 2" in record["arms"]) for record in alone] == [True, False]


def test_a_part_of_the_study_needs_its_target_its_anchors_and_its_control(trained, tmp_path):
    assert needed(["dpo/bold-0.5+ink-0.25"]) == {"dpo/bold-0.5+ink-0.25", "dpo/bold-1", "dpo/ink-1"}
    assert needed(["weighted/ink-2"]) == {"weighted/ink-2", "weighted/ink-1", "weighted/control"}
    for wrong in ("ink-0.5", "dpo/vivid-1", "dpo/ink", "other/ink-1", "dpo/"):
        with pytest.raises(ValueError, match=naming(wrong)):
            needed([wrong])
    plan = replace(PLAN, guidance_scales=(1.0, 1.5))
    [record] = run(trained, tmp_path / "out", plan, lambda *_: None, 1, ["weighted/bold-0.5"], 1.5)
    assert record["case"]["guidance_scale"] == 1.5
    with pytest.raises(ValueError, match=naming(trained)):
        run(trained, tmp_path / "out", plan, lambda *_: None, 1, ["weighted/ink-0.5"])


def told(reward: str, shift: float, errors: dict[str, tuple[float, float]], kind: str) -> dict:
    """A record with one reward."""
    gaps = {arm: {"value": value, "error": error} for arm, (value, error) in errors.items()}
    return {
        "case": {"family": "weighted", "target": {reward: 0.5}, "guidance_scale": 1.0},
        "arms": {"reference": {"by_prompt": {}, "inks": {}}},
        "errors": {reward: {"shift": {"value": shift, "error": 0.01}, "gaps": gaps}},
        "verdicts": {reward: {"kind": kind, "words": "as said"}},
    }


def test_rows_say_what_was_missed_what_particles_remove_and_whether_the_verdict_was_right():
    off = {"algorithm 1": (-0.2, 0.02), "weighted": (0.05, 0.02), "particles 16": (0.05, 0.02)}
    right = {"algorithm 1": (0.01, 0.02), "weighted": (0.005, 0.02)}
    overshot = {"algorithm 1": (0.1, 0.02), "weighted": (0.3, 0.02)}
    found = rows(
        [
            told("ink", 0.5, off, "off"),
            told("ink", 0.5, off, "trust"),
            told("bold", -0.5, right, "trust"),
            told("bold", 0.5, right, "off"),
            told("bold", 0.5, off, "uneven"),
            told("bold", 0.5, overshot, "off"),
        ]
    )
    assert [row.judgement for row in found] == ["right", "miss", "right", "false alarm", "open", "false alarm"]
    assert [row.missed for row in found] == [True, True, False, False, True, True]
    assert found[0].beyond == pytest.approx(0.16 / 0.5) and found[2].beyond == 0
    assert found[0].removed("particles 16") == pytest.approx(0.75) and found[2].removed("particles 16") is None
    assert "by_prompt" not in json.dumps(summary([told("ink", 0.5, off, "off")]))
    assert "| weighted | ink λ = 0.5 | 1 | ink | +0.500 ± 0.010 | -0.200 ± 0.020 |" in table(
        [told("ink", 0.5, off, "off")]
    )
