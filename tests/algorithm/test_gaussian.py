"""Geometric mixtures against brute force: densities on a grid, and float64 or rational arithmetic."""

import math

import pytest
import torch

from deradiff.algorithm.gaussian import Gaussian, IllConditionedMixture, geometric_mixture, kl, log_normalizer
from messages import naming

GRID = torch.linspace(-40, 40, 400_001, dtype=torch.float64)


def log_density(mean: float, variance: float) -> torch.Tensor:
    return -((GRID - mean) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2


def on_a_grid(means: list[float], variances: list[float], weights: list[float]) -> tuple[float, float, float]:
    """Mean, variance and log normaliser of the mixture, by summing its density."""
    log_p = torch.stack([w * log_density(m, v) for m, v, w in zip(means, variances, weights, strict=True)]).sum(0)
    log_z = torch.logsumexp(log_p, 0) + math.log(GRID[1] - GRID[0])
    p = (log_p - log_z).exp() * (GRID[1] - GRID[0])
    mean = float((p * GRID).sum())
    return mean, float((p * (GRID - mean) ** 2).sum()), float(log_z)


@pytest.mark.parametrize(
    ("means", "variances", "weights"),
    [
        ([0.5, -1.0], [1.0, 1.0], [0.3, 0.7]),
        ([0.5, -1.0], [1.0, 1.0], [-0.8, 1.8]),
        ([0.5, -1.0], [2.0, 0.5], [0.3, 0.7]),
        ([0.5, -1.0], [2.0, 0.5], [-0.5, 1.5]),
        ([0.5, -1.0], [0.5, 2.0], [-0.2, 1.2]),
        ([0.5, -1.0], [0.5, 2.0], [1.4, -0.4]),
        ([0.5, -1.0, 2.0], [1.0, 3.0, 0.7], [0.2, 0.3, 0.5]),
        ([0.5, -1.0, 2.0, 0.1], [1.0, 3.0, 0.7, 1.1], [-0.4, 0.3, 0.8, 0.3]),
        ([0.5, -1.0, 2.0], [1.0, 3.0, 0.7], [1.0, 0.5, -0.5]),
    ],
)
def test_mean_variance_and_normalizer_are_those_of_the_density(means, variances, weights):
    mu, s2, w = (torch.tensor(x, dtype=torch.float64) for x in (means, variances, weights))
    mixture = geometric_mixture(mu[:, None], s2[:, None], w)
    log_z = log_normalizer(mu[:, None], s2[:, None], w, batch_dims=0)
    mean, variance, expected = on_a_grid(means, variances, weights)
    assert mixture.mean.item() == pytest.approx(mean, abs=1e-8)
    assert mixture.variance.item() == pytest.approx(variance, rel=1e-8)
    assert log_z.item() == pytest.approx(expected, abs=1e-8)


def test_the_reference_is_kept_where_the_printed_equations_leave_it_out():
    """DeRaDiff, equations 33-36: without the reference's factor both mean and variance come out wrong."""
    means, variances = torch.tensor([[3.0], [0.0], [1.0]]), torch.tensor([[1.0], [1.0], [1.0]])
    mixture = geometric_mixture(means, variances, torch.tensor([0.5, 0.2, 0.3]))
    printed_variance = 1 / (0.2 + 0.3)
    assert mixture.variance.item() == pytest.approx(1.0) and printed_variance == 2.0
    assert mixture.mean.item() == pytest.approx(1.8) and printed_variance * 0.3 == pytest.approx(0.6)


def test_theorem_1_with_two_models_and_diagonal_variances():
    generator = torch.Generator().manual_seed(0)
    mu_0, mu_1 = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).unbind()
    s2_0, s2_1 = (torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) + 0.1).unbind()
    lam = 0.35
    precision = (1 - lam) / s2_0 + lam / s2_1
    mean, variance = geometric_mixture(
        torch.stack([mu_0, mu_1]), torch.stack([s2_0, s2_1]), torch.tensor([1 - lam, lam], dtype=torch.float64)
    )
    torch.testing.assert_close(variance, 1 / precision)
    torch.testing.assert_close(mean, ((1 - lam) * mu_0 / s2_0 + lam * mu_1 / s2_1) / precision)


# -- exactness ---------------------------------------------------------------------------------------------------------

VARIANCES = {
    "equal": [0.3, 0.3, 0.3],
    "unequal": [0.3, 0.7, 0.11],
    "tiny": [1e-20, 1e-3, 1e-20],
    "zero": [0.0, 0.0, 0.0],
    "one zero": [0.0, 0.2, 0.3],
    "diagonal": None,
}


