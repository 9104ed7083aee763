"""A search in the folder of an experiment: nothing twice, resumable to the last bit, and what it writes."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from deradiff.cli import app
from deradiff.experiments import executors
from deradiff.experiments.store import Store
from deradiff.search import Goal, figures, spaces
from deradiff.search.answers import Best, Front
from deradiff.search.summary import sentences
from messages import naming
from small_experiment import files
from smooth_search import GOAL, PROMPTS, SPACE, Smooth, plan, search


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests need no figure, which takes as long as the rest."""
    if request.node.get_closest_marker("usefixtures") is None:
        monkeypatch.setattr(figures, "draw", lambda *given: given[-1].write_bytes(b""))


@pytest.fixture
def drawn() -> None:
    """For tests that look at the figure."""


@pytest.mark.usefixtures("drawn")
def test_no_image_is_drawn_twice_and_the_best_is_drawn_in_the_end(tmp_path: Path) -> None:
    executor = Smooth()
    outcome = search(tmp_path / "x", executor)
    assert isinstance(outcome.answer, Best) and outcome.answer.point[0] == pytest.approx(0.4, abs=0.02)
    assert len(executor.identities) == len({*executor.identities})
    drawn = {lam for anchors, *_ in executor.identities for _, lam in anchors} | {0.0}
    assert drawn == {one.point[0] for one in outcome.answer.evaluations} | {outcome.answer.point[0]}
    assert [path.name for path in outcome.files] == ["search.png", "sheet.png", "search.json"]
    kept = json.loads((tmp_path / "x" / "search.json").read_text())
    assert kept["answer"]["point"] == [outcome.answer.point[0]] and kept["objectives"] == ["legible"]
    with Image.open(tmp_path / "x" / "search.png") as figure, Image.open(tmp_path / "x" / "sheet.png") as sheet:
        assert min(figure.size) > 500 and sheet.width > 400


@pytest.mark.parametrize("ends_after", [3, 13, 18])
@pytest.mark.cases(1)
def test_a_search_that_was_broken_off_ends_like_an_unbroken_one(tmp_path: Path, ends_after: int) -> None:
    whole = search(tmp_path / "whole", Smooth())
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "broken", Smooth(ends_after=ends_after))
    begun = files(tmp_path / "broken")
    executor = Smooth()
    resumed = search(tmp_path / "broken", executor)
    assert resumed.answer == whole.answer and resumed.checks == whole.checks
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    assert begun.items() <= files(tmp_path / "broken").items()
    assert len(executor.identities) == len(files(tmp_path / "whole")) - len(begun)


def test_a_larger_budget_goes_on(tmp_path: Path) -> None:
    few, more = Smooth(), Smooth()
    first = search(tmp_path / "x", few, budget=3)
    second = search(tmp_path / "x", more, budget=5)
    assert isinstance(first.answer, Best) and isinstance(second.answer, Best)
    for later, earlier in zip(second.answer.evaluations[:3], first.answer.evaluations, strict=True):
        # A product of matrices of another size is rounded otherwise.
        assert asdict(later) == {name: pytest.approx(value, rel=1e-12) for name, value in asdict(earlier).items()}
    assert not {*few.identities} & {*more.identities}
    again = Smooth()
    assert search(tmp_path / "x", again, budget=5).answer == second.answer and again.draws == []


def test_other_weights_under_the_same_name_are_other_images(tmp_path: Path) -> None:
    search(tmp_path / "x", Smooth(), budget=3)
    executor, models = Smooth(), {"strong": {"source": "digits:100", "beta": 100}, "weak": {"source": "digits:500"}}
    search(tmp_path / "x", executor, given=plan(models=models), budget=3)
    drawn = {lam for anchors, *_ in executor.identities for _, lam in anchors}
    assert drawn >= {1.0, 0.5} and all(anchors for anchors, *_ in executor.identities)  # all but the reference


