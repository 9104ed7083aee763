"""The comparison with the exact answer: its numbers, its folder, its tables, its report, on small samples."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from deradiff.algorithm.estimates import Estimate
from messages import naming
from programs import invoked
from studies.closed_forms import comparison, report, tables
from studies.closed_forms.cases import PAIRS, WORLDS, Case, Plan, planned
from studies.closed_forms.comparison import Record, compute, difference, exact


def case(**changed: Any) -> Case:
    """A small case of the crossing world, where Algorithm 1 is off by a third."""
    settings = {
        "study": "grid",
        "world": "crossing",
        "rewards": ("slope",),
        "eta": 1.0,
        "beta": 0.5,
        "lam": 0.25,
        "steps": 40,
        "samples": 2000,
        "count": 2000,
    }
    return Case(**{**settings, **changed})


@pytest.fixture(scope="module")
def crossing() -> Record:
    return compute(case())


# -- one case ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", list(WORLDS))
def test_exact_values_are_what_independent_draws_from_the_tilted_reference_give(world: str) -> None:
    names = tuple(WORLDS[world]().rewards)[:1]
    found = exact(case(world=world, rewards=names, beta=1.0, lam=0.5))
    place = WORLDS[world]()
    x = place.reference.sample(200_000, torch.Generator().manual_seed(1))
    reward = place.rewards[names[0]](x)
    tilt = torch.softmax(0.5 * reward, 0)
    error = float((tilt * (reward - tilt @ reward)).square().sum().sqrt())
    assert abs(found.reward - float(tilt @ reward)) < 5 * error
    assert found.shift == pytest.approx(found.reward - float(reward.mean()), abs=5 * float(reward.std()) / 200_000**0.5)
    assert found.modes == pytest.approx((tilt @ place.reference.modes_of(x)).tolist(), abs=0.02)
    log_z = float(torch.logsumexp(0.5 * reward, 0)) - math.log(len(x))
    assert found.divergence == pytest.approx(0.5 * found.reward - log_z, abs=0.03)


def test_arms_are_off_where_theory_says_and_right_where_it_says(crossing: Record) -> None:
    arms = crossing["arms"]
    assert set(arms) == {"aligned", "plain", "weighted", "particles", "annealed"}
    for name in ("aligned", "weighted", "particles"):
        value, error = arms[name]["against_exact"]
        assert abs(value) < 4 * error + 0.02, name
        assert arms[name]["modes_off"] < 3 * arms[name]["modes_allowance"] + 0.01, name
    assert arms["plain"]["against_aligned"][0] < -0.25
    assert arms["plain"]["modes_off"] > 0.08
    assert arms["annealed"]["against_aligned"][0] < arms["plain"]["against_aligned"][0]
    verdict = crossing["verdict"]
    assert verdict["kind"] == "off" and verdict["evenness"] > 0.8
    assert -verdict["error"][0] == pytest.approx(arms["plain"]["against_aligned"][0], abs=0.06)


def test_errors_are_counted_in_exact_shifts(crossing: Record) -> None:
    truth, plain = crossing["exact"], crossing["arms"]["plain"]
    reward, error = plain["reward"]
    assert plain["against_exact"] == pytest.approx(
        [(reward - truth["reward"]) / truth["shift"], error / truth["shift"]]
    )
    gap = (reward - crossing["arms"]["aligned"]["reward"][0]) / truth["shift"]
    assert plain["against_aligned"][0] == pytest.approx(gap)


def test_interpolated_weights_are_exact_for_one_gaussian_and_blank_elsewhere(crossing: Record) -> None:
    found = compute(case(world="gaussian", lam=1.5, samples=200, count=200, steps=10))
    assert found["arms"]["interpolated"]["against_aligned"] == pytest.approx([0, 0], abs=1e-6)
    assert found["arms"]["plain"]["against_aligned"] == pytest.approx([0, 0], abs=1e-6)
    assert "interpolated" not in crossing["arms"]


def test_deterministic_samplers_have_no_particles() -> None:
    found = compute(case(eta=0.0, samples=100, count=100, steps=5))
    assert "particles" not in found["arms"] and found["verdict"]["path_kl"] is None


def test_two_rewards_take_an_anchor_each() -> None:
    found = compute(case(study="two rewards", rewards=("slope", "lift"), beta=1.0, lam=0.5))
    assert found["exact"]["reward"] > compute(case(beta=1.0, lam=0.5, samples=100, count=100))["exact"]["reward"]
    value, error = found["arms"]["weighted"]["against_aligned"]
    assert abs(value) < 4 * error + 0.02


def test_a_few_particles_of_many_prompts_are_better_than_one() -> None:
    one, several = (compute(case(study="particles", count=count)) for count in (1, 16))
    assert set(one["arms"]) == {"aligned", "particles"}
    assert one["arms"]["particles"]["against_exact"][0] < -0.2
    value, error = several["arms"]["particles"]["against_exact"]
    assert abs(value) < 4 * error + 0.03


def test_differences_know_that_their_samples_are_paired() -> None:
    chance = torch.Generator().manual_seed(3)
    runs = []
    for _ in range(300):
        x = torch.randn(400, generator=chance, dtype=torch.float64)
        y = x + 0.1 * torch.randn(400, generator=chance, dtype=torch.float64)
        runs.append(difference(x, y, 0.5 * x))  # weights e^{x/2} move the mean of x to 1/2
    values = torch.tensor([run.value for run in runs])
    assert float(values.mean()) == pytest.approx(0.5, abs=0.02)
    assert sum(run.error for run in runs) / 300 == pytest.approx(float(values.std()), rel=0.15)


# -- plans and folders ------------------------------------------------------------------------------------------------


def test_the_full_plan_has_every_pair_in_every_world_and_no_name_twice() -> None:
    cases = Plan().cases()
    assert len({found.name for found in cases}) == len(cases)
    for world in WORLDS:
        grid = {(c.eta, c.beta, c.lam) for c in cases if c.world == world and c.study == "grid"}
        assert len(grid) == 3 * 3 * 6
    assert {c.count for c in cases if c.study == "particles"} == {1, 4, 16, 64, 256}
    assert {(c.beta, c.lam) for c in cases if c.study == "steps"} == set(PAIRS)


def test_what_is_not_given_follows_from_quick() -> None:
    assert planned() == Plan()
    assert planned(quick=True, steps=7).steps == 7 and planned(quick=True).samples < planned().samples
    assert planned(worlds=("gaussian", "gaussian")).worlds == ("gaussian",)


SMALL = Plan(worlds=("crossing",), samples=100, steps=4, quick=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole comparison, from the command line, by two processes."""
    out = tmp_path_factory.mktemp("truth") / "out"
    result = command("--out", str(out), *SMALL_WORDS)
    assert result.exit_code == 0, result.output
    assert str(out / "report.html") in result.stdout
    return out


