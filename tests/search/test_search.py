"""The search for λ, on scores that are formulas: what it finds, how sure it says it is, and what it refuses."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from deradiff.search import Goal, PointRefused, Tables, maximise, spaces
from deradiff.search.answers import Best, Front
from deradiff.search.goals import Constraint, Objective
from deradiff.search.loop import SearchState
from deradiff.search.proposals import Surrogates, propose
from deradiff.search.spaces import Point, SearchSpace
from deradiff.search.surrogate import KEPT, Observed, Surrogate
from messages import naming
from studies.search_baseline import LINE, _fitted, algorithm_2

UNITS = 40


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


EASE, TASTE = normal(UNITS), normal(UNITS, seed=1)
"""How easy each prompt is, which all points share, and how much more it likes a larger λ."""


def measured(score: Callable[[Point], dict[str, float]], noise: float = 0.1) -> Callable[[Sequence[Point]], Tables]:
    """Scores of any point: what is expected, prompts that differ by ten times the effect, and a taste of their own."""

    def row(point: Point) -> dict[str, Tensor]:
        return {name: value + 10 * EASE + noise * TASTE * sum(point) for name, value in score(point).items()}

    def evaluate(points: Sequence[Point]) -> Tables:
        rows, reference = [row(point) for point in points], row(tuple(0.0 for _ in points[0]))
        return Tables(reference, {name: torch.stack([one[name] for one in rows]) for name in reference})

    return evaluate


def peak(point: Point) -> dict[str, float]:
    """Best at λ = 0.42; `harm` grows with λ."""
    return {"score": -3 * (point[0] - 0.42) ** 2, "harm": 2 * point[0] ** 2, "safe": -0.1 * point[0]}


def find(
    goal: Goal, score: Callable[[Point], dict[str, float]] = peak, space: SearchSpace | None = None, **options: object
) -> tuple[Best | Front, SearchState]:
    state = SearchState()
    answer = maximise(space or spaces.lam("anchor"), goal, measured(score), state=state, **options)  # type: ignore[arg-type]
    assert isinstance(answer, Best | Front)
    return answer, state


SCORE = Goal.read(["score"])


# -- the surrogate -----------------------------------------------------------------------------------------------------


def test_the_posterior_is_the_textbooks_with_correlated_noise() -> None:
    at = torch.tensor([[0.0], [0.3], [1.0]], dtype=torch.float64)
    root = normal(3, 3)
    observed = Observed(normal(3, seed=2), 0.05 * root @ root.T)
    surrogate = Surrogate(at, observed, seed=3)
    where = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None]
    kernel, nodes = surrogate.model.covar_module, (KEPT, -1, -1)

    def between(a: Tensor, b: Tensor) -> Tensor:
        return kernel(a.expand(*nodes), b.expand(*nodes)).to_dense()

    noise = surrogate.model.likelihood.covariance
    rough = noise - observed.covariance / surrogate.scale**2  # a multiple of the identity for each node
    torch.testing.assert_close(rough, rough[:, :1, :1] * torch.eye(3, dtype=torch.float64))
    assert 0.003 <= float(rough[:, 0, 0].min().sqrt()) <= float(rough[:, 0, 0].max().sqrt()) <= 0.3
    gain = between(where, at) @ torch.linalg.inv(between(at, at) + noise)
    means = (gain @ ((observed.means - surrogate.centre) / surrogate.scale)[:, None])[..., 0]
    variances = (between(where, where) - gain @ between(at, where)).diagonal(dim1=1, dim2=2)
    spread = variances.mean(0) + means.var(0, correction=0)
    torch.testing.assert_close(surrogate.mean(where), surrogate.centre + surrogate.scale * means.mean(0))
    torch.testing.assert_close(surrogate.deviation(where), surrogate.scale * spread.sqrt(), rtol=1e-5, atol=1e-8)
    drawn = surrogate.samples(where, 64_000, seed=0)
    torch.testing.assert_close(drawn.mean(0), surrogate.mean(where), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.std(0), surrogate.deviation(where), rtol=0.05, atol=0.01)


def test_errors_that_all_points_share_cancel() -> None:
    table = torch.stack([10 * EASE, 10 * EASE + 0.5 + 0.1 * TASTE])
    observed = Observed.of(table)
    expected = 0.1 * float(TASTE.std()) / UNITS**0.5 * ((UNITS - 1) / (UNITS - 3)) ** 0.5
    assert observed.error_of_difference(0, 1) == pytest.approx(expected, rel=1e-6)
    assert float(observed.covariance[1, 1].sqrt()) > 10 * expected


def test_a_single_unit_has_no_error() -> None:
    with pytest.raises(ValueError, match=naming("one prompt", "one seed")):
        Observed.of(normal(3, 1))


def test_nothing_new_is_proposed_where_everything_is_known() -> None:
    space = spaces.lam("anchor", 0, 0.02)
    points = [(0.0,), (0.01,), (0.02,)]
    models = Surrogates.of(space, SCORE, points, measured(peak)(points), 0)
    assert propose(space, models, points, space.candidates(0, points), 0).point is None


# -- one objective -----------------------------------------------------------------------------------------------------


def test_the_best_lam_is_found_and_its_range_holds_it() -> None:
    answer, state = find(SCORE)
    assert isinstance(answer, Best)
    assert state.points[:3] == [(0.0,), (1.0,), (0.5,)] and len(state.points) <= 8
    # The prompts that were drawn have their own optimum, 0.42 + 0.1 mean(TASTE)/6.
    assert answer.point[0] == pytest.approx(0.42 + 0.1 * float(TASTE.mean()) / 6, abs=0.011)
    (low, high), *_ = answer.ranges
    assert low <= 0.42 <= high and high - low < 0.1
    assert answer.gain.low < 3 * 0.42**2 < answer.gain.high
    # The score itself is as uncertain as prompts are different, its gain is not.
    assert answer.score.high - answer.score.low > 20 * (answer.gain.high - answer.gain.low)


def test_a_search_is_what_its_seed_makes_it_and_goes_on_as_if_unbroken() -> None:
    whole, state = find(SCORE, budget=7, fraction=0.0, seed=5)
    again, same = find(SCORE, budget=7, fraction=0.0, seed=5)
    assert again == whole and same.points == state.points
    _, begun = find(SCORE, budget=5, fraction=0.0, seed=5)
    assert begun.points == state.points[:5]


def test_it_stops_where_little_is_to_be_gained() -> None:
    stopped, few = find(SCORE, fraction=1e6, budget=8)
    assert len(few.points) == 3 and "less than 1e+06 of the gain's standard error" in stopped.stopped
    used, all_of_it = find(SCORE, fraction=0.0, budget=6)
    assert len(all_of_it.points) == 6 and used.stopped == "all 6 evaluations are used"


def test_an_optimum_beyond_one_is_found_when_asked() -> None:
    answer, state = find(SCORE, lambda p: {"score": -((p[0] - 1.4) ** 2)}, spaces.lam("anchor", 0, 2))
    assert isinstance(answer, Best) and answer.point[0] == pytest.approx(1.4, abs=0.06)
    assert state.points[:3] == [(0.0,), (1.0,), (2.0,)]


def test_the_reference_is_an_answer() -> None:
    answer, _ = find(SCORE, lambda p: {"score": -p[0]})
    assert isinstance(answer, Best) and answer.point == (0.0,) and abs(answer.gain.value) < 1e-2


# -- several anchors, schedules ----------------------------------------------------------------------------------------


def test_lams_of_two_anchors_stay_on_the_simplex() -> None:
    space = spaces.lams(["a", "b"])
    answer, state = find(
        SCORE, lambda p: {"score": -3 * (p[0] - 0.3) ** 2 - 3 * (p[1] - 0.2) ** 2}, space, budget=12, fraction=0.01
    )
    assert isinstance(answer, Best)
    assert state.points[:4] == [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.33, 0.33)]
    assert all(sum(point) <= 1 + 1e-9 for point in state.points)
    assert math.dist(answer.point, (0.3, 0.2)) < 0.08


def test_a_box_reaches_where_the_simplex_does_not() -> None:
    best = {"score": 0.0}

    def corner(point: Point) -> dict[str, float]:
        return {"score": -((point[0] - 0.8) ** 2) - (point[1] - 0.9) ** 2 + best["score"]}

    answer, _ = find(SCORE, corner, spaces.lams(["a", "b"], simplex=False), budget=10)
    assert isinstance(answer, Best) and math.dist(answer.point, (0.8, 0.9)) < 0.15


def test_a_power_is_searched_by_its_logarithm() -> None:
    space = spaces.power("anchor")
    answer, state = find(SCORE, lambda p: {"score": -(math.log(p[0] / 2) ** 2) if p[0] else -9.0}, space)
    assert isinstance(answer, Best) and answer.point[0] == pytest.approx(2, rel=0.2)
    assert state.points[:3] == [(0.25,), (5.0,), (1.12,)]


def test_points_become_methods_of_a_plan() -> None:
    assert spaces.lam("a").method((0.3,)) == {"method": "realign", "anchors": ("a",), "lam": (0.3,)}
    assert spaces.lams(["a", "b"]).method((0.3, 0.1)) == {"method": "combine", "lams": [{"a": 0.3, "b": 0.1}]}
    assert spaces.power("a").method((2.0,))["schedules"] == ["power:2"]
    assert spaces.knots("a", [0, 0.5, 1]).method((0.0, 0.25, 1.0))["schedules"] == ["spline:0/0,0.5/0.25,1/1"]


def test_scattered_candidates_cover_the_simplex_evenly() -> None:
    points = torch.tensor(spaces.lams(["a", "b"]).candidates(0, []), dtype=torch.float64)
    assert len(points) > 200 and float(points.sum(1).max()) <= 1 + 1e-9
    torch.testing.assert_close(points.mean(0), torch.full((2,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spaces.lam("a", 0, 2.5), naming("0 to 2", "0 to 2.5")),
        (lambda: spaces.lam("a", 0.5, 0.5), naming("0 to 2", "0.5 to 0.5")),
        (lambda: spaces.lam("a", -0.5, 1), naming("0 to 2", "-0.5 to 1")),
        (lambda: spaces.lams(["a"]), naming("two", "a")),
        (lambda: spaces.lams(["a", "a"]), naming("two", "a, a")),
        (lambda: spaces.lams(["a", "b"], 0, 1.5), naming(1, 1.5, "box")),
        (lambda: spaces.power("a", 0, 2), naming("p", "0 to 2")),
        (lambda: spaces.knots("a", [0.5, 0.2]), naming("knots", [0.5, 0.2])),
        (lambda: spaces.lam("a", 0, math.nan), "nan"),
    ],
)
def test_spaces_that_cannot_be_searched(make: Callable[[], SearchSpace], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- conditions --------------------------------------------------------------------------------------------------------


def test_a_condition_keeps_the_best_where_it_holds() -> None:
    answer, _ = find(Goal.read(["score"], require=["safe >= reference - 0.025"]))
    assert isinstance(answer, Best) and answer.reachable
    # Without it 0.42; safe falls by 0.1 λ and differs between prompts by its own error, 0.1/√40 λ.
    assert 0.1 <= answer.point[0] <= 0.25
    (condition,) = answer.conditions
    assert condition.probability >= 0.8 and condition.margin.value > 0


def test_conditions_that_nothing_meets_say_by_how_much() -> None:
    answer, _ = find(Goal.read(["score"], require=["safe >= reference + 0.5"]))
    assert isinstance(answer, Best) and not answer.reachable
    (condition,) = answer.conditions
    assert condition.margin.value == pytest.approx(-0.5, abs=0.05) and condition.probability < 0.01
    assert str(condition).startswith("safe >= reference + 0.5: missed by 0.5")


def test_conditions_read_as_they_are_written() -> None:
    tables = Tables({"a": torch.tensor([1.0, 3.0])}, {"a": torch.tensor([[2.0, 5.0]])})
    for text, expected in {
        "a >= reference": [[1.0, 2.0]],
        "a >= reference - 0.5": [[1.5, 2.5]],
        "a <= 4": [[2.0, -1.0]],
        "a <= reference + 1": [[0.0, -1.0]],
        "2*a >= 3": [[1.0, 7.0]],
    }.items():
        assert Constraint.read(text).table(tables).tolist() == expected, text


@pytest.mark.parametrize("text", ["a", "a > 3", "a >=", ">= 3", "a >= much", "a >= reference * 2"])
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(ValueError):
        Constraint.read(text)


def test_objectives_read_as_they_are_written() -> None:
    assert Objective.read("legible - 0.1*bold").terms == (("legible", 1.0), ("bold", -0.1))
    assert Objective.read("hps-v2.0 + 2 * path-kl").terms == (("hps-v2.0", 1.0), ("path-kl", 2.0))
    assert Objective.read("-path-kl").terms == (("path-kl", -1.0),)
    assert Objective.read("a + a").terms == (("a", 2.0),)
    assert str(Objective.read("legible - 0.1*bold")) == "legible - 0.1*bold"
    assert str(Objective.read("-a + b")) == "-a + b"
    for text in ("", "a b", "a - ", "0.1", "a + 3"):
        with pytest.raises(ValueError):
            Objective.read(text)
    with pytest.raises(ValueError, match="maximise"):
        Goal.read([])


# -- several objectives ------------------------------------------------------------------------------------------------


def test_two_objectives_have_a_pareto_set() -> None:
    answer, state = find(Goal.read(["score"], ["harm"]), budget=7)
    assert isinstance(answer, Front) and len(state.points) == 7
    lams = [one.point[0] for one in answer.points]
    # Beyond 0.42 both get worse: the front is what lies below, the reference included.
    assert lams[0] == 0 and max(lams) < 0.46 and len(lams) >= 4
    gains = [one.gains for one in answer.points]
    assert all(a[0].value < b[0].value and a[1].value > b[1].value for a, b in pairwise(gains))
    assert all(one.probability > 0.5 for one in answer.points)


def test_a_front_keeps_to_its_conditions() -> None:
    answer, _ = find(Goal.read(["score"], ["harm"], ["harm <= reference + 0.1"]), budget=6)
    assert isinstance(answer, Front)
    assert max(one.point[0] for one in answer.points) <= 0.25  # 2 λ² <= 0.1 below 0.22


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_budget_below_the_first_points() -> None:
    with pytest.raises(ValueError, match=naming("budget", 2, 3, "λ = 0; λ = 1; λ = 0.5")):
        find(SCORE, budget=2)


def test_scores_without_any_difference() -> None:
    constant = measured(lambda p: {"score": 0.5}, noise=0.0)

    def alike(points: Sequence[Point]) -> Tables:
        return Tables({"score": torch.full((5,), 0.5)}, {"score": torch.full((len(points), 5), 0.5)})

    with pytest.raises(ValueError, match=naming("score", 0.5)):
        maximise(spaces.lam("a"), SCORE, alike)
    with pytest.raises(ValueError, match=naming("score", "reference")):
        maximise(spaces.lam("a"), SCORE, constant)


def test_a_point_that_is_refused_bounds_the_search() -> None:
    evaluate, asked = measured(lambda p: {"score": p[0]}), list[Point]()

    def up_to(points: Sequence[Point]) -> Tables:
        asked.append(points[-1])
        if points[-1][0] > 1.3:
            raise PointRefused(f"no mixture at {points[-1][0]}")
        return evaluate(points)

    state = SearchState()
    answer = maximise(spaces.lam("a", 0, 2), SCORE, up_to, state=state)
    assert isinstance(answer, Best) and 1.2 <= answer.point[0] <= 1.3
    assert (2.0,) in state.refused and all(point[0] <= 1.3 for point in state.points)
    assert len(state.refused) < 6 and max(point[0] for point in state.points) > 1.2


# -- the baseline ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_algorithm_2_follows_the_papers_equations() -> None:
    def score(lam: float) -> float:
        return 2 - (lam - 0.6) ** 2

    for acquisition in ("ei", "ucb"):
        found = algorithm_2(score, budget=4, initial=3, acquisition=acquisition, delta=0.1, seed=1)
        lams, means = (torch.tensor(one, dtype=torch.float64) for one in zip(*found.evaluated[:3], strict=True))
        unit = float(means.square().mean().sqrt())
        surrogate = _fitted(lams, means / unit)
        kernel, noise = surrogate.covar_module, surrogate.likelihood.noise
        total = kernel(lams[:, None]).to_dense() + noise.diag()
        to = kernel(LINE[:, None], lams[:, None]).to_dense()
        mu = to @ torch.linalg.solve(total, means / unit)  # equation 41
        deviation = (kernel(LINE[:, None]).to_dense().diagonal() - (to @ torch.linalg.inv(total) * to).sum(1)).sqrt()
        if acquisition == "ei":
            best = float(means.max()) / unit
            z, standard = (mu - best) / deviation, torch.distributions.Normal(0.0, 1.0)
            value = (mu - best) * standard.cdf(z) + deviation * standard.log_prob(z).exp()  # equation 43
        else:
            value = mu + math.sqrt(2 * math.log(3**2 * math.pi**2 / 0.6)) * deviation
        assert value[int(found.evaluated[3][0] * 1000 + 0.5)] == pytest.approx(float(value.max()), rel=1e-6), (
            acquisition
        )


def test_algorithm_2_returns_the_best_it_has_seen_and_is_reproducible() -> None:
    noise = iter(normal(60).tolist())
    first = algorithm_2(lambda lam: -((lam - 0.5) ** 2) + 0.05 * next(noise), seed=2)
    assert first.score == max(score for _, score in first.evaluated) and len(first.evaluated) == 8
    assert (first.lam, first.score) in first.evaluated
    assert algorithm_2(lambda lam: lam, seed=2) == algorithm_2(lambda lam: lam, seed=2)
    with pytest.raises(ValueError, match=naming("budget", 2)):
        algorithm_2(lambda lam: lam, budget=2)
    with pytest.raises(ValueError, match="probability"):
        algorithm_2(lambda lam: lam, delta=1.5)
