"""Does the knee undo hacking? python benchmarks/undo_hacking.py NAME=ANCHOR ... [--out FOLDER] | --show

On the digits, for anchors that over-optimised "bold and vivid": `digits:30`, and what `deradiff align digits --method
draft --beta 0` makes. `deradiff search --undo-hacking` sees that reward and the drift, and nothing of legibility. Other
prompts and other noise judge afterwards, by the classifier that was trained on real digits: is an image of the answer
as often legible as one of the reference, within `WITHIN`? And how much of the reward does it keep? Compared with the
largest constant λ, in steps of `STEP`, that is legible within `WITHIN` of the reference on the judging prompts
themselves, which bisection finds; its gain is what the best single λ keeps.

Standard errors are over the judging prompts, by the bootstrap, differences and quotients of the same ones. The results
go to benchmarks/undo_hacking.json, an anchor at a time, and are printed. Images are kept under --out: the same command
goes on.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import keep_parts
from rich.console import Console
from rich.table import Table

from deradiff.cli import terminal
from deradiff.experiments import executors
from deradiff.experiments.plan import Plan
from deradiff.files.images import read_rgb
from deradiff.search import Goal, spaces
from deradiff.search.evaluation import PointEvaluator
from deradiff.search.knees import Knee
from deradiff.search.running import run
from deradiff.search.spaces import Point, SearchSpace
from deradiff.sweep.alignment_records import alignment_of
from deradiff.sweep.jobs import reproducible
from deradiff.sweep.workers import cores
from deradiff.worlds import find_anchor
from deradiff.worlds.digits import captions, classifier

WITHIN, KEPT = 0.01, 0.5
"""The legibility that may be lost, and the least share of the best single λ's gain."""

STEP = 0.05
BUDGET, RESAMPLED = 8, 4000
REWARD = "digits"
SPACES: dict[str, SearchSpace] = {"constant": spaces.lam("anchor"), "early and late": spaces.knots("anchor", [0, 1])}


def plan_of(source: str, prompts: list[str], seeds: str) -> Plan:
    """The anchor beside the reference, sampled as everything about the digits is published."""
    return Plan.model_validate(
        {
            "name": "undo-hacking",
            "reference": "digits",
            "models": {"anchor": {"source": source}},
            "prompts": {"prompts": {"prompts": prompts, "seeds": seeds}},
            "sampling": {"euler-a": {"scheduler": "euler-a", "steps": 25, "guidance_scale": 1.5}},
            "methods": [{"method": "reference"}],
            "scores": [REWARD],
            "batch_size": 64,
        }
    )


def searched(source: str, space: SearchSpace, folder: Path, workers: int, prompts: int, seeds: int) -> Knee:
    """What the search says."""
    plan = plan_of(source, distinct(prompts, 1), f"0:{seeds - 1}")
    outcome = run(
        plan,
        space,
        Goal.undo_hacking(REWARD),
        folder,
        lambda: executors.local(plan, "cpu", 1, workers),
        reported,
        budget=BUDGET,
    )
    assert isinstance(outcome.answer, Knee)
    return outcome.answer


class Judge:
    """Draws points of a space with prompts and noise that no search has seen, and looks at them."""

    def __init__(self, source: str, folder: Path, workers: int, prompts: int) -> None:
        plan = plan_of(source, distinct(prompts, 2), "1000")
        executor = partial(executors.local, plan, "cpu", 1, workers)
        self._evaluators = {
            space: PointEvaluator(plan, space, folder, executor, reported, [REWARD]) for space in SPACES.values()
        }

    def close(self) -> None:
        """End the workers."""
        for evaluator in self._evaluators.values():
            evaluator.__exit__()

    def __call__(self, space: SearchSpace, point: Point) -> tuple[np.ndarray, np.ndarray]:
        """The reward and the legibility of every prompt."""
        evaluator = self._evaluators[space]
        results = evaluator.drawn([point])
        arm = space.arm(results.plan, point) if any(point) else evaluator.reference(results)
        texts = results.contents.texts["prompts"]
        images = [results.image(arm, "prompts", row, 0) for row in range(len(texts))]
        assert all(images), "an image is missing"
        pixels = torch.stack([torch.from_numpy(np.array(read_rgb(path))) for path in images if path])
        read = classifier.read(pixels.permute(0, 3, 1, 2).float() / 255).digits
        wanted = torch.tensor([captions.parse(text).digit for text in texts])
        return results.scores(arm, "prompts", REWARD)[:, 0], (read == wanted).double().numpy()


