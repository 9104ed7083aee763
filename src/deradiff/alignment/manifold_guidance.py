"""Manifold-preserving guidance (MPGD; He et al. 2024, ICLR, arXiv 2311.16424): a reward pulls at the estimate of x_0.

At every step of DDIM (their algorithm 1, equation 7, for latent diffusion with the decoder in the reward)

    x̂_0 ← x̂_0 + c_t ∇ r(x̂_0)        x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1} - σ_t²) ε(x_t) + σ_t z

with the ε of before. The gradient passes the decoder and the reward, not the denoiser: that is what makes it cheap, and
what keeps it near the data, the authors argue. They leave `c_t` open; here it is `(1 - ᾱ_t)/β`, the shift that a reward
of constant slope has on E[x_0 | x_t] under a standard normal prior when it tilts that by exp(r/β).
"""

from collections.abc import Sequence
from inspect import signature

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.alignment.rewarded_model import RewardedModel


def manifold_guided(
    model: RewardedModel,
    noise: Float[Tensor, "batch *latent"],
    beta: float | int,
    generators: Sequence[torch.Generator] | None = None,
) -> Float[Tensor, "batch *latent"]:
    """Clean latents from standard normal `noise`, guided at strength 1/`beta` (β in points of the reward, above 0).

    For samplers of one evaluation a step that remember none: ddim, ddpm, euler, euler-a. `generators` draw the noise
    that a stochastic one adds, one per row. Each step evaluates the denoiser once, without a gradient.

    Raises `ValueError` for a β that is not positive, another sampler, a reward without a finite gradient.
    """
    scheduler = model.scheduler
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta = {beta}: it must be positive and finite")
    if getattr(scheduler, "order", 1) != 1 or hasattr(scheduler, "model_outputs") or hasattr(scheduler, "ets"):
        raise ValueError(
            f"{type(scheduler).__name__} takes its steps from several evaluations, whose estimates of x_0 cannot be "
            "moved one by one: take ddim, ddpm, euler or euler-a"
        )
    draws = "generator" in signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if draws and generators else {}
    x = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = model.scales(i)
        with torch.no_grad():
            prediction = model.predict(x, t)
            estimate = model.clean(prediction, x, i)
        gradient = model.scored_with_gradient(lambda clean: clean, estimate)[1]
        strength = sigma**2 / (alpha**2 + sigma**2) / beta
        # ε stays as it is, so the step moves by what it multiplies x_0 with.
        x = scheduler.step(prediction, t, x, **extra).prev_sample + model.scales(i + 1).alpha * strength * gradient
    return x
