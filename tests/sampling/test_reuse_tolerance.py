"""A tolerance of reuse is kept, or said not to be, and errors are estimated as they are."""

import math
import warnings
from typing import Any

import pytest
import torch

import deradiff
from deradiff.sampling import reuse as reusing
from deradiff.sampling.reuse import PredictionEstimator, Reuse
from deradiff.worlds import digits
from messages import naming
from tiny import assert_close, make, sample

STEPS = {"num_inference_steps": 6}


def test_a_tolerance_chooses_steps_and_keeps_them_on_the_digits() -> None:
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def drawn(lam: float, reuse: Reuse | None) -> torch.Tensor:
        dial.lam, dial.reuse = lam, reuse
        generator = torch.Generator().manual_seed(5)
        call: dict[str, Any] = {"num_images_per_prompt": 8, "num_inference_steps": 25, "guidance_scale": 1.0}
        return pipe("a green four", generator=generator, output_type="latent", **call).images

    with deradiff.realign(pipe, digits.anchor_path(250)) as dial:
        exact, base = drawn(0.5, None), drawn(0.0, None)
        effects = (exact - base).flatten(1).norm(dim=1)
        costs = []
        for tolerance in (0.02, 0.05, 0.15):
            errors = (drawn(0.5, Reuse(tolerance=tolerance)) - exact).flatten(1).norm(dim=1)
            assert dial.reused is not None
            assert float(errors.median() / effects.median()) < 1.5 * tolerance
            # What the run says of itself is what it did, within a factor.
            assert 0.3 < dial.reused.error / float(errors.median() / effects.median()) < 3
            costs.append(dial.reused.evaluations / 25)
        assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
        assert costs[1] <= 1.45 and costs[2] <= 1.3


def test_a_tolerance_that_was_not_kept_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reusing, "TURNOVER", 1e-3)  # a run that begins by expecting hardly any change
    pipe, anchor, call = make("sd")
    with deradiff.realign(pipe, anchor, 0.5, tolerance=0.001) as dial:
        with pytest.warns(UserWarning, match=naming("tolerance", 0.001, "ABOVE")) as told:
            sample(pipe, call, num_inference_steps=20)
        assert len(told) == 1
        assert dial.reused is not None and not dial.reused.kept and dial.reused.record()["kept"] is False
        dial.reuse = 3
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            sample(pipe, call, **STEPS)
        assert dial.reused.kept, "none was asked for"


def digits_run(lam: Any, reuse: Reuse | None, **changes: Any) -> tuple[torch.Tensor, Any]:
    """Latents of eight digits, and the dial's word."""
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_images_per_prompt": 8, "num_inference_steps": 25, "guidance_scale": 1.0, **changes}
    with deradiff.realign(pipe, digits.anchor_path(250), lam, reuse=reuse) as dial:
        latents = pipe("a green four", generator=torch.Generator().manual_seed(5), output_type="latent", **call).images
        return latents, dial.reused


def test_every_weight_of_a_sweep_keeps_the_tolerance_and_zero_is_the_reference() -> None:
    lams = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    exact, base = digits_run(lams, None)[0], digits_run(0.0, None)[0]
    near, told = digits_run(lams, Reuse(tolerance=0.05))
    assert told.carrier == "reference" and told.errors[0] == 0
    assert_close(near[0], base[0])
    away = (near - exact).flatten(1).norm(dim=1)[1:] / (exact - base).flatten(1).norm(dim=1)[1:]
    assert float(away.max()) < 0.15 and float(away.median()) < 0.05


def test_the_error_of_an_annealed_weight_is_that_of_the_steps_where_it_acts() -> None:
    annealed = deradiff.schedules.Power(6)
    exact, base = digits_run(annealed, None)[0], digits_run(0.0, None)[0]
    near, told = digits_run(annealed, Reuse(tolerance=0.05))
    away = (near - exact).flatten(1).norm(dim=1).median() / (exact - base).flatten(1).norm(dim=1).median()
    assert 0.5 < told.error / float(away) < 2
    assert told.evaluations < 1.4 * told.predictions


@pytest.mark.parametrize("rate", [0.1, 0.15, 0.2, 0.3])
def test_a_difference_that_changes_ever_faster_is_expected_to_go_on_so(rate: float) -> None:
    estimator = PredictionEstimator(Reuse(tolerance=0.3), "reference", ("reference", "anchor"), [1.0] * 40, [1.0] * 40)
    for i in range(40):
        both = torch.tensor([0.0, math.exp(rate * i)]).view(2, 1, 1, 1, 1)
        evaluated = (0,) if estimator.wants(i, "alike") == "carrier" else (0, 1)
        estimator.complete(i, both[: len(evaluated)], (0, 1), evaluated, torch.tensor([[0.5], [0.5]]))
    result = estimator.result()
    assert result.error < 0.45 * 0.3 and result.evaluations < 1.4 * 40
