"""λ by a line search of the loss: the polynomial is the loss itself, the minimum is found, and noise falls back."""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from scipy.optimize import minimize_scalar

from deradiff.alignment.base import Base
from deradiff.alignment.dpo import Noised, errors
from deradiff.alignment.objectives import diffusion_dpo
from deradiff.worlds.digits import anchor_path, load_pipeline
from studies.digits.calibration import SCALES, TimedTerms, calibrate, minimum, timed_terms
from studies.digits.calibration_study import case, matched, matched_table


def test_the_polynomial_is_the_loss_of_mixed_predictions() -> None:
    pipe, generator = load_pipeline(), torch.Generator().manual_seed(1)
    base, anchor = Base(pipe), UNet2DConditionModel.from_pretrained(anchor_path(100.0))
    latents, told = torch.randn(3, 2, 4, 8, 8, generator=generator), torch.randn(3, 16, 64, generator=generator)
    found = timed_terms(base, pipe.unet, {"a": anchor}, latents, told, draws=2, seed=5, per_pass=6)["a"]
    assert found.timesteps.T.sort(1).values.div(500).long().tolist() == [[0, 1]] * 3  # stratified

    class Mixed(torch.nn.Module):
        def forward(self, *args: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            before, after = (model(*args, **named) for model in (pipe.unet, anchor))
            before.sample = torch.lerp(before.sample, after.sample, SCALES[100].item())
            return before

    # The same noise again: what `timed_terms` draws after the timesteps.
    again = torch.Generator().manual_seed(5)
    torch.rand(3, 2, generator=again)
    noise = torch.randn(6, 4, 8, 8, generator=again).repeat(2, 1, 1, 1)
    pair, t = torch.arange(3).repeat_interleave(2), found.timesteps.T.flatten().repeat(2)
    noisy = base.noising.noised(latents[pair].transpose(0, 1).flatten(0, 1), noise, t)
    noised = Noised(noisy, t, {"prompt_embeds": told[pair].repeat(2, 1, 1)}, noise)
    with torch.no_grad():
        loss = diffusion_dpo(*errors(base, Mixed(), noised), *errors(base, pipe.unet, noised), beta=300.0)
    assert found.curves(300.0).mean(0)[100].item() == pytest.approx(loss.item(), rel=1e-3)


def drawn(pairs: int, effect: float, bend: float, seed: int = 2) -> TimedTerms:
    """Terms whose linear ones have that mean and a standard deviation of 1e-3, square ones one of `bend`."""
    generator = torch.Generator().manual_seed(seed)
    linear, square = torch.randn(2, pairs, 4, generator=generator, dtype=torch.float64)
    return TimedTerms((effect - 1e-3 * linear).T / 2, bend * square.T, torch.zeros(4, pairs, dtype=torch.long))


def test_the_minimum_lies_between_the_scales() -> None:
    of = drawn(500, 1e-4, 5e-4)
    for beta in (300.0, 1000.0, 4000.0):
        exact = minimize_scalar(
            lambda s, beta=beta: of.loss(s, beta),
            bounds=(0, 4),
            method="bounded",
            options={"xatol": 1e-8},
        ).x
        assert minimum(of.curves(beta).mean(0)).item() == pytest.approx(exact, rel=2e-3)


def test_without_a_square_term_the_quotient_is_that_of_the_strengths() -> None:
    """However few pairs there are, and however far the anchor is from the minimum at its own strength."""
    found = calibrate(drawn(40, 2e-4, 0.0), 1000.0, 3000.0)
    assert found.ratio == pytest.approx(1 / 3, rel=1e-3) and found.error < 0.01
    assert found.search != pytest.approx(1 / 3, rel=0.05)
    assert found.lam == pytest.approx(1 / 3, rel=1e-2)


def test_a_square_term_that_bites_is_told_and_where_pairs_do_not_tell_the_quotient_of_strengths_stands() -> None:
    many = calibrate(drawn(2000, 1e-4, 1e-3), 500.0, 2000.0)
    assert many.clear and many.ratio > 0.25 * 1.1 and many.lam == many.ratio
    few = calibrate(drawn(6, 1e-4, 1e-3, seed=9), 500.0, 2000.0)
    assert not few.clear and few.lam == few.plain == 0.25
    beyond = calibrate(drawn(2000, 1e-4, 1e-3), 2000.0, 500.0)
    assert beyond.clear and beyond.lam == beyond.plain == 4.0


def test_errors_are_read_off_the_curve_of_realigned_rewards() -> None:
    curve = {0.0: 1.0, 0.5: 1.4, 1.0: 2.0}
    told = case(drawn(2000, 1e-4, 1e-3), 500.0, 1000.0, curve, [1.5, 0.01])
    assert told["shift"] == 0.5 and told["error at β/λ"] == pytest.approx((1.4 - 1.5) / 0.5)
    assert 0.5 < told["lam"] < 1 and told["error calibrated"] > told["error at β/λ"]
    assert math.isfinite(told["log error"])


def test_weighted_anchors_are_matched_by_the_share_of_the_shift_that_their_weights_demand() -> None:
    """From the committed numbers: nothing is drawn."""
    found = {(c["reward"], c["lam"], c["guidance"]): c for c in matched()}
    quarter = found["ink", 0.25, 1.0]
    assert quarter["share"] == pytest.approx(0.327, abs=0.001)  # more than ¼: the reward's exponential is no line
    assert quarter["error at β/λ"][0] == pytest.approx(-0.051 / 0.244, abs=0.005)
    assert abs(quarter["error matched"][0]) < 0.5 * abs(quarter["error at β/λ"][0])
    assert "| ink | 0.25 | 1 | 33% |" in matched_table()
