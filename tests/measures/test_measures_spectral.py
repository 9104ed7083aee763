"""Spectral covariance distances: equations 13 and 14, what they ignore, and what few images do to them."""

import math

import pytest
import torch

from deradiff.measures.spectral import reference_mismatch, spectral_distance, spectrum
from deradiff.measures.statistics import Statistics
from messages import naming


def correlated(images: int, features: int) -> torch.Tensor:
    return torch.randn(images, features, dtype=torch.float64) @ torch.randn(features, features, dtype=torch.float64)


@pytest.mark.parametrize("images", [100, 10])
def test_the_spectrum_is_that_of_the_covariance(images: int) -> None:
    features = correlated(images, 12)
    expected = torch.linalg.eigvalsh(torch.cov(features.T)).flip(0)
    torch.testing.assert_close(spectrum(features), expected, rtol=1e-9, atol=1e-11)
    assert int((spectrum(features) > 0).sum()) == min(images - 1, 12)


def test_equations_13_and_14() -> None:
    first, second = correlated(80, 6), correlated(80, 6)
    a, b = (torch.linalg.eigvalsh(torch.cov(x.T)) for x in (first, second))
    found = spectral_distance(first, second)
    assert found.scd == pytest.approx(float((a - b).square().sum()), rel=1e-10)
    assert found.lscd == pytest.approx(float((a.log() - b.log()).square().sum()), rel=1e-10)
    assert (found.compared, found.caveat) == (6, None)
    assert spectral_distance(Statistics.of(first), Statistics.of(second)) == found


def test_shift_and_rotation_change_nothing_and_scale_does() -> None:
    features = correlated(50, 6)
    moved = features @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q + 3
    same = spectral_distance(features, moved)
    assert same.scd < 1e-18 * float(spectrum(features)[0]) ** 2 and same.lscd < 1e-18
    twice = spectral_distance(features, 2 * moved)
    assert twice.lscd == pytest.approx(6 * math.log(4) ** 2, rel=1e-10)
    assert twice.scd == pytest.approx(float((3 * spectrum(features)).square().sum()), rel=1e-10)


def test_eigenvalues_that_are_zero_for_lack_of_images_do_not_enter_lscd() -> None:
    features = correlated(10, 30)
    found = spectral_distance(features, 3 * features[:8])
    a, b = spectrum(features)[:7], spectrum(3 * features[:8])[:7]
    assert found.compared == 7 and found.lscd == pytest.approx(float((a.log() - b.log()).square().sum()), rel=1e-12)
    assert found.scd == pytest.approx(
        float((spectrum(features) - spectrum(3 * features[:8])).square().sum()), rel=1e-12
    )
    assert found.caveat is not None
    assert "10 and 8 images for 30 features: LSCD compares 7 eigenvalues, the other 23" in found.caveat
    assert "10 images against 8" in found.caveat


def test_collapse_is_infinitely_far_and_what_neither_varies_in_counts_nothing() -> None:
    features = correlated(20, 4)
    collapsed = spectral_distance(features, features[:1].repeat(20, 1))
    assert collapsed.lscd == math.inf and collapsed.scd == pytest.approx(float(spectrum(features).square().sum()))
    assert collapsed.caveat is not None and "does not vary at all" in collapsed.caveat
    still = torch.cat([features, torch.full((20, 3), 0.1)], 1)
    assert spectral_distance(still, 2 * still).lscd == pytest.approx(4 * math.log(4) ** 2, rel=1e-10)


def test_what_is_zero_but_for_rounding_is_zero() -> None:
    flat = torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 6, dtype=torch.float64)
    assert int((spectrum(flat) > 0).sum()) == 3
    assert spectral_distance(flat, correlated(30, 6)).lscd == math.inf
    assert spectral_distance(flat, 2 * flat).lscd == pytest.approx(3 * math.log(4) ** 2, rel=1e-10)


def test_sets_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=naming(3, 4, "features")):
        spectral_distance(correlated(9, 3), correlated(9, 4))
    with pytest.raises(ValueError, match=naming("reference", 1)):
        spectral_distance(correlated(1, 3), correlated(9, 3))


# --- figure 5


def test_the_illustration_has_fid_and_scd_disagree() -> None:
    clouds = reference_mismatch(samples=100)
    base, collapsed, moved = (clouds[name] for name in ("base", "collapsed", "moved"))
    assert collapsed.frechet.value < moved.frechet.value / 2
    assert moved.spectral.scd < 1e-20 and moved.spectral.lscd < 1e-20 < 1 < collapsed.spectral.scd
    torch.testing.assert_close(moved.spectrum, base.spectrum)
    torch.testing.assert_close(base.spectrum, torch.tensor([4.0, 0.49], dtype=torch.float64))
    assert base.frechet.value < 1e-12 and base.points.shape == (100, 2)
    torch.testing.assert_close(moved.mean, torch.tensor([2.5, 1.5], dtype=torch.float64))
    assert moved.covariance[0, 1].abs() > 1  # rotated


def test_the_illustration_is_seeded() -> None:
    first, again, other = (reference_mismatch(seed=seed)["base"].points for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match=naming(2, "samples")):
        reference_mismatch(samples=2)