SMALL_WORDS = ["--quick", "-w", "crossing", "--samples", "100", "--workers", "2", "--steps", "4"]


def command(*words: str) -> Result:
    return invoked(["studies.closed_forms", *words])


def ignore(done: int, total: int) -> None:
    """No progress bar."""


@pytest.mark.cases(0)
def test_an_interrupted_comparison_computes_what_is_missing_and_nothing_else(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((finished / "cases").iterdir())
    assert len(files) == len(SMALL.cases())
    before = {file: file.read_bytes() for file in files}
    missing = files[::7]
    for file in missing:
        file.unlink()
    computed = []

    def counting(wanted: Case) -> Record:
        computed.append(wanted.name)
        return compute(wanted)

    monkeypatch.setattr(comparison, "compute", counting)
    records = comparison.run(SMALL, finished, ignore)
    assert sorted(computed) == [file.stem for file in missing]
    assert {file: file.read_bytes() for file in files} == before  # though two processes had written them
    assert [record["case"] for record in records] == [found.as_json() for found in SMALL.cases()]


def test_other_settings_and_foreign_files_are_refused(finished: Path, tmp_path: Path) -> None:
    words = [*SMALL_WORDS[:-1], "5"]
    result = command("--out", str(finished), *words)
    assert result.exit_code == 2
    assert re.search(naming(finished, 4, 5), result.output), result.output
    (tmp_path / "letter.txt").write_text("dear")
    result = command("--out", str(tmp_path), *SMALL_WORDS)
    assert result.exit_code == 2 and str(tmp_path) in result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["letter.txt"]
    result = command("--out", str(tmp_path / "letter.txt"), *SMALL_WORDS)
    assert result.exit_code == 2 and str(tmp_path / "letter.txt") in result.output


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--world", "flat"], ["'flat'", "crossing"]),
        (["--samples", "99"], ["99 samples", 100]),
        (["--steps", "1"], ["steps", 2, 1000, 1]),
        (["--steps", "1001"], ["steps", 2, 1000, 1001]),
    ],
)
def test_wrong_input_ends_with_one_sentence(words: list[str], values: list[object], tmp_path: Path) -> None:
    result = command("--out", str(tmp_path / "out"), *words)
    assert result.exit_code == 2
    assert re.search(naming(*values), result.output) and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


# -- tables -----------------------------------------------------------------------------------------------------------


