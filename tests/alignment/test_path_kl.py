"""The path KL against a chain walked by hand, its closed form, the densities of its own paths, and realigned runs."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from deradiff import realign
from deradiff.algorithm.estimates import mean
from deradiff.alignment.base import Base, Policy
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.path_kl import Chain, divergence, path_kl
from deradiff.alignment.policy_gradient import log_density
from deradiff.alignment.sampling import SamplerSettings
from messages import naming
from tiny import make

PROMPTS = ["a red fox", "two blue owls", "a fox"]


def moved(kind: str = "sd", rank: int | None = None, scale: float = 0.01) -> tuple[Base, Policy]:
    """A policy clearly different from its reference."""
    base = Base(make(kind)[0])
    policy = Policy(base, rank, seed=3)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in policy.model.parameters() if p.requires_grad):
            parameter += scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return base, policy


@pytest.mark.parametrize("rank", [None, 2])
def test_a_policy_that_is_its_reference_has_gone_nowhere(rank: int | None) -> None:
    base = Base(make("sd")[0])
    assert path_kl(base, Policy(base, rank), PROMPTS, SamplerSettings("ddim", 3, 2.0)).value == 0


@pytest.mark.parametrize("kind, guidance_scale", [("sd", 1.0), ("sd", 3.0), ("sdxl", 3.0)])
def test_divergence_is_that_of_a_chain_walked_by_hand(kind: str, guidance_scale: float) -> None:
    base, policy = moved(kind)
    pipe: Any = base.pipe
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(3)
    by_hand = []
    for row, prompt in enumerate(PROMPTS):
        prompted, unprompted, *pooled = pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )

        def predicted(unet: nn.Module, x: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, pool: Any) -> Any:
            side = base.denoiser.config.sample_size * pipe.vae_scale_factor
            sizes = {"text_embeds": pool, "time_ids": torch.tensor([[side, side, 0.0, 0.0, side, side]])}
            return unet(
                x, t, encoder_hidden_states=embeds, added_cond_kwargs=sizes if pool is not None else None
            ).sample

        (generator,) = row_generators(8, range(row, row + 1), "path")
        x, total = torch.randn(1, 4, 8, 8, generator=generator), 0.0
        for t in scheduler.timesteps:
            means = []
            for unet in (policy.model, base.denoiser):
                with torch.no_grad():
                    epsilon = predicted(unet, x, t, prompted, pooled[0] if pooled else None)
                    without = predicted(unet, x, t, unprompted, pooled[1] if pooled else None)
                if guidance_scale > 1:
                    epsilon = without + guidance_scale * (epsilon - without)
                noiseless = scheduler.step(epsilon, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
                means.append(noiseless)
            variance = float(scheduler._get_variance(int(t), int(t) - 1000 // 3))
            if variance:  # SDXL's last step has none
                total += float((means[0] - means[1]).double().square().sum()) / (2 * variance)
            x = means[0] + variance**0.5 * torch.randn(1, 4, 8, 8, generator=generator)
        by_hand.append(total)
    found = path_kl(base, policy, PROMPTS, SamplerSettings("ddim", 3, guidance_scale), seed=8, per_pass=2)
    assert found.value == pytest.approx(sum(by_hand) / 3, rel=1e-3)
    assert found.error == pytest.approx(torch.tensor(by_hand).std().item() / 3**0.5, rel=1e-2)


class Shift(nn.Module):
    """A denoiser that always predicts the same."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, noisy: torch.Tensor, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(sample=self.value.expand_as(noisy))


def test_constant_predictions_have_the_closed_form() -> None:
    base = Base(make("sd")[0])
    policy = Policy(base)
    policy.model, policy._reference = Shift(0.3), Shift(-0.1)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    kept = torch.cumprod(1 - betas, 0)
    total, elements, steps = 0.0, 4 * 8 * 8, 5
    for t in range(1 + 1000 // steps * (steps - 1), 0, -1000 // steps):
        now, after = kept[t], kept[max(t - 1000 // steps, 0)]
        variance = (1 - after) / (1 - now) * (1 - now / after)
        # The mean is √ᾱ' (x - √(1-ᾱ) ε)/√ᾱ + √(1 - ᾱ' - σ²) ε (Song et al. 2021, equation 12).
        gain = (1 - after - variance).sqrt() - (after * (1 - now) / now).sqrt()
        total += float(gain.square() / (2 * variance)) * 0.4**2 * elements
    found = path_kl(base, policy, PROMPTS, SamplerSettings("ddim", steps, 1.0))
    assert found.value == pytest.approx(total, rel=1e-4) and found.error < 1e-4 * total


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler-a"])
def test_it_is_the_mean_log_density_ratio_of_its_paths(scheduler: str) -> None:
    base, policy = moved(scale=0.002)
    texts = [PROMPTS[0]] * 48
    sampling = SamplerSettings(scheduler, 4, 2.0)
    chain = Chain(base, texts, sampling)
    ratios = torch.zeros(len(texts))
    for step in chain.walk(policy.model, row_generators(9, range(len(texts)), "other paths")):
        if step.is_random:
            with torch.no_grad():
                known = chain.transition(base.denoiser, step.number, step.before)
            ratios += log_density(step.transition, step.after) - log_density(known, step.after)
    ratio, found = mean(ratios), path_kl(base, policy, texts, sampling)
    assert found.value > 4 * found.error and ratio.value > 4 * ratio.error
    assert abs(ratio.value - found.value) < 4 * math.hypot(ratio.error, found.error)


def test_a_realigned_run_counts_the_same_steps_by_their_logarithm() -> None:
    base, policy = moved()
    pipe: Any = base.pipe
    sampling, texts, rows = SamplerSettings("ddpm", 6, 1.0), PROMPTS[:1] * 4, range(4)
    chain, counted = Chain(base, texts, sampling), torch.zeros(4)
    snr = (chain.scheduler.alphas_cumprod / (1 - chain.scheduler.alphas_cumprod)).tolist()
    for step in chain.walk(policy.model, row_generators(2, rows, "path")):
        t = int(chain.scheduler.timesteps[step.number])
        after = int(chain.scheduler.previous_timestep(t))
        if after >= 0:
            # The step's own divergence is ½ (R - 1) ||Δε||², with the growth R of the signal-to-noise ratio; the
            # weights of a realigned run take ½ log R, its limit for fine steps.
            growth = snr[after] / snr[t]
            counted += divergence(chain, policy, step, policy.model).detach() * math.log(growth) / (growth - 1)
    pipe.scheduler = sampling.prepared(base)
    # A picture of the reference alone beside those of the policy, so that both models are evaluated.
    with realign(pipe, policy.model, [1.0] * 4 + [0.0]) as dial:
        pipe(
            texts + texts[:1],
            guidance_scale=1.0,
            num_inference_steps=6,
            output_type="latent",
            height=16,
            width=16,
            generator=row_generators(2, range(5), "path"),
        )
        whole = dial.importance_weights.path_kl
    assert whole is not None and whole[-1] == 0
    torch.testing.assert_close(counted, whole[:4].float(), rtol=1e-3, atol=0)


def test_what_has_no_divergence_is_refused() -> None:
    base, policy = moved()
    with pytest.raises(ValueError, match="prompts"):
        path_kl(base, policy, [], SamplerSettings("ddim", 3, 1.0))
    with pytest.raises(ValueError, match=naming("'dpmpp'", "ddim")):
        path_kl(base, policy, PROMPTS, SamplerSettings("dpmpp", 3, 1.0))
