"""How good is the search for λ? python benchmarks/search.py closed | neighbours | digits | digits-flow

`closed`: random problems in closed form with an optimum inside (0, 1). A mixture of Gaussians on a line is aligned to a
linear reward; another score, which has a target of its own for every prompt, is highest somewhere between the two
models. An evaluation draws 512 images by the library, 8 for each of 64 prompts (DeRaDiff, §5.1, has 500). The score's
expectation is exact, by backward recursion through the sampler's steps with Gauss-Hermite quadrature: `plain` of
Algorithm 1's own samples, `weighted` of the retrained model's by the same sampler. All methods have 8 evaluations.
Regret is what the answer's expected score lacks of the best, as a share of the range over [0, 1].

The search has the same prompts and noise at every λ. Algorithm 2 generates a batch for every evaluation: as printed
that is other prompts and other noise, `same prompts` has other noise alone, `same noise` neither.

`neighbours`: whether scores at neighbouring λ, estimated from one run by importance weights, save evaluations.

`digits`, `digits-flow`: legibility and a little boldness, searched by images on a model that ships with deradiff, from
its anchor aligned hardest, against a grid of λ from the same noise.

The results go to benchmarks/search.json, one part at a time. `closed` keeps what it has in a folder, and goes on there.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from search_problems import PROMPTS, SEEDS, STEPS, Batch, Kind, Problem, problems, shares

from deradiff.cli import terminal
from deradiff.experiments import executors
from deradiff.experiments.plan import Plan
from deradiff.files.records import versions
from deradiff.files.writing import write_json
from deradiff.search import Goal, maximise, spaces
from deradiff.search import running as searching
from deradiff.search.answers import Best
from deradiff.search.evaluation import PointEvaluator
from deradiff.search.loop import FRACTION, SearchState
from deradiff.search.proposals import Surrogates, propose
from deradiff.search.surrogate import Observed, Surrogate
from deradiff.sweep.jobs import reproducible
from deradiff.sweep.workers import cores
from studies.search_baseline import algorithm_2

PROBLEMS, BUDGET = 200, 8
REGRET, SHARE, COVERAGE = 0.01, 0.5, (0.85, 0.95)


# -- methods ----------------------------------------------------------------------------------------------------------

SPACE, GOAL = spaces.lam("anchor"), Goal.read(["score"])


def searched(problem: Problem, **settings: Any) -> dict[str, Any]:
    state = SearchState()
    answer = maximise(SPACE, GOAL, problem.tables, budget=BUDGET, seed=problem.seed, state=state, **settings)
    assert isinstance(answer, Best)
    (lam,), ((low, high),) = answer.point, answer.ranges
    return {
        "lam": lam,
        "low": low,
        "high": high,
        "regret": problem.regret(lam),
        "evaluations": len(state.points),
        "covered": low <= problem.best <= high,
    }


def printed(problem: Problem, acquisition: Literal["ei", "ucb"], batch: Batch = "new") -> dict[str, Any]:
    found = algorithm_2(problem.evaluator(batch), budget=BUDGET, acquisition=acquisition, seed=problem.seed)
    return {"lam": found.lam, "regret": problem.regret(found.lam), "evaluations": BUDGET}


def uniform(problem: Problem, batch: Batch) -> dict[str, Any]:
    """The best of a uniform grid, both ends included."""
    lams, evaluate = np.linspace(0, 1, BUDGET), problem.evaluator(batch)
    lam = float(lams[np.argmax([evaluate(float(lam)) for lam in lams])])
    return {"lam": lam, "regret": problem.regret(lam), "evaluations": BUDGET}


METHODS: dict[str, Callable[[Problem], dict[str, Any]]] = {
    "search": partial(searched, fraction=0.0),
    "search, stopping": searched,
    "Algorithm 2, EI": partial(printed, acquisition="ei"),
    "Algorithm 2, UCB": partial(printed, acquisition="ucb"),
    "Algorithm 2, EI, same prompts": partial(printed, acquisition="ei", batch="same prompts"),
    "Algorithm 2, UCB, same prompts": partial(printed, acquisition="ucb", batch="same prompts"),
    "Algorithm 2, EI, same noise": partial(printed, acquisition="ei", batch="same noise"),
    "Algorithm 2, UCB, same noise": partial(printed, acquisition="ucb", batch="same noise"),
    "grid, same prompts": partial(uniform, batch="same prompts"),
    "grid, same noise": partial(uniform, batch="same noise"),
}


def closed(folder: Path, count: int) -> dict[str, Any]:
    """All methods on all problems, summed up."""
    found: dict[str, Any] = {}
    kinds: tuple[Kind, ...] = ("weighted", "plain")
    for kind in kinds:
        found[kind] = summed_up(kept(folder / f"{kind}.jsonl", kind, count))
    return found


def kept(file: Path, kind: Kind, count: int) -> list[dict[str, Any]]:
    """A row for each problem, those that are there already from the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    asked = problems(kind, 1 + max((row["seed"] for row in rows), default=-1))
    with file.open("a") as out:
        while len(rows) < count:
            problem = next(asked)
            row = {"seed": problem.seed, "best": problem.best, "range": problem.range}
            rows.append(row | {name: method(problem) for name, method in METHODS.items()})
            out.write(json.dumps(rows[-1]) + "\n")
            out.flush()
    return rows[:count]


