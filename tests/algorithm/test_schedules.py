import json
import math
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from deradiff.algorithm.lams import Lams, parse_lam
from deradiff.algorithm.schedules import Constant, Power, Progress, Schedule, Sigmoid, Spline, Step, taking_turns
from messages import naming

ALL = [
    Constant(0.5),
    Constant(-2),
    Power(2),
    Power(1.25, lam=0.8, over="time"),
    Step(0.3),
    Step(0.5, lam=1.5),
    Sigmoid(10),
    Sigmoid(1e-3, lam=-1, over="time"),
    Spline([(0, 0), (0.3, 0.1), (0.6, 0.9), (1, 1)]),
    Spline([(0.2, 1.0), (0.8, 0.0)], over="time"),
]
START = Progress(0.0, 0.0)


# -- the curves --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 1.25, 1.5, 2, 3, 4, 5])
def test_power_is_one_minus_the_papers_gamma(p):
    """γ = 1 - ((T - t)/T)^p (AIG, A.7.3), and the original implementation's w_aligned = (i/N)^p."""
    n = 50
    for i in range(n):
        t = 1 - i / n
        assert Power(p)(i / n) == pytest.approx(1 - (1 - (1 - t) ** p), abs=1e-12)
        assert Power(p, lam=0.7)(i / n) == pytest.approx(0.7 * (i / n) ** p)


def test_step_is_the_heaviside_function_and_its_edge_belongs_to_the_anchor():
    for n in (7, 10, 25, 50, 1000):
        for p in (0.1, 0.3, 0.5, 0.7):
            values = [Step(p)(i / n) for i in range(n)]
            assert values == [0.0 if (n - i) > p * n + 1e-6 else 1.0 for i in range(n)]
    assert Step(0.3)(0.7) == 1.0  # t/T = p up to rounding: 1 - 0.7 > 0.3 in floating point
    assert [Step(1)(s) for s in (0, 0.5, 1)] == [1, 1, 1]
    assert [Step(0)(s) for s in (0, 0.999, 1)] == [0, 0, 1]


def test_sigmoid_is_the_papers_with_exact_ends():
    for kappa in (0.1, 5.0, 30.0):
        schedule = Sigmoid(kappa, lam=0.8)
        assert schedule(0) == 0 and schedule(1) == 0.8 and schedule(0.5) == pytest.approx(0.4)
        for s in np.linspace(0, 1, 11):
            gamma, low, high = (1 / (1 + math.exp(-kappa * x)) for x in (0.5 - s, -0.5, 0.5))
            assert schedule(s) == pytest.approx(0.8 * (1 - (gamma - low) / (high - low)), abs=1e-12)
    assert Sigmoid(1e-6)(0.25) == pytest.approx(0.25)
    assert Sigmoid(1e6)(0.4999) == pytest.approx(0, abs=1e-12)


def test_spline_goes_through_its_points_keeps_their_shape_and_holds_the_ends():
    points = [(0.2, 0.0), (0.4, 0.05), (0.5, 0.9), (0.9, 1.0)]
    spline = Spline(points)
    assert [spline(s) for s, _ in points] == pytest.approx([lam for _, lam in points])
    values = [spline(s) for s in np.linspace(0, 1, 201)]
    assert all(b >= a for a, b in pairwise(values))  # a cubic spline would overshoot here
    assert 0 == values[0] == spline(0.1) and values[-1] == spline(0.95) == 1.0
    assert Spline(points[::-1]) == spline
    hill = Spline([(0, 0), (0.5, 1), (1, 0)])
    assert hill(0.5) == 1 and max(hill(s) for s in np.linspace(0, 1, 101)) == 1


@pytest.mark.parametrize("schedule", [s for s in ALL if not isinstance(s, Constant)])
def test_aig_schedules_run_from_reference_to_anchor(schedule):
    values = [schedule(s) for s in np.linspace(0, 1, 101)]
    steps = [b - a for a, b in pairwise(values)]
    assert all(step >= 0 for step in steps) or all(step <= 0 for step in steps)
    if not isinstance(schedule, Spline):
        assert values[0] == 0 and values[-1] == schedule.lam


