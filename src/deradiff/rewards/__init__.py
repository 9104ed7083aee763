"""Scores of (image, prompt). One file each, one protocol; `load` finds them by name."""

from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.files.models import model_of
from deradiff.rewards.pixels import Images

__all__ = ["COMPUTED", "LEARNED", "Images", "PictureReward", "Reward", "load", "named"]


@runtime_checkable
class Reward(Protocol):
    """A batch of images in [0, 1] and their prompts to one score each, the higher the better: what alignment asks for.

    A reward of your own need not do more; those that `load` gives are `PictureReward`.
    """

    name: str

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """Score `images`; differentiable in them where the reward is."""
        ...


@runtime_checkable
class PictureReward(Reward, Protocol):
    """A reward that scores PIL images as well as tensors."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """Score `images`, a float tensor in [0, 1] or PIL images; differentiable in a tensor where the reward is."""
        ...


LEARNED: dict[str, str] = {
    "pickscore": "deradiff.rewards.pickscore:load",
    "hps-v2.0": "deradiff.rewards.hps:load_v2_0",
    "hps-v2.1": "deradiff.rewards.hps:load_v2_1",
    "clip": "deradiff.rewards.clip:load",
    "aesthetic": "deradiff.rewards.aesthetic:load",
    "image-reward": "deradiff.rewards.image_reward:ImageReward.load",
}
"""Rewards that are models: what loads one from `(model, device, dtype)`."""

COMPUTED: dict[str, str] = {
    "digits": "deradiff.worlds.digits.rewards:DigitsReward",
    "bold": "deradiff.worlds.digits.rewards:BoldReward",
    "ink": "deradiff.worlds.digits.rewards:InkReward",
    "legible": "deradiff.worlds.digits.caption_rewards:LegibleReward",
    "colours": "deradiff.worlds.digits.caption_rewards:ColourReward",
}
"""Rewards that are formulas: the class. Those here know the digits."""


def load(
    name: str,
    *,
    model: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PictureReward:
    """The reward of that name: one of `LEARNED`, or one of `COMPUTED`, for the digits.

    `model` is a folder or a hub id to load instead of the published one; `load("pickscore=FOLDER")` is short for it.
    A model's parameters are frozen, on `device` (the CPU if None) in `dtype` (float32 if None, whatever the file's is).
    What is computed goes where the images are.

    Raises `ValueError` for an unknown name, or a `model` for a reward that is none.
    """
    kind, chosen = named(name, model)
    if kind in COMPUTED:
        formula: PictureReward = resolve_name(COMPUTED[kind])()
        return formula
    place = torch.device("cpu" if device is None else device)
    reward: PictureReward = resolve_name(LEARNED[kind])(chosen, place, torch.float32 if dtype is None else dtype)
    if chosen is not None:
        reward.name = f"{kind}={chosen}"  # what was scored by one model is not to be taken for another's
    return reward


def named(name: str, model: str | Path | None = None) -> tuple[str, str | Path | None]:
    """Which reward `load(name, model=model)` would load, and from where; raises what it raises about the two."""
    return model_of(name, model, LEARNED, COMPUTED, "reward")
