"""Estimates, verdicts and other λ from the log weights of a run, in worlds where the truth is a formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deradiff.algorithm.comparisons import ENOUGH, compare
from deradiff.algorithm.estimates import effective_sample_size, normalized
from deradiff.algorithm.other_lams import at_other_lam, slope
from deradiff.algorithm.path_weights import ImportanceWeights, joined
from deradiff.algorithm.verdict import verdict
from deradiff.worlds.gaussian_mixture import crossing, random_world
from messages import naming
from realigned_worlds import FAMILIES, realigned

# -- statistics -------------------------------------------------------------------------------------------------------


def test_effective_sample_size_from_equal_to_one_survivor_and_far_below_underflow():
    assert effective_sample_size(torch.full((7,), -3000.0)) == pytest.approx(7)
    assert effective_sample_size(torch.tensor([0.0, -2000.0, -3000.0])) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([-5e4, -5e4 + math.log(3)], dtype=torch.float64)) == pytest.approx(
        16 / 10
    )
    assert normalized(torch.tensor([-1e5, -1e5 - math.log(3)], dtype=torch.float64)).tolist() == pytest.approx(
        [0.75, 0.25]
    )
    assert normalized(torch.tensor([0.0, -math.inf])).tolist() == [1.0, 0.0]
    for bad in (torch.tensor([0.0, math.nan]), torch.tensor([-math.inf, -math.inf])):
        with pytest.raises(ValueError, match="NaN"):
            normalized(bad)


def test_prompts_are_weighted_among_themselves():
    scores = torch.tensor([1.0, 2.0, 10.0, 20.0])
    logs = torch.tensor([0.0, 0.0, 500.0, 500.0 + math.log(3)])
    groups = torch.tensor([4, 4, 7, 7])
    comparison = compare(scores, logs, groups)
    assert comparison.weighted.value == pytest.approx((1.5 + 17.5) / 2)
    assert comparison.plain.value == pytest.approx(8.25)
    assert comparison.effective == pytest.approx(2 + 16 / 10, rel=1e-5)
    assert comparison.prompts == 2 and comparison.evenness == pytest.approx(3.6 / 4, rel=1e-5)
    assert compare(scores, logs).weighted.value > 17  # all in one group: the first prompt has vanished


def test_standard_errors_are_the_spread_of_repeated_runs():
    chance = torch.Generator().manual_seed(0)
    runs = []
    for _ in range(400):
        x = torch.randn(200, generator=chance, dtype=torch.float64)
        runs.append(compare(x, 0.5 * x))
    for part in ("plain", "weighted", "bias"):
        estimates = torch.tensor([getattr(run, part).value for run in runs])
        claimed = sum(getattr(run, part).error for run in runs) / len(runs)
        assert claimed == pytest.approx(float(estimates.std()), rel=0.12), part
    # x and log W are jointly Gaussian, so first order is exact: E_w[x] = Cov(x, x/2) = 1/2.
    assert sum(run.covariance for run in runs) / len(runs) == pytest.approx(0.5, abs=0.02)
    assert sum(run.weighted.value for run in runs) / len(runs) == pytest.approx(0.5, abs=0.02)


def test_second_order_is_nearer_where_the_score_is_skewed():
    """THEORY's world: exact 1.243, plain 0.86, first order 1.36, second 1.28."""
    world, reward = crossing(), crossing().rewards["slope"]
    x, dial = realigned(world, FAMILIES["DDIM η = 1"], {"a": {"slope": 2.0}}, 0.25, samples=20_000)
    exact = world.aligned({"slope": 0.5}).expected(reward)
    comparison = compare(reward(x), dial.importance_weights.log_weights)
    plain, first, second = (abs(v - exact) for v in (comparison.plain.value, comparison.covariance, comparison.skewed))
    assert second < first < plain


@pytest.mark.parametrize("scores", [torch.ones(3), torch.tensor([1.0, math.nan, 0.0, 0.0])])
def test_scores_have_to_fit(scores):
    with pytest.raises(ValueError, match=naming(4, len(scores), int((~scores.isfinite()).sum()))):
        compare(scores, torch.zeros(4))


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_verdicts_tell_trust_from_error_where_even_weights_prove_nothing():
    world, reward = crossing(), crossing().rewards["slope"]
    family = FAMILIES["DDIM η = 1"]
    x, dial = realigned(world, family, {"a": {"slope": 2.0}}, 0.25)
    off = dial.verdict(reward(x), baseline=0.0)
    assert off.comparison.evenness > 0.8 and off.kind == "off" and "use the weighted mean" in off.words
    exact = world.aligned({"slope": 0.5}).expected(reward)
    assert off.error is not None
    assert off.error.value == pytest.approx((exact - float(reward(x).mean())) / exact, abs=4 * off.error.error)
    # A single Gaussian has nothing to choose between: Algorithm 1 is exact there, and the verdict knows.
    gaussian = random_world(1, 1, 4)
    x, dial = realigned(gaussian, family, {"a": {"reward 1": 1.0}}, 0.5)
    assert (
        dial.verdict(
            gaussian.rewards["reward 1"](x), baseline=gaussian.reference.expected(gaussian.rewards["reward 1"])
        ).kind
        == "trust"
    )
    assert dial.verdict().kind == "trust" and dial.verdict().score == "implicit reward"


def run_of(log_weights: Tensor, lam: float = 0.5, **changes: Any) -> ImportanceWeights:
    """A run of a deterministic sampler with these weights."""
    n = len(log_weights)
    known: dict[str, Any] = {
        "log_weights": log_weights.double(),
        "log_ratios": {},
        "path_kl": None,
        "memoryless": False,
        "lams": torch.full((1, n), lam),
        "obstacles": frozenset(),
        "predictions": 10,
    }
    return ImportanceWeights(**(known | changes))