def test_each_clock_is_read_where_it_is_asked_for():
    progress = Progress(steps=0.25, time=0.5)
    assert Power(1).at(progress) == 0.25
    assert Power(1, over="time").at(progress) == 0.5


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_schedules_survive_repr_and_json(schedule):
    assert eval(repr(schedule)) == schedule
    assert hash(eval(repr(schedule))) == hash(schedule)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_schedules_differ_where_a_parameter_differs():
    assert len({repr(s) for s in ALL}) == len(set(ALL)) == len(ALL)
    assert Power(2) != Power(2, over="time")
    assert repr(Power(2)) == "Power(p=2.0)" and repr(Power(2, over="time")) == "Power(p=2.0, over='time')"


@pytest.mark.parametrize(
    ("record", "values"),
    [
        ({}, [None]),
        ({"schedule": "Linear"}, ["'Linear'"]),
        ({"schedule": 3}, [3]),
        ({"schedule": "Power", "q": 2}, ["Power", ["q"]]),
    ],
)
def test_records_of_something_else_are_refused(record, values):
    with pytest.raises(ValueError, match=naming(*values)):
        Schedule.from_dict(record)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_schedules_plot_themselves(schedule):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ax = schedule.plot()
    assert ax.get_xlabel() == {"steps": "fraction of steps done", "time": "diffusion time, 1 − t/T"}[schedule.over]
    assert ax.get_ylabel() == "λ"
    x, y = ax.lines[0].get_data()
    assert y[0] == schedule(0) and y[-1] == schedule(1) and (x[0], x[-1]) == (0, 1)
    assert Constant(0.1).plot(ax) is ax
    _, labels = ax.get_legend_handles_labels()
    assert labels == [str(schedule), "λ = 0.1"]
    pyplot.close("all")


# -- bad parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda: Constant(math.nan), ["Constant", "lam", "nan"]),
        (lambda: Power(0), ["Power", "p", 0.0]),
        (lambda: Power(-1), ["Power", "p", -1.0]),
        (lambda: Power(math.inf), ["Power", "p", "inf"]),
        (lambda: Power(2, lam=math.nan), ["Power", "lam", "nan"]),
        (lambda: Step(1.5), ["Step", "p", 1.5]),
        (lambda: Step(-0.1), ["Step", "p", -0.1]),
        (lambda: Sigmoid(0), ["Sigmoid", "kappa", 0.0]),
        (lambda: Sigmoid(-3), ["Sigmoid", "kappa", -3.0]),
        (lambda: Spline([(0.5, 1.0)]), ["Spline", "two", 1]),
        (lambda: Spline([]), ["Spline", "two", 0]),
        (lambda: Spline([(0, 0), (0, 1)]), ["Spline", "distinct", [0.0, 0.0]]),
        (lambda: Spline([(0, 0), (1.5, 1)]), ["Spline", 0, 1, [0.0, 1.5]]),
        (lambda: Spline([(-0.1, 0), (1, 1)]), ["Spline", 0, 1, [-0.1, 1.0]]),
        (lambda: Spline([(0, 0), (1, math.nan)]), ["point", "λ", "nan"]),
        (lambda: Spline([(0, 0, 0), (1, 1, 1)]), ["Spline", [(0, 0, 0), (1, 1, 1)]]),
    ],
)
def test_bad_parameters_are_named(make, values):
    with pytest.raises(ValueError, match=naming(*values)):
        make()


def test_an_unknown_clock_is_named():
    with pytest.raises(ValueError, match="'noise'"):
        Schedule.from_dict({"schedule": "Power", "p": 2, "over": "noise"})


@pytest.mark.parametrize("s", [-0.1, 1.1, math.nan])
def test_progress_outside_its_range_is_refused(s):
    with pytest.raises(ValueError, match=naming("progress", s)):
        Power(2)(s)


# -- λ in all its forms ------------------------------------------------------------------------------------------------


def at(lam, anchors=("a",), progress=START, batch=3) -> list[list[float]]:
    return parse_lam(lam, anchors).at(progress, batch).tolist()


