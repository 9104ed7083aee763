"""What the four examples of annealed importance guidance claim, as numbers that could come out otherwise."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from deradiff.worlds.gaussian_mixture import (
    GaussianMixture,
    QuadraticReward,
    crossing,
    linear_reward,
    mixture,
    peaked_reward,
    random_world,
    variance_preserving,
)
from deradiff.worlds.gaussian_presets import (
    collapse,
    dropout_average,
    mixing,
    off_segment,
    parametrised_peak,
    peak,
    reverse,
    sampled_reverse,
    tikhonov,
    total_variance,
    two_modes,
)
from messages import naming

GRID = torch.linspace(-6, 6, 24_001, dtype=torch.float64)
CELL = float(GRID[1] - GRID[0])


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def density(model: GaussianMixture) -> Tensor:
    return model.log_density(GRID[:, None]).exp()


def test_the_total_variance_is_that_of_samples() -> None:
    model = random_world(0, 4, 3).reference
    assert total_variance(model) == pytest.approx(float(model.sample(200_000, chance()).var(0).sum()), rel=0.02)
    assert total_variance(two_modes().reference) == pytest.approx(1.05)


# -- noise mixes the modes, the reverse process finds them (A.6.1) -----------------------------------------------------


@pytest.mark.parametrize(("now", "then"), [(990, None), (350, None), (50, None), (990, 980), (350, 340), (350, 20)])
def test_the_reverse_conditional_is_bayes_rule(now: int, then: int | None) -> None:
    """`p(x_then) p(x_now | x_then)`, normalised on a grid."""
    model, x = two_modes().reference, vector(0.37)
    late = variance_preserving(now)
    early = (1.0, 0.0) if then is None else tuple(map(float, variance_preserving(then)))
    a = float(late.alpha) / early[0]
    spread = math.sqrt(float(late.sigma) ** 2 - (a * early[1]) ** 2)
    prior = torch.stack(
        [
            torch.distributions.Normal(early[0] * m, math.sqrt(early[0] ** 2 * 0.05 + early[1] ** 2))
            .log_prob(GRID)
            .exp()
            / 2
            for m in (1.0, -1.0)
        ]
    ).sum(0)
    posterior = prior * torch.distributions.Normal(a * GRID, spread).log_prob(x).exp()
    posterior = posterior / (posterior.sum() * CELL)
    exact = reverse(model, x, late, variance_preserving(then)) if then is not None else reverse(model, x, late)
    torch.testing.assert_close(density(exact), posterior, rtol=1e-6, atol=1e-9)


def test_going_back_in_two_steps_is_going_back_in_one() -> None:
    """Averaged over `p(x_s | x_t)`, `p(x_0 | x_s)` is `p(x_0 | x_t)`."""
    model, x = random_world(1, 3, 2).reference, vector(0.4, -0.3)
    late, middle = variance_preserving(600), variance_preserving(250)
    between = reverse(model, x, late, middle).sample(1000, chance())
    means = torch.stack([(m := reverse(model, y, middle)).mode_weights @ m.means for y in between])
    exact = reverse(model, x, late)
    error = means.std(0) / 1000**0.5
    assert bool(((means.mean(0) - exact.mode_weights @ exact.means).abs() < 4 * error).all())


@pytest.mark.parametrize(("now", "then"), [(10, 10), (10, 20), (0, 999)])
def test_a_reverse_step_leads_to_less_noise(now: int, then: int) -> None:
    levels = [variance_preserving(now), variance_preserving(then)]
    ratios = [f"{level.sigma / level.alpha:g}" for level in levels]
    with pytest.raises(ValueError, match=naming("σ/α", *ratios)):
        reverse(two_modes().reference, vector(0.1), *levels)


@pytest.mark.parametrize("timestep", [60, 360, 990])
def test_one_sampled_step_spreads_as_the_exact_one(timestep: int) -> None:
    model, x = two_modes().reference, vector(0.4)
    exact = reverse(model, x, variance_preserving(timestep), variance_preserving(timestep - 10))
    samples = sampled_reverse(model, x, timestep, timestep - 10, count=20_000, stride=10, generator=chance())
    # A step of the sampler takes x_0 for known, and so is a little too narrow between the modes.
    assert float(samples.std()) == pytest.approx(total_variance(exact) ** 0.5, rel=0.06)
    assert float(samples.mean()) == pytest.approx(float(exact.mode_weights @ exact.means), abs=0.02)


@pytest.mark.parametrize("timestep", [200, 350, 600])
def test_the_whole_sampled_chain_divides_the_modes_as_the_exact_conditional(timestep: int) -> None:
    model, x, count = two_modes().reference, vector(0.3), 3000
    exact = reverse(model, x, variance_preserving(timestep))
    samples = sampled_reverse(model, x, timestep, count=count, stride=2, generator=chance(2))
    right = float(exact.mode_weights[0])
    assert float((samples > 0).double().mean()) == pytest.approx(
        right, abs=4 * (right * (1 - right) / count) ** 0.5 + 0.01
    )
    for sign, k in ((1, 0), (-1, 1)):
        mode = samples[sign * samples > 0]
        if len(mode) > 300:
            assert float(mode.std()) == pytest.approx(float(exact.variances[k]) ** 0.5, rel=0.15)


@pytest.mark.parametrize(("timestep", "until"), [(355, None), (350, 345), (350, 350), (340, 350), (1000, None)])
def test_a_chain_refuses_timesteps_it_does_not_meet(timestep: int, until: int | None) -> None:
    with pytest.raises(ValueError, match=naming("stride 10", timestep)):
        sampled_reverse(two_modes().reference, vector(0.1), timestep, until, stride=10)


def test_modes_mix_with_time_and_are_found_again_early() -> None:
    model = two_modes().reference
    numbers = [mixing(model, t) for t in (0, 100, 200, 400, 600, 800, 999)]
    variances, guesses = [n.variance for n in numbers], [n.guess for n in numbers]
    assert variances == sorted(variances) and guesses == sorted(guesses, reverse=True)
    assert variances[0] < 0.002 and variances[-1] > 0.99
    assert guesses[0] > 0.999 and guesses[-1] < 0.54


@pytest.mark.parametrize("timestep", [50, 300, 700])
def test_the_mixing_numbers_match_quadrature(timestep: int) -> None:
    model, noise = mixture([0.3, 0.7], [[1.0], [-0.5]], [0.05, 0.2]), variance_preserving(timestep)
    points = GRID[::100]
    law = model.noised(noise).log_density(points[:, None]).exp() * 100 * CELL
    exact = [reverse(model, x[None], noise) for x in points]
    left = vector(*(total_variance(conditional) for conditional in exact)) / total_variance(model)
    likeliest = torch.stack([conditional.mode_weights.max() for conditional in exact])
    found = mixing(model, timestep)
    assert found.variance == pytest.approx(float(left @ law), abs=0.01)
    assert found.guess == pytest.approx(float(likeliest @ law), abs=0.01)


# -- alignment collapses to the maximiser (Lemma 1) --------------------------------------------------------------------

PEAKS = {
    "two modes": (two_modes().reference, two_modes().rewards["peak"]),
    "four modes": (crossing().reference, peaked_reward([0.5, -0.4], [1.0, 2.0])),
    "sixteen dimensions": (random_world(3, 5, 16).reference, peaked_reward([0.2] * 16, 0.7)),
}


@pytest.mark.parametrize(("model", "reward"), PEAKS.values(), ids=PEAKS)
def test_alignment_without_regularisation_collapses_to_the_maximiser(
    model: GaussianMixture, reward: QuadraticReward
) -> None:
    betas = [1e-4, 1e-5, 1e-6]
    numbers = [collapse(model, reward, beta) for beta in betas]
    for beta, found in zip(betas, numbers, strict=True):
        # Every component tends to N(x*, β/q); how far each still is from the maximiser adds terms of order β².
        assert found.variance == pytest.approx(float((beta / reward.curvature).sum()), rel=3e3 * beta + 1e-3)
    assert numbers[1].distance / numbers[0].distance == pytest.approx(0.1, rel=0.02)
    growth = [later.divergence - earlier.divergence for earlier, later in itertools.pairwise(numbers)]
    assert growth == pytest.approx([model.dim * math.log(10) / 2] * 2, rel=0.02)


@pytest.mark.parametrize(("model", "reward"), PEAKS.values(), ids=PEAKS)
def test_collapse_is_gradual_and_costs_divergence_all_the_way(model: GaussianMixture, reward: QuadraticReward) -> None:
    numbers = [collapse(model, reward, float(beta)) for beta in torch.logspace(3, -5, 60)]
    divergences = [n.divergence for n in numbers]
    assert divergences == sorted(divergences) and divergences[0] < 1e-2
    assert numbers[0].variance == pytest.approx(total_variance(model), rel=0.05)
    torch.testing.assert_close(numbers[0].mode_weights, model.mode_weights, rtol=0.05, atol=0.01)


def test_the_mode_next_to_the_maximiser_takes_all_before_it_moves_there() -> None:
    world = two_modes()
    halfway = collapse(world.reference, world.rewards["peak"], 0.3)
    assert float(halfway.mode_weights[0]) > 0.99 and halfway.distance > 0.4 and halfway.variance < 0.05


def test_a_linear_reward_narrows_nothing_and_has_no_maximiser() -> None:
    world = crossing()
    assert total_variance(world.aligned({"slope": 1e4})) == pytest.approx(0.3)
    for reward in (world.rewards["slope"], parametrised_peak(vector(0.3, 0.3, 1.0, 0.0))):
        with pytest.raises(ValueError, match=naming(reward.curvature.tolist(), "maximiser")):
            collapse(world.reference, reward, 0.1)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_a_strength_is_positive(beta: float) -> None:
    with pytest.raises(ValueError, match=naming("β", beta)):
        collapse(two_modes().reference, two_modes().rewards["peak"], beta)


# -- dropout in the reward makes another reward (A.1.1) ----------------------------------------------------------------


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.95])
def test_dropout_averages_a_linear_reward_to_a_weaker_one(rate: float, rescaled: bool) -> None:
    phi = vector(1.0, -0.6, 2.0)
    average = dropout_average(linear_reward, phi, rate, rescaled=rescaled)
    assert not average.curvature.any() and average.constant == 0
    torch.testing.assert_close(average.linear, phi if rescaled else (1 - rate) * phi)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.95])
def test_dropout_averages_a_peak_to_another_peak(rate: float, rescaled: bool) -> None:
    target, curvature = vector(0.5, -1.5), vector(1.0, 3.0)
    average = dropout_average(parametrised_peak, torch.cat([target, curvature]), rate, rescaled=rescaled)
    torch.testing.assert_close(average.curvature, curvature if rescaled else (1 - rate) * curvature)
    torch.testing.assert_close(peak(average), target if rescaled else (1 - rate) * target)


def test_the_average_over_dropout_is_the_mean_of_many_draws() -> None:
    parameters, x, rate = vector(0.5, -1.5, 1.0, 3.0), torch.randn(6, 2, dtype=torch.float64, generator=chance()), 0.4
    kept = (torch.rand(1000, 4, generator=chance(1)) > rate).double()
    draws = torch.stack([parametrised_peak(mask * parameters)(x) for mask in kept])
    average = dropout_average(parametrised_peak, parameters, rate)(x)
    assert bool(((draws.mean(0) - average).abs() < 4 * draws.std(0) / 1000**0.5).all())


def test_dropout_of_a_linear_reward_is_alignment_at_another_strength() -> None:
    world, beta, rate = crossing(), 0.4, 0.5
    plain = world.rewards["slope"]
    dropped = world.reference.tilted(dropout_average(linear_reward, plain.linear, rate) / beta)[0]
    weaker = world.reference.tilted(plain / (beta / (1 - rate)))[0]
    torch.testing.assert_close(dropped.log_weights, weaker.log_weights)
    torch.testing.assert_close(dropped.means, weaker.means)


def test_no_model_does_better_under_dropout_than_the_one_aligned_to_the_average() -> None:
    """The objective of equation 23 with a KL penalty, mask by mask, at the claimed optimum and at other models."""
    model, beta, rate = two_modes().reference, 0.2, 0.3
    parameters = vector(1.2, 1.0)
    masks = [vector(*mask) for mask in itertools.product([0.0, 1.0], repeat=2)]
    chances = [math.prod(1 - rate if kept else rate for kept in mask) for mask in masks]
    rewards = [parametrised_peak(mask * parameters) for mask in masks]

    def objective(candidate: GaussianMixture) -> float:
        gain = sum(c * candidate.expected(reward) for c, reward in zip(chances, rewards, strict=True))
        log_ratio = candidate.log_density(GRID[:, None]) - model.log_density(GRID[:, None])
        return gain - beta * float((density(candidate) * log_ratio).sum() * CELL)

    best = objective(model.tilted(dropout_average(parametrised_peak, parameters, rate) / beta)[0])
    others = [model.tilted(reward / beta)[0] for reward in rewards]
    others += [model.tilted(dropout_average(parametrised_peak, parameters, r) / beta)[0] for r in (0.25, 0.35)]
    assert all(objective(other) < best - 1e-6 for other in others)


@pytest.mark.parametrize("rate", [0.5, 0.95])
def test_a_reward_with_dropout_collapses_just_the_same(rate: float) -> None:
    model, parameters, beta = two_modes().reference, vector(1.6, 1.0), 1e-5
    found = collapse(model, dropout_average(parametrised_peak, parameters, rate), beta)
    assert found.variance == pytest.approx(beta / (1 - rate), rel=0.02)
    assert found.distance < 0.01


@pytest.mark.parametrize(
    ("rate", "parameters", "values"), [(1.0, 2, ["rate", 1.0]), (-0.1, 2, ["rate", -0.1]), (0.5, 13, [13])]
)
def test_dropout_refuses_rates_and_counts_without_an_average(
    rate: float, parameters: int, values: list[object]
) -> None:
    with pytest.raises(ValueError, match=naming(*values)):
        dropout_average(linear_reward, torch.ones(parameters, dtype=torch.float64), rate)


# -- interpolated weights as regularisation (Lemma 2) ------------------------------------------------------------------


def problem(dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A base, a minimiser and a Hessian, drawn at random."""
    factor = torch.randn(dim, dim, dtype=torch.float64, generator=chance(seed))
    base, tuned = torch.randn(2, dim, dtype=torch.float64, generator=chance(seed + 1))
    return base, tuned, factor @ factor.T + 0.1 * torch.eye(dim, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0, 20.0])
