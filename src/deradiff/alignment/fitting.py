"""What the settings of an alignment stand for: the base as it is trained, the sampler, the reward."""

from typing import Any

from diffusers import DiffusionPipeline

from deradiff.alignment.base import Base
from deradiff.alignment.presets import Preset
from deradiff.alignment.sampling import SamplerSettings
from deradiff.rewards import Reward
from deradiff.rewards import load as load_reward
from deradiff.worlds import find


def base_of(pipe: DiffusionPipeline, settings: Preset) -> Base:
    """`pipe` as it is trained with `settings`. Raises `ValueError` as `Base` does."""
    return Base(pipe, settings.resolution, settings.density)


def reward_of(settings: Preset, device: Any) -> Reward:
    """The reward that `settings` name, on that device. Raises `ValueError` if they name none."""
    if settings.reward is None:
        raise ValueError("name what is to be maximised: --reward pickscore, hps-v2.1, ...")
    return load_reward(settings.reward, device=device)


def sampling_of(settings: Preset, scheduler: str | None = None) -> SamplerSettings:
    """How `settings` sample; with another scheduler if one is named."""
    resolution = None if find(settings.base) else settings.resolution
    named = {"scheduler": scheduler} if scheduler else {}
    return SamplerSettings(resolution=resolution, **{**settings.sampling, **named})
