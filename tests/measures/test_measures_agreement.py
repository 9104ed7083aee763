"""Agreement statistics: Table 5 by hand, bootstraps against SciPy called directly, figures against numpy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from deradiff.measures.agreement import (
    agreement_by_lam,
    agreement_of,
    error_distribution,
    paired_difference,
    scatter_of,
)
from messages import naming

ORIGINAL = [0.20, 0.22, 0.24, 0.26, 0.28]
APPROXIMATED = [0.21, 0.22, 0.23, 0.29, 0.27]
DIFFERENCES = np.array([0.01, 0.0, -0.01, 0.03, -0.01])


def scores(pairs: int = 15) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(0)
    original = 0.23 + 0.01 * random.standard_normal(pairs)
    approximated = original - 5e-4 + 1e-3 * random.standard_normal(pairs)
    return torch.from_numpy(approximated), torch.from_numpy(original)


# --- Table 5


def test_table_5_by_hand() -> None:
    found = agreement_of(APPROXIMATED, ORIGINAL)
    assert found.pairs == 5
    assert found.mae == pytest.approx(0.012)
    assert found.rmse == pytest.approx(math.sqrt(0.0012 / 5))
    assert found.median_absolute_error == pytest.approx(0.01)
    assert found.bias == pytest.approx(0.004)
    assert found.sd == pytest.approx(DIFFERENCES.std(ddof=1))
    assert found.limits == pytest.approx((0.004 - 1.96 * found.sd, 0.004 + 1.96 * found.sd))
    assert found.original_mean == pytest.approx(0.24)


def test_relative_values_are_percent_of_the_original_mean() -> None:
    found = agreement_of(APPROXIMATED, ORIGINAL, original_mean=0.25)
    relative = found.relative()
    assert relative["mae"] == pytest.approx(4.8) and relative["bias"] == pytest.approx(1.6)
    assert relative["limits"] == pytest.approx(tuple(400 * x for x in found.limits))
    assert set(relative) == set(vars(found)) - {"pairs", "original_mean"}
    assert math.isnan(float(agreement_of([0.0, 1.0], [-1.0, 1.0]).relative()["mae"]))  # type: ignore[arg-type]


def test_the_interval_is_scipys() -> None:
    approximated, original = scores()
    found = agreement_of(approximated, original, resamples=2000, seed=3)
    expected = stats.bootstrap(
        (np.abs((approximated - original).numpy()),),
        np.mean,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(3),
    )
    assert found.mae_interval == tuple(expected.confidence_interval)
    assert found.mae_bootstrap == expected.bootstrap_distribution.mean()
    assert found.mae_bootstrap != found.mae
    low, high = np.quantile(expected.bootstrap_distribution, [0.025, 0.975])
    assert found.mae_interval == pytest.approx((low, high), rel=1e-3)


def test_the_bootstrap_is_seeded() -> None:
    first, again, other = (agreement_of(*scores(), resamples=500, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.mae_interval != other.mae_interval and first.mae == other.mae


def test_equal_scores_agree_perfectly() -> None:
    found = agreement_of(ORIGINAL, ORIGINAL)
    assert (found.mae, found.mae_interval, found.bias, found.limits) == (0, (0, 0), 0, (0, 0))


def test_parts_by_lam_share_their_mean() -> None:
    approximated, original = scores(6)
    lams = [0.5, 1.0, 2.0, 0.25, 4.0, 1.5]
    found = agreement_by_lam(approximated, original, lams)
    assert found.interpolated is not None and found.extrapolated is not None
    mean = float(original.numpy().mean())
    for part, rows in ((found.interpolated, [0, 1, 3]), (found.extrapolated, [2, 4, 5])):
        assert part == agreement_of(approximated[rows], original[rows], original_mean=mean)
    inner = agreement_by_lam(approximated[:2], original[:2], lams[:2], original_mean=0.3)
    assert inner.extrapolated is None and inner.interpolated is not None and inner.interpolated.original_mean == 0.3


def test_what_agreement_refuses() -> None:
    with pytest.raises(ValueError, match=naming(5, "approximated", 4, "original")):
        agreement_of(APPROXIMATED, ORIGINAL[:4])
    with pytest.raises(ValueError, match=naming(1, 2)):
        agreement_of([0.1], [0.2])
    with pytest.raises(ValueError, match=naming(0, 2)):
        error_distribution([], [])
    with pytest.raises(ValueError, match=naming("1 of 2", "original", 1)):
        agreement_of([0.1, 0.2], [0.2, math.nan])
    with pytest.raises(ValueError, match=naming(5, 2, "λ")):
        agreement_by_lam(APPROXIMATED, ORIGINAL, [0.5, 2.0])
    with pytest.raises(ValueError, match="λ > 1"):
        agreement_by_lam(APPROXIMATED, ORIGINAL, [0.5, 0.5, 0.5, 0.5, 2.0])


# --- figures


def test_the_error_distribution_steps_at_every_error() -> None:
    approximated = [x + d for x, d in zip(ORIGINAL, [4e-4, -2e-4, 8e-4, 2e-4, 3e-3], strict=True)]
    found = error_distribution(approximated, ORIGINAL)
    assert found.shares[-1] == 1 and len(found.errors) == len(found.shares) and found.maximum == pytest.approx(3e-3)
    assert found.fractions == {5e-4: 0.6, 1e-3: 0.8}
    assert found.quantiles == pytest.approx({0.5: 4e-4, 0.75: 8e-4, 0.9: 8e-4 + 0.6 * 2.2e-3})
    assert found.mae == pytest.approx(np.mean([4e-4, 2e-4, 8e-4, 2e-4, 3e-3])) and found.pairs == 5
    assert (found.original_mean, found.original_sd) == pytest.approx((0.24, np.std(ORIGINAL)))


def test_the_deviation_of_retrained_models_is_the_papers() -> None:
    table_2 = [0.2273, 0.2314, 0.2313, 0.2311, 0.2312, 0.2308]  # PickScore; figure 4 says 0.230509 and 0.001434
    found = error_distribution(table_2 * 5, table_2 * 5, retrained=table_2)
    assert found.original_mean == pytest.approx(0.230509, abs=5e-5)
    assert found.original_sd == pytest.approx(0.001434, abs=5e-5) and found.original_sd == pytest.approx(
        1.451e-3, abs=1e-6
    )


def test_an_error_at_the_threshold_counts() -> None:
    assert error_distribution([0.5, 1.0, 2.0], [0.0, 0.0, 0.0], thresholds=[0.5]).fractions == {0.5: 1 / 3}


def test_the_scatter_of_equal_and_of_shifted_scores() -> None:
    same = scatter_of(ORIGINAL, ORIGINAL)
    assert (same.slope.value, same.intercept.value) == pytest.approx((1, 0))
    assert (same.concordance, same.identity_r2, same.identity_rmse) == pytest.approx((1, 1, 0))
    shifted = scatter_of([2 * x + 1 for x in ORIGINAL], ORIGINAL)
    assert (shifted.slope.value, shifted.intercept.value) == pytest.approx((0.5, -0.5))
    assert shifted.correlation == pytest.approx(1) and shifted.concordance < 0.01 and shifted.identity_r2 < 0
    assert shifted.fit_rmse == pytest.approx(0, abs=1e-12) and shifted.identity_rmse > 1


def test_the_scatter_is_the_usual_regression() -> None:
    x, y = (each.numpy() for each in scores())
    found = scatter_of(*scores())
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    assert (found.slope.value, found.intercept.value) == pytest.approx((slope, intercept))
    assert (found.slope.error, found.intercept.error) == pytest.approx(tuple(np.sqrt(np.diag(covariance))))
    assert found.fit_rmse == pytest.approx(np.sqrt(np.square(y - slope * x - intercept).mean()))
    assert found.identity_r2 == pytest.approx(1 - np.square(y - x).sum() / np.square(y - y.mean()).sum())
    lin = 2 * np.mean((x - x.mean()) * (y - y.mean())) / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    assert found.concordance == pytest.approx(lin)


def test_what_has_no_fit() -> None:
    with pytest.raises(ValueError, match=naming(2, "line")):
        scatter_of([0.1, 0.2], [0.1, 0.3])
    with pytest.raises(ValueError, match=naming(3, "approximated", 0.1)):
        scatter_of([0.1] * 3, [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=naming(3, "original", 0.1)):
        scatter_of([0.1, 0.2, 0.3], [0.1] * 3)


# --- two methods


def test_the_paired_difference_is_scipys_on_both_methods_together() -> None:
    first, second = torch.randn(30, 4), torch.randn(30, 3) - 0.2
    found = paired_difference(first, second, resamples=3000, seed=5)
    expected = stats.bootstrap(
        (first.double().mean(1).numpy(), second.double().mean(1).numpy()),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=3000,
        method="percentile",
        rng=np.random.default_rng(5),
    )
    assert found.interval == pytest.approx(tuple(expected.confidence_interval), rel=1e-9)
    assert found.estimate.error == pytest.approx(expected.standard_error, rel=1e-9)
    assert found.estimate.value == pytest.approx(float(first.mean() - second.mean()), rel=1e-5)
    assert found.prompts == 30


def test_what_makes_prompts_hard_for_both_cancels() -> None:
    ease, noise = 10 * torch.randn(50, 1), 0.1 * torch.randn(2, 50, 4)
    paired = paired_difference(ease + noise[0] + 0.5, ease + noise[1])
    assert paired.estimate.error < 0.02 and paired.interval[0] > 0.4
    apart = paired_difference(ease + noise[0] + 0.5, ease.flip(0) + noise[1])
    assert apart.estimate.error > 1 and apart.interval[0] < 0 < apart.interval[1]


def test_what_a_paired_difference_refuses() -> None:
    with pytest.raises(ValueError, match=naming(3, 2, "prompts")):
        paired_difference(torch.randn(3, 2), torch.randn(2, 2))
    with pytest.raises(ValueError, match="single"):
        paired_difference(torch.randn(1, 2), torch.randn(1, 2))
    with pytest.raises(ValueError, match=naming("1 of 3", "NaN")):
        paired_difference(torch.tensor([[1.0], [math.nan], [2]]), torch.randn(3, 1))
    with pytest.raises(ValueError, match=naming("second", (3, 0))):
        paired_difference(torch.randn(3, 2), torch.randn(3, 0))