@pytest.mark.parametrize("dim", [1, 2, 8])
def test_a_penalty_in_the_hessians_metric_interpolates_the_weights(dim: int, alpha: float) -> None:
    base, tuned, hessian = problem(dim)
    interpolated = base + (tuned - base) / (1 + alpha)
    torch.testing.assert_close(tikhonov(base, tuned, hessian, alpha), interpolated)


@pytest.mark.parametrize("metric", [None, "identity"])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 20.0])
def test_the_minimiser_is_one(alpha: float, metric: str | None) -> None:
    base, tuned, hessian = problem(5)
    penalty = hessian if metric is None else torch.eye(5, dtype=torch.float64)

    def loss(theta: Tensor) -> Tensor:
        return (theta - tuned) @ hessian @ (theta - tuned) / 2 + alpha * (theta - base) @ penalty @ (theta - base) / 2

    theta = tikhonov(base, tuned, hessian, alpha, None if metric is None else penalty).requires_grad_()
    gradient = torch.autograd.grad(loss(theta), theta)[0]
    assert float(gradient.abs().max()) < 1e-9


def test_a_plain_l2_penalty_leaves_the_segment_unless_the_hessian_is_isotropic() -> None:
    base, tuned, hessian = problem(4)
    identity = torch.eye(4, dtype=torch.float64)
    for alpha in (0.1, 1.0, 10.0):
        assert off_segment(tikhonov(base, tuned, hessian, alpha, identity), base, tuned) > 0.02
        assert off_segment(tikhonov(base, tuned, hessian, alpha), base, tuned) < 1e-9
        assert off_segment(tikhonov(base, tuned, 3 * identity, alpha, identity), base, tuned) < 1e-9
    along = torch.linalg.eigh(hessian).eigenvectors[:, 1]
    assert off_segment(tikhonov(base, base + along, hessian, 1.0, identity), base, base + along) < 1e-9


def test_flat_directions_return_to_the_base_before_steep_ones() -> None:
    base, tuned = vector(0.0, 0.0), vector(1.0, 1.0)
    theta = tikhonov(base, tuned, torch.diag(vector(100.0, 0.01)), 1.0, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(theta, vector(100 / 101, 0.01 / 1.01))
    assert off_segment(vector(2.0, 2.0), base, tuned) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("hessian", "alpha", "message"),
    [
        (torch.eye(2).double(), -0.1, naming("α", -0.1)),
        (torch.diag(vector(1.0, 0.0)), 1.0, "Hessian"),
        (torch.diag(vector(1.0, -1.0)), 1.0, "Hessian"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double(), 1.0, "Hessian"),
    ],
)
def test_a_lemma_without_its_premises_is_refused(hessian: Tensor, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tikhonov(vector(0.0, 0.0), vector(1.0, 1.0), hessian, alpha)