def test_every_kind_of_verdict():
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=chance)
    assert verdict(run_of(torch.zeros(1000), lam=1.0), x).kind == "exact"
    assert verdict(run_of(3 * torch.randn(1000, generator=chance)), x).kind == "uneven"
    assert verdict(run_of(torch.zeros(1000)), x, torch.arange(1000)).kind == "few"
    assert verdict(run_of(1e-3 * x)).kind == "trust"
    assert verdict(run_of(0.1 * x)).kind == "depends"
    assert verdict(run_of(0.1 * x), x).kind == "depends"
    assert verdict(run_of(0.1 * x), x, baseline=-1.0).kind == "off"
    assert verdict(run_of(0.1 * torch.randn(1000, generator=chance)), x, baseline=-1.0).kind in ("unclear", "trust")
    assert verdict(run_of(0.1 * torch.randn(30, generator=chance)), x[:30], baseline=-1.0).kind == "unclear"
    hopeless = verdict(run_of(8 * x + torch.randn(1000, generator=chance)), x)
    assert "as a direction" in hopeless.words and "raise" in hopeless.words and "k̂" in hopeless.words
    assert hopeless.comparison.tail > hopeless.comparison.tail_limit and hopeless.record()["smoothed"]
    assert "lower" in verdict(run_of(-8 * x), x).words
    words = verdict(run_of(torch.tensor([0.0] + [-5000.0] * 99)), x[:100]).words
    assert "too uneven (1 of 100" in words and "particles" in words
    assert ENOUGH > 1


def test_a_batch_of_several_lam_is_judged_row_by_row_and_runs_join():
    world = crossing()
    lams = [0.25] * 200 + [0.75] * 200
    _, dial = realigned(world, FAMILIES["DDPM"], {"a": {"slope": 1.0}}, lams, samples=400, steps=20)
    with pytest.raises(ValueError, match=r"run\.rows"):
        dial.verdict()
    run = dial.importance_weights
    first, second = run.rows(slice(0, 200)), run.rows(torch.arange(200, 400))
    assert first.lams.unique().tolist() == [0.25] and len(second.log_ratios["a"]) == 200
    assert verdict(first).comparison.images == 200
    again = joined([first, second])
    assert torch.equal(again.log_weights, run.log_weights)
    assert run.path_kl is not None and again.path_kl is not None and torch.equal(again.path_kl, run.path_kl)


# -- other λ ----------------------------------------------------------------------------------------------------------


def test_other_lam_from_one_run():
    world, reward = crossing(), crossing().rewards["slope"]
    x, dial = realigned(world, FAMILIES["DDPM"], {"a": {"slope": 1.0}}, 0.5, samples=20_000, steps=200)
    run = dial.importance_weights
    for lam in (0.4, 0.5, 0.65):
        elsewhere = at_other_lam(run, reward(x), lam)
        exact = world.aligned({"slope": lam}).expected(reward)
        assert abs(elsewhere.mean.value - exact) < 4 * elsewhere.mean.error + 0.02 * exact
    assert elsewhere.effective < 20_000
    with pytest.raises(ValueError, match=naming("λ = 4.0", 20_000)):
        at_other_lam(run, reward(x), 4.0)
    derivative = slope(run, reward(x))["a"]
    exact = (world.aligned({"slope": 0.51}).expected(reward) - world.aligned({"slope": 0.49}).expected(reward)) / 0.02
    assert abs(derivative.value - exact) < 4 * derivative.error + 0.05 * exact


def test_other_lam_of_two_anchors_and_refusals():
    world = crossing()
    lams = {"s": 0.4, "l": 0.4}
    x, dial = realigned(world, FAMILIES["DDPM"], {"s": {"slope": 1.0}, "l": {"lift": 1.0}}, lams, samples=20_000)
    lift = world.rewards["lift"]
    elsewhere = at_other_lam(dial.importance_weights, lift(x), {"s": 0.4, "l": 0.55})
    exact = world.aligned({"slope": 0.4, "lift": 0.55}).expected(lift)
    assert abs(elsewhere.mean.value - exact) < 4 * elsewhere.mean.error + 0.03 * exact
    with pytest.raises(ValueError, match=naming(["s", "l"], 0.5)):
        at_other_lam(dial.importance_weights, lift(x), 0.5)
    with pytest.raises(ValueError, match=naming(["s", "l"], {"s": 0.4, "x": 0.5})):
        at_other_lam(dial.importance_weights, lift(x), {"s": 0.4, "x": 0.5})
    x, dial = realigned(world, FAMILIES["DDIM η = 0"], {"s": {"slope": 1.0}}, 0.5, samples=50, steps=5)
    for asked in (
        lambda: at_other_lam(dial.importance_weights, lift(x), 0.6),
        lambda: slope(dial.importance_weights, lift(x)),
    ):
        with pytest.raises(ValueError, match="memoryless"):
            asked()


def test_the_error_of_a_derivative_is_the_spread_of_repeated_runs_over_prompts_of_different_size():
    groups = torch.tensor([0] * 60 + [1] * 20)
    generator = torch.Generator().manual_seed(3)
    values, errors = [], []
    for _ in range(400):
        ratio, noise = torch.randn(2, 80, generator=generator, dtype=torch.float64)
        run = run_of(torch.zeros(80), log_ratios={"anchor": ratio}, memoryless=True)
        made = slope(run, ratio + noise, groups)["anchor"]
        values.append(made.value)
        errors.append(made.error)
    spread = torch.tensor(values).std().item()  # known to 4% from 400 runs
    assert sum(values) / 400 == pytest.approx(1, abs=4 * spread / 20)
    assert sum(errors) / 400 == pytest.approx(spread, rel=0.15)