def record(kind: str, true: float, error: float = 0.0, eta: float = 1.0, evenness: float = 0.9, **more: Any) -> Record:
    """What the tables read of a record."""
    arm = {"against_aligned": [true, error], "against_exact": [true, error], "modes_off": 0.03, "modes_allowance": 0.01}
    return {
        "case": case(eta=eta, **more).as_json(),
        "arms": {name: arm for name in ("plain", "weighted", "particles")},
        "verdict": {"kind": kind, "evenness": evenness, "error": [0.0, 0.0]},
    }


def test_verdicts_are_counted_against_true_errors() -> None:
    records = [
        record("trust", 0.019),
        record("trust", -0.06),  # a miss
        record("trust", 0.05, 0.02),  # within two standard errors of 2%: chance
        record("exact", 0.0),
        record("off", 0.3),
        record("off", 0.01),  # a false alarm
        record("uneven", 0.01, eta=0.0),  # another one, of a verdict that cannot tell
        record("uneven", -0.5, 0.1, eta=0.0),
    ]
    found = {(row.kind, row.eta): row for row in tables.verdict_rows(records)}
    assert {key: (row.runs, row.within, row.false_alarms, row.misses) for key, row in found.items()} == {
        ("trust", 1.0): (3, 2, 0, 1),
        ("exact", 1.0): (1, 1, 0, 0),
        ("off", 1.0): (2, 1, 1, 0),
        ("uneven", 0.0): (2, 1, 1, 0),
    }
    assert found["uneven", 0.0].worst == pytest.approx(0.3)
    words = report.verdict_sentence(records)
    assert words.startswith("Of 4 runs called exact or trustworthy, 1 truly miss by more than 2%")
    assert "Of the 4 others, 2 are within 2% (false alarms); 1 of these are among the 2 called off" in words


def test_evenness_is_binned_without_runs_of_one_model() -> None:
    records = [
        record("off", 0.1, evenness=0.3),
        record("off", -0.3, evenness=0.49),
        record("uneven", 0.5, 0.1, evenness=0.05),
        record("off", 0.2, eta=0.0, evenness=1.0),
        record("exact", 0.0, evenness=1.0),
    ]
    rows = tables.evenness_rows(records)
    assert [(row.low, row.high, row.stochastic, row.runs) for row in rows] == [
        (0.03, 0.1, True, 1),
        (0.3, 0.5, True, 2),
        (0.9, 1.0, False, 1),
    ]
    assert rows[0].worst == pytest.approx(0.3) and rows[1].weighted == pytest.approx(0.2)


def test_goals_take_the_worst_run_after_its_monte_carlo_error() -> None:
    records = [record("off", 0.05, 0.02), record("trust", 0.03, lam=2.0), record("off", -0.2, eta=0.0, evenness=0.2)]
    found = {goal.words: goal for goal in tables.goals(records)}
    reward, modes, trusted = found.values()
    assert (reward.worst, reward.met, reward.runs) == (pytest.approx(0.03), False, 2)
    assert "λ = 2" in reward.where
    assert modes.worst == pytest.approx(0.02) and not modes.met
    assert trusted.worst == pytest.approx(0.03) and trusted.runs == 1


def test_beyond_is_what_two_standard_errors_leave() -> None:
    assert tables.beyond(Estimate(-0.5, 0.1)) == pytest.approx(0.3)
    assert tables.beyond(Estimate(0.1, 0.1)) == 0


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_holds_every_case_and_needs_no_other_file(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    summary = json.loads((finished / "summary.json").read_text())
    records = [json.loads(file.read_text()) for file in (finished / "cases").iterdir()]
    assert sum(row["runs"] for row in summary["verdicts"]) == len(tables.judged(records))
    for file in (finished / "cases").iterdir():
        found = json.loads(file.read_text())
        for arm in found["arms"].values():
            value, error = arm["reward"]
            assert f"{value:.3f} ± {error:.3f}" in page, (file.name, arm)
    for world in SMALL.worlds:
        expected = len([c for c in SMALL.cases() if c.world == world])
        assert f"{world}: {expected} cases" in page
    assert page.count("<img") == len(list(finished.glob("*.png")))
    assert "http" not in page and "<script" not in page and 'src="data:image/png;base64,' in page


def test_words_that_look_like_html_are_escaped(finished: Path) -> None:
    records = [json.loads(file.read_text()) for file in sorted((finished / "cases").iterdir())]
    for found in records:
        if "verdict" in found:
            found["verdict"]["words"] = '<b>"off"</b>'
    figures = {path.stem: path for path in finished.glob("*.png")}
    page = report.page(records, SMALL, figures)
    assert "<b>" not in page and "&lt;b&gt;&#34;off&#34;" in page
