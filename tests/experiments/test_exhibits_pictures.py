"""Picture sheets show the images they say, and Table 3's distances are those of an independent computation."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from deradiff.experiments.reporting import hacking_distances, hacking_exhibits, picture_exhibits
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.experiments.reporting.picture_sheets import ABSENT, best_set, label, shots, stored_picture
from deradiff.experiments.results import Results
from deradiff.sweep.sheets import TILE_GAP, panel_sheet
from messages import naming
from picture_results import METHODS, WORDS, arm, cells, colour, colour_of, plan_of, results_of


def named_rows(exhibit: Exhibit) -> list[dict[str, Any]]:
    return [dict(zip(exhibit.header, row, strict=True)) for row in exhibit.rows]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    yield results_of(tmp_path_factory.mktemp("pictures") / "run", plan_of())


@pytest.fixture(scope="module")
def every(results: Results) -> dict[str, Exhibit]:
    all_of_them = list(picture_exhibits.exhibits(results))
    assert len({exhibit.key for exhibit in all_of_them}) == len(all_of_them)
    return {exhibit.key: exhibit for exhibit in all_of_them}


# -- sheets -----------------------------------------------------------------------------------------------------------


def test_a_strip_shows_reference_anchor_and_every_lam_once_in_order(
    results: Results, every: dict[str, Exhibit]
) -> None:
    names = ["reference", "low → high", "low → mid", "low, λ = 0.75", "low", "low, λ = 1.5"]  # 0, ¼, ½, ¾, 1, 1.5
    strip = every["strip-low"]
    shown = cells(strip, 2, len(names))
    assert shown == [[colour(results, name, "main", row, 0) for name in names] for row in range(2)]
    assert [row[2] for row in strip.rows[: len(names)]] == names
    assert "figure 3" in strip.caption and "first 2 prompts of “main”, seed 3" in strip.caption


def test_pairs_are_the_retrained_model_above_its_approximations(results: Results, every: dict[str, Exhibit]) -> None:
    names = ["high", "low → high", "mid → high"]  # λ = ¼, ½
    shown = cells(every["pairs-high"], len(names), 2)
    assert shown == [[colour(results, name, "main", row, 0) for row in range(2)] for name in names]
    assert "figure 1" in every["pairs-high"].caption


def test_rows_name_files_that_are_there_with_their_scores(results: Results, every: dict[str, Exhibit]) -> None:
    exhibit = every["strip-low"]
    assert exhibit.header == ("prompt", "seed", "arm", "file", "bold")
    some = results.image(arm(results, "reference"), "main", 0, 0)
    assert some is not None
    folder = some.parents[2]
    for prompt, seed, name, file, score in exhibit.rows:
        assert results.image(arm(results, name), "main", WORDS.index(prompt), seed - 3) == folder / file
        assert file.startswith("images/") and score == colour_of(Path(file).stem)[0]


def test_annealed_and_combined_arms_stand_between_what_they_mix(results: Results, every: dict[str, Exhibit]) -> None:
    names = ["reference", "low, power:3", "low, power:2", "low, power:1", "low"]  # mean λ 0, ¼, ⅓, ½, 1
    assert cells(every["annealed-low"], 2, 5)[1] == [colour(results, name, "main", 1, 0) for name in names]
    names = ["reference", "low", "refl", "0.5 low + 0.5 refl"]
    assert cells(every["combined-low-refl"], 2, 4)[0] == [colour(results, name, "main", 0, 0) for name in names]


def test_methods_are_represented_by_fixed_rules_on_the_set_that_has_most(
    results: Results, every: dict[str, Exhibit]
) -> None:
    arms = [one.name for one in picture_exhibits.representatives(results, "low")]
    assert arms == [
        "reference",
        "low",
        "low, power:2",
        "low → mid",
        "low → high, 2 particles",
        "low, weights at 0.4",
        "0.5 low + 0.5 refl",
        "high",
        "refl",
        "noise for bold, 3 iterations",
    ]
    sheet = every["methods-low"]
    assert {row[0] for row in sheet.rows} == {*WORDS[1:3]}, "only “few” has the optimised noise"
    # The particles were drawn for “main”, where the same prompts and seed are: the same images.
    assert [row[2] for row in sheet.rows[: len(arms)]] == arms
    assert cells(sheet, 2, len(arms))[0][4] == colour(results, "low → high, 2 particles", "main", 1, 0)
    assert "particles" in sheet.caption and "noise that is optimised" in sheet.caption


def test_a_grid_has_every_methods_images_of_the_same_seeds_in_the_same_places(
    results: Results, every: dict[str, Exhibit]
) -> None:
    grids = [key for key in every if key.startswith("grid")]
    assert grids == ["grid-low-1", "grid-low-2"], "“wide” has most seeds, and two prompts are pictured"
    exhibit = every["grid-low-2"]
    assert exhibit.picture is not None and "substitute for the 40 prompts" in exhibit.caption
    names = [
        "reference",
        "low",
        "low, power:2",
        "low → mid",
        "low, weights at 0.4",
        "0.5 low + 0.5 refl",
        "high",
        "refl",
    ]
    assert [row[2] for row in exhibit.rows[: len(names)]] == names
    assert {row[1] for row in exhibit.rows} == {*range(9)} and {row[0] for row in exhibit.rows} == {WORDS[1]}
    tile, pixels = 96, np.asarray(exhibit.picture).astype(np.int32) @ (1 << 16, 1 << 8, 1)
    for name in names:
        middles = []
        for seed in range(9):
            red, green, blue = colour(results, name, "wide", 1, seed)
            ys, xs = np.nonzero(pixels == (red << 16) + (green << 8) + blue)
            assert len(ys) == tile * tile, "enlarged by a whole factor, and shown once"
            middles.append((ys.min(), xs.min()))
        (top, left), step = middles[0], tile + TILE_GAP
        assert middles == [(top + seed // 3 * step, left + seed % 3 * step) for seed in range(9)]


def test_what_is_missing_is_crossed_out_and_an_arm_without_pictures_left_out(tmp_path: Path) -> None:
    def wanted(cell: Any) -> bool:
        mine = cell.arm.method in ("reference", "model") or cell.arm.name in ("low → high", "low, λ = 0.75")
        return mine and not (cell.arm.name == "low → high" and cell.drawing.prompt == WORDS[0])

    results = results_of(tmp_path / "run", plan_of(), wanted)
    every = {exhibit.key: exhibit for exhibit in picture_exhibits.exhibits(results)}
    strip = every["strip-low"]
    names = ["reference", "low → high", "low, λ = 0.75", "low"]
    assert [row[2] for row in strip.rows] == [names[0], *names[2:], *names]
    assert "1 of 8 pictures" in strip.caption
    assert strip.picture is not None
    assert cells(strip, 2, 4)[1] == [colour(results, name, "main", 1, 0) for name in names]
    assert ABSENT in {count[1] for count in strip.picture.getcolors(1 << 20) or []}
    assert not any(key.startswith(("annealed", "combined", "strip-high")) for key in every)
    path = results.image(arm(results, "low"), "main", 0, 0)
    assert path is not None
    path.write_bytes(b"no picture")  # altered behind the store's back
    again = next(exhibit for exhibit in picture_exhibits.exhibits(results) if exhibit.key == "strip-low")
    assert cells(again, 2, 4)[0][2] == colour(results, "low, λ = 0.75", "main", 0, 0)


def test_a_prompt_that_nobody_has_a_picture_of_is_left_out_and_counted(tmp_path: Path) -> None:
    results = results_of(tmp_path / "run", plan_of(), lambda cell: cell.drawing.prompt != WORDS[0])
    strip = next(exhibit for exhibit in picture_exhibits.exhibits(results) if exhibit.key == "strip-low")
    assert cells(strip, 1, 6) == [[colour(results, row[2], "main", 1, 0) for row in strip.rows]]
    assert "6 of 12 pictures" in strip.caption


def test_nothing_drawn_is_nothing_shown(tmp_path: Path) -> None:
    assert list(picture_exhibits.exhibits(results_of(tmp_path / "run", plan_of(), lambda cell: False))) == []


def test_triples_are_hacked_realigned_and_healthy(results: Results, every: dict[str, Exhibit]) -> None:
    triples = [key for key, exhibit in every.items() if exhibit.section == "Reward hacking" and exhibit.picture]
    assert triples == ["hacking-low-high", "hacking-low-high-2-particles", "hacking-mid-high"]
    names = ["low", "low → high", "high"]
    shown = cells(every["hacking-low-high"], 2, 3)
    assert shown == [[colour(results, name, "main", row, 0) for name in names] for row in range(2)]
    assert "same noise" not in every["hacking-low-high-2-particles"].caption


def test_labels_say_what_and_with_what(results: Results) -> None:
    plan = results.plan
    assert label(plan, arm(results, "low → mid")) == "DeRaDiff\nlow\nλ = 0.5\nβ/λ = 200"
    assert label(plan, arm(results, "low, power:2")) == "annealed guidance\nlow\npower, p = 2"
    assert label(plan, arm(results, "refl")) == "refl"
    few = shots(results, "few")
    assert best_set(results, results.of_method("optimize-noise")) == "main", "where the same pictures are"
    place = stored_picture(results, results.of_method("optimize-noise")[0], few[0])
    assert place is not None and place.prompts == "few"


def test_panels_refuse_titles_that_do_not_fit() -> None:
    blank = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match=naming("1 titles", [1, 1])):
        panel_sheet([[blank], [blank]], ["a"])


# -- distances --------------------------------------------------------------------------------------------------------


def naive(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance by SciPy's matrix root."""
    one, two = (np.cov(x.astype(np.float64), rowvar=False) for x in (first, second))
    root = scipy.linalg.sqrtm(one @ two)
    away = first.mean(0, dtype=np.float64) - second.mean(0, dtype=np.float64)
    return float(away @ away + np.trace(one + two - 2 * root.real))