def test_an_image_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    whole = search(tmp_path / "x", Smooth())
    before = files(tmp_path / "x")
    (tmp_path / "x" / next(iter(before))).unlink()
    executor = Smooth()
    assert search(tmp_path / "x", executor).answer == whole.answer
    assert len(executor.identities) == 1 and files(tmp_path / "x") == before


@pytest.mark.parametrize(
    "space",
    [spaces.lams(["strong", "weak"]), spaces.power("strong"), spaces.knots("strong", [0, 1])],
    ids=lambda space: space.kind,
)
@pytest.mark.cases(1)
def test_other_spaces_are_drawn_too(tmp_path: Path, space: spaces.SearchSpace) -> None:
    outcome = search(tmp_path / "x", Smooth(), space=space, budget=len(space.first()) + 1)
    assert isinstance(outcome.answer, Best) and len(outcome.answer.point) == len(space.coordinates)
    # By the mean λ of a run: what Smooth likes is met within what a point more can tell.
    assert outcome.answer.gain.value > 0.1
    assert any(line.startswith("Best: ") for line in sentences(space, GOAL, outcome))


def test_the_experiment_can_be_reported_on(tmp_path: Path) -> None:
    search(tmp_path / "x", Smooth())
    shown = CliRunner().invoke(app, ["experiment", "status", str(tmp_path / "x")])
    assert shown.exit_code == 0 and "strong, λ = 0.5" in shown.output


# -- what is measured --------------------------------------------------------------------------------------------------


def test_an_image_without_a_score_is_left_out_everywhere(tmp_path: Path) -> None:
    outcome = search(tmp_path / "x", Smooth(broken=((0.5, 1),)))
    assert outcome.left_out == len(PROMPTS)
    assert isinstance(outcome.answer, Best) and outcome.answer.point[0] == pytest.approx(0.4, abs=0.02)
    # Scores are those of the seed that is left, at every point.
    lengths = np.mean([len(prompt) for prompt in PROMPTS])
    at_reference = np.mean([len(p) / 10 - 0.16 * (1 + 0.1 * len(p)) for p in PROMPTS])
    assert outcome.answer.evaluations[0].scores[0] == pytest.approx(at_reference) and lengths > 0
    assert any("8 images were left out" in line for line in sentences(SPACE, GOAL, outcome))


def test_a_score_that_fails_at_the_reference_ends_the_search(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("reference", "100%", "finite")):
        search(tmp_path / "x", Smooth(broken=((0.0, 0), (0.0, 1))))


def test_points_without_scores_or_mixture_bound_the_search(tmp_path: Path) -> None:
    space = spaces.lam("strong", 0, 2)
    executor = Smooth(best=1.2, broken=((2.0, 0), (2.0, 1)))
    outcome = search(tmp_path / "x", executor, space=space, budget=5)
    assert "100% of the images could not be scored" in outcome.refused[2.0,]
    assert isinstance(outcome.answer, Best) and max(one.point[0] for one in outcome.answer.evaluations) < 2
    outcome = search(tmp_path / "y", Smooth(best=1.2, no_mixture_beyond=1.5), space=space, budget=5)
    assert "λ must stay under the bound" in outcome.refused[2.0,]
    assert any("could not be used" in line for line in sentences(space, GOAL, outcome))


def test_weighted_scores_are_the_retrained_models(tmp_path: Path) -> None:
    given = plan(prompts={"few": {"prompts": PROMPTS, "seeds": "0:7"}})
    outcome = search(tmp_path / "x", Smooth(log_weight=0.1), given=given, weighted=True, budget=4)
    weights = np.exp(0.1 * np.arange(8))
    mean_seed = weights @ np.arange(8) / weights.sum()
    assert isinstance(outcome.answer, Best)
    by_lam = {one.point[0]: one for one in outcome.answer.evaluations}
    plain = np.mean([len(p) / 10 - 0.01 * (1 + 0.1 * len(p)) for p in PROMPTS])
    assert by_lam[0.5].scores[0] == pytest.approx(plain + mean_seed)
    assert by_lam[1.0].scores[0] == pytest.approx(
        np.mean([len(p) / 10 - 0.36 * (1 + 0.1 * len(p)) for p in PROMPTS]) + 3.5
    )