def summed_up(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, dict[str, float]] = {}
    for name in METHODS:
        regrets = np.array([row[name]["regret"] for row in rows])
        found[name] = {
            "median regret": float(np.median(regrets)),
            "mean regret": float(regrets.mean()),
            "90% of regrets below": float(np.quantile(regrets, 0.9)),
            "median distance": float(np.median([abs(row[name]["lam"] - row["best"]) for row in rows])),
            "mean evaluations": float(np.mean([row[name]["evaluations"] for row in rows])),
        }
        if "covered" in rows[0][name]:
            covered = float(np.mean([row[name]["covered"] for row in rows]))
            found[name] |= {
                "coverage": covered,
                "error of coverage": (covered * (1 - covered) / len(rows)) ** 0.5,
                "mean width": float(np.mean([row[name]["high"] - row[name]["low"] for row in rows])),
            }
    return {"problems": len(rows), **found}


# -- importance estimates at neighbouring λ ---------------------------------------------------------------------------


def with_neighbours(problem: Problem, budget: int, step: float) -> float:
    """The regret of a search that also observes λ ± `step` of each evaluation, by importance weights; 0 for none."""
    points = [*SPACE.first()]
    while True:
        table, at = expanded(problem, points, step)
        models = Surrogates([Surrogate(SPACE.unit(at), Observed.of(table), len(points))], [])
        candidates = SPACE.candidates(len(points), points)
        if len(points) == budget:
            return problem.regret(candidates[int(models.gains[0].mean(SPACE.unit(candidates)).argmax())][0])
        point = propose(SPACE, models, points, candidates, len(points)).point
        assert point is not None
        points.append(point)


def expanded(
    problem: Problem, points: Sequence[tuple[float, ...]], step: float
) -> tuple[torch.Tensor, list[tuple[float, ...]]]:
    """Gains over the reference at the points and their neighbours; what dividing by few weights biases is undone."""
    reference = problem.by_prompt(0.0)
    rows: list[torch.Tensor] = []
    at: list[tuple[float, ...]] = []
    for (lam,) in points:
        scores, log_weights, ratio = problem.images(lam)
        mine = problem.by_prompt(lam)
        rows.append(mine)
        at.append((lam,))
        if ratio is None or not step:
            continue
        for other in (lam - step, lam + step):
            if 0 <= other <= 1:
                moved = torch.from_numpy((shares(log_weights + (other - lam) * ratio) * scores).sum(1))
                rows.append(mine + SEEDS / (SEEDS - 1) * (moved - mine))
                at.append((other,))
    return torch.stack(rows) - reference, at


def neighbours(count: int) -> dict[str, Any]:
    asked = problems("weighted")
    chosen = [next(asked) for _ in range(count)]
    found: dict[str, Any] = {"problems": count}
    step: float
    for budget in (4, 5, 6, 8):
        for step in (0.0, 0.05, 0.1):
            regrets = [with_neighbours(problem, budget, step) for problem in chosen]
            found[f"{budget} evaluations, " + (f"λ ± {step:g}" if step else "alone")] = {
                "median regret": float(np.median(regrets)),
                "mean regret": float(np.mean(regrets)),
            }
    return found


# -- the digits -------------------------------------------------------------------------------------------------------

GOAL_OF_DIGITS = "legible + 0.02*bold"
"""Ink is liked, but what cannot be read is not: a little of the bold anchor is best."""


WORLDS: dict[str, dict[str, Any]] = {
    "digits": {"anchor": 30, "count": 120, "lams": 41, "scheduler": "euler-a", "guidance_scale": 1.0},
    "digits-flow": {"anchor": 5, "count": 60, "lams": 21, "scheduler": "flow-euler", "guidance_scale": 1.1},
}
"""By world the β of its anchor, how many prompts and λ a whole run takes, and the sampler of 25 steps."""