def measured(source: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The searches of one anchor, and what the judge says of their answers beside the grid."""
    answers = {
        name: searched(source, SPACES[name], folder / slug, options.workers, options.prompts, options.seeds)
        for name, slug in (("constant", "constant"), ("early and late", "knots"))
        if name == "constant" or options.two
    }
    with closing(Judge(source, folder / "judge", options.workers, options.judged)) as judge:
        return compared(source, answers, judge)


def compared(source: str, answers: dict[str, Knee], judge: Judge) -> dict[str, Any]:
    """The answers beside a grid of λ, on the judge's prompts."""
    reward, legible = judge(SPACES["constant"], (0.0,))
    grid: dict[float, tuple[np.ndarray, np.ndarray]] = {}
    low, high = 0, round(1 / STEP)  # the anchor itself is taken to be hacked
    while high - low > 1:
        middle = (low + high) // 2
        there, seen = judge(SPACES["constant"], (round(middle * STEP, 2),))
        lost = seen - legible
        grid[round(middle * STEP, 2)] = there - reward, lost
        low, high = (middle, high) if lost.mean() >= -WITHIN else (low, middle)
    best = round(low * STEP, 2) or None
    found: dict[str, Any] = {
        "source": described_source(source),
        "judging prompts": len(reward),
        "legibility of the reference": [float(legible.mean()), error(legible)],
        "grid": {f"{lam:g}": [*with_error(gain), *with_error(lost)] for lam, (gain, lost) in sorted(grid.items())},
        "best single": best,
    }
    for name, answer in answers.items():
        found[name] = described(answer)
        if answer.point is not None and best is not None:
            there, seen = judge(SPACES[name], answer.point)
            gain, lost = there - reward, seen - legible
            share = [float(gain.mean() / grid[best][0].mean()), quotient_error(gain, grid[best][0])]
            found[name] |= {"gain": with_error(gain), "legibility": with_error(lost), "share kept": share}
    return found


def described_source(source: str) -> str:
    """What the anchor is, without the folder that it lies in here."""
    made = alignment_of(source)
    return source if find_anchor(source) else f"{made.method}, {'no KL' if made.beta is None else f'β = {made.beta:g}'}"


def described(answer: Knee) -> dict[str, Any]:
    return {
        "point": answer.point,
        "knee": answer.ranges,
        "probability": answer.probability,
        "drift": [answer.drift.value, answer.drift.low, answer.drift.high],
        "slowing": [answer.slowing.value, answer.slowing.low, answer.slowing.high],
        "evaluations": [
            [*one.point, 0.5 + one.gains[0], one.errors[0], -one.gains[1], one.errors[1]] for one in answer.evaluations
        ],
    }


# -- numbers ----------------------------------------------------------------------------------------------------------


def distinct(count: int, seed: int) -> list[str]:
    """So many different captions."""
    return list(dict.fromkeys(captions.sample_prompts(20 * count, seed)))[:count]


def resampled(*tables: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Means of all tables over the same prompts, drawn anew."""
    chance = np.random.default_rng(0)
    for _ in range(RESAMPLED):
        rows = chance.integers(len(tables[0]), size=len(tables[0]))
        yield [table[rows].mean() for table in tables]


def error(table: np.ndarray) -> float:
    return float(np.std([mean for (mean,) in resampled(table)], ddof=1))


def with_error(table: np.ndarray) -> list[float]:
    return [float(table.mean()), error(table)]


def quotient_error(above: np.ndarray, below: np.ndarray) -> float:
    return float(np.std([a / b for a, b in resampled(above, below)], ddof=1))


# -- the tables -------------------------------------------------------------------------------------------------------


def show(console: Console, found: dict[str, Any]) -> None:
    for name, part in found.items():
        if "grid" not in part:
            continue
        value, spread = part["legibility of the reference"]
        heading = f"{name} ({part['source']}): {part['judging prompts']} prompts, the reference is legible "
        table = Table("λ", "gain", "legibility, difference", title=f"{heading}{value:.1%} ± {spread:.1%}")
        rows = [(lam, row) for lam, row in part["grid"].items()]
        chosen = [(f"{way}: {part[way]['point']}", part[way]) for way in SPACES if "gain" in part.get(way, {})]
        for lam, row in [*rows, *((label, [*one["gain"], *one["legibility"]]) for label, one in chosen)]:
            table.add_row(lam, f"{row[0]:.3f} ± {row[1]:.3f}", f"{row[2]:+.1%} ± {row[3]:.1%}")
        console.print(table)
        for way in SPACES:
            if way in part:
                console.print(f"{way}: {judged(part[way], part['best single'])}", highlight=False)


def judged(answer: dict[str, Any], best: float | None) -> str:
    if answer["point"] is None:
        return f"no knee (probability {answer['probability']:.0%})"
    if "share kept" not in answer:
        return f"λ = {answer['point']}; no single λ is legible within {WITHIN:.0%} of the reference"
    (share, spread), lost = answer["share kept"], -answer["legibility"][0]
    return (
        f"λ = {answer['point']}, the knee in {answer['knee']}; legible within {WITHIN:.0%}: {lost <= WITHIN}; keeps "
        f"{share:.0%} ± {spread:.0%} of what the best single λ, {best}, keeps, {KEPT:.0%} at least: {share >= KEPT}"
    )


def reported(*_: Any) -> None:
    """Progress that nobody follows: the folders show it."""


def main(given: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("anchors", nargs="*", metavar="NAME=ANCHOR")
    options.add_argument("--out", type=Path, default=Path("undo-hacking"), help="folder of what is kept")
    options.add_argument("--prompts", type=int, default=16, help="that are searched on")
    options.add_argument("--seeds", type=int, default=8, help="of each of them")
    options.add_argument("--judged", type=int, default=400, help="prompts that judge, of one image each")
    options.add_argument("--two", action="store_true", help="search λ early and late as well")
    options.add_argument("--workers", type=int, default=cores(), help="processes that draw")
    options.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options.add_argument("--show", action="store_true", help="print what was measured before")
    chosen = options.parse_args(given)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    terminal.pass_on_warnings()
    sources = dict(anchor.split("=", 1) for anchor in chosen.anchors)
    with reproducible(1):
        parts = ((name, measured(source, chosen.out / name, chosen)) for name, source in sources.items())
        found = json.loads(chosen.json.read_text()) if chosen.show else keep_parts(parts, chosen.json)
    show(Console(), found)


if __name__ == "__main__":
    main()
