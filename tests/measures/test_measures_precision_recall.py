"""Precision and recall: as prdc counts them, as plain loops count them, and where images coincide."""

import json
from pathlib import Path

import pytest
import torch

from deradiff.measures import precision_recall
from deradiff.measures.precision_recall import precision_and_recall
from measures_inputs import FEATURE_SETS, NEIGHBOURS, feature_sets
from messages import naming

GOLDENS = json.loads((Path(__file__).parents[1] / "data" / "measures_goldens.json").read_text())["precision and recall"]


@pytest.mark.parametrize("k", NEIGHBOURS)
@pytest.mark.parametrize("name", FEATURE_SETS)
def test_it_is_exactly_prdcs(name: str, k: int) -> None:
    found = precision_and_recall(*feature_sets(name), k=k)
    assert {"precision": found.precision, "recall": found.recall} == GOLDENS[name][str(k)]
    assert (found.k, found.samples) == (k, FEATURE_SETS[name][:2])


def by_loops(manifold: torch.Tensor, images: torch.Tensor, k: int) -> float:
    """The share of `images` in a ball around one of `manifold`, ball by ball."""
    covered = 0
    radii = [
        sorted(float((a - b).norm()) for j, b in enumerate(manifold) if j != i)[k - 1] for i, a in enumerate(manifold)
    ]
    for image in images:
        covered += any(float((image - a).norm()) <= radius for a, radius in zip(manifold, radii, strict=True))
    return covered / len(images)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_it_is_what_loops_count(k: int) -> None:
    reference, generated = torch.randn(40, 3).double() + 500, 0.5 * torch.randn(25, 3).double() + 500
    found = precision_and_recall(reference, generated, k)
    assert found.precision == by_loops(reference, generated, k)
    assert found.recall == by_loops(generated, reference, k)
    assert found.recall < 1


def test_blocks_do_not_change_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = feature_sets("unequal")
    whole = precision_and_recall(*sets, k=1)
    monkeypatch.setattr(precision_recall, "BLOCK", 7 * 90)  # seven rows at a time, and less than one of the larger set
    assert precision_and_recall(*sets, k=1) == whole


def test_a_set_covers_itself_also_where_all_images_are_one() -> None:
    for features in (torch.randn(30, 5), torch.full((30, 5), 0.3), torch.randn(3, 64).repeat(10, 1) + 1000):
        found = precision_and_recall(features, features, k=3)
        assert (found.precision, found.recall) == (1, 1)


def test_collapse_keeps_precision_and_loses_recall() -> None:
    reference = torch.randn(200, 4)
    collapsed = reference[:1].repeat(50, 1)
    found = precision_and_recall(reference, collapsed)
    assert (found.precision, found.recall) == (1, 1 / 200)


def test_what_is_refused() -> None:
    features = torch.randn(10, 3)
    for k in (0, 10, 11):
        with pytest.raises(ValueError, match=naming(f"k = {k}", 12, 10)):
            precision_and_recall(torch.randn(12, 3), features, k)
    with pytest.raises(ValueError, match=naming(3, 4, "features")):
        precision_and_recall(features, torch.randn(10, 4), 2)
    with pytest.raises(ValueError, match=naming("generated", "10 of 10")):
        precision_and_recall(features, features / 0, 2)
    with pytest.raises(ValueError, match=naming(0, "images")):
        precision_and_recall(features[:0], features, 2)