def test_one_value_serves_every_image():
    for lam in (0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16), Constant(0.5)):
        assert at(lam) == [[0.5] * 3]
    assert at(1) == [[1.0] * 3]
    assert at(-0.5) == [[-0.5] * 3]
    values = parse_lam(0.1, ["a"]).at(START, 2)
    assert values.dtype == torch.float64 and values.device.type == "cpu" and values.shape == (1, 2)
    assert values[0, 0].item() == 0.1


def test_a_list_holds_one_value_per_image_in_order():
    for lam in ([0.0, 0.5, 1.0], (0, 0.5, 1), np.array([0.0, 0.5, 1.0]), torch.tensor([0.0, 0.5, 1.0])):
        assert at(lam) == [[0.0, 0.5, 1.0]]
    mixed = [0.25, Power(1), Power(2)]
    assert at(mixed, progress=Progress(0.5, 0.9)) == [[0.25, 0.5, 0.25]]
    assert parse_lam(mixed, ["a"]).images == 3 and parse_lam(0.5, ["a"]).images is None


def test_a_dictionary_names_anchors_in_any_order_and_rows_follow_the_anchors():
    lam = {"text": [0.1, 0.2, 0.3], "aesthetic": Power(1)}
    assert at(lam, ("aesthetic", "text"), Progress(0.5, 0)) == [[0.5] * 3, [0.1, 0.2, 0.3]]
    assert at({"a": 0.5}) == [[0.5] * 3]


def test_constant_or_not():
    assert parse_lam(0.5, ["a"]).is_constant
    assert parse_lam([0.5, 1.0], ["a"]).is_constant
    assert not parse_lam([0.5, Power(2)], ["a"]).is_constant
    assert not parse_lam({"a": 0.5, "b": Step(0.5)}, ["a", "b"]).is_constant


def test_what_the_user_gave_can_be_read_back():
    for lam in (0.5, (0.1, 0.2), Power(2), {"a": 1.0}, {"a": (0.1, Power(2))}):
        assert isinstance(parse_lam(lam, ["a"]), Lams) and parse_lam(lam, ["a"]).raw == lam
    for given in ([0.25, 0.5], np.array([0.25, 0.5]), torch.tensor([0.25, 0.5])):
        assert parse_lam(given, ["a"]).raw == (0.25, 0.5)


@pytest.mark.parametrize(
    ("lam", "values"),
    [
        (math.nan, ["λ", "nan"]),
        (math.inf, ["λ", "inf"]),
        pytest.param(10**400, ["λ", "inf"], id="too large for a float"),
        (-math.inf, ["λ", "-inf"]),
        ("0.5", ["λ", "'0.5'", "str"]),
        (None, ["λ", None]),
        (True, ["λ", True]),
        (1j, ["λ", 1j]),
        ([], ["λ", "empty"]),
        (torch.zeros(0), ["λ", "empty"]),
        ([0.5, math.nan], ["λ[1]", "nan"]),
        ([0.5, "1"], ["λ[1]", "'1'", "str"]),
        ([[0.5, 1.0]], ["λ[0]", [0.5, 1.0]]),
        (torch.zeros(2, 2), ["λ[0]", [0.0, 0.0]]),
        (torch.tensor(math.nan), ["λ", "nan"]),
        ({"a": math.nan}, ["λ", "'a'", "nan"]),
        ({"a": 1.0, "b": 0.5}, [["a"], "unknown: ['b']"]),
        ({}, ["missing: ['a']"]),
        (Power, ["λ", Power]),
    ],
)
def test_bad_lambdas_are_refused_in_words(lam, values):
    with pytest.raises(ValueError, match=naming(*values)):
        parse_lam(lam, ["a"])


def test_several_anchors_need_a_dictionary_of_exactly_their_names():
    for lam in (0.5, [0.5, 0.5], Power(2)):
        with pytest.raises(ValueError, match=naming(2, "'a'", "'b'", repr(lam))):
            parse_lam(lam, ["a", "b"])
    with pytest.raises(ValueError, match=naming("unknown: ['c']", "missing: ['b']")):
        parse_lam({"a": 1.0, "c": 1.0}, ["a", "b"])
    with pytest.raises(ValueError, match=naming({"a": 2, "b": 3})):
        parse_lam({"a": [1.0, 2.0], "b": [1.0, 2.0, 3.0]}, ["a", "b"])


