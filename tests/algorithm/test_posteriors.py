"""Posteriors against the schedulers of diffusers themselves: their `step` is the oracle throughout."""

import copy

import diffusers
import pytest
import torch

from deradiff.algorithm import posteriors
from deradiff.algorithm.gaussian import geometric_mixture
from deradiff.algorithm.posterior_families import UnsupportedScheduler, ddim
from messages import naming
from scheduler_cases import CASES, SHAPE, make, model_input, prediction, start, started

DTYPES = {"float32": (torch.float32, 3e-6), "float64": (torch.float64, 3e-6), "bfloat16": (torch.bfloat16, 3e-2)}


def state(scheduler) -> dict:
    return {k: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v) for k, v in vars(scheduler).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_mean_and_noise_scale_are_those_of_step_over_a_whole_run(case, dtype):
    name, config, step_kwargs = CASES[case]
    dtype, tolerance = DTYPES[dtype]
    scheduler = started(name, config)
    x = start(scheduler, dtype)
    for i, t in enumerate(scheduler.timesteps):
        output = prediction(scheduler, model_input(scheduler, x, t), i)
        before = state(scheduler)
        mean, variance = posteriors.posterior(scheduler, output, t, x, **step_kwargs)
        after = state(scheduler)
        assert before.keys() == after.keys()
        assert all(
            torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items()
        )
        assert mean.dtype == dtype and variance.ndim == mean.ndim

        expected = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i), **step_kwargs)[0]
        noise_dtype = torch.float32 if name.startswith("Flow") else dtype
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i), dtype=noise_dtype)
        scale = tolerance * float(expected.abs().max())
        wide = torch.promote_types(dtype, torch.float32)
        got = mean.to(wide) + variance.sqrt() * z.to(wide)
        torch.testing.assert_close(got, expected.to(wide), rtol=0, atol=scale)
        # The noise scale on its own, from two draws of the same step.
        if not hasattr(scheduler, "step_index") and dtype == torch.float32:
            again = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(99), **step_kwargs)[0]
            z_again = torch.randn(SHAPE, generator=torch.Generator().manual_seed(99), dtype=dtype)
            torch.testing.assert_close(variance.sqrt() * (z - z_again), expected - again, rtol=0, atol=2 * scale)
        x = expected


@pytest.mark.parametrize("generators", ["one", "one per image", "global"])
@pytest.mark.parametrize("case", CASES)
def test_sampling_from_posteriors_reproduces_the_scheduler_and_leaves_generators_alike(case, generators):
    name, config, step_kwargs = CASES[case]

    def seeded():
        torch.manual_seed(5)
        match generators:
            case "one":
                return torch.Generator().manual_seed(3)
            case "one per image":
                return [torch.Generator().manual_seed(s) for s in (3, 4)]
        return None

    def run(step):
        scheduler, generator = started(name, config), seeded()
        x = start(scheduler, torch.float32)
        for i, t in enumerate(scheduler.timesteps):
            x = step(scheduler, prediction(scheduler, model_input(scheduler, x, t), i), t, x, generator)
        rest = generator if isinstance(generator, list) else [generator]
        return x, getattr(scheduler, "step_index", None), [torch.randn(3, generator=g) for g in rest]

    def own(scheduler, output, t, x, generator):
        return scheduler.step(output, t, x, generator=generator, **step_kwargs)[0]

    def ours(scheduler, output, t, x, generator):
        gaussian = posteriors.posterior(scheduler, output, t, x, **step_kwargs)
        return posteriors.sample(scheduler, gaussian, t, generator, eta=step_kwargs.get("eta", 0.0))

    expected, index, rest = run(own)
    got, got_index, got_rest = run(ours)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert got_index == index
    assert all(torch.equal(a, b) for a, b in zip(rest, got_rest, strict=True))


def test_half_precision_samples_keep_their_dtype_and_tiny_variances():
    scheduler = started("DDPMScheduler", {"steps_offset": 1})
    x = start(scheduler, torch.float16)
    gaussian = posteriors.posterior(scheduler, prediction(scheduler, x, 0), scheduler.timesteps[-1], x)
    assert gaussian.variance.dtype == torch.float32
    assert gaussian.variance.item() == pytest.approx(1e-20)
    assert posteriors.sample(scheduler, gaussian, scheduler.timesteps[-1]).dtype == torch.float16


def test_given_noise_is_used_and_excludes_a_generator():
    scheduler = started("DDIMScheduler", {})
    t, x, z = scheduler.timesteps[2], start(scheduler, torch.float32), torch.randn(SHAPE)
    output = prediction(scheduler, x, 0)
    gaussian = ddim(scheduler, output, t, x, eta=1.0)
    expected = scheduler.step(output, t, x, eta=1.0, variance_noise=z)[0]
    torch.testing.assert_close(posteriors.sample(scheduler, gaussian, t, variance_noise=z), expected)
    with pytest.raises(ValueError, match=naming("generator", "variance_noise")):
        posteriors.sample(scheduler, gaussian, t, torch.Generator(), z)


