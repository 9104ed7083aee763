"""How far λ can go: knees that are known are found with their uncertainty, and where there is none, none is."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from deradiff.cli import app
from deradiff.search import Goal, Tables, figures, maximise, spaces
from deradiff.search.answers import MET
from deradiff.search.goals import BEATS, DRIFT
from deradiff.search.knees import Knee, fit
from deradiff.search.spaces import Point, SearchSpace
from deradiff.search.summary import sentences
from messages import naming
from smooth_search import PROMPTS, Smooth, plan, search

GOAL = Goal.undo_hacking("score")
UNITS, REACH = 40, 30.0
DRIFTS = torch.linspace(0, REACH, 101, dtype=torch.float64)[None]


def bent(at: float, after: float = 0.1) -> Callable[[Tensor], Tensor]:
    """A front that rises by 0.03 a unit of drift up to the knee, and by a share of that beyond it."""
    return lambda drift: 0.03 * (drift.clamp(max=at) + after * (drift - at).clamp(min=0))


# -- lines through a front ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "after"), [(4.0, 0.3), (9.0, 0.2), (20.0, 0.0)])
def test_two_lines_meet_at_the_knee(at: float, after: float) -> None:
    lines = fit(DRIFTS, bent(at, after)(DRIFTS))
    assert float(lines.drift) == pytest.approx(at, abs=REACH / 64) and bool(lines.bent)
    assert float(lines.before) == pytest.approx(0.03, rel=0.05)
    assert float(lines.after) == pytest.approx(0.03 * after, abs=0.0006)


@pytest.mark.parametrize(
    "front",
    [lambda x: x, lambda x: x**2, lambda x: 1 - torch.exp(-x / REACH), lambda x: -x, lambda x: 0 * x, bent(3, 0)],
    ids=["straight", "ever steeper", "hardly bent", "falling", "nothing", "next to nothing"],
)
def test_a_front_that_does_not_bend_has_no_knee(front: Callable[[Tensor], Tensor]) -> None:
    assert not bool(fit(DRIFTS, front(DRIFTS)).bent)


def test_the_front_is_what_is_best_up_to_a_drift_whatever_the_order() -> None:
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    falls = torch.where(DRIFTS < 10, DRIFTS, 20 - DRIFTS)  # beyond 10 nothing is gained, as if it stayed level
    lines = fit(DRIFTS[:, order], falls[:, order])
    assert float(lines.drift) == pytest.approx(10, abs=REACH / 64) and abs(float(lines.after)) < 0.02


# -- searches on known fronts ------------------------------------------------------------------------------------------


def tables_of(front: Callable[[Tensor], Tensor], noise: float, seed: int = 0) -> Callable[[Sequence[Point]], Tables]:
    """Fronts that differ from prompt to prompt by a tenth, with noise of their own at every point."""

    def evaluate(points: Sequence[Point]) -> Tables:
        chance = torch.Generator().manual_seed(seed)
        taste = 1 + 0.1 * torch.randn(UNITS, dtype=torch.float64, generator=chance)
        rows = []
        for point in points:
            own = torch.Generator().manual_seed(seed + 1 + round(1000 * sum(point)))
            drift = torch.full((UNITS,), REACH * math.hypot(*point), dtype=torch.float64)
            gain = taste * front(drift) + noise * torch.randn(UNITS, dtype=torch.float64, generator=own) * (drift > 0)
            rows.append({BEATS + "score": 0.5 + gain, DRIFT: drift * taste, "score": 3 + 10 * gain})
        nothing = {BEATS + "score": 0.5, DRIFT: 0.0, "score": 3.0}
        reference = {name: torch.full((UNITS,), value, dtype=torch.float64) for name, value in nothing.items()}
        return Tables(reference, {name: torch.stack([row[name] for row in rows]) for name in reference})

    return evaluate


def looked_for(
    front: Callable[[Tensor], Tensor], noise: float = 0.05, space: SearchSpace | None = None, **options: Any
) -> Knee:
    answer = maximise(space or spaces.lam("anchor"), GOAL, tables_of(front, noise, **options), budget=8)
    assert isinstance(answer, Knee) and len(answer.evaluations) == 8
    return answer


@pytest.mark.parametrize("at", [6.0, 15.0])
def test_a_known_knee_lies_in_the_interval_and_the_answer_before_it(at: float) -> None:
    answer = looked_for(bent(at), noise=0.02)
    assert answer.probability >= MET and answer.drift.low <= at <= answer.drift.high
    ((low, high),) = answer.ranges
    assert low <= at / REACH <= high and high - low < 0.25
    assert answer.point is not None and 0.6 * at <= REACH * answer.point[0] <= at
    assert answer.beats is not None and answer.gain is not None
    assert answer.beats.low <= 0.5 + 0.03 * REACH * answer.point[0] <= answer.beats.high + 0.02
    assert answer.gain.value == pytest.approx(10 * (answer.beats.value - 0.5), abs=0.3)


@pytest.mark.parametrize(
    "front", [lambda x: 0.015 * x, lambda x: 0.0005 * x**2, lambda x: -0.01 * x], ids=["straight", "steeper", "worse"]
)
def test_no_knee_is_an_answer(front: Callable[[Tensor], Tensor]) -> None:
    answer = looked_for(front)
    assert answer.point is None and answer.ranges == () and answer.probability < MET


def test_two_numbers_have_a_knee_in_the_drift() -> None:
    space = spaces.knots("anchor", [0, 1])
    answer = maximise(space, GOAL, tables_of(bent(12), 0.02), budget=9)
    assert isinstance(answer, Knee) and answer.point is not None and len(answer.ranges) == 2
    assert answer.drift.low <= 12 <= answer.drift.high and REACH * math.hypot(*answer.point) <= 12.5


# -- in a folder -------------------------------------------------------------------------------------------------------


@dataclass
class Drifting(Smooth):
    """Scores rise with λ by `rise`, among seeds that lie one point apart; paths part as λ²."""

    rise: float = 10.0

    def told(self, drawing: Any) -> dict[str, Any]:
        lam = sum(lam for _, lam in drawing.anchors)
        return super().told(drawing) | {"path_kl": (REACH * lam) ** 2 * (1 + 0.1 * len(drawing.prompt) / 15)}

    def score(self, name: str, picture: dict[str, Any]) -> tuple[Any, Any]:
        return self.rise * picture["lam"] + picture["seed"] + len(picture["prompt"]) / 10, None


def hacked(folder: Path, executor: Drifting, **options: Any) -> Any:
    given = plan(prompts={"few": {"prompts": PROMPTS, "seeds": "0:3"}}, scores=["bold", "legible"])
    return search(folder, executor, Goal.undo_hacking("bold"), given, **{"budget": 6} | options)


def test_the_reference_is_beaten_by_images_of_other_seeds(tmp_path: Path) -> None:
    answer = hacked(tmp_path / "x", Drifting(rise=3.0), budget=3).answer
    beats = {one.point: one.scores[0] for one in answer.evaluations}
    drifts = {one.point: -one.scores[1] for one in answer.evaluations}
    # Of 12 pairs of different seeds, those more than 1.5 points behind are (0, 2), (0, 3) and (1, 3).
    assert beats == {(0.0,): 0.5, (0.5,): 0.75, (1.0,): pytest.approx(11.5 / 12)}
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    assert drifts[1.0,] == pytest.approx(np.sqrt(REACH**2 * (1 + 0.1 * lengths / 15)).mean())


def test_a_knee_is_written_down_and_drawn(tmp_path: Path) -> None:
    outcome = hacked(tmp_path / "x", Drifting())
    answer = outcome.answer
    assert isinstance(answer, Knee) and answer.point is not None and 0 < answer.point[0] < 0.4  # all are beaten at 0.31
    kept = json.loads((tmp_path / "x" / "search.json").read_text())
    assert kept["knee"] == "bold" and kept["answer"]["point"] == list(answer.point) and kept["verdict"] is None
    assert [path.stat().st_size > 1000 for path in outcome.files] == [True] * 3
    words = " ".join(sentences(spaces.lam("strong"), Goal.undo_hacking("bold"), outcome, 30.0))
    assert f"Take λ = {answer.point[0]:g}" in words and "β" not in words and "legible rises" in words


def test_no_knee_is_said_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    draw = figures._labelled

    def kept(axes: Any, answer: Knee) -> None:
        draw(axes, answer)
        titles.append(axes.get_title())

    monkeypatch.setattr(figures, "_labelled", kept)
    outcome = hacked(tmp_path / "x", Drifting(rise=-5.0), budget=4)
    assert outcome.answer.point is None and outcome.checks == {} and titles[0].startswith("no knee")
    assert any(line.startswith("No knee found") for line in sentences(spaces.lam("strong"), GOAL, outcome))


@pytest.mark.parametrize("score", ["bold - 0.1*legible", "2*bold", "path-kl", "beats-reference:bold"])
def test_a_knee_is_that_of_one_score(score: str) -> None:
    with pytest.raises(ValueError, match=re.escape(score)):
        Goal.undo_hacking(score)


def test_what_the_command_needs_for_a_knee(tmp_path: Path) -> None:
    base = ["search", "digits", "-a", "digits:100", "-o", str(tmp_path / "x"), "-p", "the digit one", "--undo-hacking"]
    options: dict[tuple[str, ...], tuple[str, ...]] = {
        (): ("--maximize",),
        ("-m", "bold", "-m", "legible"): ("one score",),
        ("-m", "bold", "--require", "recall >= 0.5"): ("one score",),
        ("-m", "bold", "-s", "0"): ("two seeds",),
        ("-m", "bold", "-s", "0:7", "--weighted"): ("weights",),
    }
    for extra, values in options.items():
        shown = CliRunner().invoke(app, [*base, *extra])
        assert shown.exit_code == 2, (extra, shown.output)
        assert re.search(naming(*values), " ".join(shown.output.split())), (extra, shown.output)
