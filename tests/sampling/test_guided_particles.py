"""Particles under guidance: weighed by guidance's parts apart, against the retrained model under the same guidance."""

from typing import Any

import pytest
import torch

from deradiff import realign, sample_particles
from deradiff.algorithm.guided_weights import GuidedWeights
from deradiff.algorithm.path_weights import ImportanceWeights
from deradiff.algorithm.smc import Population
from deradiff.sampling.particles import Particles, RealignedPaths
from deradiff.worlds.gaussian_mixture import crossing
from realigned_worlds import FAMILIES, sample

CALL: dict[str, Any] = {"prompt": "right", "guidance_scale": 1.5}
STEPS, COUNT = 60, 6000


def guided(ess_threshold: float) -> Particles:
    """The crossing's reference towards an anchor of β = ½, at λ = ¼."""
    world = crossing()
    pipe = world.pipeline(FAMILIES["DDPM"]())
    pipe.set_progress_bar_config(disable=True)
    with realign(pipe, world.denoiser({"slope": 2.0}), 0.25):
        return sample_particles(
            pipe,
            count=COUNT,
            num_inference_steps=STEPS,
            ess_threshold=ess_threshold,
            generator=torch.Generator().manual_seed(3),
            **CALL,
        )


def test_guided_particles_meet_the_retrained_model_under_the_same_guidance() -> None:
    """Where Algorithm 1 is off by more than a fifth of the shift; weights may be by their margin, a hundredth here."""
    reward = crossing().rewards["slope"]
    tilts: tuple[dict[str, float], ...] = ({"slope": 0.5}, {})
    target, reference = (
        reward(sample(crossing(), FAMILIES["DDPM"], tilt, steps=STEPS, samples=COUNT, **CALL)) for tilt in tilts
    )
    truth, shift = float(target.mean()), float(target.mean() - reference.mean())
    noise = float(target.std()) / len(target) ** 0.5
    plain, resampled = guided(0.0), guided(1.0)
    assert truth - float(reward(plain.images).mean()) > 0.2 * shift
    for particles in (plain, resampled):
        estimate = particles.mean(reward(particles.images))
        assert abs(estimate.value - truth) <= 0.01 * shift + 2 * (estimate.error + noise)
    assert resampled.lineage and "weights at guidance 1.5 leave out up to" in resampled.words
    # Not the weights of the guided predictions, which are there as well.
    guidance = plain.run.guidance
    assert guidance is not None
    torch.testing.assert_close(plain.log_weights[0], torch.log_softmax(guidance.combined, 0))
    assert (plain.log_weights[0] - torch.log_softmax(plain.run.log_weights, 0)).abs().max() > 0.05


def test_particles_go_by_the_mixed_predictions_once_no_scale_explains_the_guidance():
    paths = RealignedPaths(Population(1, 2, 0.0, torch.Generator()), 1.0)

    def weigh(mixed: float, parts: float | None) -> None:
        zero, one = torch.zeros(2), torch.tensor([0.0, 1.0])
        guidance = None if parts is None else GuidedWeights(1.5, parts * one / 1.5, zero, zero)
        nothing: dict[str, Any] = {"log_ratios": {}, "path_kl": None, "memoryless": True, "lams": torch.ones(1, 2)}
        run = ImportanceWeights(mixed * one, **nothing, obstacles=frozenset(), predictions=1, guidance=guidance)
        paths._weigh(run)

    weigh(1.0, 0.5)  # 0.5 by the parts
    weigh(3.0, 0.75)  # and 0.25 more
    weigh(4.0, None)  # and 1 by the mixed predictions, of which there were 3
    left, right = paths.population.result().log_weights[0].tolist()
    assert right - left == pytest.approx(1.75)