def test_weights_need_a_target_and_enough_images(tmp_path: Path) -> None:
    given = plan(prompts={"few": {"prompts": PROMPTS, "seeds": "0:7"}})
    with pytest.raises(ValueError, match="guided"):
        search(tmp_path / "x", Smooth(obstacles=("guidance",)), given=given, weighted=True)
    with pytest.raises(ValueError, match=naming("8 seeds", 2)):
        search(tmp_path / "y", Smooth(), weighted=True)


def test_conditions_and_fronts_on_diversity(tmp_path: Path) -> None:
    given = plan(features=["digits"], report={"neighbours": 3})
    goal = Goal.read(["legible"], require=["distance >= reference - 0.5"])
    outcome = search(tmp_path / "x", Smooth(), goal, given)
    assert isinstance(outcome.answer, Best)
    # Distances shrink by 0.9 λ: a loss of 0.5 of about 2.5 is at λ = 0.2.
    assert 0.1 < outcome.answer.point[0] < 0.3 and outcome.answer.conditions[0].probability >= 0.8
    front = search(tmp_path / "x", Smooth(), Goal.read(["legible", "recall"]), given)
    assert isinstance(front.answer, Front) and len(front.checks) == len(front.answer.points) > 1
    never = Goal.read(["legible", "recall"], require=["recall >= 2"])
    none = search(tmp_path / "x", Smooth(), never, given)
    assert isinstance(none.answer, Front) and not none.answer.points
    assert next(iter(sentences(SPACE, never, none))) == "No point meets all conditions."


def test_one_prompt_is_measured_by_its_seeds(tmp_path: Path) -> None:
    given = plan(prompts={"few": {"prompts": PROMPTS[:1], "seeds": "0:5"}})
    outcome = search(tmp_path / "x", Smooth(), given=given)
    assert isinstance(outcome.answer, Best) and outcome.answer.point[0] == pytest.approx(0.4, abs=0.02)
    with pytest.raises(ValueError, match=naming("one prompt", "one seed")):
        search(tmp_path / "y", Smooth(), given=plan(prompts={"few": {"prompts": PROMPTS[:1]}}))


@pytest.mark.parametrize(
    ("goal", "changes", "values"),
    [
        (["colours"], {}, ["'colours'"]),
        (["recall"], {}, ["recall", "extractor"]),
        (["vendi"], {"features": ["digits"], "prompts": {"few": {"prompts": PROMPTS}}}, ["vendi", "two seeds"]),
    ],
)
def test_what_is_not_measured(tmp_path: Path, goal: list[str], changes: dict[str, Any], values: list[str]) -> None:
    with pytest.raises(ValueError, match=naming(*values)):
        search(tmp_path / "x", Smooth(), Goal.read(goal), plan(**changes))
    assert not (tmp_path / "x").exists()


# -- hacking -----------------------------------------------------------------------------------------------------------


def test_hacking_shows_in_what_was_held_out(tmp_path: Path) -> None:
    given = plan(features=["digits"], report={"neighbours": 3})
    falls = search(tmp_path / "x", Smooth(best=0.9), Goal.read(["legible"]), given)
    (found,) = falls.checks.values()
    assert (
        "This may be reward hacking" in found.sentence and "the Vendi score" not in found.sentence.split("hacking")[0]
    )
    recall = next(one for one in found.compared if one.name == "recall")
    assert recall.winner < 0.5 and recall.suspicious
    bold = next(one for one in found.compared if one.name == "bold")
    assert bold.difference.value == pytest.approx(3 * falls.answer.point[0]) and not bold.suspicious  # type: ignore[union-attr, index]
    fine = search(tmp_path / "y", Smooth(best=0.05), Goal.read(["legible"]), plan())
    (sentence,) = [check.sentence for check in fine.checks.values()]
    assert sentence.startswith("No sign of reward hacking: bold rises (+0.1")
    bare = search(tmp_path / "z", Smooth(), Goal.read(["legible"]), plan(scores=["legible"]))
    assert next(iter(bare.checks.values())).sentence.startswith("Not checked")