def models(kind: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(3, 4, 2, 5, 5, generator=generator).to(dtype)
    if VARIANCES[kind] is None:
        return means, torch.rand(3, 4, 2, 5, 5, generator=generator) + 0.01
    return means, torch.tensor(VARIANCES[kind]).reshape(3, 1, 1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", VARIANCES)
def test_weight_one_for_one_model_gives_that_model_back_bit_for_bit(kind, dtype):
    means, variances = models(kind, dtype)
    for k in range(3):
        mixture = geometric_mixture(means, variances, torch.eye(3, dtype=torch.float64)[k])
        assert torch.equal(mixture.mean, means[k]) and mixture.mean.dtype == dtype
        assert torch.equal(mixture.variance, variances[k])


@pytest.mark.parametrize("kind", VARIANCES)
def test_weights_per_image_act_on_each_image_alone(kind):
    means, variances = models(kind)
    per_image = torch.tensor([[1.0, 0.0, 0.3, 0.0], [0.0, 1.0, 0.3, 0.0], [0.0, 0.0, 0.4, 1.0]])
    mixture = geometric_mixture(means, variances, per_image.reshape(3, 4, 1, 1, 1))
    for image, model in ((0, 0), (1, 1), (3, 2)):
        assert torch.equal(mixture.mean[image], means[model, image])
        variance = variances[model].expand_as(means[model])[image]
        assert torch.equal(mixture.variance.expand_as(mixture.mean)[image], variance)
    alone = geometric_mixture(means[:, 2:3], variances.expand_as(means)[:, 2:3], per_image[:, 2])
    assert torch.equal(mixture.mean[2:3], alone.mean)


def test_a_model_of_weight_zero_plays_no_part_whatever_it_holds():
    means, variances = models("unequal")
    broken = means.clone()
    broken[1] = torch.nan
    weights = torch.tensor([0.4, 0.0, 0.6])
    for bad in (0.0, 1e-30, 1e30):
        variances[1] = bad
        mixture = geometric_mixture(broken, variances, weights)
        rest = geometric_mixture(means[[0, 2]], variances[[0, 2]], weights[[0, 2]])
        assert torch.equal(mixture.mean, rest.mean) and torch.equal(mixture.variance, rest.variance)


@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.5], [-1.0, 0.5, 1.5], [3.0, -0.5, -1.5]])
@pytest.mark.parametrize("variance", [1e-20, 1e-3, 1.0, 300.0, 0.0])
def test_equal_variances_mix_means_linearly_and_stay_as_they_are(weights, variance):
    means, _ = models("equal")
    variances = torch.full((3, 1, 1, 1, 1), variance)
    mixture = geometric_mixture(means, variances, torch.tensor(weights))
    linear = (torch.tensor(weights).double().reshape(3, 1, 1, 1, 1) * means.double()).sum(0)
    torch.testing.assert_close(mixture.mean.double(), linear, rtol=0, atol=2e-6)
    assert torch.equal(mixture.variance, variances[0])


