"""Between pictures and latents: what a VAE is given and gives, and where each number of a latent is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

DIGIT = 16
"""Places are read in digits of this base, whose values half precision still tells apart."""


@runtime_checkable
class Packing(Protocol):
    """Latents as the scheduler steps them, from what the VAE works on, and back; differentiable."""

    def unpacked(self, latents: Float[Tensor, "batch *latent"]) -> Tensor:
        """What the decoder is given for clean latents."""
        ...

    def packed(self, encoded: Tensor) -> Float[Tensor, "batch *latent"]:
        """Latents of what the encoder gave."""
        ...


@dataclass(frozen=True)
class ScaledLatents:
    """Stable Diffusion's: the VAE's latents times a factor."""

    factor: float

    def unpacked(self, latents: Float[Tensor, "batch *latent"]) -> Tensor:
        """See `Packing`."""
        return latents / self.factor

    def packed(self, encoded: Tensor) -> Float[Tensor, "batch *latent"]:
        """See `Packing`."""
        return encoded * self.factor


@dataclass(frozen=True)
class PlacedLatents:
    """Every number of the VAE's is a latent's times `scale` plus `shift`, in another place: what pipelines do before
    they decode, unpacking and scaling, read off a call of their own.
    """

    source: Int[Tensor, " element"]
    """Where each number of the VAE's is in the latent, both flattened."""
    scale: Float[Tensor, " element"]
    shift: Float[Tensor, " element"]
    encoded: tuple[int, ...]
    latent: tuple[int, ...]
    """The shapes of one picture in both."""

    def unpacked(self, latents: Float[Tensor, "batch *latent"]) -> Tensor:
        """See `Packing`."""
        chosen = latents.flatten(1)[:, self.source.to(latents.device)]
        moved = chosen * self.scale.to(latents) + self.shift.to(latents)
        return moved.unflatten(1, self.encoded)

    def packed(self, encoded: Tensor) -> Float[Tensor, "batch *latent"]:
        """See `Packing`. Raises `ValueError` for pictures of another size."""
        if tuple(encoded.shape[1:]) != self.encoded:
            raise ValueError(
                f"the VAE makes {tuple(encoded.shape[1:])} of these pictures, and the pipeline draws {self.encoded}: "
                "take a resolution that both divide evenly"
            )
        numbers = (encoded.flatten(1) - self.shift.to(encoded)) / self.scale.to(encoded)
        places = self.source.to(encoded.device).argsort()
        return numbers[:, places].unflatten(1, self.latent)


def placed(decoder_input: Callable[[Tensor], Tensor], latent: tuple[int, ...]) -> PlacedLatents:
    """How `decoder_input`, latents to what a decoder is given, places and scales the numbers of a latent of that shape.

    Asks it once: for zeros, for ones, and for the digits of each place. Raises `ValueError` where it does something
    else to them than to move, scale and shift each.
    """
    count = torch.Size(latent).numel()
    places = torch.arange(count)
    digits: list[Tensor] = []
    while len(digits) == 0 or DIGIT ** len(digits) < count:
        digits.append((places // DIGIT ** len(digits)) % DIGIT)
    asked = torch.stack([torch.zeros(count), torch.ones(count), *[digit.float() for digit in digits]])
    given = decoder_input(asked.unflatten(1, latent)).float().cpu()
    if len(given) != len(asked) or given[0].numel() != count:
        raise ValueError(f"latents of {latent} become {tuple(given.shape[1:])} for the decoder: not number by number")
    rows = given.flatten(1).double()
    shift, scale = rows[0], rows[1] - rows[0]
    read = (rows[2:] - shift) / scale
    source = torch.stack([digit.round().long() * DIGIT**k for k, digit in enumerate(read)]).sum(0)
    if not bool(scale.abs().min() > 0) or (read - read.round()).abs().max() > 0.3 or len(source.unique()) != count:
        raise ValueError(f"latents of {latent} are mixed with one another before they are decoded")
    return PlacedLatents(source, scale.float(), shift.float(), tuple(given.shape[1:]), latent)


def encoded(vae: Any, images: Float[Tensor, "batch 3 height width"]) -> Tensor:
    """What a VAE makes of pictures in [-1, 1]: the mean of its distribution if it has one; a video VAE, of single
    frames.
    """
    pixels = images.to(vae.device, vae.dtype)
    output = vae.encode(pixels.unsqueeze(2) if _of_videos(vae) else pixels)
    return output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latent


def decoded(vae: Any, given: Tensor) -> Float[Tensor, "batch 3 height width"]:
    """Pictures of what a decoder is given, with gradients; the first frame of a video VAE's."""
    pictures = vae.decode(given).sample
    return pictures[:, :, 0] if pictures.ndim == 5 else pictures


def vae_fingerprint(vae: Any) -> str:
    """A SHA-256 of a VAE's configuration and weights: latents are worth something beside the same VAE alone."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    whole = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in vae.state_dict().items():
        whole.update(name.encode())
        whole.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return whole.hexdigest()


def _of_videos(vae: Any) -> bool:
    return any(isinstance(part, nn.Conv3d) for part in vae.modules())
