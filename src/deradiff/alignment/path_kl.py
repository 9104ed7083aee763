"""How far a trained model has gone from its reference: the KL divergence between the paths that both would sample.

A stochastic sampler makes a Markov chain of a denoiser: every step from x_t to x_{t-1} draws from a Gaussian whose mean
follows from the prediction. The chain is what policy gradients reinforce (Black et al. 2023, arXiv 2305.13301). The
divergence of two chains from the same noise is a sum over steps, and no smaller than the divergence of the images (Fan
et al. 2023, arXiv 2305.16381; Annealed Importance Guidance, figure 3, whose equation 4 leaves out the steps' weights).
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deradiff.algorithm import posteriors
from deradiff.algorithm.estimates import Estimate, mean
from deradiff.algorithm.gaussian import Gaussian, kl
from deradiff.alignment.base import Base, Policy
from deradiff.alignment.data_order import passes, row_generators
from deradiff.alignment.sampling import SamplerSettings, at_first, guided, shown, together, told

NOISELESS = 1e-12
"""diffusers clamps a variance of zero to 1e-20. Below the variance given here, float32 latents hold no noise."""


LEAST_NOISE = 0.02
"""A flow's step to a noise level below this has so sharp a density that it would drown those of all others."""


class ChainStep(NamedTuple):
    """One step of a chain: `after` was drawn from `transition`, the step's Gaussian at `before`."""

    number: int
    before: Float[Tensor, "batch *latent"]
    transition: Gaussian
    after: Float[Tensor, "batch *latent"]

    @property
    def is_random(self) -> bool:
        """Whether the step has a density. Most samplers' last step has none: it gives the estimate of x_0 itself."""
        return bool((self.transition.variance > NOISELESS).all())


class Chain:
    """The Markov chain x_T, ..., x_0 that `sampling` makes of a denoiser, for one picture of each of `prompts`.

    DDPM, Euler ancestral, and DDIM or the SDE of a flow at `sampling.eta`. With guidance, the guided prediction is the
    denoiser's: the chain is what is sampled. Raises `ValueError` for a sampler whose steps draw no noise.
    """

    def __init__(self, base: Base, prompts: Sequence[str], sampling: SamplerSettings) -> None:
        self.base, self.sampling = base, sampling
        self.scheduler = sampling.prepared(base)
        if not posteriors.is_diffusion(self.scheduler, eta=1.0):
            raise ValueError(
                f"the steps of the scheduler {sampling.scheduler!r} draw no noise, so that its paths have no density: "
                "take ddim (at eta 1 by default), ddpm or euler-a, for flows flow-sde"
            )
        self._eta = {"eta": sampling.eta} if "eta" in inspect.signature(self.scheduler.step).parameters else {}
        prompted, unprompted = told(base, prompts, sampling)
        self._known = together(unprompted, prompted)

    @property
    def counted(self) -> list[int]:
        """The numbers of the steps that divergences and gradients are made of: of a flow, those that leave some noise.

        That leaves out its last step, and where the times end just above 0, as Stable Diffusion 3's do, the one before
        it (`LEAST_NOISE`). Raises `ValueError` where none is left.
        """
        steps = range(len(self.scheduler.timesteps))
        if not self.base.is_flow:
            return [*steps]
        ends = self.scheduler.sigmas[1:].tolist()
        if not (left := [number for number in steps if ends[number] >= LEAST_NOISE]):
            raise ValueError(
                f"none of the {len(ends)} steps of {self.sampling.scheduler} ends at a noise level of {LEAST_NOISE} or "
                "more: take 3 steps or more"
            )
        return left

    def transition(self, denoiser: nn.Module, number: int, latents: Float[Tensor, "batch *latent"]) -> Gaussian:
        """`p(x_{t-1} | x_t, c)` of `denoiser` at the step with this number, from 0, where x_t is `latents`.

        In single precision at least, and differentiable in the weights. `denoiser` is the base's own, or another with
        its architecture.
        """
        timestep = self.scheduler.timesteps[number]
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = number
        noisy = shown(self.scheduler, latents, timestep)
        prediction = guided(self.base, denoiser, noisy, timestep, self._known, self.sampling.guidance_scale)
        return posteriors.posterior(self.scheduler, prediction, timestep, latents, **self._eta)

    def walk(self, denoiser: nn.Module, generators: Sequence[torch.Generator]) -> Iterator[ChainStep]:
        """Draw the chain step by step, with a generator for each picture: none depends on the others in the batch.

        Without gradients.
        """
        x = at_first(self.scheduler, self.sampling.noise(self.base, generators))
        for number in range(len(self.scheduler.timesteps)):
            # Not around the `yield`, where it would be in force for the caller as well.
            with torch.no_grad():
                transition = self.transition(denoiser, number, x)
            noise = self.sampling.noise(self.base, generators)
            after = transition.mean + transition.variance.sqrt() * noise
            yield ChainStep(number, x, transition, after)
            x = after


def divergence(chain: Chain, policy: Policy, step: ChainStep, prepared: nn.Module) -> Float[Tensor, " batch"]:
    """The KL divergence of one step from the reference's, at the state it starts from; zero if it has no density.

    `prepared` is the policy's model as Accelerate prepared it. Gradients go to `step.transition`.
    """
    if not step.is_random:
        return torch.zeros(len(step.before), device=step.before.device)
    with policy.reference(prepared) as reference:
        known = chain.transition(reference, step.number, step.before)
    return kl(step.transition, known)


def path_kl(
    base: Base, policy: Policy, prompts: Sequence[str], sampling: SamplerSettings, *, seed: int = 0, per_pass: int = 16
) -> Estimate:
    """The KL divergence of the policy's paths from its reference's, in nats, with its standard error.

        mean over c of  E_{x_{0:T} ~ p_θ} Σ_t KL(p_θ(x_{t-1} | x_t, c) || p_ref(x_{t-1} | x_t, c))

    One path of every prompt is drawn, `per_pass` at a time; for more, give each prompt several times. What is summed
    are the divergences of the sampler's own steps, ½ (R - 1) ||Δε||² where the signal-to-noise ratio grows R times: so
    compare models with the same sampling. (`Dial.importance_weights` has the limit for fine steps, ½ log R.) Left out
    are a last step without noise, whose divergence would be infinite wherever the models differ, and of a flow those
    that leave hardly any (`Chain.counted`).

    Raises `ValueError` for no prompts and for a sampler whose steps draw no noise.
    """
    if not prompts:
        raise ValueError("no prompts: the divergence is a mean over prompts")
    divergences = []
    for places in passes(len(prompts), per_pass):
        chain = Chain(base, prompts[places.start : places.stop], sampling)
        generators = row_generators(seed, places, "path")
        counted = chain.counted
        walk = (step for step in chain.walk(policy.model, generators) if step.number in counted)
        steps = [divergence(chain, policy, step, policy.model) for step in walk]
        divergences.append(torch.stack(steps).double().sum(0).cpu())
    return mean(torch.cat(divergences))