def test_a_run_that_starts_in_mid_schedule_knows_its_step():
    for begin in (True, False):
        scheduler = started("EulerAncestralDiscreteScheduler", {})
        if begin:
            scheduler.set_begin_index(3)
        t, x = scheduler.timesteps[3], start(scheduler, torch.float32)
        output = prediction(scheduler, x, 0)
        gaussian = posteriors.posterior(scheduler, output, t, x)
        assert scheduler.step_index is None
        drawn = posteriors.sample(scheduler, gaussian, t, torch.Generator().manual_seed(0))
        assert scheduler.step_index == 4
        scheduler._step_index = None
        scheduler.is_scale_input_called = True
        expected = scheduler.step(output, t, x, torch.Generator().manual_seed(0))[0]
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# -- which schedulers have posteriors, and which of them are affine ----------------------------------------------------

WITH_POSTERIORS = {
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
}
WITHOUT_POSTERIORS = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMEulerScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}


@pytest.mark.parametrize("name", sorted(WITH_POSTERIORS | WITHOUT_POSTERIORS))
def test_which_schedulers_have_posteriors(name):
    scheduler = make(name)
    assert posteriors.has_posterior(scheduler) == (name in WITH_POSTERIORS)
    affine, reason = posteriors.affine(scheduler)
    assert affine and name in reason
    if name in WITHOUT_POSTERIORS:
        assert "mixing predictions is the definition" in reason
        x = torch.zeros(SHAPE)
        with pytest.raises(UnsupportedScheduler, match=name):
            posteriors.posterior(scheduler, x, 1, x)


def test_no_other_scheduler_is_taken_for_one_with_posteriors():
    every = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    known = {name for name, cls in every.items() if vars(cls).get("step") in posteriors._FAMILIES}
    assert known == WITH_POSTERIORS


def test_a_step_of_ones_own_has_no_posterior_but_a_wrapped_one_has():
    import functools

    class Own(diffusers.DDPMScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    class Wrapped(diffusers.DDPMScheduler):
        @functools.wraps(diffusers.DDPMScheduler.step)
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    assert not posteriors.has_posterior(Own())
    assert posteriors.has_posterior(Wrapped())


@pytest.mark.parametrize(
    ("name", "config", "because"),
    [
        ("DDPMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DDPMScheduler", {"thresholding": True}, "thresholding"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding"),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type='learned'"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type='learned_range'"),
    ],
)
def test_steps_that_are_not_affine_say_why(name, config, because):
    affine, reason = posteriors.affine(make(name, **config))
    assert not affine and because in reason


@pytest.mark.parametrize(
    ("name", "config", "because"),
    [
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding"),
        ("HeunDiscreteScheduler", {"clip_sample": True}, "clip_sample"),
    ],
)
def test_without_a_posterior_nonlinear_switches_are_named_and_predictions_are_mixed_all_the_same(name, config, because):
    affine, reason = posteriors.affine(make(name, **config))
    assert affine and because in reason and "definition" in reason


@pytest.mark.parametrize("case", CASES)
def test_affine_is_true_exactly_where_both_mixtures_agree(case):
    """Mixed predictions through one step equal mixed posteriors if and only if the step is affine."""
    name, config, step_kwargs = CASES[case]
    scheduler = started(name, config)
    x, t = start(scheduler, torch.float32), scheduler.timesteps[3]
    x = x / x.std()
    model_input(scheduler, x, t)
    outputs = torch.stack([3 * prediction(scheduler, x, i) for i in (0, 1)])
    if scheduler.config.get("variance_type") == "learned":
        outputs = outputs.abs()
    weights = torch.tensor([0.3, 0.7])
    each = [posteriors.posterior(scheduler, output, t, x, **step_kwargs) for output in outputs]
    means, variances = (torch.stack(part) for part in zip(*each, strict=True))
    mixture = geometric_mixture(means, variances, weights)
    mixed = posteriors.posterior(scheduler, 0.3 * outputs[0] + 0.7 * outputs[1], t, x, **step_kwargs)
    agree = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(mixture, mixed, strict=True))
    assert posteriors.affine(scheduler)[0] == agree


def test_variances_that_cannot_be_are_refused_with_the_reason():
    x = torch.zeros(SHAPE)
    scheduler = started("DDPMScheduler", {"variance_type": "fixed_large_log"})
    assert not posteriors.has_posterior(scheduler)
    with pytest.raises(UnsupportedScheduler, match=naming("variance_type='fixed_large_log'", "NaN")):
        posteriors.posterior(scheduler, x, scheduler.timesteps[0], x)
    scheduler = started("DDPMScheduler", {"variance_type": "learned_range"})
    with pytest.raises(UnsupportedScheduler, match="variance_type='learned_range'"):
        posteriors.posterior(scheduler, x, scheduler.timesteps[0], x)
    scheduler = started("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"})
    with pytest.raises(
        UnsupportedScheduler, match=naming("EulerAncestralDiscreteScheduler", "prediction_type='sample'")
    ):
        posteriors.posterior(scheduler, x, scheduler.timesteps[0], x)


@pytest.mark.parametrize(
    ("name", "config", "eta", "share"),
    [
        ("DDIMScheduler", {}, 0.3, 0.3),
        ("DDPMScheduler", {}, 0.3, 1.0),
        ("EulerAncestralDiscreteScheduler", {}, 0.0, 1.0),
        ("EulerDiscreteScheduler", {}, 0.3, 0.0),
    ],
)
def test_how_much_of_a_step_is_noise(name, config, eta, share):
    scheduler = started(name, config, steps=4)
    assert posteriors.share_of_noise(scheduler, eta) == share
    assert posteriors.memoryless(scheduler, eta) == (share == 1)
