"""Pareto smoothing against SciPy's generalised Pareto distribution and what ArviZ makes of the same weights."""

import math

import pytest
import torch
from scipy.stats import genpareto

from deradiff.algorithm.comparisons import compare
from deradiff.algorithm.estimates import normalized
from deradiff.algorithm.pareto import fit, quantiles, smoothed


@pytest.mark.parametrize("shape", [-0.4, 0.0, 0.3, 0.7, 1.1])
def test_shape_and_scale_of_draws_are_found_and_quantiles_are_scipys(shape):
    fits = [fit(torch.tensor(genpareto.rvs(shape, scale=2.0, size=500, random_state=s)).sort()[0]) for s in range(20)]
    shapes, scales = torch.tensor(fits, dtype=torch.float64).T
    assert float(shapes.mean()) == pytest.approx(shape, abs=0.06)
    assert float(scales.mean()) == pytest.approx(2.0, abs=0.1)
    shares = torch.tensor([0.05, 0.5, 0.99], dtype=torch.float64)
    assert quantiles(shares, shape, 2.0).tolist() == pytest.approx(genpareto.ppf(shares, shape, scale=2.0).tolist())


@pytest.mark.parametrize(
    ("count", "shape", "largest", "squares"),
    [
        (64, 0.7185678213166841, 0.24379262998909618, 0.0958163285461136),
        (200, 0.09521976889447543, 0.05061577261078339, 0.017428787614254475),
        (2000, 0.4426721926189261, 0.03835412403817688, 0.005111842036478067),
    ],
)
def test_weights_are_those_of_arviz(count, shape, largest, squares):
    """What arviz-stats 0.8.0 gives: `array_stats.psislw(-log_weights)`."""
    logs = 1.5 * torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    steady = smoothed(logs)
    weights = steady.log_weights.exp() / count
    assert float(weights.sum()) == pytest.approx(1)
    told = (steady.shape, float(weights.max()), float(weights.square().sum()))
    assert told == pytest.approx((shape, largest, squares), rel=1e-9)


def test_groups_are_made_comparable_before_they_share_a_tail():
    logs = torch.randn(4, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    groups, far_apart = torch.arange(4).repeat_interleave(40), torch.tensor([[0.0], [-500.0], [700.0], [3.0]])
    alike, apart = smoothed(logs.flatten(), groups), smoothed((logs + far_apart).flatten(), groups)
    assert alike.shape == pytest.approx(apart.shape) and torch.allclose(alike.log_weights, apart.log_weights)
    assert torch.allclose(alike.log_weights.view(4, 40).exp().mean(1), torch.ones(4, dtype=torch.float64))
    assert math.isfinite(alike.shape) and alike.limit == pytest.approx(1 - 1 / math.log10(160))


@pytest.mark.parametrize("logs", [torch.randn(24), torch.zeros(100), torch.zeros(1)])
def test_few_and_equal_weights_have_no_tail_and_stay(logs):
    steady = smoothed(logs)
    assert math.isnan(steady.shape)
    assert torch.allclose(normalized(steady.log_weights), normalized(logs))


def test_smoothing_lessens_the_error_of_a_mean_of_heavy_weights():
    """log W ~ N(0, 1.5²), a score of correlation 0.7 with it: the exact weighted mean is 1.05."""
    chance = torch.Generator().manual_seed(0)
    off = []
    for _ in range(300):
        z, noise = torch.randn(2, 256, generator=chance, dtype=torch.float64)
        found = compare(0.7 * z + 0.51**0.5 * noise, 1.5 * z)
        off.append([found.weighted.value - 1.05, found.smoothed.value - 1.05])
    raw, smooth = torch.tensor(off).square().mean(0).sqrt().tolist()
    assert smooth < 0.95 * raw
