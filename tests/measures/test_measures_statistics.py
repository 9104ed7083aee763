"""Means and covariances kept for later: exact for few images, the same in parts, from covariances as from features."""

import pytest
import torch

from deradiff.measures.statistics import Statistics, require_features, singular_values
from messages import naming

SHAPES = [(40, 8), (9, 8), (8, 8), (5, 8), (2, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_and_covariance_are_the_usual_ones(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, dtype=torch.float64) + 100
    found = Statistics.of(features)
    torch.testing.assert_close(found.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.covariance, torch.cov(features.T), rtol=1e-11, atol=1e-12)
    assert (found.samples, found.features, found.most_rank) == (*shape, min(shape[0] - 1, shape[1]))
    assert len(found.root) <= 8


@pytest.mark.parametrize("parts", [[20, 20], [2, 3], [2, 2, 2, 30], [30, 2]])
def test_parts_merge_into_the_whole(parts: list[int]) -> None:
    features = torch.randn(sum(parts), 8) * torch.arange(1.0, 9.0) + 5
    features[parts[0] :] += 3  # parts with different means
    merged = Statistics.of(features[: parts[0]])
    for part in features[parts[0] :].split(parts[1:]):
        merged = merged.merged(Statistics.of(part))
    whole = Statistics.of(features)
    assert merged.samples == whole.samples and len(merged.root) <= 8
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_published_covariance_is_as_good_as_the_features(shape: tuple[int, int]) -> None:
    whole = Statistics.of(torch.randn(shape))
    found = Statistics.of_covariance(whole.mean, whole.covariance, whole.samples)
    torch.testing.assert_close(found.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    assert len(found.root) == whole.most_rank


def test_what_never_changes_has_no_variance_at_all() -> None:
    assert torch.equal(Statistics.of(torch.full((7, 3), 0.1)).root, torch.zeros(3, 3, dtype=torch.float64))
    features = torch.randn(20, 3)
    features[:, 1] = 0.3
    covariance = Statistics.of(features).covariance
    assert torch.all(covariance[1] == 0) and torch.all(covariance[[0, 2], [0, 2]] > 0)


def test_singular_values_leave_the_number_of_threads_as_it_was() -> None:
    matrix = torch.randn(9, 5).double()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(singular_values(matrix), torch.linalg.svdvals(matrix))
        assert torch.get_num_threads() == 2
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            singular_values(torch.full((3, 3), torch.nan).double()[0])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_features_that_are_refused() -> None:
    broken = torch.randn(6, 3)
    broken[4, 1], broken[5, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=naming("reference", "2 of 6", 4)):
        require_features(broken, "the reference's")
    with pytest.raises(ValueError, match=naming(1, 2)):
        require_features(torch.randn(1, 3))
    with pytest.raises(ValueError, match=naming(0, "images")):
        Statistics.of(torch.randn(0, 3))
    with pytest.raises(ValueError, match=naming((4, 3, 2, 2))):
        require_features(torch.randn(4, 3, 2, 2))
    with pytest.raises(ValueError, match=naming((4, 0))):
        require_features(torch.randn(4, 0))


def test_covariances_that_are_none() -> None:
    mean, good = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=naming(3, (2, 2))):
        Statistics.of_covariance(mean, torch.eye(2), 10)
    with pytest.raises(ValueError, match=naming(1, 2)):
        Statistics.of_covariance(mean, good, 1)
    with pytest.raises(ValueError, match="NaN"):
        Statistics.of_covariance(mean, good * torch.nan, 10)
    with pytest.raises(ValueError, match=naming("eigenvalue", -1)):
        Statistics.of_covariance(mean, torch.diag(torch.tensor([1.0, 1.0, -1.0])), 10)
    with pytest.raises(ValueError, match=naming(1, "symmetric")):
        Statistics.of_covariance(mean, torch.tensor([[2.0, 1, 0], [0, 2, 0], [0, 0, 2]]), 10)


def test_statistics_of_other_features_do_not_merge() -> None:
    with pytest.raises(ValueError, match=naming(3, 4, "features")):
        Statistics.of(torch.randn(5, 3)).merged(Statistics.of(torch.randn(5, 4)))