# -- real pictures -----------------------------------------------------------------------------------------------------


def test_the_digits_are_searched_by_the_command(tmp_path: Path) -> None:
    command = [
        "search",
        "digits",
        "-a",
        "digits:100",
        "-o",
        str(tmp_path / "x"),
        "-m",
        "legible + 0.1*bold",
        "--held-out",
        "colours",
        "--features",
        "digits",
        "--neighbours",
        "3",
        "-p",
        "the digit one",
        "-p",
        "the digit two",
        "-p",
        "a red three",
        "-s",
        "0:1",
        "--scheduler",
        "euler-a",
        "--steps",
        "2",
        "--guidance-scale",
        "1",
        "--workers",
        "1",
        "--evaluations",
        "3",
        "--require",
        "path-kl <= 1000",
    ]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "Best: λ = " in shown.output and "Stopped after 3 evaluations" in shown.output
    assert "path-kl <= 1000: met by" in shown.output
    with Store(tmp_path / "x", write=False) as store:
        told = {len(one[0]) for one in store.diagnostics().values()}
        assert len(store.drawn()) in (18, 24) and len(told) > 0
    assert executors.InProcess.size == 1


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    base = ["search", "digits", "-a", "digits:100", "-o", str(tmp_path / "x"), "-p", "the digit one"]
    options: dict[tuple[str, ...], tuple[str, ...]] = {
        (): ("maximise",),
        ("-m", "legibel"): ("'legibel'",),
        ("-m", "legible", "--range", "0:3"): ("0 to 2", "0 to 3"),
        ("-m", "legible", "--range", "0"): ("LOW:HIGH",),
        ("-m", "legible", "--over", "time"): ("lam, power and knots",),
        ("-m", "legible", "--box"): ("--box",),
        ("-m", "legible", "--evaluations", "2"): ("budget", "2"),
        ("-m", "legible", "--prompts", "digits"): ("--prompts",),
    }
    for extra, values in options.items():
        shown = CliRunner().invoke(app, [*base, *extra])
        assert shown.exit_code == 2, (extra, shown.output)
        assert re.search(naming(*values), " ".join(shown.output.split())), (extra, shown.output)
    assert not (tmp_path / "x").exists()


def test_scores_nearby_come_from_the_same_images(tmp_path: Path) -> None:
    given = plan(prompts={"few": {"prompts": PROMPTS, "seeds": "0:7"}})
    states: list[Any] = []

    def keep(state: Any) -> None:
        states.append(state.tables)

    executor = Smooth(log_weight=0.1, log_ratio=0.5)
    search(tmp_path / "x", executor, given=given, weighted=True, nearby=0.1, budget=3, on_evaluation=keep)
    tables = states[0]
    assert set(tables.near) == {(0.4,), (0.6,)}, "λ = 0 and 1 run one model, whose path has no ratio"
    estimated = dict(zip(tables.near, tables.estimates["legible"], strict=True))
    seeds = np.arange(8)
    mine, there = (np.exp(rate * seeds) @ seeds / np.exp(rate * seeds).sum() for rate in (0.1, 0.1 + 0.1 * 0.5))
    half = tables.points["legible"][2]  # after the reference and the anchor
    assert float(estimated[(0.6,)][0]) == pytest.approx(float(half[0]) + 8 / 7 * (there - mine))
    assert tables.extended().points["legible"].shape[0] == tables.points["legible"].shape[0] + 2
    bad: list[tuple[dict[str, Any], str]] = [
        ({"nearby": 0.1}, "weighted"),
        ({"nearby": -1.0, "weighted": True}, naming("nearby", 0, 0.5, -1)),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            search(tmp_path / "y", Smooth(), given=given, **changes)
