"""Diversity within prompts: pairs counted one by one, Vendi scores in closed form, means with errors over prompts."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from deradiff.measures.diversity import mean_pairwise_distance, vendi_score
from messages import naming


def value(found: Any) -> float:
    """Of a single prompt."""
    assert len(found.per_prompt) == 1
    return float(found.per_prompt[0])


# --- pairs


def test_pairwise_distances_are_means_over_pairs() -> None:
    features = torch.randn(7, 5)
    pairs = list(combinations(features.double(), 2))
    euclidean = sum(float((a - b).norm()) for a, b in pairs) / len(pairs)
    cosine = sum(1 - float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs) / len(pairs)
    assert value(mean_pairwise_distance(features)) == pytest.approx(euclidean, rel=1e-12)
    assert value(mean_pairwise_distance(features, metric="cosine")) == pytest.approx(cosine, rel=1e-12)


def test_prompts_are_kept_apart_and_averaged() -> None:
    features, groups = torch.randn(9, 4), torch.tensor([5, 2, 5, 2, 5, 9, 9, 9, 2])
    for measure in (mean_pairwise_distance, vendi_score):
        found = measure(features, groups)
        alone = [value(measure(features[groups == prompt])) for prompt in (2, 5, 9)]
        assert found.prompts.tolist() == [2, 5, 9] and found.images.tolist() == [3, 3, 3]
        assert found.per_prompt.tolist() == alone
        assert found.mean.value == pytest.approx(sum(alone) / 3)
        assert found.mean.error == pytest.approx(float(torch.tensor(alone).std()) / 3**0.5, rel=1e-6)
        assert math.isnan(measure(features).mean.error)


# --- the Vendi score


@pytest.mark.parametrize("order", [0, 0.5, 1, 2, math.inf])
def test_vendi_of_equal_and_of_orthogonal_images(order: float) -> None:
    same, apart = torch.tensor([[1.0, 2, 3]]).repeat(6, 1), 3 * torch.eye(6)
    assert value(vendi_score(same, order=order)) == pytest.approx(1, abs=1e-12)
    assert value(vendi_score(apart, order=order)) == pytest.approx(6, rel=1e-12)
    assert value(vendi_score(torch.cat([apart, 2 * apart]), order=order)) == pytest.approx(6, rel=1e-12)


def test_vendi_of_uneven_groups() -> None:
    """Three images of one kind and one of another: K/n has the eigenvalues 3/4 and 1/4."""
    features = torch.eye(2)[[0, 0, 0, 1]]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = {0: 2, 1: math.exp(entropy), 2: 1 / (0.75**2 + 0.25**2), math.inf: 4 / 3}
    for order, score in expected.items():
        assert value(vendi_score(features, order=order)) == pytest.approx(score, rel=1e-12)
    near = [value(vendi_score(features, order=order)) for order in (0.999, 1.001)]
    assert near[0] > expected[1] > near[1] and near[0] - near[1] < 1e-2


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_vendi_is_the_entropy_of_the_similarity_matrix(shape: tuple[int, int]) -> None:
    features = torch.randn(shape)
    unit = F.normalize(features.double(), dim=1)
    shares = torch.linalg.eigvalsh(unit @ unit.T / shape[0]).clamp(min=0)
    assert value(vendi_score(features)) == pytest.approx(float(torch.special.entr(shares).sum().exp()), rel=1e-9)
    assert value(vendi_score(features, order=0)) == pytest.approx(min(shape), rel=1e-12)


# --- what is refused


def test_what_is_refused() -> None:
    features = torch.randn(4, 3)
    with pytest.raises(ValueError, match=naming(1, 2, 7)):
        mean_pairwise_distance(features, torch.tensor([1, 1, 7, 1]))
    with pytest.raises(ValueError, match=naming(4, 3)):
        vendi_score(features, torch.tensor([1, 1, 7]))
    with pytest.raises(ValueError, match=naming("Vendi", 0, -1)):
        vendi_score(features, order=-1)
    with pytest.raises(ValueError, match=naming(2, 4)):
        vendi_score(torch.cat([features[:2], torch.zeros(2, 3)]))
    with pytest.raises(ValueError, match="NaN"):
        mean_pairwise_distance(features * math.nan)
    with pytest.raises(ValueError, match=naming(1, "images")):
        mean_pairwise_distance(features[:1])
    unknown: Any = "manhattan"
    with pytest.raises((ValueError, TypeError)):
        mean_pairwise_distance(features, metric=unknown)
