"""`RealignGuider` held against Algorithm 1: the plain modular pipelines of either model, and both in lock step."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    HeunDiscreteScheduler,
    LayerSkipConfig,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
)
from safetensors.torch import save_file
from torch import nn

from deradiff import realign
from deradiff.algorithm.schedules import Power, Progress, Step
from deradiff.integrations.diffusers import RealignGuider
from oracle import lock_step
from tiny import Counter, assert_close, denoiser_name, distance, sample
from tiny_families import built, drawn
from tiny_loras import lora_weights
from tiny_modular import GUIDED, call_of, modular
from tiny_parts import perturbed


@cache
def anchor_for(kind: str, seed: int = 1) -> nn.Module:
    """Another denoiser for the pipelines of that kind, frozen as anchors are; nobody changes it."""
    pipe, _ = built(kind)
    return perturbed(getattr(pipe, denoiser_name(pipe)), seed).requires_grad_(False)


def guided(kind: str, anchor: Any, lam: Any, guider: Any = None, **settings: Any) -> tuple[Any, RealignGuider]:
    """A modular pipeline with a realigning guider in it."""
    pipe = modular(kind, guider=guider)
    own = RealignGuider(anchor, lam, pipe=pipe, **settings)
    pipe.update_components(guider=own)
    return pipe, own


def test_flux_has_no_guider_and_is_realigned_as_any_other_pipeline():
    call, pipe = call_of("flux"), modular("flux")
    own = [modular("flux"), modular("flux", anchor_for("flux"))]
    with realign(pipe, anchor_for("flux"), 0.5):
        assert_close(sample(pipe, call), lock_step(own, call, 0.5))


@pytest.mark.parametrize("kind", GUIDED)
def test_the_mixture_is_algorithm_1(kind):
    call, own = call_of(kind), [modular(kind), modular(kind, anchor_for(kind))]
    plain = [sample(each, call) for each in own]
    assert distance(*plain) > 1e-2
    pipe, guider = guided(kind, anchor_for(kind), 0.0)
    assert torch.equal(sample(pipe, call), plain[0])
    guider.lam = 1.0
    assert torch.equal(sample(pipe, call), plain[1])
    guider.lam = 0.5
    mixed = sample(pipe, call)
    assert_close(mixed, lock_step(own, call, 0.5))
    guider.remove()
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    assert torch.equal(sample(pipe, call), plain[0])
    with realign(pipe, anchor_for(kind), 0.5):
        assert torch.equal(sample(pipe, call), mixed)


def classic(kind: str) -> tuple[Any, dict[str, Any]]:
    pipe, call = built(kind)
    return pipe, call | {"true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale": 3.0}


def unpacked(kind: str, latents: torch.Tensor) -> torch.Tensor:
    """The latents of the other pipelines in the form of the modular one's: Qwen-Image's are patches there."""
    if kind != "qwen_image":
        return latents
    patches = latents.reshape(2, 4, 4, 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 1, 8, 8)


@pytest.mark.parametrize("kind", ["sdxl", "qwen_image", "wan", "z_image"])
def test_the_other_pipeline_realigned_gives_the_same_latents(kind):
    # Z-Image's own pipeline adds its guidance to the prediction with the prompt.
    inner = ClassifierFreeGuidance(guidance_scale=3.0, use_original_formulation=kind == "z_image")
    pipe, _ = guided(kind, anchor_for(kind), 0.4, inner)
    other, call = classic(kind)
    with realign(other, anchor_for(kind), 0.4):
        (latents,) = drawn(other, call | {"num_inference_steps": call_of(kind)["num_inference_steps"]})
    assert_close(sample(pipe, call_of(kind)), unpacked(kind, latents), tolerance=2e-5)


def skipping() -> SkipLayerGuidance:
    config = LayerSkipConfig([1], fqn="transformer_blocks", skip_attention=False)
    return SkipLayerGuidance(4.0, skip_layer_config=config, skip_layer_guidance_start=0, skip_layer_guidance_stop=1)


def dropping() -> AutoGuidance:
    config = LayerSkipConfig([1], fqn="transformer_blocks", skip_attention=False, dropout=0.5)
    return AutoGuidance(4.0, auto_guidance_config=config)


INNER: dict[str, Any] = {
    "APG": lambda: AdaptiveProjectedGuidance(4.0, adaptive_projected_guidance_momentum=-0.5, eta=0.3),
    "TCFG": lambda: TangentialClassifierFreeGuidance(4.0),
    "CFG-Zero*": lambda: ClassifierFreeZeroStarGuidance(4.0),
    "CFG, rescaled": lambda: ClassifierFreeGuidance(4.0, guidance_rescale=0.5),
    "CFG, in the middle": lambda: ClassifierFreeGuidance(4.0, start=0.3, stop=0.8),
    "CFG, never": lambda: ClassifierFreeGuidance(4.0, enabled=False),
    "no guidance": lambda: ClassifierFreeGuidance(1.0),
    "skipped layers": skipping,
}
QWEN = ("APG", "TCFG", "CFG, in the middle", "CFG, never")


@pytest.mark.cases(8)
@pytest.mark.parametrize(
    ("kind", "inner"), [*(("sd3", inner) for inner in INNER), *(("qwen_image", inner) for inner in QWEN)]
)
def test_each_model_is_guided_by_a_guider_of_its_own(kind, inner):
    call, make = call_of(kind) | {"num_inference_steps": 4}, INNER[inner]
    own = [modular(kind, guider=make()), modular(kind, anchor_for(kind), make())]
    pipe, guider = guided(kind, anchor_for(kind), 0.37, make())
    assert_close(sample(pipe, call), lock_step(own, call, 0.37), tolerance=3e-5)
    for lam, alone in enumerate(own):
        guider.lam = float(lam)
        assert torch.equal(sample(pipe, call), sample(alone, call))


def test_the_same_weights_are_warned_of_and_what_is_dropped_at_random_is_the_same_for_both():
    call = call_of("sd3")
    with pytest.warns(UserWarning, match="same weights"):
        pipe, _ = guided("sd3", built("sd3")[0].transformer, 0.37, dropping())
    assert_close(sample(pipe, call), sample(modular("sd3", guider=dropping()), call))


@pytest.mark.parametrize("inner", ["APG", "TCFG"])
def test_schedules_go_by_the_scheduler_and_each_image_can_have_its_own(inner):
    call = call_of("sd3") | {"num_inference_steps": 4}
    own = [modular("sd3", guider=INNER[inner]()), modular("sd3", anchor_for("sd3"), INNER[inner]())]
    pipe, guider = guided("sd3", anchor_for("sd3"), [0.2, Power(2.0)], INNER[inner]())
    squares = [(i / 4) ** 2 for i in range(4)]
    assert_close(sample(pipe, call), lock_step(own, call, lambda i: torch.tensor([0.2, squares[i]])), tolerance=3e-5)
    guider.lam = Step(0.5)
    assert_close(sample(pipe, call), lock_step(own, call, lambda i: float(i >= 2)), tolerance=3e-5)


def test_a_two_stage_scheduler_is_not_asked_for_its_number_of_calls():
    schedule, call = Power(1.0, over="time"), call_of("sdxl")
    own = [modular("sdxl"), modular("sdxl", anchor_for("sdxl"))]
    pipe, _ = guided("sdxl", anchor_for("sdxl"), schedule)
    for each in (pipe, *own):
        each.update_components(scheduler=HeunDiscreteScheduler.from_config(each.scheduler.config))
    own[0].scheduler.set_timesteps(2)
    times = [float(t) / 1000 for t in own[0].scheduler.timesteps]
    assert len(times) == 3
    expected = lock_step(own, call, lambda i: schedule.at(Progress(0.0, 1 - times[i])))
    assert_close(sample(pipe, call), expected, tolerance=3e-5)


@pytest.mark.cases(2)
@pytest.mark.parametrize("kind", ["wan", "qwen_image", "sdxl"])
def test_a_lora_is_switched_in_the_reference_for_each_of_its_calls(kind, tmp_path):
    weights, call = lora_weights(built(kind)[0], seed=20), call_of(kind)
    save_file(weights, tmp_path / "lora.safetensors")
    pipe, guider = guided(kind, tmp_path / "lora.safetensors", 0.0)
    name = denoiser_name(built(kind)[0])
    own = [modular(kind), modular(kind)]
    getattr(own[1], name).load_lora_adapter(dict(weights), prefix=name)
    plain = [sample(each, call) for each in own]
    assert torch.equal(sample(pipe, call), plain[0])
    guider.lam = 1.0
    assert torch.equal(sample(pipe, call), plain[1])
    guider.lam = 0.37
    assert_close(sample(pipe, call), lock_step(own, call, 0.37), tolerance=3e-5)
    assert not guider.modules
    guider.remove()
    assert getattr(pipe, name).state_dict().keys() == getattr(own[0], name).state_dict().keys()


def test_two_anchors_and_the_price_of_each_lam():
    call, steps = call_of("sd3"), call_of("sd3")["num_inference_steps"]
    modules = {"one": anchor_for("sd3"), "two": anchor_for("sd3", seed=5)}
    own = [modular("sd3"), *(modular("sd3", anchor_for("sd3", seed)) for seed in (1, 5))]
    pipe, guider = guided("sd3", modules, {"one": 0.6, "two": -0.3})
    assert_close(sample(pipe, call), lock_step(own, call, [0.6, -0.3]), tolerance=3e-5)
    for lam, evaluated in (({"one": 0.0, "two": 0.0}, [2, 0, 0]), ({"one": 1.5, "two": -0.5}, [0, 2, 2])):
        guider.lam = lam
        counters = [Counter(module) for module in (pipe.transformer, *modules.values())]
        with counters[0], counters[1], counters[2]:
            sample(pipe, call)
        assert [counter.number for counter in counters] == [steps * n for n in evaluated]


def test_the_two_denoisers_of_wan_2_2_have_a_guider_each():
    call, scales = call_of("wan22"), {"guider": 4.0, "guider_2": 3.0}

    def pipeline(anchored: bool) -> Any:
        pipe = modular("wan22")
        pipe.update_components(**{name: ClassifierFreeGuidance(scale) for name, scale in scales.items()})
        if anchored:
            for seed, name in enumerate(("transformer", "transformer_2"), 1):
                setattr(pipe, name, perturbed(getattr(pipe, name), seed).requires_grad_(False))
        return pipe

    pipe, own = pipeline(False), [pipeline(False), pipeline(True)]
    with pytest.raises(ValueError, match="transformer_2"):
        RealignGuider(own[1].transformer, 0.5, pipe=pipe)
    for name in ("transformer", "transformer_2"):
        anchor = getattr(pipeline(True), name)
        guider = RealignGuider(anchor, 0.5, pipe=pipe, component=name)
        pipe.update_components(**{name.replace("transformer", "guider"): guider})
    assert (pipe.guider.guidance_scale, pipe.guider_2.guidance_scale) == (4.0, 3.0)
    assert_close(sample(pipe, call), lock_step(own, call, 0.5), tolerance=3e-5)
    pipe.guider.lam = pipe.guider_2.lam = 1.0
    assert torch.equal(sample(pipe, call), sample(own[1], call))
