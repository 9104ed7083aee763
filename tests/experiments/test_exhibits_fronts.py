"""Trade-offs, diversity and cost of a small made-up experiment, against computations of their own."""

import io
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from deradiff.experiments.plan import Arm, parse_plan
from deradiff.experiments.reporting import cost_exhibits, diversity_exhibits, front_exhibits
from deradiff.experiments.reporting.arm_series import change, distinct, keys, series_of
from deradiff.experiments.reporting.cost_figures import GainAtCost, by_cost
from deradiff.experiments.reporting.diversity_exhibits import (
    DISTANCE,
    FID,
    LSCD,
    PRECISION,
    RECALL,
    SCD,
    VENDI,
    VENDI_OF_ALL,
    Measured,
    diversity,
)
from deradiff.experiments.reporting.front_figures import root_ticks
from deradiff.experiments.results import Results, over_prompts
from deradiff.sweep.pipelines import SCHEDULERS, scheduler_like
from front_results import PLAN, STEPS, filled, named


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return filled(tmp_path_factory.mktemp("made-up") / "run", parse_plan(PLAN, "the test"))


@pytest.fixture(scope="module")
def found(results: Results) -> dict[Arm, Measured]:
    return diversity(results, "digits")


# -- arms -------------------------------------------------------------------------------------------------------------


def test_arms_with_the_same_images_are_kept_once_under_the_plainest_name(results: Results) -> None:
    names = [arm.name for arm in distinct(results, "cover")]
    assert {"reference", "strong", "weak"} <= {*names}
    assert not {"strong, λ = 0", "strong, λ = 1", "strong → strong", "weak → weak", "strong → weak"} & {*names}
    assert "strong, λ = 0.25" in names  # the same as strong → weak, and before it


def test_series_grow_with_their_parameter(results: Results) -> None:
    found = series_of(results)
    series = {(one.kind, one.variant): [arm.name for arm in one.arms] for one in found}
    assert series["model", 0] == ["weak", "strong"]
    strong = [arm.lam for arm in next(one for one in found if one.kind == "realign").arms]
    assert strong == [0, 0.25, 0.25, 0.5, 1, 1, 1.5]
    assert series["anneal", 0] == ["strong, power:2", "strong, power:4"]
    assert series["anneal", 1] == ["strong, step:0.5"]
    every = [arm for one in series_of(results) for arm in one.arms]
    assert len(every) == len({*every}) == len(results.arms) - 1


def test_keys_tell_models_of_one_kind_apart() -> None:
    assert keys(["clip=a", "CLIP", "hps-v2.0", "clip=b"]) == {
        "clip=a": "clip",
        "CLIP": "clip.2",
        "hps-v2.0": "hps-v2-0",
        "clip=b": "clip.3",
    }


def test_missing_seeds_do_not_weigh_on_a_prompt() -> None:
    table = np.array([[1.0, 3.0], [np.nan, 5.0], [np.nan, np.nan]])
    mean, error = over_prompts(table)
    assert (mean, error) == pytest.approx((3.5, np.std([2, 5], ddof=1) / 2**0.5))
    assert np.isnan(over_prompts(table[2:])).all()


def feature_groups(results: Results, arm: Arm, prompts: str, name: str) -> list[np.ndarray]:
    """The features of each prompt's images."""
    places = results.features_by_place(arm, prompts, name).items()
    return [
        np.stack([vector for _, vector in group]) for _, group in itertools.groupby(places, lambda place: place[0][0])
    ]


# -- diversity --------------------------------------------------------------------------------------------------------


def numbers_of(reference: np.ndarray, other: np.ndarray, k: int) -> dict[str, float]:
    """The measures of all images together, by other formulas: matrix roots, eigenvalues, loops."""
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (reference, other)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    spectra = [np.linalg.eigvalsh(covariance) for covariance in covariances]

    def share_on(points: np.ndarray, of: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(of - centre, axis=1))[k] for centre in of]
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(of, radii, strict=True)) for p in points]
        return float(np.mean(inside))

    return {
        "fid": np.square(reference.mean(0) - other.mean(0)).sum() + np.trace(sum(covariances) - 2 * root),
        "precision": share_on(other, reference),
        "recall": share_on(reference, other),
        "scd": np.square(spectra[0] - spectra[1]).sum(),
        "lscd": np.square(np.log(spectra[0]) - np.log(spectra[1])).sum(),
    }


