"""Latents are decoded by ourselves as the pipeline does it, upcast where it asks for that."""

from typing import Any

import pytest
import torch

import deradiff
import tiny
from deradiff.alignment.base import Base
from deradiff.alignment.sampling import decode
from deradiff.sampling import pictures
from deradiff.sampling.pictures import NotFinite
from deradiff.studio import drawing

pixels = pytest.mark.attack("NaN pixels")
CALL = {"prompt": "a red fox", "num_inference_steps": 2, "guidance_scale": 1.0}


# -- decoding by ourselves ---------------------------------------------------------------------------------------------


def overflowing(pipe: Any, force_upcast: bool) -> Any:
    """In half precision, with a VAE whose insides leave its range and whose results do not."""
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(3e5)
        pipe.vae.decoder.conv_in.bias.mul_(3e5)
    pipe.vae.register_to_config(force_upcast=force_upcast)
    return pipe.to(torch.float16)


@pixels
def test_sdxls_decoder_is_upcast_as_its_pipeline_does() -> None:
    pipe = overflowing(tiny.make("sdxl")[0], True)
    latents = tiny.noise(2, 4, 8, 8).half()
    precise = decode(Base(pipe), latents)
    assert torch.isfinite(precise).all() and pipe.vae.dtype == torch.float16
    pipe.vae.to(torch.float32)
    assert torch.equal(precise, decode(Base(pipe), latents.float()))
    pipe.vae.to(torch.float16)
    assert torch.isfinite(Base(pipe).encode_images(tiny.picture() * 2 - 1)).all()
    with pictures.upcast(pipe.vae):
        leaf = latents.float().requires_grad_(True)
        (gradient,) = torch.autograd.grad(decode(Base(pipe), leaf).sum(), leaf)
        assert torch.isfinite(gradient).all() and gradient.any()
    assert pipe.vae.dtype == torch.float16


@pixels
def test_a_decoder_that_overflows_and_does_not_ask_to_be_upcast_is_refused() -> None:
    pipe = overflowing(tiny.make("sdxl")[0], False)
    with pytest.raises(NotFinite) as error:
        decode(Base(pipe), tiny.noise(2, 4, 8, 8).half())
    assert (error.value.origin, error.value.dtype) == ("decoder", torch.float16)


@pixels
def test_sdxls_own_pipeline_in_half_precision() -> None:
    for force_upcast, origin in ((True, None), (False, "decoder")):
        pipe = overflowing(tiny.make("sdxl")[0], force_upcast)
        flaws = pictures.draw(pipe, **CALL).flaws
        assert [flaw and flaw.origin for flaw in flaws] == [origin]


@pixels
def test_the_studios_glimpses_are_upcast_or_left_out() -> None:
    for force_upcast in (True, False):
        pipe, anchor, _ = tiny.make("sdxl")
        overflowing(pipe, force_upcast)
        with deradiff.realign(pipe, anchor.half(), 0.5) as dial:
            pipe(**CALL | {"output_type": "latent"})
            glimpse = drawing.glimpse_of(pipe, dial)
        assert (glimpse is not None) == force_upcast and pipe.vae.dtype == torch.float16
