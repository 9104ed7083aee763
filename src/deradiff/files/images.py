"""What an image looks like, whatever file or mode it comes in: one function makes RGB of it, for everybody."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Transpose

ORIENTATION = 0x0112
"""The tag of EXIF that says how a camera was held."""

UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What each orientation has to undergo."""

SIXTEEN_BITS = 65535
MOVING = ("GIF", "PNG", "WEBP")
"""Formats of which a file may move."""


def rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """`image` as it is meant to be seen, in 8-bit RGB and without metadata; what is transparent is on white.

    It is turned as its EXIF data say. Of several pictures in a file the present one is taken, the first in a file that
    was just opened, with a warning where they move. Grey of 16 bits is divided by 257, and floating-point values in
    [0, 1] are multiplied by 255, both rounded. Colour profiles are ignored, as diffusers and the processors of CLIP
    ignore them. `name` stands in errors.

    Raises `ValueError` for an image without pixels, damaged data, integers of 32 bits whose range the file's format
    does not tell, and floating-point values outside [0, 1].
    """
    if 0 in image.size:
        raise ValueError(f"{name} is {image.width} x {image.height} pixels: it shows nothing")
    if image.format in MOVING and getattr(image, "is_animated", False):
        warnings.warn(f"{name} moves: one picture of it is taken, the first unless another was sought", stacklevel=2)
    try:
        image.load()
        return _rgb(image, name)
    except (MemoryError, _Refused):
        raise
    # Damaged files make Pillow's decoders raise almost anything, from SyntaxError to struct.error.
    except Exception as error:
        raise _damaged(name, error) from error


def read_rgb(source: Path | bytes, name: str | None = None) -> Image.Image:
    """The picture in an image file, given as its path or its bytes, as `rgb` makes it.

    Raises `ValueError` with the file's `name` (its path by default) where it is no image, damaged, larger than Pillow
    reads (a "decompression bomb"), or refused by `rgb`; `OSError` where the file cannot be opened.
    """
    name = name or (str(source) if isinstance(source, Path) else "the image")
    content = source.read_bytes() if isinstance(source, Path) else source
    try:
        image = Image.open(io.BytesIO(content))
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged(name, error) from error
    with image:
        return rgb(image, name)


class _Refused(ValueError):
    """An image that is sound, but has no meaning in RGB."""


def _damaged(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "it is in no format that Pillow knows, or damaged"
    return ValueError(f"{name} cannot be decoded: {reason}")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    upright = UPRIGHT.get(_orientation(image))
    kind = image.mode.partition(";")[0]
    if kind == "F":
        flat = _scaled(image, 1, name)
    elif kind == "I":
        if ";" not in image.mode and image.format not in ("PNG", "PPM"):  # both mean 16 bits by it
            low, high = image.getextrema()
            raise _Refused(
                f"{name} holds integers of 32 bits from {low} to {high}, and nothing says which of them is white: save "
                "it with 8 or 16 bits"
            )
        flat = _scaled(image, SIXTEEN_BITS, name)
    else:
        flat = np.asarray(_of_8_bits(image))
    picture = Image.fromarray(flat)  # no metadata, which could turn it again
    return picture if upright is None else picture.transpose(upright)


def _of_8_bits(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # grey multiplied by its alpha, which Pillow takes to no other mode
        image = image.convert("LA")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode == "LAB":
        from PIL import ImageCms

        image = (
            ImageCms.profileToProfile(
                image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            or image
        )
    return image.convert("RGB")


def _scaled(image: Image.Image, white: int, name: str) -> np.ndarray:
    """Grey values between 0 and `white` as RGB, and a value that stands for transparency as white."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):
        raise _Refused(
            f"{name} holds values from {low:g} to {high:g}, and nothing says which of them is white: scale them to "
            f"[0, {white}], or save it with 8 or 16 bits"
        )
    levels = np.floor(values * (255 / white) + 0.5)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        levels[values == clear] = 255
    return np.repeat(levels.astype(np.uint8)[..., None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    """How the camera was held; 1, upright, also where the EXIF data are damaged."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1
