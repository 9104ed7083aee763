"""Calls of a pipeline whose images are looked at before they are rounded to 8 bits, where NaN turns black.

Nothing about the call is changed: decoder and conversions are observed while it lasts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Lock, get_ident
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from deradiff.anchors.checks import unwrapped
from deradiff.sampling.truncation import watched

Origin = Literal["latents", "decoder", "model"]
"""Where NaN was first seen: in what the decoder was given, in what it made of it, or in a model without a decoder."""

_ABSENT = object()


class NotFinite(FloatingPointError):
    """An image holds NaN or infinity. `origin` says where they come from, `image` which it is.

    `part` and `dtype` are the class and the numbers of what made them.
    """

    def __init__(self, origin: Origin, part: str, dtype: torch.dtype | None, image: str = "an image") -> None:
        numbers = "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"
        cause = {
            "latents": f"its latents were so before they were decoded, of the {part}{numbers}",
            "decoder": f"its latents are sound, and the {part} made NaN or infinity of them{numbers}",
            "model": f"the {part} made it{numbers}",
        }[origin]
        cure = "look whether the model's files are whole"
        if dtype in (torch.float16, torch.bfloat16):
            cure = "draw with --dtype float32 (in a plan, dtype: float32)"
            if origin == "decoder":
                cure += ", or give the pipeline a VAE made for half precision (madebyollin/sdxl-vae-fp16-fix for SDXL)"
        super().__init__(f"{image} is NaN or infinite, and would be shown black or white: {cause}; {cure}.")
        self.origin, self.part, self.dtype, self.image = origin, part, dtype, image

    def of(self, image: str) -> NotFinite:
        """The same, said of an image by name."""
        return NotFinite(self.origin, self.part, self.dtype, image)

    def __reduce__(self) -> Any:
        return NotFinite, (self.origin, self.part, self.dtype, self.image)


@dataclass(frozen=True)
class DrawnPictures:
    """What a pipeline returned.

    Attributes:
        images: as they came, in a list or as one tensor.
        flaws: of each image, what is wrong with its values, None for nothing.
        blacked_out: of each image, whether the pipeline's safety checker put a black one in its place.
    """

    images: Any
    flaws: list[NotFinite | None]
    blacked_out: list[bool]

    def require_finite(self, names: Sequence[str]) -> DrawnPictures:
        """The same again. Raises `NotFinite` that names the first image that is not finite."""
        for flaw, name in zip(self.flaws, names, strict=True):
            if flaw is not None:
                raise flaw.of(name)
        return self


def draw(pipe: Any, **call: Any) -> DrawnPictures:
    """Call `pipe` with `call`, and look at what its decoder is given and returns, and at what is made into pictures.

    Prompts that its tokenizers cut are warned of (see `truncation`). Raises whatever the pipeline raises.
    """
    with _observed(pipe) as seen, watched(pipe):
        output = pipe(**call)
    images = output.images
    if isinstance(images, Tensor | np.ndarray):
        seen.pixels.append(_finite(images))
    count = len(images)
    return DrawnPictures(images, _flaws(pipe, seen, count), _blacked_out(output, count))


def _blacked_out(output: Any, count: int) -> list[bool]:
    flags = getattr(output, "nsfw_content_detected", getattr(output, "nsfw_detected", None))
    return [False] * count if flags is None or len(flags) != count else [bool(flag) for flag in flags]


# -- observing --------------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """Which rows were finite, call by call."""

    latents: list[Bool[Tensor, " row"]] = field(default_factory=list)
    decoded: list[Bool[Tensor, " row"]] = field(default_factory=list)
    pixels: list[Bool[Tensor, " row"]] = field(default_factory=list)
    precision: torch.dtype | None = None
    """What was decoded in."""


@contextmanager
def _observed(pipe: Any) -> Iterator[_Seen]:
    """While this lasts, the pipeline's decoder and its conversion to pictures tell what goes through them."""
    seen = _Seen()

    def decoding(given: Any, result: Any) -> None:
        decoded = result[0] if isinstance(result, tuple) else getattr(result, "sample", result)
        if isinstance(given, Tensor) and isinstance(decoded, Tensor):
            seen.latents.append(_finite(given))
            seen.decoded.append(_finite(decoded))
            seen.precision = decoded.dtype  # SDXL's pipeline decodes in another than the decoder is kept in

    def converting(given: Any, _: Any) -> None:
        if isinstance(given, Tensor | np.ndarray):
            seen.pixels.append(_finite(given))

    with ExitStack() as stack:
        if (vae := _decoder(pipe)) is not None:
            stack.enter_context(_told(vae, "decode", decoding))
        for owner, name in ((getattr(pipe, "image_processor", None), "postprocess"), (pipe, "numpy_to_pil")):
            if hasattr(owner, name):
                stack.enter_context(_told(owner, name, converting))
        yield seen


