"""Fréchet distance: against a matrix square root in float64, against torchmetrics, and in closed form."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from deradiff.measures.frechet import frechet_distance
from deradiff.measures.statistics import Statistics
from measures_inputs import FEATURE_SETS, feature_sets
from messages import naming

GOLDENS = json.loads((Path(__file__).parents[1] / "data" / "measures_goldens.json").read_text())["frechet"]


def by_matrix_root(first: np.ndarray, second: np.ndarray) -> float:
    """As it is written, on covariances in float64."""
    covariances = [np.cov(x, rowvar=False) for x in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    means = np.square(first.mean(0) - second.mean(0)).sum()
    return float(means + np.trace(covariances[0] + covariances[1] - 2 * root).real)


@pytest.mark.parametrize("name", FEATURE_SETS)
def test_it_is_the_matrix_roots_and_torchmetrics(name: str) -> None:
    reference, generated = feature_sets(name)
    found = frechet_distance(reference, generated)
    assert found.value == pytest.approx(by_matrix_root(reference.numpy(), generated.numpy()), rel=1e-6)
    assert found.value == pytest.approx(GOLDENS[name], rel=1e-6)
    assert found.value == pytest.approx(found.means + found.covariances, rel=1e-15)
    assert frechet_distance(generated, reference).value == pytest.approx(found.value, rel=1e-12)


@pytest.mark.parametrize(("first", "second"), [(30, 20), (30, 200), (200, 20), (64, 65), (3, 2)])
@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
def test_fewer_images_than_features(first: int, second: int) -> None:
    mix = torch.randn(64, 64, dtype=torch.float64)
    x = torch.randn(first, 64, dtype=torch.float64) @ mix
    y = 0.8 * torch.randn(second, 64, dtype=torch.float64) @ mix + 0.3
    found = frechet_distance(x, y)
    assert found.value == pytest.approx(by_matrix_root(x.numpy(), y.numpy()), rel=1e-6)


@pytest.mark.parametrize("samples", [300, 20])
def test_singular_covariances_lose_no_digits(samples: int) -> None:
    """Five of 64 dimensions vary, by a rotation that is known: the distance is that of the five, in closed form."""
    axes = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q[:, :5]
    noise = torch.randn(samples, 5, dtype=torch.float64)
    white = torch.linalg.qr(noise - noise.mean(0)).Q * (samples - 1) ** 0.5
    scales, others = torch.tensor([3.0, 2, 1, 0.5, 0.1]).double(), torch.tensor([1.0, 2, 3, 0.1, 0.2]).double()
    expected = float((scales - others).square().sum()) + 4.0
    x, y = white * scales @ axes.T, white.flip(0) * others @ axes.T + 2 * axes[:, 0]
    for given in ((x, y), (Statistics.of(x), Statistics.of(y))):
        assert frechet_distance(*given).value == pytest.approx(expected, rel=1e-12)
    stored = [Statistics.of_covariance(each.mean(0), torch.cov(each.T), samples) for each in (x, y)]
    assert frechet_distance(*stored).value == pytest.approx(expected, rel=1e-9)


def test_a_set_is_at_no_distance_from_itself_and_a_shift_is_its_square() -> None:
    features = torch.randn(50, 80)
    assert 0 <= frechet_distance(features, features).value < 1e-11
    moved = frechet_distance(features.double(), features.double() + 0.5)
    assert moved.value == pytest.approx(80 * 0.25, rel=1e-12)


def test_few_images_are_told_with_their_numbers() -> None:
    enough = frechet_distance(torch.randn(65, 64), torch.randn(80, 64))
    assert enough.caveat is None
    few = frechet_distance(torch.randn(64, 64), torch.randn(80, 64))
    assert few.caveat is not None
    assert few.caveat.startswith("64 and 80 images for 64 features: the covariances have rank 63 and 64 at most")
    assert f"{few.value:.4g} is biased upwards" in few.caveat and f"worth {few.noise:.3g}" in few.caveat


def test_the_noise_is_what_equal_distributions_have_between_their_means() -> None:
    found = [frechet_distance(torch.randn(20, 10), 3 * torch.randn(40, 10)) for _ in range(400)]
    mean, noise = (float(np.mean([getattr(each, name) for each in found])) for name in ("means", "noise"))
    assert mean == pytest.approx(noise, rel=0.1)
    assert noise == pytest.approx(10 / 20 + 90 / 40, rel=0.05)


def test_sets_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=naming(8, 9, "features")):
        frechet_distance(torch.randn(20, 8), torch.randn(20, 9))
    with pytest.raises(ValueError, match=naming("generated", 1)):
        frechet_distance(torch.randn(20, 8), torch.randn(1, 8))
    with pytest.raises(ValueError, match=naming("reference", "1 of 2", "NaN")):
        frechet_distance(torch.tensor([[0.0], [torch.nan]]), torch.randn(3, 1))
