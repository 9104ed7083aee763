"""Alignment of any pipeline: what its denoiser is told and answers is captured, and held against its own run."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deradiff.alignment.base import Base, Policy
from deradiff.alignment.data_order import order
from deradiff.alignment.dpo import train_dpo
from deradiff.alignment.latent_cache import CachedBatch
from deradiff.alignment.parameters import trainable
from deradiff.alignment.rwr import ReferenceSamples, train_rwr
from deradiff.alignment.sampling import SamplerSettings, decode, sample, told
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun
from trainable_families import TRAINABLE
from trainable_families import trainable as pipeline_of

PROMPTS = ["a red fox", "two blue owls in"]
SAMPLERS = {"wan": "unipc", "pixart": "dpmpp"}
GUIDED: dict[str, tuple[float, dict[str, Any]]] = {
    "sd3": (3.0, {"guidance_scale": 3.0}),
    "flux": (2.0, {"guidance_scale": 2.0}),
    "flux2_klein": (3.0, {"guidance_scale": 3.0}),
    "qwen_image": (1.0, {"true_cfg_scale": 1.0}),
    "z_image": (3.0, {"guidance_scale": 2.0}),
    "sana": (3.0, {"guidance_scale": 3.0, "use_resolution_binning": False}),
    "lumina2": (3.0, {"guidance_scale": 3.0, "cfg_normalization": False}),
    "chroma": (3.0, {"guidance_scale": 3.0}),
    "wan": (3.0, {"guidance_scale": 3.0, "num_frames": 1}),
    "pixart": (3.0, {"guidance_scale": 3.0, "use_resolution_binning": False}),
}
"""Our guidance scale, and the pipeline's arguments for the same."""


@pytest.fixture(scope="module")
def bases() -> dict[str, tuple[Base, int]]:
    return {}


def base_of(bases: dict[str, tuple[Base, int]], family: str) -> tuple[Base, int]:
    """One capture for all tests of a family; the base, and the side of its pictures."""
    if family not in bases:
        pipe, side = pipeline_of(family)
        bases[family] = Base(pipe, side), side
    return bases[family]


