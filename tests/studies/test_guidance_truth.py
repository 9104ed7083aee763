"""The comparison under guidance: one case by hand, its tables, and a command that goes on where it was."""

import json
from dataclasses import asdict
from functools import partial

import pytest
import torch

from deradiff.algorithm.verdict import MOST_LEFT_OUT
from studies.closed_forms import guidance
from studies.closed_forms.guidance import run, summary
from studies.closed_forms.guided_cases import SAMPLERS, GuidedCase, GuidedRecord, GuidedWorld, compute


def test_predictions_without_a_prompt_are_those_of_the_model_that_a_case_names():
    case = GuidedCase(1, 2, 2, 3.0, True, "negative", "DDPM", 2.0, 1.0, 0.5, 10, 100)
    for empty, shift in (("negative", 1), ("tilt", None)):
        world = GuidedWorld(GuidedCase(**asdict(case) | {"empty": empty}))
        denoiser = world.model(1.0, "epsilon")
        x, none = torch.randn(5, 2, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)
        expected = super(type(denoiser), denoiser).forward(
            x, 500, none if shift is None else world.shifts[shift] + none
        )
        torch.testing.assert_close(denoiser(x, 500, none).sample, expected.sample)


def test_a_case_draws_reference_target_and_realigned_reference_under_one_guidance():
    case = GuidedCase(3, 2, 2, 1.5, True, "tilt", "DDPM", 1.25, 0.5, 0.25, 40, 1500)
    record = GuidedRecord.model_validate(compute(case))
    assert record.scale == pytest.approx(1.25, abs=1e-4)
    value, error = record.error["combined"]
    assert abs(value) < 0.03 + 4 * error < abs(record.error["plain"][0])


def test_cases_are_drawn_the_same_each_time_and_cover_everything():
    cases = [GuidedCase.drawn(number, 50, 100) for number in range(200)]
    assert cases == [GuidedCase.drawn(number, 50, 100) for number in range(200)]
    assert {case.sampler for case in cases} == {*SAMPLERS} and {case.dim for case in cases} == {2, 4, 8, 16}


def test_an_interrupted_run_goes_on_and_its_tables_count_every_case_once(tmp_path, monkeypatch):
    calls = []

    def drawn(case: GuidedCase) -> dict:
        calls.append(case.number)
        arms = {arm: [0.01, 0.001] for arm in guidance.ARMS}
        far = case.number == 3
        return {
            "case": asdict(case),
            "scale": case.scale,
            "baseline": 0.0,
            "target": 1.0,
            "shift": 0.1 if case.number == 2 else 1.0,
            "mean": {arm: [1.0, 0.001] for arm in guidance.ARMS},
            "bias": arms,
            "error": arms,
            "evenness": dict.fromkeys(guidance.ARMS, 0.9),
            "left_out": 2 * MOST_LEFT_OUT if far else 0.01,
            "deviation": 1.0,
        }

    monkeypatch.setattr(guidance, "compute", drawn)
    monkeypatch.setattr(guidance, "CHOSEN_ON", 1)
    monkeypatch.setattr(guidance, "_computed", lambda out, cases, workers: map(partial(guidance._store, out), cases))
    run(2, 10, 100, tmp_path / "out", 1)
    records = run(6, 10, 100, tmp_path / "out", 1)
    assert calls == [0, 1, 2, 3, 4, 5]
    told = json.loads(json.dumps(summary(records)))
    assert told["drawn"] == 6 and len(told["all"]) == 5  # the one without a shift is left out
    assert sum(row["cases"] for row in told["guidance"].values()) == 5
    assert told["bound"]["above 20%"]["cases"] == 1
    assert told["verdict"]["judged on"]["claims"] == 3 and told["verdict"]["chosen on"]["cases"] == 1
