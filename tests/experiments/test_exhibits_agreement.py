"""Agreement exhibits hold the numbers that an independent computation gives, of the pairs they are said to be of."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from agreement_results import BETAS, PROMPTS, Scored, column, differences, name_of, plan_of, results_of
from deradiff.algorithm.estimates import Estimate
from deradiff.experiments.reporting import agreement_exhibits, agreement_figures, agreement_statistics
from deradiff.experiments.reporting.agreement_pairs import Study, resampled_means, studies
from deradiff.experiments.reporting.agreement_summaries import middle
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.measures.agreement import paired_difference


@pytest.fixture(scope="module")
def results() -> Scored:
    return results_of(plan_of())


@pytest.fixture(scope="module")
def made(results: Scored) -> dict[str, Exhibit]:
    return {exhibit.key: exhibit for exhibit in agreement_exhibits.exhibits(results)}


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_six_strengths_give_fifteen_pairs_of_either_sort(results: Scored) -> None:
    (study,) = studies(results)
    inside, outside = study.part(True), study.part(False)
    assert len(inside) == len(outside) == 15 and len(study.pairs) == 36
    assert all(study.betas[pair.models.anchor] < study.betas[pair.models.target] for pair in inside)
    assert all(study.betas[pair.models.anchor] > study.betas[pair.models.target] for pair in outside)
    assert study.anchors == study.targets == [name_of(beta) for beta in BETAS]


def test_differences_and_their_errors_are_those_of_a_paired_bootstrap(results: Scored) -> None:
    (study,) = studies(results)
    for pair in study.part(True)[::4]:
        approximated, retrained = (
            torch.from_numpy(results.scores(arm, "main", "pickscore"))
            for arm in (pair.models.approximated, pair.models.retrained)
        )
        truth = paired_difference(approximated, retrained, seed=5)
        assert pair.difference.value == pytest.approx(truth.estimate.value, abs=1e-12)
        assert pair.difference.error == pytest.approx(truth.estimate.error, rel=0.05)
        assert pair.interval == pytest.approx(truth.interval, abs=0.15 * truth.estimate.error)
        alone = [float(scores.mean(1).std() / PROMPTS**0.5) for scores in (approximated, retrained)]
        assert pair.difference.error < 0.3 * math.hypot(*alone)  # what prompts share has cancelled


def test_resamples_take_the_same_prompts_for_all_pairs() -> None:
    values = np.random.default_rng(0).normal(size=(9, 1))
    twice = resampled_means(np.hstack([values, values + 2]), resamples=200)
    assert np.allclose(twice[:, 1], twice[:, 0] + 2) and twice[:, 0].std() > 0.1
    lacking = np.hstack([values, values])
    lacking[0, 1] = np.nan
    assert resampled_means(lacking)[:, 1].mean() == pytest.approx(float(values[1:].mean()), abs=0.02)


def test_a_pair_is_compared_over_the_images_that_both_models_have() -> None:
    results = results_of(plan_of((500, 1000)))
    for name, rows, seeds in (("b500 → b1000", slice(30, None), slice(None)), ("b1000", slice(0, 4), 1)):
        table = results.known[name, "main", "pickscore"]
        table[rows, seeds] = np.nan
    (study,) = studies(results)
    pair = study.at("b500", "b1000")
    assert pair is not None
    first = results.known["b500 → b1000", "main", "pickscore"]
    second = results.known["b1000", "main", "pickscore"]
    by_prompt = [float(first[i, 0] - second[i, 0]) for i in range(4)]
    by_prompt += [float((first[i] - second[i]).mean()) for i in range(4, 30)]
    assert pair.difference.value == pytest.approx(float(np.mean(by_prompt)), abs=1e-12)
    assert (pair.prompts, pair.images, pair.planned) == (30, 56, 80)
    exhibit = next(made for made in agreement_exhibits.exhibits(results) if "-heat-" in made.key)
    assert "2 of 4 cells lack images" in exhibit.caption
    assert exhibit.figure is not None and "n = 56" in written(exhibit.figure)


def test_what_has_no_approximation_has_no_study(results: Scored) -> None:
    known = {
        key: table
        for key, table in results.known.items()
        if "→" not in key[0] or key[0] in ("b500 → b500", "b1000 → b500")
    }
    assert [len(study.pairs) for study in studies(Scored(results.plan, known))] == [2]
    del known["b1000 → b500", "main", "pickscore"]
    assert list(studies(Scored(results.plan, known))) == []
    assert list(agreement_exhibits.exhibits(Scored(results.plan, known))) == []


def test_another_model_of_the_same_strength_is_an_approximation() -> None:
    plan = plan_of((500, 1000))
    models = {name: model.model_dump() for name, model in plan.models.items()}
    twin = plan_of(
        (500, 1000),
        models=models | {"twin": models["b500"]},
        methods=[
            {"method": "model"},
            {"method": "realign", "anchors": ["b500"], "targets": ["b500", "twin"]},
        ],
    )
    (study,) = studies(results_of(twin))
    assert [pair.models.target for pair in study.part(True)] == ["twin"] and not study.part(False)


# -- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_table_5(results: Scored, made: dict[str, Exhibit]) -> None:
    exhibit = made["agreement-statistics-dpo-main-pickscore"]
    mean = np.mean([results.known[name_of(beta), "main", "pickscore"].mean() for beta in BETAS])
    for part, inside in (("λ ≤ 1", True), ("λ > 1", False)):
        d = np.array([away.mean() for (a, t), away in differences(results).items() if a != t and (a < t) == inside])
        found = dict(zip(column(exhibit, "statistic"), column(exhibit, part), strict=True))
        percent = dict(zip(column(exhibit, "statistic"), column(exhibit, f"{part}, % of mean"), strict=True))
        assert found["pairs"] == len(d) == 15
        for name, value in {
            "mean absolute error (MAE)": np.abs(d).mean(),
            "root mean squared error": np.sqrt((d**2).mean()),
            "median absolute error": np.median(np.abs(d)),
            "Bland-Altman bias, mean of y − x": d.mean(),
            "Bland-Altman SD of differences": d.std(ddof=1),
            "limit of agreement, lower": d.mean() - 1.96 * d.std(ddof=1),
            "limit of agreement, upper": d.mean() + 1.96 * d.std(ddof=1),
        }.items():
            assert found[name] == pytest.approx(value, rel=1e-9), name
            assert percent[name] == pytest.approx(100 * value / mean, rel=1e-9), name
        low, high = (found[f"MAE, 95% interval over pairs, {end}"] for end in ("lower", "upper"))
        width = 2 * 1.96 * np.abs(d).std() / 15**0.5
        assert low < found["mean absolute error (MAE)"] < high and high - low == pytest.approx(width, rel=0.15)


def test_noise_of_prompts_is_that_of_a_plain_bootstrap(results: Scored, made: dict[str, Exhibit]) -> None:
    away = np.stack([away for (a, t), away in differences(results).items() if a < t], axis=1)
    rng = np.random.default_rng(3)
    resampled = np.array([away[rng.integers(0, PROMPTS, PROMPTS)].mean(0) for _ in range(4000)])
    exhibit = made["agreement-table-1-dpo-main"]
    assert column(exhibit, "s.e. of the MAE over prompts") == pytest.approx([np.abs(resampled).mean(1).std()], rel=0.05)
    floor = np.abs(resampled - away.mean(0)).mean()
    assert column(exhibit, "MAE of noise alone") == pytest.approx([floor], rel=0.03)
    normal = (2 / math.pi) ** 0.5 * (away.std(0) / PROMPTS**0.5).mean()
    assert floor == pytest.approx(normal, rel=0.05)


def test_where_models_agree_the_whole_error_is_the_noise_of_the_prompts() -> None:
    plan, ratios = plan_of(), []
    for seed in range(8):
        results = results_of(plan, seed=seed)
        rng = np.random.default_rng(seed)
        for arm in plan.arms():
            if arm.target and not arm.particles and arm.lam != 1:
                retrained = results.known[arm.target, "main", "pickscore"]
                results.known[arm.name, "main", "pickscore"] = retrained + rng.normal(0, 0.003, retrained.shape)
        (study,) = studies(results)
        mae = np.mean([abs(pair.difference.value) for pair in study.part(True)])
        ratios.append(float(mae / study.noise(True).floor))
    assert float(np.mean(ratios)) == pytest.approx(1, abs=0.15)


def test_table_1_counts_every_retrained_model_once(results: Scored, made: dict[str, Exhibit]) -> None:
    exhibit = made["agreement-table-1-dpo-main"]
    means = [results.known[name_of(beta), "main", "pickscore"].mean() for beta in BETAS]
    mae = np.mean([abs(away.mean()) for (a, t), away in differences(results).items() if a < t])
    assert column(exhibit, "pairs") == [15]
    assert column(exhibit, "MAE") == pytest.approx([mae], rel=1e-9)
    assert column(exhibit, "μ") == pytest.approx([np.mean(means)]) and column(exhibit, "SD") == pytest.approx(
        [np.std(means)]
    )
    assert column(exhibit, "MAE, % of μ") == pytest.approx([100 * mae / np.mean(means)])


def test_table_2_is_of_the_middle_anchor_in_per_cent_of_the_retrained_mean(
    results: Scored, made: dict[str, Exhibit]
) -> None:
    (study,) = studies(results)
    assert middle(study) == "b2000"  # DeRaDiff's Table 2 is
    exhibit = made["agreement-table-2-dpo-main"]
    assert exhibit.header[2:] == tuple(f"{name_of(beta)} (β = {beta:g})" for beta in BETAS)
    retrained, approximated, percent = (row[2:] for row in exhibit.rows)
    for i, beta in enumerate(BETAS):
        truth = results.known[name_of(beta), "main", "pickscore"].mean()
        away = differences(results)[2000, beta].mean()
        assert retrained[i] == pytest.approx(truth) and approximated[i] == pytest.approx(truth + away)
        assert percent[i] == pytest.approx(100 * abs(away) / truth, abs=1e-12)
    pair = study.part(True)[0]
    assert replace(pair, retrained=0.2314, difference=Estimate(0.2296 - 0.2314, 0)).percent == pytest.approx(
        0.7831, abs=0.02
    )  # as printed there, of means that are printed with four decimals


def test_thresholds_are_the_papers_for_cosines_and_scaled_for_others() -> None:
    (cosine, other) = studies(results_of(plan_of(scores=("clip=folder", "digits"))))
    assert agreement_statistics.thresholds(cosine) == (5e-4, 1e-3)
    means = [estimate.value for estimate in other.retrained.values()]
    expected = [np.std(means) * bound / 0.001434 for bound in (5e-4, 1e-3)]
    assert agreement_statistics.thresholds(other) == pytest.approx(expected)


def test_distribution_counts_errors(results: Scored, made: dict[str, Exhibit]) -> None:
    exhibit = made["agreement-errors-dpo-main-pickscore"]
    errors = sorted(abs(away.mean()) for (a, t), away in differences(results).items() if a < t)
    found = {row[1]: row[3] for row in exhibit.rows if row[0] == "λ ≤ 1" and row[2] is None}
    assert found["n (pairs)"] == 15 and found["maximum"] == pytest.approx(errors[-1])
    assert found["share ≤ 0.0005"] == pytest.approx(np.mean([error <= 5e-4 for error in errors]))
    assert found["90th percentile"] == pytest.approx(np.quantile(errors, 0.9))
    steps = [(row[2], row[3]) for row in exhibit.rows if row[0] == "λ ≤ 1" and row[2] is not None]
    assert [error for error, _ in steps] == pytest.approx(errors)
    assert [share for _, share in steps] == pytest.approx([(i + 1) / 15 for i in range(15)])


def test_noise_distribution_is_a_distribution(results: Scored) -> None:
    (study,) = studies(results)
    at = agreement_statistics.noise_distribution(study, np.array([0.0, 1e-9, 1.0]))
    assert at is not None and at[0] == 0 and at[1] < 0.01 and at[2] == 1


# -- figures ----------------------------------------------------------------------------------------------------------


def written(figure: Figure) -> list[str]:
    """Every text of a figure, cell by cell."""
    return [line for ax in figure.axes for text in ax.texts for line in text.get_text().split("\n")]


def test_heat_maps_annotate_every_cell(results: Scored, made: dict[str, Exhibit]) -> None:
    exhibit = made["agreement-heat-dpo-main-pickscore"]
    assert exhibit.figure is not None
    texts = written(exhibit.figure)
    assert texts.count("anchor") == 6 and len(texts) == 36 + 6 + 36
    assert len(exhibit.rows) == 36
    for row in exhibit.rows:
        named = dict(zip(exhibit.header, row, strict=True))
        away = differences(results)[named["anchor_beta"], named["target_beta"]].mean()
        assert named["difference"] == pytest.approx(away, abs=1e-12)
        assert named["approximated"] - named["retrained"] == pytest.approx(away, abs=1e-12)
        assert named["lambda"] == pytest.approx(named["anchor_beta"] / named["target_beta"])
        assert f"{named['approximated']:.4f}" in texts
    thousandths = 1e3 * differences(results)[500, 1000].mean()
    assert agreement_figures.signed(thousandths) in texts and "10⁻³" in exhibit.figure.axes[1].get_title()


def test_the_staircase_runs_between_interpolation_and_extrapolation(made: dict[str, Exhibit]) -> None:
    figure = made["agreement-heat-dpo-main-pickscore"].figure
    assert figure is not None
    drawn = {
        tuple(zip(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist(), strict=True))
        for line in figure.axes[1].lines
    }
    expected = {((i + 0.5, i + 0.5), (i + 0.5, i + 1.5)) for i in range(5)}
    expected |= {((i - 0.5, i + 0.5), (i + 0.5, i + 0.5)) for i in range(5)}
    assert drawn == expected


def test_lines_have_a_panel_for_every_anchor(results: Scored, made: dict[str, Exhibit]) -> None:
    exhibit = made["agreement-lines-dpo-main-pickscore"]
    assert exhibit.figure is not None
    titles = [ax.get_title() for ax in exhibit.figure.axes if ax.get_visible()]
    assert titles == [f"anchor {name_of(beta)} (β = {beta:g})" for beta in BETAS]
    (first, *_) = exhibit.figure.axes
    retrained = next(line for line in first.lines if line.get_label() == "retrained")
    assert np.asarray(retrained.get_xdata()).tolist() == list(BETAS)
    means = [results.known[name_of(beta), "main", "pickscore"].mean() for beta in BETAS]
    assert np.asarray(retrained.get_ydata()) == pytest.approx(means)
    methods = column(exhibit, "method")
    assert [methods.count(name) for name in ("retrained", "Algorithm 1", "particles", "reference")] == [6, 36, 1, 1]


def test_scatter_and_bland_altman_hold_every_pair_but_the_diagonal(results: Scored, made: dict[str, Exhibit]) -> None:
    for kind in ("scatter", "bland-altman"):
        exhibit = made[f"agreement-{kind}-dpo-main-pickscore"]
        assert len(exhibit.rows) == 30 and column(exhibit, "part").count("λ ≤ 1") == 15
        for anchor, target, ratio in zip(
            *(column(exhibit, n) for n in ("anchor", "target", "log2_beta_ratio")), strict=True
        ):
            assert ratio == pytest.approx(math.log2(float(target[1:]) / float(anchor[1:])))
    scatter = made["agreement-scatter-dpo-main-pickscore"].figure
    assert scatter is not None
    points = np.asarray(scatter.axes[0].collections[-1].get_offsets())
    truth = []
    for (anchor, target), away in differences(results).items():
        if anchor < target:
            retrained = results.known[name_of(target), "main", "pickscore"].mean()
            truth.append((retrained + away.mean(), retrained))
    assert np.array(sorted(points.tolist())) == pytest.approx(np.array(sorted(truth)))


def test_small_differences_are_told_with_their_sign() -> None:
    assert [agreement_figures.signed(x) for x in (0.0123, -1.26, 0.0, 12.6)] == ["+0.012", "−1.3", "0.0", "+13"]
    assert agreement_figures.signed(-0.00004, most=3) == "0.000"


def test_particles_stand_beside_algorithm_1(results: Scored, made: dict[str, Exhibit]) -> None:
    exhibit = made["agreement-particles-dpo-main"]
    assert column(exhibit, "method") == ["Algorithm 1", "4 particles"]
    retrained = results.known["b1000", "main", "pickscore"].mean()
    for row, name in zip(exhibit.rows, ("b500 → b1000", "b500 → b1000, 4 particles"), strict=True):
        named = dict(zip(exhibit.header, row, strict=True))
        assert named["difference"] == pytest.approx(results.known[name, "main", "pickscore"].mean() - retrained)
    assert column(exhibit, "effective_particles") == [None, 2.0] and column(exhibit, "collapsed") == [None, 0.5]


# -- all of them ------------------------------------------------------------------------------------------------------


def test_keys_are_file_names_and_captions_name_substitutes(made: dict[str, Exhibit]) -> None:
    assert len(made) == 9
    for key, exhibit in made.items():
        assert key == key.lower() and key.replace("-", "").isalnum()
        assert "are a substitute for the <500>" in exhibit.caption
        assert all(len(row) == len(exhibit.header) for row in exhibit.rows)


def test_one_that_cannot_be_made_does_not_end_the_others(results: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(study: Study) -> Figure:
        raise ValueError("no room")

    monkeypatch.setattr(agreement_figures, "heat_maps", broken)
    exhibits, raised, keys = agreement_exhibits.exhibits(results), [], []
    for found in until_stopped(exhibits):
        if isinstance(found, Exception):
            raised.append(found)
        else:
            keys.append(found.key)
    assert [error.__notes__ for error in raised] == [["heat_maps: DPO, prompts main, pickscore"]]
    assert len(keys) == 8 and "agreement-bland-altman-dpo-main-pickscore" in keys


def until_stopped(exhibits: Iterator[Exhibit]) -> Iterator[Exhibit | Exception]:
    while True:
        try:
            yield next(exhibits)
        except StopIteration:
            return
        except ValueError as error:
            yield error
