"""`dial.remove()` lets go of the anchors: nothing of ours keeps their weights in memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from peft.tuners.lora import LoraLayer

from anchor_files import lora
from deradiff import realign, sample_particles
from tiny import make, sample, seeded

attack = pytest.mark.attack("the anchor's memory after remove()")


def alive(references: list[Any]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


def made_any() -> Any:
    """`make` for a type checker that knows no modules."""
    return make("sd")


def weights_of(module: Any) -> list[Any]:
    return [weakref.ref(parameter) for parameter in module.parameters()] + [weakref.ref(module)]


@attack
@pytest.mark.parametrize(
    "options", [{}, {"reuse": 2}, {"reuse": 2, "lam": 0.7}, {"method": "interpolate"}, {"lam": 1.0}]
)
@pytest.mark.cases(2)
def test_a_whole_model_is_let_go(options):
    pipe, anchor, call = made_any()
    dial = realign(pipe, anchor, **{"lam": 0.5, **options})
    held = weights_of(anchor)
    image = sample(pipe, call)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    sample(pipe, call)
    reused = dial.reused
    dial.remove()
    del anchor
    assert alive(held) == 0 and dial.anchors == ("anchor",) and "anchor" in repr(dial) and dial.modules == {}
    assert dial.reused == reused and torch.isfinite(image).all()


@attack
def test_several_anchors_and_a_lora_among_them_are_let_go(tmp_path):
    pipe, anchor, call = made_any()
    lora(pipe.unet).save_pretrained(tmp_path)
    before = {name: id(layer) for name, layer in pipe.unet.named_modules()}
    dial = realign(pipe, {"whole": anchor, "lora": tmp_path}, {"whole": 0.3, "lora": 0.4})
    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, LoraLayer)]
    held = [*weights_of(anchor), *(ref for layer in layers for ref in weights_of(layer.lora_A))]
    del layers
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    sample(pipe, call)
    dial.remove()
    del anchor
    assert alive(held) == 0
    assert {name: id(layer) for name, layer in pipe.unet.named_modules()} == before


@attack
def test_particles_and_gradients_let_go(tmp_path):
    pipe, anchor, call = made_any()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    dial, held = realign(pipe, anchor, 0.5), weights_of(anchor)
    call = {"num_inference_steps": 3, "output_type": "latent", "height": 16, "width": 16, "guidance_scale": 1.0}
    sample_particles(pipe, "a red fox", 4, **call)
    pipe.scheduler.set_timesteps(3)
    with seeded(0):
        latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    for t in pipe.scheduler.timesteps:
        output = pipe.unet(latents, t, torch.zeros(1, 5, 16)).sample
        latents = pipe.scheduler.step(output, t, latents).prev_sample
    assert dial.last is not None and dial.last.predictions.requires_grad
    del latents, output
    dial.remove()
    del anchor
    assert alive(held) == 0 and dial.last.sample is not None and dial.importance_weights.predictions == 3


@attack
def test_an_error_that_is_kept_does_not_keep_the_anchor(tmp_path):
    pipe, anchor, call = made_any()
    anchor.conv_in.bias.data.fill_(torch.nan)
    dial, held = realign(pipe, anchor, 0.5), weights_of(anchor)
    with pytest.raises(FloatingPointError) as kept:
        sample(pipe, call)
    dial.remove()
    del anchor
    assert alive(held) == 0 and "anchor" in str(kept.value)


@attack
def test_a_realign_that_fails_keeps_nothing(tmp_path):
    pipe, anchor, _ = made_any()
    folder = Path(tmp_path / "anchor")
    anchor.save_pretrained(folder)
    loaded: list[Any] = []
    original = type(pipe.unet).eval

    def watched(self: Any) -> Any:
        loaded.append(weakref.ref(self))
        return original(self)

    type(pipe.unet).eval = watched
    try:
        with pytest.raises(ValueError) as kept:
            realign(pipe, {"good": folder, "bad": tmp_path / "missing"}, {"good": 0.5, "bad": 0.5})
    finally:
        type(pipe.unet).eval = original
    assert loaded and alive(loaded) == 0 and "missing" in str(kept.value)