def effective(x: np.ndarray) -> float:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(unit @ unit.T / len(x))
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_measures_are_those_of_other_formulas(results: Results, found: dict[Arm, Measured]) -> None:
    arm = named(results, "strong, λ = 0.5")
    mine, groups = found[arm], feature_groups(results, arm, "cover", "digits")
    base = feature_groups(results, named(results, "reference"), "cover", "digits")
    expected = numbers_of(np.concatenate(base), np.concatenate(groups), 3)
    measured = [mine.values[measure] for measure in (FID, PRECISION, RECALL, SCD, LSCD)]
    assert measured == pytest.approx(list(expected.values()), rel=1e-5)
    within = [effective(group) for group in groups]
    assert mine.values[VENDI] == pytest.approx(np.mean(within), rel=1e-5)
    assert mine.errors[VENDI] == pytest.approx(np.std(within, ddof=1) / 4**0.5, rel=1e-5)
    assert mine.values[VENDI_OF_ALL] == pytest.approx(effective(np.concatenate(groups)), rel=1e-5)
    apart = [np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(group, 2)]) for group in groups]
    assert mine.values[DISTANCE] == pytest.approx(np.mean(apart), rel=1e-5)
    assert (mine.images, mine.prompts, mine.features, mine.compared) == (20, 4, 3, 3)


def test_standard_errors_leave_each_prompt_out_on_both_sides(results: Results, found: dict[Arm, Measured]) -> None:
    arm = named(results, "strong, λ = 0.5")
    sides = [feature_groups(results, one, "cover", "digits") for one in (named(results, "reference"), arm)]
    kept = [[np.concatenate(side[:row] + side[row + 1 :]) for side in sides] for row in range(4)]
    without = [numbers_of(reference, other, 3)["fid"] for reference, other in kept]
    expected = math.sqrt(3 / 4 * np.square(np.array(without) - np.mean(without)).sum())
    assert found[arm].errors[FID] == pytest.approx(expected, rel=1e-5)


def test_a_jackknife_of_means_is_their_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=9)
    parts = [float(np.delete(values, row).mean()) for row in range(9)]
    assert diversity_exhibits.jackknifed(parts) == pytest.approx(values.std(ddof=1) / 3)
    assert math.isnan(diversity_exhibits.jackknifed([1.0, math.nan]))


def test_the_reference_is_as_diverse_as_itself_and_twins_are_measured_alike(
    results: Results, found: dict[Arm, Measured]
) -> None:
    base = found[named(results, "reference")]
    assert [base.values[measure] for measure in (FID, SCD, LSCD)] == pytest.approx([0, 0, 0], abs=1e-9)
    assert base.values[RECALL] == 1
    assert found[named(results, "strong, λ = 1")] is found[named(results, "strong")]
    assert not any(arm.reward_guidance for arm in found)  # drawn for other prompts


def test_missing_images_are_left_out_of_the_reference_too(tmp_path: Path) -> None:
    results = filled(tmp_path / "run", parse_plan(PLAN, "the test"), lost="weak")
    weak = named(results, "weak")
    mine = diversity(results, "digits")[weak]
    known, other = (results.features_by_place(arm, "cover", "digits") for arm in (named(results, "reference"), weak))
    places = sorted(other)
    assert mine.images == 19 and (1, 2) not in places
    expected = numbers_of(np.stack([known[p] for p in places]), np.stack([other[p] for p in places]), 3)
    assert mine.values[FID] == pytest.approx(expected["fid"], rel=1e-5)
    assert math.isfinite(mine.errors[FID])


def test_too_few_images_for_recall_leave_it_out_and_say_so(tmp_path: Path) -> None:
    plan = parse_plan(PLAN | {"report": {"diversity_on": "cover", "neighbours": 20}}, "the test")
    results = filled(tmp_path / "run", plan)
    mine = diversity(results, "digits")[named(results, "weak")]
    assert math.isnan(mine.values[RECALL]) and math.isfinite(mine.values[FID])
    assert any("k = 20" in words for words in mine.refusals)
    panels = front_exhibits.front(results, "main", "digits", diversity(results, "digits"))
    assert [measure.name for measure in panels] == ["FID", "SCD", "LSCD", "Vendi"]


