"""Sampling with gradients: the pipelines' own pictures, and gradients that finite differences agree with."""

from typing import Any

import pytest
import torch
from torch import nn

from deradiff.alignment.base import Base
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.sampling import SamplerSettings, conditions, decode, sample, unconditional
from deradiff.sweep.pipelines import scheduler_like
from messages import naming
from tiny import make

PROMPTS = ["a red fox", "two blue owls"]


def base_of(kind: str = "sd", dtype: torch.dtype = torch.float32) -> Base:
    pipe, _, _ = make(kind)
    pipe.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).to(dtype).requires_grad_(False)
    return Base(pipe)


def drawn(base: Base, noise: torch.Tensor, sampling: SamplerSettings, keep: int = 0, **others: Any) -> Any:
    prompted, unprompted = conditions(base, PROMPTS[: len(noise)]), unconditional(base, len(noise))
    return sample(base, base.denoiser, prompted, unprompted, noise, sampling, keep=keep, **others)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "euler-a", "dpmpp", "ddpm"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.cases(5)
def test_the_pictures_are_the_pipelines_own(kind: str, scheduler: str, guidance_scale: float) -> None:
    base = base_of(kind)
    sampling = SamplerSettings(scheduler, 4, guidance_scale)
    generators = row_generators(1, range(2))
    noise = sampling.noise(base, generators)
    ours = decode(base, drawn(base, noise, sampling, generators=generators).latents)
    base.pipe.scheduler = scheduler_like(base.pipe.scheduler, scheduler)
    again = row_generators(1, range(2))
    latents = sampling.noise(base, again)
    theirs = base.pipe(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=again,
        latents=latents,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs.float(), atol=2e-5, rtol=1e-4)
    alone = row_generators(1, range(1, 2))
    noise, prompted, unprompted = sampling.noise(base, alone), conditions(base, PROMPTS[1:]), unconditional(base, 1)
    row = sample(base, base.denoiser, prompted, unprompted, noise, sampling, keep=0, generators=alone)
    torch.testing.assert_close(decode(base, row.latents), ours[1:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("keep", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_exactly_the_last_steps(keep: int, checkpointing: bool) -> None:
    base, sampling = base_of(), SamplerSettings("ddim", 4, 3.0)
    noise = torch.randn(1, 4, 8, 8, requires_grad=True)
    with_graph: list[bool] = []
    handle = base.denoiser.register_forward_hook(lambda *_: with_graph.append(torch.is_grad_enabled()))
    base.denoiser.conv_out.bias.requires_grad_(True)
    found = drawn(base, noise, sampling, keep, checkpointing=checkpointing)
    handle.remove()
    assert with_graph == [False] * (4 - keep) + [True] * keep and len(found.steps) == keep
    found.latents.sum().backward()
    assert base.denoiser.conv_out.bias.grad.abs().sum() > 0
    assert (noise.grad is not None) == (keep == 4)
    assert len(drawn(base, noise, sampling, 0).steps) == 0
    with torch.no_grad():
        assert not drawn(base, noise, sampling, keep).latents.requires_grad


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_gradients_are_those_of_finite_differences(keep: int) -> None:
    base, sampling = base_of(dtype=torch.float64), SamplerSettings("ddim", 3, 2.0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight: nn.Parameter = base.denoiser.conv_out.weight
    probe = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def score(steps: int) -> torch.Tensor:
        pictures = decode(base, drawn(base, noise, sampling, steps).latents)
        return (pictures * probe).sum()

    # Only the last steps see the change: those before are drawn with the weights as they are.
    before = drawn_until(base, noise, sampling, keep)
    weight.requires_grad_(True)
    score(keep).backward()
    assert weight.grad is not None
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradient = (weight.grad * direction).sum().item()
    weight.requires_grad_(False)

    def moved(step: float) -> float:
        weight.add_(step * direction)
        found = last_steps(base, before, sampling, keep)
        weight.sub_(step * direction)
        return (decode(base, found) * probe).sum().item()

    difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
    assert gradient == pytest.approx(difference, rel=1e-5)


def drawn_until(base: Base, noise: torch.Tensor, sampling: SamplerSettings, keep: int) -> torch.Tensor:
    """The latents before the last `keep` steps."""
    return last_steps(base, noise, sampling, sampling.steps, stop=sampling.steps - keep)


@torch.no_grad()
def last_steps(
    base: Base, latents: torch.Tensor, sampling: SamplerSettings, keep: int, stop: int | None = None
) -> torch.Tensor:
    """DDIM by hand from the state before the last `keep` steps."""
    scheduler = sampling.prepared(base)
    prompted, unprompted = conditions(base, PROMPTS[:1]), unconditional(base, 1)
    for t in scheduler.timesteps[sampling.steps - keep : stop]:
        with_prompt = base.call.predict(base.denoiser, latents, t.expand(1), prompted)
        without = base.call.predict(base.denoiser, latents, t.expand(1), unprompted)
        guided = without + sampling.guidance_scale * (with_prompt - without)
        latents = scheduler.step(guided, t, latents).prev_sample
    return latents


def test_wrong_input_is_said() -> None:
    base = base_of()
    with pytest.raises(ValueError, match=naming(0, "steps")):
        SamplerSettings("ddim", 0, 1.0)
    with pytest.raises(ValueError, match=naming("guidance scale", 0.5)):
        SamplerSettings("ddim", 1, 0.5)
    noise = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match=naming("3 of 2")):
        drawn(base, noise, SamplerSettings("ddim", 2, 1.0), keep=3)
    with pytest.raises(ValueError, match=naming("guidance", 2)):
        sample(base, base.denoiser, conditions(base, PROMPTS[:1]), None, noise, SamplerSettings("ddim", 2, 2.0), keep=0)
    with pytest.raises(ValueError, match=naming("'best'")):
        drawn(base, noise, SamplerSettings("best", 2, 1.0))