@pytest.fixture(scope="module")
def sets() -> dict[str, np.ndarray]:
    """Paired features of (prompt, seed): the realigned model is near the healthy one, the hacked one is not."""
    random = np.random.default_rng(5)
    healthy = random.normal(size=(30, 1, 5)) + random.normal(size=(30, 4, 5))
    return {
        "high": healthy,
        "low → high": healthy + 0.2 * random.normal(size=healthy.shape) + 0.1,
        "low": 0.5 * healthy + 0.3 * random.normal(size=healthy.shape) + 1,
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, sets: dict[str, np.ndarray]) -> Results:
    plan = plan_of(
        prompts={"main": {"prompts": [f"a {n}" for n in range(30)], "seeds": "0:3"}},
        methods=[
            {"method": "model", "models": ["low", "high"]},
            {"method": "realign", "anchors": ["low"], "targets": ["high"]},
        ],
        report={"healthy": "high", "hacked": ["low"]},
    )

    def vector(cell: Any, item: str) -> np.ndarray | None:
        # One image has no features of the hacked model: its place drops out for all three.
        missing = cell.arm.name == "low" and (cell.row, cell.column) == (0, 0)
        return None if missing else sets[cell.arm.name][cell.row, cell.column].astype(np.float32)

    return results_of(tmp_path_factory.mktemp("hacking") / "run", plan, vector=vector)