@pytest.mark.parametrize("small", [1e-20, 1e-8, 1e-3])
def test_float32_keeps_its_accuracy_whatever_the_scale(small):
    means, _ = models("equal")
    variances = torch.tensor([small, 3 * small, 1e-3]).reshape(3, 1, 1, 1, 1)
    weights = torch.tensor([0.3, 0.3, 0.4])
    single, double = (geometric_mixture(means.to(d), variances.to(d), weights) for d in (torch.float32, torch.float64))
    torch.testing.assert_close(single.mean.double(), double.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(single.variance.double(), double.variance, rtol=1e-6, atol=0)
    log_z, exact = (log_normalizer(means.to(d), variances.to(d), weights) for d in (torch.float32, torch.float64))
    torch.testing.assert_close(log_z.double(), exact, rtol=1e-5, atol=0)


def test_the_certain_models_decide_where_only_some_are_certain():
    """The limit s_0 → 0, approached from above."""
    means, variances = models("one zero")
    weights = torch.tensor([0.2, 0.5, 0.3])
    limit = geometric_mixture(means, variances, weights)
    near = geometric_mixture(means, variances.clamp(min=1e-12), weights)
    torch.testing.assert_close(limit.mean, means[0])
    torch.testing.assert_close(near.mean, limit.mean)
    assert limit.variance.item() == 0

    variances[2] = 0.0
    limit = geometric_mixture(means, variances, weights)
    torch.testing.assert_close(limit.mean, 0.4 * means[0] + 0.6 * means[2])


# -- the normaliser ----------------------------------------------------------------------------------------------------


def test_the_normalizer_is_summed_over_elements_one_value_per_image():
    means, variances = models("diagonal")
    weights = torch.tensor([0.2, 0.5, 0.3])
    total = log_normalizer(means, variances, weights)
    assert total.shape == (4,)
    each = log_normalizer(means, variances, weights, batch_dims=4)
    torch.testing.assert_close(total, each.flatten(1).sum(1))
    per_image = log_normalizer(means, variances, weights.reshape(3, 1, 1, 1, 1).expand(3, 4, 1, 1, 1))
    torch.testing.assert_close(total, per_image)


def test_the_normalizer_does_not_cancel():
    """Means of 1000 that differ by 0.001: squared norms would lose every digit in float32."""
    base = torch.full((1, 64), 1000.0)
    means = torch.stack([base, base + 2**-10])
    variances = torch.ones(2, 1, 1)
    log_z = log_normalizer(means, variances, torch.tensor([0.5, 0.5]))
    assert log_z.item() == pytest.approx(-0.5 * 0.25 * 64 * 2**-20, rel=1e-6)


def test_the_normalizer_of_nearly_equal_variances_does_not_cancel():
    """10,000 elements whose variances differ by 1%: second order in the difference, -0.06 nats in all."""
    means = torch.zeros(2, 1, 10_000)
    variances = torch.tensor([1.0, 1.01], dtype=torch.float64).reshape(2, 1, 1)
    single = log_normalizer(means, variances.float(), torch.tensor([0.5, 0.5]))
    exact = log_normalizer(means, variances, torch.tensor([0.5, 0.5]))
    analytic = 10_000 / 2 * (math.log(1 / (0.5 + 0.5 / 1.01)) - 0.5 * math.log(1.01))
    assert exact.item() == pytest.approx(analytic, rel=1e-9)
    assert single.item() == pytest.approx(analytic, rel=1e-4)


def test_the_normalizer_has_the_sign_of_a_bhattacharyya_coefficient():
    """For λ in (0, 1) Hölder's inequality gives Z ≤ 1, with equality for equal models; outside it is the other way."""
    means, variances = models("diagonal")
    two = torch.tensor([0.4, 0.6])
    assert (log_normalizer(means[:2], variances[:2], two) < 0).all()
    assert (
        log_normalizer(means[:2], variances[:1].expand(2, *variances.shape[1:]), torch.tensor([-0.5, 1.5])) > 0
    ).all()
    same = log_normalizer(means[[0, 0]], variances[[0, 0]], two)
    assert torch.equal(same, torch.zeros(4))
    assert torch.equal(log_normalizer(means[:2], variances[:2], torch.tensor([0.0, 1.0])), torch.zeros(4))


def test_a_certain_model_has_no_normalizer():
    means, variances = models("one zero")
    with pytest.raises(ValueError, match="normaliser"):
        log_normalizer(means, variances, torch.tensor([0.2, 0.5, 0.3]))
    assert torch.isfinite(log_normalizer(means, variances, torch.tensor([0.0, 0.5, 0.5]))).all()


# -- KL ----------------------------------------------------------------------------------------------------------------


def test_kl_is_torch_distributions():
    means, variances = models("diagonal", torch.float64)
    p, q = (Gaussian(m, v.double()) for m, v in zip(means[:2], variances[:2], strict=True))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(p.mean, p.variance.sqrt()), torch.distributions.Normal(q.mean, q.variance.sqrt())
    )
    torch.testing.assert_close(kl(p, q), expected.flatten(1).sum(1))
    torch.testing.assert_close(kl(p, q, batch_dims=0), expected.sum())
    assert torch.equal(kl(p, p), torch.zeros(4, dtype=torch.float64))


def test_kl_broadcasts_one_variance_and_survives_extremes():
    mean = torch.zeros(2, 3)
    tiny, wide = (Gaussian(mean, torch.full((1, 1), v)) for v in (1e-20, 1e-3))
    expected = 3 * 0.5 * (1e-17 - 1 - math.log(1e-17))
    assert kl(tiny, wide).tolist() == pytest.approx([expected] * 2, rel=1e-5)
    nearly = Gaussian(mean, torch.full((1, 1), 1e-3 * (1 + 2**-10)))
    assert kl(wide, nearly).tolist() == pytest.approx([3 / 4 * 2**-20] * 2, rel=2e-3)
    certain = Gaussian(mean, torch.zeros(1, 1))
    assert kl(certain, certain).tolist() == [0, 0]
    for p, q in ((certain, wide), (wide, certain), (certain, Gaussian(mean + 1, torch.zeros(1, 1)))):
        assert kl(p, q).tolist() == [math.inf] * 2