def test_a_list_of_the_wrong_length_names_both_lengths_and_the_order():
    lams = parse_lam([0.1, 0.2], ["style"])
    with pytest.raises(ValueError, match=naming("'style'", 2, 6, "num_images_per_prompt", "first")):
        lams.at(START, 6)
    with pytest.raises(ValueError, match=naming("'a'", 1, 2)):
        parse_lam([0.5], ["a"]).at(START, 2)


def test_schedules_are_cheap_to_import():
    heavy = "torch", "scipy", "matplotlib", "diffusers"
    code = f"import sys, deradiff; deradiff.schedules; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.attack("a λ that cannot be what it seems")
@pytest.mark.parametrize(
    "lam",
    [
        torch.tensor(0.5, requires_grad=True),
        torch.tensor([0.5, 0.6], requires_grad=True),
        torch.nn.Parameter(torch.tensor(0.5)),
        [0.1, torch.tensor(0.5, requires_grad=True)],
        torch.tensor(0.5, device="meta"),
        torch.tensor([0.5], device="meta"),
        torch.tensor([0.5]).to_sparse(),
        torch.tensor(0.5 + 1j),
        torch.tensor([True]),
        torch.tensor([[0.5]]),
        np.array([np.nan]),
        np.array(["0.5"]),
        np.ma.array([0.5, 0.6], mask=[False, True]),
        10**400,
    ],
    ids=repr,
)
def test_a_lambda_that_is_no_number_to_read_is_refused(lam):
    for given, names in ((lam, ["a"]), ({"a": 0.1, "b": lam}, ["a", "b"])):
        with pytest.raises(ValueError, match="λ"):
            parse_lam(given, names)


@pytest.mark.attack("a λ that cannot be what it seems")
def test_a_lambda_of_any_library_is_read():
    for lam in (torch.tensor(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5).half(), Fraction(1, 2)):
        assert parse_lam(lam, ["a"]).raw == 0.5
    for lams in (torch.tensor([0.5, 2]), np.array([0.5, 2]), [torch.tensor(0.5), 2], torch.tensor([0.5, 2]).bfloat16()):
        assert parse_lam(lams, ["a"]).raw == (0.5, 2.0)


def test_a_schedule_says_how_far_it_goes_unless_that_is_one():
    assert "1.5" in str(Power(2, 1.5)) and "λ = 1" not in str(Power(2))


# -- models that take turns --------------------------------------------------------------------------------------------


def test_models_take_turns_in_proportion_to_lam_and_one_at_a_time():
    turns = taking_turns({"a": 0.2, "b": 0.5}, 7)
    values = np.array([[turns[name](i / 4000) for name in ("a", "b")] for i in range(4000)])
    assert set(values.flatten()) == {0.0, 1.0} and values.sum(1).max() == 1
    for share, expected in zip((*values.mean(0), 1 - values.sum(1).mean()), (0.2, 0.5, 0.3), strict=True):
        assert share == pytest.approx(expected, abs=4 * (0.25 / 4000) ** 0.5)
    again, other = taking_turns({"a": 0.2, "b": 0.5}, 7), taking_turns({"a": 0.2, "b": 0.5}, 8)
    assert again == turns and [turns["a"](i / 50) for i in range(50)] != [other["a"](i / 50) for i in range(50)]
    assert Schedule.from_dict(json.loads(json.dumps(turns["b"].to_dict()))) == turns["b"]
    whole = taking_turns({"a": 0.1, "b": 0.2, "c": 0.7}, 0)  # whose sum is rounded to less than 1
    assert all(sum(turn(i / 999) for turn in whole.values()) == 1 for i in range(1000))


@pytest.mark.parametrize("lams", [{"a": 0.6, "b": 0.5}, {"a": -0.1, "b": 0.5}])
def test_turns_are_probabilities(lams):
    with pytest.raises(ValueError, match=naming(lams)):
        taking_turns(lams, 0)