class _Heard:
    """Stands in for a method of an object, and has its calls heard by those who listen in the thread that calls."""

    def __init__(self, owner: Any, name: str) -> None:
        self.before = vars(owner).get(name, _ABSENT)
        self.method = getattr(owner, name)
        self.listeners: list[tuple[int, Callable[[Any, Any], None]]] = []
        functools.update_wrapper(self, self.method, updated=())

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        result = self.method(*arguments, **options)
        given = next((v for v in (*arguments, *options.values()) if isinstance(v, Tensor | np.ndarray)), None)
        for thread, tell in tuple(self.listeners):
            if thread == get_ident():
                tell(given, result)
        return result


_listening = Lock()


@contextmanager
def _told(owner: Any, name: str, tell: Callable[[Any, Any], None]) -> Iterator[None]:
    """While this lasts, `tell` hears the first array among the arguments, and the result, of this thread's calls.

    Pipelines of several threads may share the object: whoever ends last puts its method back.
    """
    listener = get_ident(), tell
    with _listening:
        heard = vars(owner).get(name)
        if not isinstance(heard, _Heard):
            heard = _Heard(owner, name)
            setattr(owner, name, heard)
        heard.listeners.append(listener)
    try:
        yield
    finally:
        with _listening:
            heard.listeners.remove(listener)
            if not heard.listeners and vars(owner).get(name) is heard:
                if heard.before is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, heard.before)


def _decoder(pipe: Any) -> Any:
    """What makes pictures of the pipeline's latents, None where it has none."""
    held = [getattr(pipe, name, None) for name in ("vae", "vqvae", "movq")]
    decoders = [unwrapped(part) for part in held if part is not None]
    return next((decoder for decoder in decoders if hasattr(decoder, "decode")), None)


def _finite(values: Any) -> Bool[Tensor, " row"]:
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    values = values.detach()
    return torch.isfinite(values.reshape(len(values), -1)).all(1) if values.ndim else torch.isfinite(values)[None]


def _flaws(pipe: Any, seen: _Seen, count: int) -> list[NotFinite | None]:
    latents, decoded, pixels = (_by_image(calls, count) for calls in (seen.latents, seen.decoded, seen.pixels))
    if (latents & decoded & pixels).all():
        return [None] * count
    vae = _decoder(pipe)
    model = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None) or getattr(pipe, "prior", None)
    denoiser = type(unwrapped(model)).__name__ if model is not None else type(pipe).__name__
    flaws: list[NotFinite | None] = []
    for given, made, shown in zip(latents.tolist(), decoded.tolist(), pixels.tolist(), strict=True):
        if given and made and shown:
            flaws.append(None)
        elif not given:
            flaws.append(NotFinite("latents", denoiser, getattr(model, "dtype", None)))
        elif vae is not None and seen.decoded:
            flaws.append(NotFinite("decoder", type(vae).__name__, seen.precision))
        else:
            flaws.append(NotFinite("model", denoiser, getattr(model, "dtype", None)))
    return flaws


def _by_image(calls: Sequence[Bool[Tensor, " row"]], count: int) -> Bool[Tensor, " image"]:
    """Whether all that was seen of each image was finite, from calls with all images, some of them, or their frames."""
    sound = torch.ones(count, dtype=torch.bool)
    parts = []
    for rows in calls:
        if len(rows) == count:
            sound &= rows.cpu()
        else:
            parts.append(rows.cpu())
    rest = torch.cat(parts) if parts else sound
    if count and len(rest) % count == 0:
        return sound & rest.view(count, -1).all(1)
    return sound & rest.all()  # whose rows they are, nobody can tell


# -- decoding by ourselves --------------------------------------------------------------------------------------------


@contextmanager
def upcast(vae: Any) -> Iterator[Any]:
    """`vae`, in float32 while this lasts if it is in float16 and its configuration says `force_upcast`.

    SDXL's pipeline decodes so: in half precision that VAE overflows.
    """
    half = vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))
    if half:
        vae.to(torch.float32)
    try:
        yield vae
    finally:
        if half:
            vae.to(torch.float16)


def require_decoded(pictures: Tensor, latents: Tensor, vae: Any) -> None:
    """Raise `NotFinite` where the VAE made NaN or infinity of sound latents.

    Of latents that hold them already it says nothing: those have other reasons than the VAE.
    """
    rows = ~_finite(pictures) & _finite(latents)
    if bool(rows.any()):
        which = f"image {int(rows.nonzero()[0])} of {len(rows)}"
        raise NotFinite("decoder", type(unwrapped(vae)).__name__, vae.dtype, which)
