"""Two processes train what one does: Diffusion-DPO and policies that draw, in one launch, which costs more than all."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import test_alignment
import test_flow_policies
import test_policy_gradient
from deradiff.alignment.base import Policy
from two_processes import run_by_two

TWO = """
import test_flow_policies
import test_policy_gradient
from test_alignment import PLAN, InMemory, base_of
from deradiff.alignment.base import Policy
from deradiff.alignment.dpo import train_dpo
from deradiff.alignment.training import TrainingRun
base = base_of()
policy = Policy(base, 2, seed=4)
curve = train_dpo(
    base, policy, InMemory(base, 17, held_out=5), 500.0, PLAN, batch=4, dropout=0.1, per_pass=2,
    run=TrainingRun(7, folder / "checkpoint", lambda *_: None, accelerator, "two"),
)
weights = {name: p.detach() for name, p in policy.model.named_parameters() if p.requires_grad}
result = {"dpo": {"weights": weights, "held_out": curve.held_out}}
plan = replace(test_policy_gradient.PLAN, steps=2)
weights, curve = test_policy_gradient.aligned(folder / "ddpo", 2, plan, accelerator=accelerator)
result["ddpo"] = {"weights": weights, "held_out": curve.held_out}
for method in test_flow_policies.TRAINED:
    weights, curve = test_flow_policies.trained(folder / method, method, accelerator)
    result[method] = {"weights": weights, "held_out": curve.held_out}
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_by_two(TWO, tmp_path_factory.mktemp("two"))


def trainable(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p for name, p in policy.model.named_parameters() if p.requires_grad}


def furthest(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> float:
    return max((value - others[name]).abs().max().item() for name, value in some.items())


def test_diffusion_dpo(two: Any, tmp_path: Path) -> None:
    alone, curve = test_alignment.aligned(tmp_path, 2)
    assert two["dpo"]["held_out"] == pytest.approx(curve.held_out, rel=1e-4)
    moved = furthest(alone, trainable(Policy(test_alignment.base_of(), 2, seed=4)))
    assert furthest(alone, two["dpo"]["weights"]) < 0.05 * moved


def test_policy_gradients(two: Any, tmp_path: Path) -> None:
    alone, curve = test_policy_gradient.aligned(tmp_path, 2, replace(test_policy_gradient.PLAN, steps=2))
    assert two["ddpo"]["held_out"] == pytest.approx(curve.held_out, rel=1e-4)
    moved = furthest(alone, trainable(Policy(test_policy_gradient.base_of(), 2, seed=4)))
    assert moved > 0 and furthest(alone, two["ddpo"]["weights"]) < 0.05 * moved


@pytest.mark.parametrize("method", test_flow_policies.TRAINED)
def test_policies_of_flows_with_an_older_one_that_draws(two: Any, tmp_path: Path, method: str) -> None:
    alone, curve = test_flow_policies.trained(tmp_path, method)
    assert two[method]["held_out"] == pytest.approx(curve.held_out, rel=1e-4)
    start = trainable(test_flow_policies.task_of(tmp_path / "start").policy)
    moved = furthest(alone, start)
    assert moved > 0 and furthest(alone, two[method]["weights"]) < 0.05 * moved
