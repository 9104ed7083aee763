"""Worlds whose truth is a formula, sampled with every family of schedulers as they are, and realigned."""

from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from deradiff import realign
from deradiff.sampling.dial import Dial
from deradiff.schedulers import FlowMatchSDEScheduler
from deradiff.worlds.gaussian_mixture import SCHEDULE, World, prediction_of

STEPS = 100
SAMPLES = 4000


class Family(NamedTuple):
    """A scheduler, its η, and how far its deterministic run may be off through the noise it starts from."""

    name: str
    settings: dict[str, Any] = {}  # noqa: RUF012
    eta: float = 0.0
    memory: float = 0.0

    def __call__(self) -> Any:
        own = dict(self.settings)
        if self.name == "FlowMatchSDEScheduler":
            return FlowMatchSDEScheduler(**own)
        if not self.name.startswith(("Flow", "EDM")):
            own = SCHEDULE | own
        if self.name.startswith("DD"):
            own["clip_sample"] = False
        return getattr(diffusers, self.name)(**own)


# Stable Diffusion's schedule ends with a little signal left, which samplers without noise remember: their target is
# not exactly the mixture's, and the retrained model, run through the same sampler, remembers another one.
FAMILIES = {
    "DDPM": Family("DDPMScheduler"),
    "DDPM v": Family("DDPMScheduler", {"prediction_type": "v_prediction"}),
    "DDPM x_0": Family("DDPMScheduler", {"prediction_type": "sample"}),
    "DDPM fixed_large": Family("DDPMScheduler", {"variance_type": "fixed_large"}),
    "DDIM η = 1": Family("DDIMScheduler", eta=1.0),
    "DDIM η = ½": Family("DDIMScheduler", eta=0.5, memory=0.05),
    "DDIM η = 0": Family("DDIMScheduler", memory=0.05),
    "Euler": Family("EulerDiscreteScheduler", memory=0.05),
    "Euler v": Family("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, memory=0.05),
    "Euler ancestral": Family("EulerAncestralDiscreteScheduler"),
    "Heun": Family("HeunDiscreteScheduler", memory=0.05),
    "DPM-Solver++": Family("DPMSolverMultistepScheduler", memory=0.05),
    "DPM-Solver++ SDE": Family("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": Family("UniPCMultistepScheduler", memory=0.05),
    "LMS": Family("LMSDiscreteScheduler", memory=0.05),
    "PNDM": Family("PNDMScheduler", {"skip_prk_steps": True}, memory=0.05),
    "KDPM2": Family("KDPM2DiscreteScheduler", memory=0.05),
    "EDM": Family("EDMEulerScheduler"),
    "flow matching": Family("FlowMatchEulerDiscreteScheduler"),
    "flow matching SDE": Family("FlowMatchSDEScheduler"),
    "flow matching SDE η = ½": Family("FlowMatchSDEScheduler", {"eta": 0.5}),
}


def sample(
    world: World,
    family: Any,
    tilts: dict[str, float],
    seed: int = 0,
    steps: int = STEPS,
    samples: int = SAMPLES,
    **call: Any,
) -> Tensor:
    """Draws of the model aligned at `tilts`, through the sampler."""
    pipe = world.pipeline(family(), tilts)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    eta = getattr(family, "eta", 0.0)
    call = {"num_images_per_prompt": samples, "eta": eta} | call
    with reproducible(pipe, seed):
        return pipe(num_inference_steps=steps, generator=generator, **call).images


def realigned(
    world: World,
    family: Any,
    anchors: dict[str, dict[str, float]],
    lam: Any,
    seed: int = 1,
    steps: int = STEPS,
    samples: int = SAMPLES,
    **call: Any,
) -> tuple[Tensor, Dial]:
    """The reference realigned with exact anchors: samples, and the dial (removed, with what it wrote down)."""
    pipe = world.pipeline(family())
    pipe.set_progress_bar_config(disable=True)
    modules = {name: world.denoiser(tilts, prediction_of(pipe.scheduler)) for name, tilts in anchors.items()}
    call = {"num_images_per_prompt": samples, "eta": getattr(family, "eta", 0.0)} | call
    with realign(pipe, modules, lam) as dial, reproducible(pipe, seed):
        x = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **call).images
    return x, dial


class reproducible:
    """Our flow-matching scheduler draws from a generator of its own."""

    def __init__(self, pipe: Any, seed: int):
        self.pipe, self.seed = pipe, seed

    def __enter__(self) -> None:
        if hasattr(self.pipe.scheduler, "generator"):
            self.pipe.scheduler.generator = torch.Generator().manual_seed(self.seed + 100)

    def __exit__(self, *_: object) -> None:
        pass
