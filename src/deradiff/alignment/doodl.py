"""DOODL (Wallace et al. 2023, arXiv 2303.13703): the noise is moved until the image that EDICT makes of it is liked.

Both of EDICT's pair begin at one noise z, and the mean reward of the two images is ascended in it (their algorithm 1;
momentum, clipping and defaults are those of the published code):

    v ← 0.9 v + clip(η ∇_z ½ (r(x_0) + r(y_0)), ±0.001)      z ← z + v + 10⁻⁴ ξ      z ← z ‖z_T‖/‖z‖

with standard normal ξ. Their reward is averaged over random crops of the image; here it sees the whole image. Gradients
need the memory of one step, at twice the evaluations of sampling (`edict`).
"""

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.alignment.base import Base
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.edict import Edict
from deradiff.alignment.noise_optimization import Cost, Optimized, better, counted, frozen, initial_noise
from deradiff.alignment.rewarded_model import gradient_of, rewarded
from deradiff.alignment.sampling import SamplerSettings, decode
from deradiff.alignment.scoring import scored
from deradiff.rewards import Reward
from deradiff.sampling.pictures import upcast

MOMENTUM, PERTURBATION = 0.9, 1e-4


def doodl(
    base: Base,
    prompts: Sequence[str],
    reward: Reward,
    *,
    steps: int = 50,
    guidance_scale: float | int = 7.5,
    resolution: int | None = None,
    iterations: int = 50,
    learning_rate: float | int = 1.0,
    clip: float | int = 1e-3,
    seed: int = 0,
    noise: Float[Tensor, "prompt *latent"] | None = None,
) -> Optimized:
    """Ascend the reward of EDICT's images in their noise, and keep the best image of each prompt.

    Args:
        base: the model, sampled by EDICT on DDIM. None of its weights is changed.
        prompts: one image is made for each; all are optimised together.
        reward: what to raise; differentiable in the images.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance; 1 for none.
        resolution: the side of the pictures in pixels, by default the model's own.
        iterations: of the ascent. The image is rendered once more than that.
        learning_rate: η, which belongs to the scale of the reward.
        clip: the most that an element of `η ∇` counts.
        seed: of ξ, and of the noise where none is given.
        noise: where to start.

    Raises `ValueError` for fewer than one iteration or step, and for a reward without a finite gradient.
    """
    if iterations < 1:
        raise ValueError(f"iterations = {iterations}: it must be at least 1")
    sampling = SamplerSettings("ddim", steps, guidance_scale, resolution)
    edict, began = Edict(rewarded(base, prompts, reward, sampling)), time.perf_counter()

    def look(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first image, its reward, and the gradient of both images' mean reward."""
        with torch.enable_grad():
            at = at.detach().requires_grad_(True)
            images = [decode(base, latents) for latents in edict.denoised(at, at)]
            scores = [scored(reward, image, prompts) for image in images]
            gradient = gradient_of((scores[0] + scores[1]) / 2, at)
        return images[0].detach(), scores[0].detach(), gradient

    start = initial_noise(base, sampling, len(prompts), seed) if noise is None else noise
    at = start.to(base.denoiser.device, torch.float32 if base.denoiser.device.type == "mps" else torch.float64)
    lengths, chance = _norms(at), row_generators(seed, range(len(prompts)), "perturbation")
    velocity, best, trajectory = torch.zeros_like(at), None, []
    with counted(base.denoiser) as evaluations, frozen(base.denoiser, base.pipe.vae), upcast(base.pipe.vae):
        for _ in range(iterations):
            images, scores, gradient = look(at)
            best = better(best, images, at, scores)
            trajectory.append(scores)
            velocity = MOMENTUM * velocity + (learning_rate * gradient).clamp(-clip, clip)
            shaken = torch.stack([torch.randn(at.shape[1:], dtype=at.dtype, generator=g) for g in chance])
            at = at + velocity + PERTURBATION * shaken.to(at.device)
            at = at * lengths / _norms(at)
        with torch.no_grad():
            images = decode(base, edict.denoised(at, at)[0])
            scores = scored(reward, images, prompts)
    images, at, _ = better(best, images, at, scores)
    count = len(prompts)
    cost = Cost(evaluations.forward / count, evaluations.backward / count, (time.perf_counter() - began) / count)
    return Optimized(images, at, torch.stack([*trajectory, scores]), cost)


def _norms(noise: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *ones"]:
    return noise.flatten(1).norm(dim=1).view(-1, *[1] * (noise.ndim - 1))