def own_run(pipe: Any, **call: Any) -> tuple[Tensor, Tensor]:
    """What the pipeline's scheduler begins with, and its pictures."""
    seen: list[Tensor] = []
    step = pipe.scheduler.step

    def stepped(prediction: Tensor, timestep: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(latents)
        return step(prediction, timestep, latents, *args, **kwargs)

    stepped.__wrapped__ = step  # type: ignore[attr-defined]
    pipe.scheduler.step = stepped
    try:
        (pictures,) = pipe(prompt=list(PROMPTS), output_type="pt", return_dict=False, **call)
    finally:
        del pipe.scheduler.step
    return seen[0], pictures[:, 0] if pictures.ndim == 5 else pictures


@pytest.mark.parametrize("family", TRAINABLE)
@pytest.mark.cases(5)
def test_what_is_sampled_and_decoded_is_what_the_pipeline_draws(
    bases: dict[str, tuple[Base, int]], family: str
) -> None:
    base, side = base_of(bases, family)
    scale, call = GUIDED[family]
    settings = SamplerSettings(SAMPLERS.get(family, "flow-euler"), 3, scale)
    noise, pictures = own_run(base.pipe, num_inference_steps=3, height=side, width=side, **call)
    prompted, unprompted = told(base, PROMPTS, settings)
    with torch.no_grad():
        drawn = sample(base, base.denoiser, prompted, unprompted, noise, settings, keep=0)
        assert torch.allclose(decode(base, drawn.latents), pictures, atol=2e-4)
        alone = sample(base, base.denoiser, *told(base, PROMPTS[:1], settings), noise[:1], settings, keep=0)
    assert torch.allclose(alone.latents, drawn.latents[:1], atol=1e-4)


@pytest.mark.parametrize("family", TRAINABLE)
def test_latents_of_pictures_are_what_the_decoder_is_given_again(
    bases: dict[str, tuple[Base, int]], family: str
) -> None:
    base, side = base_of(bases, family)
    latents = base.encode_images(torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert tuple(latents.shape[1:]) == base.call.latent_shape(None)
    places = torch.arange(latents.numel(), dtype=torch.float32).view_as(latents)
    assert torch.allclose(base.packing.packed(base.packing.unpacked(places)), places, atol=1e-2)
    if family == "sd3":
        config = base.pipe.vae.config
        assert torch.allclose(base.packing.unpacked(latents), latents / config.scaling_factor + config.shift_factor)


# -- training ---------------------------------------------------------------------------------------------------------


class Pairs:
    """Random latents for two prompts, of the shape of a base's."""

    training: int | None = 6
    held_out = 2

    def __init__(self, base: Base) -> None:
        shape = base.call.latent_shape(None)
        # Winners lie apart from losers: there is something to learn.
        self.latents = torch.randn(8, 2, *shape, generator=torch.Generator().manual_seed(0))
        self.latents[:, 0] += 1
        self.prompts, self.empty = base.call.encode_prompts(PROMPTS), base.call.encode_prompts([""])

    def take(self, rows: Sequence[int]) -> CachedBatch:
        prompts = {name: embeds[torch.tensor(rows) % 2] for name, embeds in self.prompts.items()}
        return CachedBatch(self.latents[rows], torch.zeros(len(rows), 2, 6), prompts, [""] * len(rows))

    def batch(self, part: BatchPart, size: int) -> CachedBatch:
        return self.take(order(6, 0, part.positions(size)))

    def held_out_batch(self, places: range) -> CachedBatch:
        return self.take([6 + place for place in places])

    def empty_prompt(self) -> dict[str, Tensor]:
        return self.empty

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Stopped(Exception):
    """The machine went away."""


PLAN = TrainingPlan(
    steps=4, learning_rate=3e-3, warmup=0, average=0.0, evaluate_every=2, checkpoint_seconds=0, accumulate=2
)


def trained(
    base: Base, rank: int | None, pairs: Pairs, folder: Path, stop_at: int | None = None
) -> tuple[LossCurve, Any]:
    """A run of Diffusion-DPO, which may be interrupted; the weights it ends with."""
    policy = Policy(base, rank)
    seen: list[int] = []

    class Interrupted(Pairs):
        def batch(self, part: BatchPart, size: int) -> CachedBatch:
            seen.append(part.step)
            if part.step == stop_at:
                raise Stopped
            return super().batch(part, size)

    pairs.__class__ = Interrupted
    try:
        run = TrainingRun(0, folder, lambda *_: None)
        curve = train_dpo(base, policy, pairs, 20.0, PLAN, batch=4, dropout=0.2, run=run)
        return curve, ([p.detach().clone() for p in trainable(policy.model)], seen)
    finally:
        pairs.__class__ = Pairs
        if rank:
            base.denoiser.delete_adapters(base.denoiser.active_adapters())


# Diffusers has no LoRA of PixArt's transformer.
ADAPTED = [(family, rank) for family in TRAINABLE for rank in (None, 4) if not (rank and family == "pixart")]


@pytest.mark.parametrize(("family", "rank"), ADAPTED)
@pytest.mark.cases(6)
def test_the_loss_falls_and_a_resumed_run_ends_with_the_same_bits(
    bases: dict[str, tuple[Base, int]], family: str, rank: int | None, tmp_path: Path
) -> None:
    base, _ = base_of(bases, family)
    pairs = Pairs(base)
    curve, (weights, _) = trained(base, rank, pairs, tmp_path / "whole")
    assert curve.held_out[0] == pytest.approx(math.log(2), abs=1e-5) and curve.held_out[-1] < curve.held_out[0] - 1e-3
    with pytest.raises(Stopped):
        trained(base, rank, pairs, tmp_path / "cut", stop_at=2)
    again, (resumed, seen) = trained(base, rank, pairs, tmp_path / "cut")
    assert min(seen) == 2 and again.held_out == curve.held_out
    assert all(map(torch.equal, weights, resumed))


@pytest.mark.parametrize("family", ["sd3", "qwen_image", "wan"])
def test_reward_weighted_denoising_learns_the_heavier_samples(
    bases: dict[str, tuple[Base, int]], family: str, tmp_path: Path
) -> None:
    base, _ = base_of(bases, family)
    latents = torch.randn(8, *base.call.latent_shape(None), generator=torch.Generator().manual_seed(0))
    latents[::2] += 2
    samples, weights = ReferenceSamples(latents, PROMPTS * 4), torch.tensor([1.0, 0.0] * 4)
    plan, run = replace(PLAN, steps=8), TrainingRun(0, tmp_path / "run", lambda *_: None)
    curve = train_rwr(base, Policy(base), samples, weights, plan, held_out=2, batch=4, dropout=0.0, run=run)
    assert curve.held_out[-1] < 0.98 * curve.held_out[0]


def test_the_module_is_called_as_the_pipeline_calls_it(bases: dict[str, tuple[Base, int]]) -> None:
    class Listening(nn.Module):
        def forward(self, **arguments: Any) -> tuple[Tensor]:
            self.arguments = arguments
            return (torch.ones_like(arguments["hidden_states"]),)

    base, heard = base_of(bases, "lumina2")[0], Listening()
    noisy, times = torch.randn(2, *base.call.latent_shape(None)), torch.tensor([250.0, 1000.0])
    prediction = base.call.predict(heard, noisy, times, base.call.encode_prompts(PROMPTS))
    # It is told the share of the picture, and its answer is minus the velocity.
    assert torch.equal(heard.arguments["timestep"], torch.tensor([0.75, 0.0])) and bool((prediction == -1).all())