def test_the_mixture_is_the_barycentre_of_kl():
    """`Σ w_i KL(p || N_i)` is least at the geometric mixture, where it is `-log Z`: ties all three together."""
    means, variances = models("diagonal", torch.float64)
    variances, weights = variances.double(), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mixture = geometric_mixture(means, variances, weights)

    def divergence(p: Gaussian) -> torch.Tensor:
        each = [kl(p, Gaussian(m, v)) for m, v in zip(means, variances, strict=True)]
        return (weights[:, None] * torch.stack(each)).sum(0)

    torch.testing.assert_close(divergence(mixture), -log_normalizer(means, variances, weights))
    assert (divergence(Gaussian(mixture.mean + 0.01, mixture.variance)) > divergence(mixture)).all()
    assert (divergence(Gaussian(mixture.mean, mixture.variance * 1.01)) > divergence(mixture)).all()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variances", "bound", "side"),
    [([1.0, 2.0], 2.0, "under"), ([2.0, 1.0], -1.0, "above"), ([1.0, 5.0], 1.25, "under")],
)
def test_the_bound_on_lambda_is_sharp_and_named(variances, bound, side):
    means, s2 = torch.zeros(2, 3, 2), torch.tensor(variances).reshape(2, 1, 1)
    inside, outside = 0.999 * bound, 1.001 * bound
    assert torch.isfinite(geometric_mixture(means, s2, torch.tensor([1 - inside, inside])).variance).all()
    for lam in (bound, outside):
        values = (f"λ = {lam:g}", side, *(f"= {value:g}" for value in (bound, *variances)))
        with pytest.raises(IllConditionedMixture, match=naming(*values)):
            geometric_mixture(means, s2, torch.tensor([1 - lam, lam]))


def test_only_the_image_beyond_its_bound_is_named():
    means, s2 = torch.zeros(2, 3, 2), torch.tensor([1.0, 2.0]).reshape(2, 1, 1)
    lam = torch.tensor([0.5, 2.5, 1.0])
    with pytest.raises(IllConditionedMixture, match=naming("λ = 2.5")):
        geometric_mixture(means, s2, torch.stack([1 - lam, lam]).unsqueeze(-1))


def test_several_anchors_are_told_by_what_factor_their_lambdas_are_too_large():
    means, s2 = torch.zeros(3, 1, 2), torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    lam = torch.tensor([1.0, 1.0])
    factor = 1 / (1 * (1 - 1 / 2) + 1 * (1 - 1 / 3))
    with pytest.raises(IllConditionedMixture, match=naming([1.0, 1.0], f"{factor:g}")):
        geometric_mixture(means, s2, torch.cat([1 - lam.sum(0, keepdim=True), lam]))
    lam = lam * factor * 0.999
    geometric_mixture(means, s2, torch.cat([1 - lam.sum(0, keepdim=True), lam]))


def test_a_certain_reference_allows_lambda_below_one_only():
    means, s2 = torch.zeros(2, 1, 2), torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
    geometric_mixture(means, s2, torch.tensor([0.01, 0.99]))
    with pytest.raises(IllConditionedMixture, match=naming("λ = 1.01", "under", "= 1")):
        geometric_mixture(means, s2, torch.tensor([-0.01, 1.01]))


@pytest.mark.parametrize("weights", [[0.5, 0.6], [math.nan, 1.0], [0.0, 0.0]])
def test_weights_must_sum_to_one(weights):
    with pytest.raises(ValueError, match=naming("weights", torch.tensor(weights).sum().item())):
        geometric_mixture(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor(weights))


@pytest.mark.parametrize("variances", [[1.0, -1.0], [math.nan, 1.0], [1.0, math.inf]])
def test_variances_must_be_variances(variances):
    with pytest.raises(ValueError, match=naming("variances", variances)) as error:
        geometric_mixture(torch.zeros(2, 1), torch.tensor(variances).reshape(2, 1), torch.tensor([0.5, 0.5]))
    assert not isinstance(error.value, IllConditionedMixture)


def test_large_weights_may_round_more_than_small_ones():
    means, variances = torch.zeros(2, 1, 3), torch.ones(2, 1, 3)
    assert geometric_mixture(means, variances, torch.tensor([[-39.0], [40.02]])).mean.shape == (1, 3)
    with pytest.raises(ValueError, match=naming(1.02)):
        geometric_mixture(means, variances, torch.tensor([[0.5], [0.52]], dtype=torch.float64))
