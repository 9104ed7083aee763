"""One meaning for every image: RGB of any mode and file, compared with values computed by hand."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from deradiff.alignment.data_order import Unreadable
from deradiff.alignment.pair_rows import UndecodedPair, decode_pair
from deradiff.files.images import read_rgb, rgb
from deradiff.measures import features
from deradiff.rewards.pixels import picture_tensor
from deradiff.study.tiles import tile
from deradiff.sweep.sheets import contact_sheet

one_meaning = pytest.mark.attack("two meanings for one image")

RAMP = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
COLOURS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


RGBA = np.concatenate([COLOURS, ALPHA[..., None]], axis=2)
FLOATS = (RAMP / 65535).astype(np.float32)
PALETTE = Image.fromarray(COLOURS).quantize(16)
SIXTEEN = grey(np.floor(RAMP / 257 + 0.5))

FILES: dict[str, tuple[bytes, np.ndarray]] = {
    "16-bit PNG": (encoded(Image.fromarray(RAMP), "PNG"), SIXTEEN),
    "16-bit TIFF": (encoded(Image.fromarray(RAMP), "TIFF"), SIXTEEN),
    "16-bit TIFF, big-endian": (
        encoded(Image.frombytes("I;16B", (32, 32), RAMP.byteswap().tobytes()), "TIFF"),
        SIXTEEN,
    ),
    "16-bit PGM": (encoded(Image.fromarray(RAMP), "PPM"), SIXTEEN),
    "16-bit PNG, one value transparent": (
        encoded(Image.fromarray(RAMP), "PNG", transparency=int(RAMP[3, 4])),
        np.where(grey(RAMP) == RAMP[3, 4], 255, SIXTEEN),
    ),
    "float TIFF": (encoded(Image.fromarray(FLOATS), "TIFF"), grey(np.floor(FLOATS.astype(float) * 255 + 0.5))),
    "grey": (encoded(Image.fromarray(ALPHA), "PNG"), grey(ALPHA)),
    "1 bit": (encoded(Image.fromarray(ALPHA > 127), "PNG"), grey(np.where(ALPHA > 127, 255, 0))),
    "RGBA": (encoded(Image.fromarray(RGBA), "PNG"), on_white(COLOURS, ALPHA)),
    "grey with alpha": (
        encoded(Image.fromarray(np.stack([COLOURS[..., 0], ALPHA], 2), "LA"), "PNG"),
        on_white(grey(COLOURS[..., 0]), ALPHA),
    ),
    "RGB, one colour transparent": (
        encoded(Image.fromarray(COLOURS), "PNG", transparency=tuple(map(int, COLOURS[5, 6]))),
        np.where((COLOURS[5, 6] == COLOURS).all(2)[..., None], 255, COLOURS),
    ),
    "palette": (encoded(PALETTE, "PNG"), np.asarray(PALETTE.getpalette()).reshape(-1, 3)[np.asarray(PALETTE)]),
    "palette, one entry transparent": (
        encoded(PALETTE, "PNG", transparency=3),
        np.where(
            (np.asarray(PALETTE) == 3)[..., None],
            255,
            np.asarray(PALETTE.getpalette()).reshape(-1, 3)[np.asarray(PALETTE)],
        ),
    ),
    "CMYK": (
        encoded(Image.frombytes("CMYK", (32, 32), np.concatenate([COLOURS, ALPHA[..., None]], 2).tobytes()), "TIFF"),
        (255 - COLOURS.astype(float)) * (255 - ALPHA[..., None].astype(float)) / 255,
    ),
}
"""A file of each kind, and what it shows."""


@one_meaning
@pytest.mark.parametrize("kind", FILES)
def test_every_reader_sees_what_the_file_shows(kind: str) -> None:
    content, expected = FILES[kind]
    opened = Image.open(io.BytesIO(content))
    pair = decode_pair(UndecodedPair("a prompt", content, opened, "row 0"))
    seen = {
        "file": np.asarray(read_rgb(content)),
        "winner": np.asarray(pair.winner),
        "loser": np.asarray(pair.loser),
        "reward": (picture_tensor(opened)[0].permute(1, 2, 0) * 255).numpy(),
        "tile": np.asarray(tile(opened).resize((32, 32), Image.Resampling.NEAREST)),
    }
    for reader, values in seen.items():
        assert np.abs(values.astype(float) - expected).max() <= 1, reader  # Pillow composes in whole numbers
    assert all(np.array_equal(values, seen["file"]) for values in seen.values())


@one_meaning
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_is_turned_upright_for_everybody_and_once(orientation: int) -> None:
    wide = Image.fromarray(COLOURS[:20])
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(wide, "PNG", exif=exif)
    # What the tag means (TIFF 6.0): where the stored first row and first column are seen.
    stored = COLOURS[:20]
    turned = stored.transpose(1, 0, 2) if orientation > 4 else stored
    expected = {
        1: turned,
        2: turned[:, ::-1],
        3: turned[::-1, ::-1],
        4: turned[::-1],
        5: turned,
        6: turned[:, ::-1],
        7: turned[::-1, ::-1],
        8: turned[::-1],
    }[orientation]
    once = read_rgb(content)
    assert np.array_equal(np.asarray(once), expected)
    assert np.array_equal(np.asarray(rgb(once)), expected)
    opened = Image.open(io.BytesIO(content))
    assert np.array_equal((picture_tensor(opened)[0].permute(1, 2, 0) * 255).numpy(), expected)
    assert tile(opened).size[0] * once.size[1] == tile(opened).size[1] * once.size[0]


@one_meaning
@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "HSV", "YCbCr", "RGBX"])
def test_modes_that_only_memory_knows(mode: str) -> None:
    source = Image.fromarray(RGBA) if mode in ("RGBa", "PA") else Image.fromarray(COLOURS)
    if mode == "La":
        source = Image.fromarray(np.stack([COLOURS[..., 0], ALPHA], 2), "LA")
    expected = {
        "RGBa": on_white(COLOURS, ALPHA),
        "La": on_white(grey(COLOURS[..., 0]), ALPHA),
        "PA": on_white(np.asarray(source.convert("PA").convert("RGBA"))[..., :3], ALPHA),
    }.get(mode, COLOURS.astype(float))
    error = np.abs(np.asarray(rgb(source.convert(mode))).astype(float) - expected)
    assert error.max() <= (12 if mode == "HSV" else 3)  # these modes round by themselves


@one_meaning
def test_lab_is_brought_back() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    soft = Image.fromarray((COLOURS // 4 + 96).astype(np.uint8))
    there = ImageCms.profileToProfile(soft, srgb, lab, outputMode="LAB")
    assert there is not None
    assert np.abs(np.asarray(rgb(there)).astype(int) - np.asarray(soft)).max() <= 6


@one_meaning
@pytest.mark.parametrize(
    ("image", "values"),
    [
        (Image.fromarray(np.array([[0, 2]], np.float32)), ["0 to 2"]),
        (Image.fromarray(np.array([[-1, 1]], np.float32)), ["-1 to 1"]),
        (Image.fromarray(np.array([[0, np.nan]], np.float32)), ["nan"]),
        (Image.fromarray(np.array([[0, 70000]], np.int32)), ["0 to 70000"]),
        (Image.new("RGB", (0, 5)), ["0 x 5"]),
    ],
)
def test_what_has_no_meaning_is_refused_by_all(image: Image.Image, values: list[str]) -> None:
    for refused in (lambda: rgb(image, "row 7"), lambda: picture_tensor(image, 7), lambda: tile(image)):
        with pytest.raises(ValueError) as error:
            refused()
        assert all(value in str(error.value) for value in values)
    with pytest.raises(Unreadable) as unreadable:
        decode_pair(UndecodedPair("a prompt", image, image, "row 7"))
    assert "row 7" in str(unreadable.value)


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@one_meaning
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"no image",
        bomb(60_000),
        encoded(Image.fromarray(COLOURS), "PNG")[:-500],
        encoded(Image.fromarray(COLOURS), "JPEG")[:400],
        encoded(Image.fromarray(COLOURS), "GIF")[:200],
        encoded(Image.fromarray(COLOURS), "WEBP")[:100],
    ],
    ids=["empty", "header", "text", "bomb", "cut PNG", "cut JPEG", "cut GIF", "cut WebP"],
)
def test_damaged_files_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "holiday.png"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_rgb(file)
    assert "holiday.png" in str(error.value)
    with pytest.raises(Unreadable) as unreadable:
        decode_pair(UndecodedPair("a prompt", content, content, "row 3"))
    assert unreadable.value.reason == "corrupt image"


@one_meaning
@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_what_moves_the_first_picture_is_taken_with_a_word(form: str) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    lossless = {"lossless": True} if form == "WEBP" else {}
    content = encoded(red, form, save_all=True, append_images=[blue], **lossless)
    with pytest.warns(UserWarning, match="row 3"):
        assert np.asarray(read_rgb(content, "row 3"))[4, 4].tolist() == [255, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_rgb(encoded(red, form, **lossless))


@one_meaning
def test_damaged_exif_does_not_spoil_a_sound_picture() -> None:
    image = Image.fromarray(COLOURS)
    image.info["exif"] = b"Exif\0\0II*\0garbage"
    assert np.array_equal(np.asarray(rgb(image)), COLOURS)


@one_meaning
def test_features_and_sheets_take_the_same_images() -> None:
    ramp = Image.fromarray(RAMP)
    plain = Image.fromarray(SIXTEEN.astype(np.uint8))
    extractor = features.load("digits")
    assert torch.equal(extractor([ramp]), extractor([plain]))
    labels = (["λ"], ["a prompt"])
    assert np.array_equal(np.asarray(contact_sheet([[ramp]], *labels)), np.asarray(contact_sheet([[plain]], *labels)))
