"""The curve that a page draws is the library's own; what is not monotone, or not pinned, is refused in words."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from deradiff.algorithm.schedules import Constant, Power, Schedule, Sigmoid, Spline, Step
from deradiff.studio import curves
from deradiff.studio.library import MOST, Library
from messages import naming


@pytest.mark.parametrize(
    ("name", "parameter", "schedule"),
    [("power", 1.25, Power(1.25)), ("step", 0.3, Step(0.3)), ("sigmoid", 8, Sigmoid(8)), ("constant", 5, None)],
)
def test_a_curve_starts_from_a_family(name: str, parameter: float, schedule: Schedule | None) -> None:
    assert curves.of_family(name, parameter) == schedule
    assert curves.family_of(schedule)[0] == name


@pytest.mark.parametrize(
    ("name", "parameter", "said"),
    [
        ("power", 0, naming("power's p", 0.05, 20, 0)),
        ("step", 1.5, naming("step's p", 0, 1, 1.5)),
        ("sigmoid", float("nan"), naming("sigmoid's κ", "nan")),
        ("cubic", 1, "'cubic'"),
    ],
)
def test_a_parameter_out_of_range_is_refused(name: str, parameter: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        curves.of_family(name, parameter)


@pytest.mark.parametrize("schedule", [Power(2), Power(0.5), Step(0.4), Step(0.0), Step(1.0), Sigmoid(10)], ids=str)
def test_points_follow_the_curve_that_they_were_taken_from(schedule: Schedule) -> None:
    spline = curves.through(curves.points_of(schedule))
    away = [abs(spline(i / 50) - schedule(i / 50)) for i in range(51) if not _at_jump(schedule, i / 50)]
    assert max(away) < 0.06


@pytest.mark.parametrize("name", list(curves.FAMILIES))
def test_every_curve_of_a_family_can_be_drawn_on(name: str) -> None:
    _, _, least, most = curves.FAMILIES[name]
    for i in range(101):
        parameter = least + (most - least) * (i / 100) ** 3
        schedule = curves.of_family(name, parameter)
        assert schedule is not None
        points = curves.points_of(schedule)
        assert curves.through(points).points == tuple(map(tuple, points))


def test_points_may_be_as_near_as_the_editor_puts_them() -> None:
    for thousandths in range(4, 991):
        s = thousandths / 1000
        curves.through([(0, 0), (s, 0.5), (round(s + curves.CLOSEST, 3), 0.6), (1, 1)])


def _at_jump(schedule: Schedule, s: float) -> bool:
    return isinstance(schedule, Step) and abs(s - (1 - schedule.p)) < 0.02


@pytest.mark.parametrize(
    ("points", "values"),
    [
        ([(0, 0)], ["2 to 24", 1]),
        ([(0, 0), *((i / 40, 0.1) for i in range(1, 30)), (1, 1)], ["2 to 24", 31]),
        ([(0, 0.1), (1, 1)], [(0, 0), (1, 1), 0.1]),
        ([(0, 0), (1, 0.9)], [(0, 0), (1, 1), 0.9]),
        ([(0, 0), (0.5, 0.6), (0.6, 0.5), (1, 1)], ["s = 0.5", 0.6]),
        ([(0, 0), (0.5, 1.2), (1, 1)], ["s = 0.5", 1]),
        ([(0, 0), (0.5, 0.5), (0.501, 0.6), (1, 1)], [0.004, "s = 0.5", 0.501]),
        ([(0, 0), (0.5, "a lot"), (1, 1)], ["λ", "'a lot'"]),
        ([(0, 0), (float("inf"), 1), (1, 1)], ["s", "inf"]),
    ],
)
def test_points_that_make_no_curve_are_refused(points: Any, values: list[Any]) -> None:
    assert re.search(naming(*values), curves.answer({"points": points, "steps": 25})["error"])


def test_what_is_drawn_is_what_the_sampler_reads() -> None:
    points = [[0.0, 0.0], [0.3, 0.1], [0.7, 0.8], [1.0, 1.0]]
    spline = Spline(points)
    drawn = curves.answer({"points": points, "steps": 20})
    assert drawn["steps"] == [[i / 20, spline(i / 20)] for i in range(20)]
    assert drawn["average"] == pytest.approx(sum(spline(i / 20) for i in range(20)) / 20)
    assert all(lam == spline(s) for s, lam in drawn["line"])
    assert Schedule.from_dict(json.loads(json.dumps(drawn["schedule"]))) == spline
    assert curves.answer({"schedule": json.loads(json.dumps(drawn["schedule"])), "steps": 20}) == drawn


def test_the_line_of_a_step_is_upright() -> None:
    line = curves.drawing(Step(0.5), 10)["line"]
    before, after = max(s for s, lam in line if lam == 0), min(s for s, lam in line if lam == 1)
    assert 0 < after - before < 1e-5


def test_without_a_curve_lam_stays_the_same() -> None:
    flat = curves.answer({"schedule": None, "steps": 4})
    assert flat["schedule"] is None and flat["average"] == 1 and [lam for _, lam in flat["steps"]] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "asked",
    [
        None,
        [],
        "power",
        {"steps": 0},
        {"steps": 10**9},
        {"steps": 2.5},
        {"schedule": {"schedule": "Explosive"}},
        {"schedule": "Power"},
        {"schedule": {"schedule": "Power", "p": "2; import os"}},
        {"points": 7},
        {"schedule": {"schedule": "Constant", "lam": 1.0}},
        {"schedule": {"schedule": "Power", "p": 2, "lam": 7}},
        {"points": [[0, 0], [1, 1]], "over": "the moon"},
    ],
)
def test_nonsense_from_a_browser_is_an_answer_in_words(asked: Any) -> None:
    assert set(curves.answer(asked)) == {"error"}


def test_the_studio_does_not_take_a_curve_that_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match=naming("λ = 1", repr(Constant(0.5)))):
        curves.read(Constant(0.5).to_dict())
    with pytest.raises(ValueError, match=naming((0, 0), (1, 1))):
        curves.read(Spline([(0, 0), (1, 2)]).to_dict())
    assert curves.read(Power(2).to_dict()) == Power(2)


# -- what is kept by name ---------------------------------------------------------------------------------------------


def test_curves_are_kept_by_name_and_found_again(tmp_path: Path) -> None:
    kept = Library(tmp_path / "curves", "curve")
    assert kept.names() == []
    assert kept.save("  late   rise ", Power(3).to_dict()) == "late rise"
    kept.save("Early", Power(0.5).to_dict())
    kept.save("Early", Power(0.4).to_dict())
    assert kept.names() == ["Early", "late rise"]
    assert curves.read(kept.load("Early")) == Power(0.4)
    kept.delete("Early")
    kept.delete("Early")
    assert kept.names() == ["late rise"]
    with pytest.raises(ValueError, match="'Early'"):
        kept.load("Early")


@pytest.mark.parametrize("name", ["", " ", "../up", "a/b", "a\\b", "x" * 61, ".hidden", "nul\x00", "<b>", "é", "a."])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    kept = Library(tmp_path / "inside", "curve")
    for act in (lambda: kept.save(name, {}), lambda: kept.load(name), lambda: kept.delete(name)):
        with pytest.raises(ValueError, match=naming("curve", 60)):
            act()
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_is_bounded_and_checked(tmp_path: Path) -> None:
    kept = Library(tmp_path, "preset")
    for i in range(MOST):
        (tmp_path / f"n{i}.json").write_text("{}")
    with pytest.raises(ValueError, match=naming(MOST)):
        kept.save("one more", {})
    kept.save("n3", {"a": 1})
    for nonsense in ("{", "[1]", " " * 200_000):
        (tmp_path / "n4.json").write_text(nonsense)
        with pytest.raises(ValueError, match="n4"):
            kept.load("n4")
