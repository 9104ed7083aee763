"""LAION's aesthetic predictor V2: how beautiful people would find a picture, whatever it shows (Schuhmann 2022).

The normalised embedding of OpenAI's CLIP ViT-L/14 goes through five linear layers with nothing between them, trained on
ratings from 1 to 10 (SAC, LAION-Logos and AVA1; mean squared error). Pictures that people like score above 6.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from deradiff.files.models import reading_model
from deradiff.files.reading import read
from deradiff.rewards.clip import folder_of, require_weights, unit
from deradiff.rewards.pixels import CLIP_MEAN, CLIP_STD, Images, clip_pixels, require_pairs

AESTHETIC = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
"""The predictor and the image tower it reads, in one safetensors file. LAION's own file is a pickle of the layers."""

LINEAR = (0, 2, 4, 6, 7)
"""Where the checkpoint counts linear layers; dropout, which only training uses, has the other places. The predictors
with activations in between count differently."""


class AestheticReward:
    """The predicted mean rating, about 1 to 10; prompts are not read.

    `tower` is a transformers `CLIPVisionModelWithProjection`, `layers` make a rating of its embedding; both are frozen.
    """

    name = "aesthetic"

    def __init__(self, tower: Any, layers: nn.Module) -> None:
        self.tower, self.layers = tower.requires_grad_(False).eval(), layers.requires_grad_(False).eval()

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """Score `images` in float32 at least; the prompts only have to be as many. Differentiable in a tensor.

        Raises `ValueError` if there is not one prompt per image, and for images that `pixels.clip_pixels` refuses.
        """
        require_pairs(images, prompts)
        side = self.tower.config.image_size
        pixels = clip_pixels(images, side, CLIP_MEAN, CLIP_STD, self.tower.device, self.tower.dtype)
        return self.layers(unit(self.tower(pixel_values=pixels).image_embeds))[:, 0]


def load(model: str | Path | None, device: torch.device, dtype: torch.dtype) -> AestheticReward:
    """The predictor in `model`, a folder or hub id laid out like `AESTHETIC`, which it is if None.

    The layers are small and stay in float32 where the tower is in half precision. Raises `ValueError` where files or
    tensors are missing.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = folder_of(model or AESTHETIC, ["config.json", "model.safetensors"])
    require_weights(folder)
    config = read(dict[str, Any], folder / "config.json", "configuration of a model", "copy or download it again")
    # The file's own model_type names a class that only its author's code has; the fields are those of CLIP's tower.
    fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures", "auto_map")}
    with reading_model(folder):
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**fields))
        tensors = load_file(folder / "model.safetensors")
        layers = rating_layers(tensors, tower.config.projection_dim)
        absent = tower.load_state_dict(tensors, strict=False).missing_keys
    if absent:
        raise ValueError(
            f"{folder / 'model.safetensors'} lacks {len(absent)} tensors of the image tower: {absent[0]}, ..."
        )
    return AestheticReward(tower.to(device, dtype), layers.to(device, torch.promote_types(dtype, torch.float32)))


def rating_layers(tensors: Mapping[str, Tensor], embedding: int) -> nn.Sequential:
    """The linear layers among a checkpoint's `tensors`, by their places in `LINEAR`.

    Raises `ValueError` if one is missing, or if they do not lead from the embedding to one number.
    """
    names = [f"layers.{place}.{part}" for place in LINEAR for part in ("weight", "bias")]
    absent = [name for name in names if name not in tensors]
    if absent:
        raise ValueError(
            f"the predictor's layers must be layers.N, N = {LINEAR}, of which {', '.join(absent)} is missing"
        )
    shapes = [tuple(tensors[f"layers.{place}.weight"].shape) for place in LINEAR]
    if [*(n for _, n in shapes), 1] != [embedding, *(n for n, _ in shapes)]:
        raise ValueError(
            f"the predictor's layers must lead from the embedding, {embedding} numbers, to one, not {shapes}"
        )
    layers = nn.Sequential(*(nn.Linear(before, after) for after, before in shapes))
    layers.load_state_dict(dict(zip(layers.state_dict(), (tensors[name] for name in names), strict=True)))
    return layers