def test_table_3_is_that_of_an_independent_computation(measured: Results, sets: dict[str, np.ndarray]) -> None:
    table, figure = list(hacking_exhibits.distance_exhibits(measured, "digits"))
    assert table.figure is None and figure.figure is not None and table.rows == figure.rows
    (row,) = named_rows(table)
    flat = {name: x.astype(np.float32).reshape(-1, 5)[1:] for name, x in sets.items()}
    far, near = naive(flat["high"], flat["low"]), naive(flat["high"], flat["low → high"])
    assert row["distance of hacked"] == pytest.approx(far, rel=1e-6)
    assert row["distance of realigned"] == pytest.approx(near, rel=1e-6)
    assert row["Δ"] == pytest.approx(far - near, rel=1e-6)
    assert row["Δ in %"] == pytest.approx(100 * (far - near) / far, rel=1e-6)
    assert (row["images (n)"], row["prompts (n)"], row["λ"]) == (119, 30, 0.25)
    assert row["few samples"] == "" and "Few samples" not in table.caption
    assert "Table 3" in table.caption and "figure 10" in figure.caption


def test_errors_are_the_bootstraps_over_prompts_that_all_share(measured: Results, sets: dict[str, np.ndarray]) -> None:
    prompts = np.repeat(np.arange(30), 4)[1:]
    flat = {name: x.astype(np.float32).reshape(-1, 5)[1:] for name, x in sets.items()}
    random, values = np.random.default_rng(0), []
    for _ in range(hacking_distances.RESAMPLES):
        picks = random.choice(np.arange(30), 30)
        images = np.concatenate([np.flatnonzero(prompts == pick) for pick in picks])
        far, near = (naive(flat["high"][images], flat[name][images]) for name in ("low", "low → high"))
        values.append((far, near, far - near, 100 * (far - near) / far))
    expected = np.std(values, axis=0, ddof=1)
    (row,) = named_rows(next(hacking_exhibits.distance_exhibits(measured, "digits")))
    assert [row[f"s.e. ({name})"] for name in ("hacked", "realigned", "Δ", "Δ in %")] == pytest.approx(
        expected, rel=1e-5
    )


