"""What the settings of an alignment stand for: the base as it is trained, the prompts, the sampler, the reward."""

from typing import Any

from diffusers import DiffusionPipeline

from deradiff.alignment.base import Base
from deradiff.alignment.prompts import load_prompts
from deradiff.alignment.sampling import SamplerSettings
from deradiff.alignment.settings import Preset
from deradiff.rewards import Reward
from deradiff.rewards import load as load_reward
from deradiff.worlds import SHIPPED, find

OWN_PROMPTS = 500

_SHIPPED = f"the models that ship ({', '.join(SHIPPED)})"


def base_of(pipe: DiffusionPipeline, settings: Preset) -> Base:
    """`pipe` as it is trained with `settings`. Raises `ValueError` as `Base` does."""
    return Base(pipe, settings.resolution, settings.density)


def reward_of(settings: Preset, device: Any) -> Reward:
    """The reward that `settings` name, on that device. Raises `ValueError` if they name none."""
    if settings.reward is None:
        raise ValueError("name what is to be maximised: --reward pickscore, hps-v2.1, ...")
    return load_reward(settings.reward, device=device)


def sampling_of(settings: Preset, scheduler: str | None = None) -> SamplerSettings:
    """How `settings` sample; with another scheduler, at its full noise, if one is named."""
    resolution = None if find(settings.base) else settings.resolution
    named = {"scheduler": scheduler, "eta": 1.0} if scheduler else {}
    return SamplerSettings(resolution=resolution, **{**settings.sampling, **named})


def prompts_of(settings: Preset, count: int | None, seed: int) -> list[str]:
    """The prompts of `settings.data`, so many of them. Raises `ValueError` where there are none."""
    if settings.data != "own":
        return list(load_prompts(settings.data, count, seed if count else None).prompts)
    if (world := find(settings.base)) is None:
        raise ValueError(f"only {_SHIPPED} bring prompts along: name --data, a list of prompts")
    return world.sample_prompts(count or OWN_PROMPTS, seed)


def require_pairs(settings: Preset, count: int | None) -> None:
    """Raise `ValueError` for settings that contradict one another, and for own pairs of a model without prompts."""
    if settings.data == "own":
        if find(settings.base) is None:
            raise ValueError(f"own pairs need prompts and a reward, which only {_SHIPPED} bring along: name --data")
        return
    if settings.reward:
        raise ValueError(f"{settings.data} says itself what is preferred: --reward compares own pairs alone")
    if count and not settings.cache:
        raise ValueError("--count limits what is cached; without a cache all pairs are used")


def require_held_out(settings: Preset, count: int, what: str) -> None:
    """Raise `ValueError` where all of `count` would be held out."""
    if count <= settings.held_out:
        raise ValueError(f"{settings.held_out} of {count} {what} are to be held out: lower --held-out")
