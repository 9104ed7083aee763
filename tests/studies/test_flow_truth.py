"""The study of flows in miniature: cells are files, trained and compared once, and make a table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deradiff.alignment.training import TrainingPlan
from messages import naming
from studies.digits_flow import truth, truth_report
from studies.digits_flow.truth import FlowCell, FlowTruth

PLAN = TrainingPlan(steps=1, learning_rate=1e-3, evaluate_every=1)


def silent(*_: Any) -> None:
    pass


def miniature() -> FlowTruth:
    planned = FlowTruth.planned()
    small = {
        name: replace(training, plan=PLAN, batch=4, held_out=4, rate_times_beta=None)
        for name, training in planned.trainings.items()
    }
    small["rwr"] = replace(small["rwr"], options={"per_prompt": 4})
    drawn: dict[str, Any] = {"compared": 2, "images": 2, "steps": 3, "batch": 4, "particles": 2}
    return replace(planned, trainings=small, lams=(0.25,), pairs=8, prompts=3, **drawn)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    for cell in ("dpo-0", "rwr-0"):
        truth.run(out, miniature(), silent, only=cell)
    return out


def test_cells_hold_every_sampler_guidance_and_lam(folder: Path) -> None:
    found = truth_report.load(folder / "cells")
    assert [cell.name for cell in found] == ["dpo-0", "rwr-0"]
    for cell, record in found.items():
        keys = [(case["scheduler"], case["guidance_scale"], case["lam"]) for case in record["cases"]]
        assert len(set(keys)) == len(keys) == 2 * 2
        for case in record["cases"]:
            noisy, arms = case["scheduler"] == "flow-sde", {"shift", "algorithm 1"}
            arms |= {"weighted", "verdict"} if noisy else {"interpolated"}
            arms |= {"particles"} if noisy and case["guidance_scale"] == 1 else set()
            assert arms == case.keys() - {"lam", "guidance_scale", "scheduler"}
        trained = {f"{beta:g}" for beta in truth.strengths(miniature(), cell.method)}
        assert trained == record["curves"].keys() == record["path KL"].keys()
        assert (f"{truth.EVEN:g}" in trained) == (cell.method == "rwr")


def test_the_table_averages_seeds() -> None:
    def case(shift: float, gap: float) -> dict[str, Any]:
        told = {"lam": 0.5, "guidance_scale": 1.0, "scheduler": "flow-euler"}
        return {**told, "shift": [shift, 0.03], "algorithm 1": [gap, 0.0], "interpolated": [gap, 0.0]}

    cases = {FlowCell("dpo", 0): case(0.5, 0.1), FlowCell("dpo", 1): case(0.7, 0.07), FlowCell("rwr", 0): case(0, 0.1)}
    lines = truth_report.table({cell: {"cases": [one]} for cell, one in cases.items()}).splitlines()
    assert lines[2].startswith("| dpo | flow-euler | 1 | 0.5 | 2 | +0.600 ± 0.021 | +15 ± ")
    assert lines[3].startswith("| rwr | flow-euler | 1 | 0.5 | 1 | +0.000 ± 0.030 | no shift | no shift |")


def test_what_is_there_is_kept_and_the_rest_refused(folder: Path) -> None:
    file = folder / "cells" / "dpo-0.json"
    before = file.stat().st_mtime_ns
    truth.run(folder, miniature(), silent, only="dpo-0")
    assert file.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=naming("dpo-7", "dpo-0, rwr-0, dpo-1, rwr-1")):
        truth.run(folder, miniature(), silent, only="dpo-7")
    with pytest.raises(ValueError, match=naming("steps")):
        truth.run(folder, replace(miniature(), steps=4), silent)
    written = json.loads(file.read_text())
    (folder / "damaged").mkdir()
    (folder / "damaged" / "dpo-0.json").write_text(json.dumps({"cell": written["cell"]}))
    with pytest.raises(ValueError, match=naming("dpo-0.json", "anchor")):
        truth_report.load(folder / "damaged")
