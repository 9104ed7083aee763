"""Pareto fronts: by hand, and against the definition on random points."""

import math

import pytest
import torch

from deradiff.measures.fronts import non_dominated
from messages import naming

POINTS = torch.tensor([[1.0, 5], [2, 4], [2, 6], [3, 7], [2, 4], [0, 9]])


def test_reward_up_and_fid_down() -> None:
    found = non_dominated(POINTS, maximize=[True, False])
    assert found.tolist() == [False, True, False, True, True, False]


def test_every_direction_counts() -> None:
    assert non_dominated(POINTS, [True, True]).tolist() == [False, False, False, True, False, True]
    assert non_dominated(POINTS, [False, False]).tolist() == [True, True, False, False, True, True]
    assert non_dominated(POINTS[:, :1], [True]).tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_it_is_the_definition(objectives: int) -> None:
    points = torch.randint(0, 6, (60, objectives)).float()
    maximize = [bool(i % 2) for i in range(objectives)]
    signed = points * torch.tensor([1 if up else -1 for up in maximize])
    expected = [not any(bool((q >= p).all() and (q > p).any()) for q in signed) for p in signed]
    assert non_dominated(points, maximize).tolist() == expected


def test_infinite_values_are_compared() -> None:
    points = torch.tensor([[1.0, math.inf], [1, 3], [2, math.inf]])
    assert non_dominated(points, [True, False]).tolist() == [False, True, True]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=naming([1, 3], "NaN")):
        non_dominated(torch.tensor([[1.0], [math.nan], [2], [math.nan]]), [True])
    with pytest.raises(ValueError, match=naming(2, 1)):
        non_dominated(POINTS, [True])
    with pytest.raises(ValueError, match="row"):
        non_dominated(POINTS[:0], [True, False])