def shipped(world: str, folder: Path, workers: int, count: int, lams: int) -> dict[str, Any]:
    """The search, and then a grid of λ on the same prompts and noise."""
    its = WORLDS[world]
    sampling = {"scheduler": its["scheduler"], "steps": 25, "guidance_scale": its["guidance_scale"]}
    plan = Plan.model_validate(
        {
            "name": world,
            "reference": world,
            "models": {"anchor": {"source": f"{world}:{its['anchor']}", "beta": its["anchor"]}},
            "prompts": {"digits": {"source": world, "count": count, "draw_seed": 3, "seeds": "0:1"}},
            "sampling": {"default": sampling},
            "methods": [{"method": "reference"}],
            "scores": ["legible", "bold", "colours"],
            "features": ["digits"],
            "batch_size": 64,
        }
    )
    goal = Goal.read([GOAL_OF_DIGITS])

    def executor() -> Any:
        return executors.local(plan, "cpu", 1, workers)

    with terminal.stages(Console(stderr=True)) as report:
        # It goes on in the same folder: first until it stops by itself, then until the budget is used.
        found = [
            searching.run(plan, SPACE, goal, folder, executor, report, budget=10, fraction=f) for f in (FRACTION, 0.0)
        ]
        with PointEvaluator(plan, SPACE, folder, executor, report, goal.names) as evaluator:
            grid = [(round(float(lam), 3),) for lam in np.linspace(0, 1, lams)]
            means = goal.objectives[0].table(evaluator(grid)).mean(1)
    searches = {}
    for name, outcome in zip(("stopping", "all ten"), found, strict=True):
        answer = outcome.answer
        assert isinstance(answer, Best)
        searches[name] = {
            "lam": answer.point[0],
            "low": answer.ranges[0][0],
            "high": answer.ranges[0][1],
            "evaluations": len(answer.evaluations),
            "stopped": answer.stopped,
            "check": next(iter(outcome.checks.values())).sentence,
        }
    return searches | {"grid": {"lams": lams, "best": grid[int(means.argmax())][0], "means": means.tolist()}}


# -- the table --------------------------------------------------------------------------------------------------------


def show(console: Console, found: dict[str, Any]) -> None:
    for kind in ("weighted", "plain"):
        part = found.get("closed", {}).get(kind)
        if part is None:
            continue
        table = Table(
            "method",
            "median regret",
            "mean",
            "90% below",
            "|λ - λ*|",
            "evaluations",
            "coverage",
            title=f"{kind}: {part['problems']} problems",
            title_justify="left",
        )
        for name in METHODS:
            row = part[name]
            covered = f"{row['coverage']:.1%} ± {row['error of coverage']:.1%}" if "coverage" in row else ""
            table.add_row(
                name,
                f"{row['median regret']:.2%}",
                f"{row['mean regret']:.2%}",
                f"{row['90% of regrets below']:.1%}",
                f"{row['median distance']:.3f}",
                f"{row['mean evaluations']:.1f}",
                covered,
            )
        console.print(table)
        mine = part["search"]
        console.print(
            f"median regret at most {REGRET:.0%}: {mine['median regret'] <= REGRET}; coverage of 90% in {COVERAGE}: "
            f"{COVERAGE[0] <= mine['coverage'] <= COVERAGE[1]}; median and mean regret as shares (target {SHARE:g}) of",
            highlight=False,
        )
        for name in list(METHODS)[2:]:
            shares = [mine[key] / part[name][key] for key in ("median regret", "mean regret")]
            console.print(f"  {name}: {shares[0]:.2f}, {shares[1]:.2f}", highlight=False)
    for name, row in found.get("neighbours", {}).items():
        if name != "problems":
            console.print(f"{name}: median {row['median regret']:.2%}, mean {row['mean regret']:.2%}", highlight=False)
    for world in [world for world in WORLDS if world in found]:
        grid = found[world]["grid"]
        for name in ("stopping", "all ten"):
            part = found[world][name]
            console.print(
                f"{world}, {name}: λ* = {part['lam']:g} [{part['low']:g}, {part['high']:g}] in {part['evaluations']} "
                f"evaluations, the grid of {grid['lams']} says {grid['best']:g}; {part['check']}",
                highlight=False,
            )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=("closed", "neighbours", *WORLDS, "show"))
    options.add_argument("--out", type=Path, default=Path("search-benchmark"), help="folder of what is kept")
    options.add_argument("--count", type=int, help="problems, or prompts of a world")
    options.add_argument("--lams", type=int, help="λ of a world's grid")
    options.add_argument("--workers", type=int, default=cores(), help="processes that draw the digits")
    options.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen, console = options.parse_args(), Console()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    terminal.pass_on_warnings()
    found = json.loads(chosen.json.read_text()) if chosen.json.exists() else {}
    with reproducible(1):
        if chosen.part == "closed":
            found["closed"] = closed(chosen.out, chosen.count or PROBLEMS)
        elif chosen.part == "neighbours":
            found["neighbours"] = neighbours(chosen.count or 50)
        elif chosen.part in WORLDS:
            count, lams = chosen.count or WORLDS[chosen.part]["count"], chosen.lams or WORLDS[chosen.part]["lams"]
            found[chosen.part] = shipped(chosen.part, chosen.out / chosen.part, chosen.workers, count, lams)
    if chosen.part != "show":
        settings = {"prompts": PROMPTS, "seeds": SEEDS, "steps": STEPS, "budget": BUDGET, "digits": GOAL_OF_DIGITS}
        write_json(chosen.json, {**found, "settings": settings, "versions": versions()})
    show(console, found)


if __name__ == "__main__":
    main()