def test_fid_and_spectral_distances_disagree_about_the_illustration() -> None:
    rows = {
        row[0][:2]: dict(zip(("fid", "scd", "lscd"), row[-3:], strict=True))
        for row in diversity_exhibits.spectral_illustration().rows
    }
    assert rows["D2"]["fid"] < rows["D3"]["fid"]
    assert rows["D2"]["scd"] > rows["D3"]["scd"] and rows["D2"]["lscd"] > rows["D3"]["lscd"]
    # The base's variances are 4 and 0.49, the collapsed set's 0.09 of them, 0.3 and 0.1 away.
    assert rows["D2"]["fid"] == pytest.approx(0.1 + 0.7**2 * (4 + 0.49))
    assert rows["D2"]["scd"] == pytest.approx(0.91**2 * (16 + 0.49**2))
    assert rows["D2"]["lscd"] == pytest.approx(2 * math.log(0.09) ** 2)


def test_spectra_are_divided_rank_by_rank(results: Results, found: dict[Arm, Measured]) -> None:
    exhibit = diversity_exhibits.spectra(results, "digits", "digits", found)
    spectra = {
        name: np.linalg.eigvalsh(np.cov(results.features(named(results, name), "cover", "digits"), rowvar=False))[::-1]
        for name in ("reference", "weak")
    }
    ratios = [row[-1] for row in exhibit.rows if row[0] == "weak"]
    assert ratios == pytest.approx((spectra["weak"] / spectra["reference"]).tolist(), rel=1e-4)


# -- trade-offs -------------------------------------------------------------------------------------------------------


def test_a_front_marks_what_nothing_beats_both_ways(results: Results, found: dict[Arm, Measured]) -> None:
    panels = front_exhibits.front(results, "main", "digits", found)
    for measure, sign in ((FID, -1), (RECALL, 1), (VENDI, 1)):
        panel = panels[measure]
        points = {p.arm: (p.y, sign * p.x) for p in (panel.base, *(p for _, some in panel.series for p in some))}
        beaten = {
            arm
            for arm, mine in points.items()
            if any(all(a >= b for a, b in zip(yours, mine, strict=True)) and yours != mine for yours in points.values())
        }
        assert panel.front == points.keys() - beaten
    fid = panels[FID]
    assert fid.ideal == (pytest.approx(0, abs=1e-9), max(p.y for _, some in fid.series for p in some))
    assert [point.arm.name for point in fid.unregularised] == ["strong"]
    assert fid.base.y == pytest.approx(results.mean(named(results, "reference"), "main", "digits")[0])


def test_a_front_is_about_the_models_of_its_reward(tmp_path: Path) -> None:
    models = {
        name: model | ({"reward": "digits"} if name == "strong" else {"reward": "bold"} if name == "weak" else {})
        for name, model in PLAN["models"].items()
    }
    report = PLAN["report"] | {"unregularised": ["strong", "weak"]}
    results = filled(tmp_path / "run", parse_plan(PLAN | {"models": models, "report": report}, "the test"))
    measured = diversity(results, "digits")
    for score, own, other in (("digits", "strong", "weak"), ("bold", "weak", "strong")):
        for panel in front_exhibits.front(results, "main", score, measured).values():
            shown = {name for _, points in panel.series for point in points for name, _ in point.arm.anchors}
            assert own in shown and "other" in shown and other not in shown
            assert [point.arm.name for point in panel.unregularised] == [own]
    keys = [exhibit.key for exhibit in front_exhibits.divergence(results)]
    assert keys == ["front-path-kl", "front-path-kl-bold"]


def test_divergence_has_the_reference_at_nothing_and_no_arm_whose_path_is_unknown(results: Results) -> None:
    (exhibit,) = front_exhibits.divergence(results)
    rows = {row[1]: row for row in exhibit.rows if row[0] == "main"}
    assert rows["reference"][-3] == 0
    assert {"strong, weights at 0.5", "strong → weak, 4 particles"}.isdisjoint(rows)
    table = results.path_kl(named(results, "weak"), "main")
    assert rows["weak"][-3:-1] == pytest.approx((table.mean(), table.mean(1).std(ddof=1) / 6**0.5))


def test_attributes_come_back_along_lambda_from_the_reference_to_the_anchor(results: Results) -> None:
    (exhibit,) = front_exhibits.returning(results)
    rows = [row for row in exhibit.rows if row[:3] == ("main", "bold", "strong")]
    assert [row[3] for row in rows] == [0, 0.25, 0.5, 1, 1.5]
    means = [
        results.scores(named(results, name), "main", "bold").mean()
        for name in ("reference", "strong, λ = 0.25", "strong, λ = 0.5", "strong", "strong, λ = 1.5")
    ]
    assert [row[7] for row in rows] == pytest.approx([mean - means[0] for mean in means])
    assert [row[11] for row in rows] == pytest.approx([(m - means[0]) / (means[3] - means[0]) for m in means])
    assert all(row[8] <= row[7] <= row[9] and row[10] == 6 for row in rows)
    assert "weak" not in {row[2] for row in exhibit.rows}  # its only realignments are at λ = 1 and 4