def test_sharing_noise_makes_distances_smaller_and_the_report_says_by_how_much(
    measured: Results, sets: dict[str, np.ndarray]
) -> None:
    halves = {name: (x.astype(np.float32)[:, :2], x.astype(np.float32)[:, 2:]) for name, x in sets.items()}
    (row,) = named_rows(next(hacking_exhibits.distance_exhibits(measured, "digits")))

    def dropped(x: np.ndarray, first: bool) -> np.ndarray:
        return x.reshape(-1, 5)[1 if first else 0 :]

    for name, column in (("low", "hacked"), ("low → high", "realigned"), ("high", "healthy")):
        crossed = [naive(dropped(halves["high"][i], i == 0), dropped(halves[name][1 - i], i == 1)) for i in (0, 1)]
        assert row[f"{column}, other seeds"] == pytest.approx(np.mean(crossed), rel=1e-6)
    assert row["realigned, other seeds"] > 3 * row["distance of realigned"]


def test_equal_models_are_at_zero_and_few_samples_are_told(results: Results, every: dict[str, Exhibit]) -> None:
    names = ["main", "wide"]
    rows = named_rows(every["hacking-table-digits"])
    assert [(row["prompts"], row["realigned"]) for row in rows] == [
        ("main", "low → high"),
        ("main", "low → high, 2 particles"),
        ("main", "mid → high"),
        ("few", "low → high"),
        ("few", "mid → high"),
        ("wide", "low → high"),
        ("wide", "mid → high"),
    ]
    few = next(row for row in rows if row["prompts"] == "few")
    assert "2 and 2 images for 6 features" in few["few samples"] and math.isnan(few["healthy, other seeds"])
    caption = every["hacking-table-digits"].caption
    assert "Few samples (“few”)" in caption and all(f"“{name}”: " in caption for name in names)
    healthy = arm(results, "high")
    same = hacking_distances.distances(results, hacking_distances.Undoing(healthy, healthy, healthy), "main", "digits")
    assert same is not None and same.hacked.value == pytest.approx(0, abs=1e-9)
    assert math.isnan(hacking_distances.percent(0.0, 0.0))


def test_one_prompt_has_no_error_and_one_image_no_distance(tmp_path: Path) -> None:
    plan = plan_of(prompts={"main": {"prompts": ["a cat"], "seeds": "0:3"}}, methods=METHODS[:3])
    row, *_ = named_rows(next(hacking_exhibits.distance_exhibits(results_of(tmp_path / "a", plan), "digits")))
    assert math.isnan(row["s.e. (hacked)"])
    plan = plan_of(prompts={"main": {"prompts": ["a cat"], "seeds": 0}}, methods=METHODS[:3])
    assert list(hacking_exhibits.distance_exhibits(results_of(tmp_path / "b", plan), "digits")) == []
