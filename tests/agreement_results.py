"""An experiment with scores of our own making, and the differences in them by plain formulas."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from deradiff.algorithm.verdict import Verdict
from deradiff.experiments.plan import Arm, Plan, parse_plan
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.experiments.results import Results, Table

BETAS = (500, 1000, 2000, 5000, 8000, 10_000)
PROMPTS = 40


class Scored(Results):
    """Results whose scores are given by arm, prompt set and score, without a store."""

    def __init__(self, plan: Plan, known: dict[tuple[str, str, str], Table]) -> None:
        self.plan, self.sampling, self.known = plan, next(iter(plan.sampling)), known
        self.verdicts: dict[str, Verdict] = {}

    def scores(self, arm: Arm, prompts: str, name: str) -> Table:
        wanted = self.plan.prompts[prompts]
        absent = np.full((wanted.count or 0, len(wanted.seeds)), np.nan)
        return self.known.get((arm.name, prompts, name), absent)

    def verdict(self, arm: Arm, prompts: str, name: str) -> Verdict | None:
        return self.verdicts.get(arm.name)

    def diagnostics(self, arm: Arm, prompts: str) -> list[dict[str, Any]]:
        return [{"effective": 1.5, "collapsed": True}, {"effective": 2.5, "collapsed": False}]


def name_of(beta: float) -> str:
    return f"b{beta:g}"


def plan_of(betas: Sequence[float] = BETAS, scores: Sequence[str] = ("pickscore",), **changes: Any) -> Plan:
    names = [name_of(beta) for beta in betas]
    content = {
        "name": "t",
        "reference": "base",
        "models": {name_of(beta): {"source": f"m/{beta:g}", "beta": beta, "family": "DPO"} for beta in betas},
        "prompts": {"main": {"source": "pickapic-v1", "count": PROMPTS, "seeds": "0:1", "substitute_for": "the <500>"}},
        "sampling": {"s": {"steps": 2}},
        "methods": [
            {"method": "reference"},
            {"method": "model"},
            {"method": "realign", "targets": names},
            {"method": "realign", "anchors": names[:1], "targets": names[1:2], "particles": 4},
        ],
        "scores": list(scores),
    }
    return parse_plan(content | changes, "the plan")


def results_of(plan: Plan, spread: float = 0.003, seed: int = 0) -> Scored:
    """Scores that share their prompts' difficulty; an anchor at λ = 1 is the model itself."""
    rng = np.random.default_rng(seed)
    known: dict[tuple[str, str, str], Table] = {}
    for score in plan.scores:
        hard = rng.normal(0.23, 0.02, (PROMPTS, 1))
        for arm in plan.arms():
            drawn = hard + rng.normal(0, 0.001) + rng.normal(0, spread, (PROMPTS, 2))
            if arm.target and arm.anchors == ((arm.target, 1.0),):
                drawn = known[arm.target, "main", score]
            known[arm.name, "main", score] = drawn
    return Scored(plan, known)


def column(exhibit: Exhibit, name: str) -> list[Any]:
    return [row[exhibit.header.index(name)] for row in exhibit.rows]


def differences(results: Scored, score: str = "pickscore") -> dict[tuple[float, float], np.ndarray]:
    """Approximated minus retrained by prompt, of every anchor and target."""
    plan = results.plan
    betas = [float(model.beta or 0) for model in plan.models.values()]
    return {
        (anchor, target): (
            results.known[f"{name_of(anchor)} → {name_of(target)}", "main", score]
            - results.known[name_of(target), "main", score]
        ).mean(1)
        for anchor, target in product(betas, betas)
    }