def test_a_change_is_over_the_prompts_of_both(results: Results) -> None:
    by_prompt = np.array([1.0, 2.0, np.nan, 3.0, 4.0, np.nan])
    base = results.by_prompt(named(results, "reference"), "main", "digits")
    there = [0, 1, 3, 4]
    mine = change(results, by_prompt, "main", "digits")
    assert mine is not None and mine.prompts == 4
    assert mine.value == pytest.approx((by_prompt - base)[there].mean())
    assert change(results, np.where(np.arange(6) < 1, by_prompt, np.nan), "main", "digits") is None


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("reference", 8),
        ("strong", 8),
        ("strong, weights at 0.5", 8),
        ("strong, λ = 0", 8),
        ("strong, λ = 1", 8),
        ("strong, λ = 0.5", 16),
        ("strong, λ = 1.5", 16),
        ("strong → weak, 4 particles", 64),
        # At the first step the power's λ is 0, so that the anchor is not needed; a step function needs one model ever.
        ("strong, power:2", 15),
        ("strong, step:0.5", 8),
        # Where λ sum to 1, but for rounding, the reference has no weight.
        ("0.3 strong + 0.3 other", 24),
        ("0.7 strong + 0.2 weak + 0.1 other", 24),
    ],
)
def test_evaluations_are_of_the_models_that_have_a_weight(results: Results, name: str, forward: int) -> None:
    assert cost_exhibits.evaluations(results, named(results, name), "main") == (forward, 0)


def test_guided_steps_evaluate_twice(tmp_path: Path) -> None:
    sampling = {"guided": {"scheduler": "heun", "steps": STEPS, "guidance_scale": 5.0}}
    results = filled(tmp_path / "run", parse_plan(PLAN | {"sampling": sampling}, "the test"))
    assert cost_exhibits.evaluations(results, named(results, "reference"), "main") == (2 * 15, 0)


def test_optimised_noise_costs_what_was_counted(results: Results) -> None:
    arm = next(arm for arm in results.arms if arm.reward_guidance)
    cost = cost_exhibits.evaluations(results, arm, "main")
    assert cost is not None and cost == (21, 10) and cost.total == 31
    assert cost_exhibits.evaluations(results, arm, "cover") is None


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samplers_call_the_denoiser_as_often_as_they_have_timesteps(name: str) -> None:
    own = {"flow": FlowMatchEulerDiscreteScheduler, "edm": EDMEulerScheduler}.get(name[:4].rstrip("-"), DDPMScheduler)
    scheduler = scheduler_like(own(), name)
    scheduler.set_timesteps(10)
    assert cost_exhibits.calls_of(name, 10) == len(scheduler.timesteps)


def test_best_of_n_is_the_mean_over_all_choices_of_n() -> None:
    table = np.array([[3.0, 1.0, 2.0, 7.0], [0.0, np.nan, 4.0, 1.0], [np.nan, np.nan, 2.0, 1.0]])
    for count in (1, 2, 3):
        expected = [
            np.mean([max(some) for some in itertools.combinations(row[np.isfinite(row)], count)])
            if np.isfinite(row).sum() >= count
            else np.nan
            for row in table
        ]
        np.testing.assert_allclose(cost_exhibits.best_of(table, count), expected)


def test_gains_at_equal_cost_are_paired_differences(results: Results) -> None:
    (exhibit,) = cost_exhibits.at_equal_cost(results, "cover", "cover")
    rows = {row[0]: dict(zip(exhibit.header, row, strict=True)) for row in exhibit.rows}
    base = results.scores(named(results, "reference"), "cover", "digits")
    for name in ("weak", "strong, λ = 0.5"):
        table = results.scores(named(results, name), "cover", "digits")
        assert rows[name]["difference to the reference"] == pytest.approx((table - base).mean())
    assert rows["strong, λ = 0.5"]["evaluations / reference's"] == 2
    seconds = results.seconds(named(results, "weak")) / results.seconds(named(results, "reference"))
    assert rows["weak"]["seconds / reference's"] == pytest.approx(seconds)
    assert rows["reference, best of 4"]["evaluations / reference's"] == 4
    assert rows["reference, best of 4"]["difference to the reference"] > 0
    assert "reference, best of 8" not in rows  # there are five seeds
    cheapest = max(
        (row for row in rows.values() if row["evaluations / reference's"] == 1),
        key=lambda row: row["difference to the reference"],
    )
    assert cheapest["non-dominated"] == "yes"


def test_arms_of_one_cost_stand_together() -> None:
    def one(kind: str, gain: float, cost: float) -> GainAtCost:
        return GainAtCost(kind, kind, 0, False, gain, gain, gain, cost, 1.0, False)

    groups = by_cost([one("realign", 2, 2), one("model", 5, 1), one("realign", 1, 2.001), one("anneal", 0, 1.9)])
    assert [(cost, [arm.gain for arm in arms]) for cost, arms in groups] == [(1, [5]), (1.9, [0]), (2, [1, 2])]


def test_savings_are_the_papers(results: Results) -> None:
    (exhibit,) = cost_exhibits.savings(results)
    rows = {(row[0], row[1]): dict(zip(exhibit.header, row, strict=True)) for row in exhibit.rows}
    assert (2, "targets of this plan") in rows
    for count, share, exaflops in ((3, 66.7, 377.4), (5, 80, 754.8), (10, 90, 1698.3)):
        row = rows[count, "DeRaDiff, §6"]
        assert (row["saved, %"], row["EFLOP saved"]) == pytest.approx((share, exaflops), abs=0.06)
        assert row["GPU hours saved"] == 336 * (count - 1)
    mixing = [arm for arm in results.of_method("realign") if not arm.particles and arm.lam not in (0, 1)]
    extra = np.mean([results.seconds(arm) for arm in mixing]) - results.seconds(named(results, "reference"))
    assert row["extra seconds per image"] == pytest.approx(extra)
    assert row["evaluations per image / reference's"] == 2


# -- as a whole -------------------------------------------------------------------------------------------------------


def test_ticks_of_a_square_root_axis_lie_apart() -> None:
    for largest in (0.013, 1.0, 37.0, 2400.0):
        ticks = root_ticks(largest)
        assert ticks[0] == 0 and largest / 2.5 <= ticks[-1] <= largest and len(ticks) >= 3
        assert np.diff(np.sqrt(ticks)).min() > 0.13 * largest**0.5
    assert root_ticks(0.0) == [0.0]


def test_every_exhibit_has_its_file_name_its_numbers_and_says_what_stands_in_for_what(results: Results) -> None:
    exhibits = list(front_exhibits.exhibits(results))
    keys_of = [exhibit.key for exhibit in exhibits]
    assert keys_of == [
        "front-digits-digits",
        "front-bold-digits",
        "front-path-kl",
        "attributes-by-lambda",
        "diversity-digits",
        "spectra-digits",
        "spectral-distance",
        "equal-cost-main",
        "equal-cost-cover",
        "compute-saved",
    ]
    assert all(re.fullmatch(r"[a-z0-9.-]+", key) for key in keys_of)
    assert {exhibit.section for exhibit in exhibits} == {"Trade-offs", "Diversity", "Cost"}
    for exhibit in exhibits:
        assert exhibit.rows and {len(row) for row in exhibit.rows} == {len(exhibit.header)}
    for exhibit in exhibits[:3]:
        assert "cover stands for lost ones" in exhibit.caption and exhibit.figure is not None
    assert "figures 4" in exhibits[0].caption and "figures 21" in exhibits[1].caption
    with np.errstate(all="raise"):
        for exhibit in (exhibits[0], exhibits[5], exhibits[7]):
            assert exhibit.figure is not None
            exhibit.figure.savefig(io.BytesIO(), dpi=40)


def test_a_plan_without_features_or_reference_has_no_fronts(tmp_path: Path) -> None:
    bare = {key: value for key, value in PLAN.items() if key != "features"}
    keys_of = [exhibit.key for exhibit in front_exhibits.exhibits(filled(tmp_path / "1", parse_plan(bare, "the test")))]
    assert not any(key.startswith(("front-digits", "diversity", "spectr")) for key in keys_of)
    assert "front-path-kl" in keys_of
    alone = bare | {"methods": [{"method": "model"}], "features": ["digits"]}
    assert list(front_exhibits.exhibits(filled(tmp_path / "2", parse_plan(alone, "the test")))) == []
