"""diffusers' guiders, in modular pipelines: every model guided by itself, also where a guider hooks its layers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DiffusionPipeline,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLAutoBlocks,
)
from safetensors.torch import save_file

from deradiff import realign
from deradiff.algorithm.schedules import Power, Progress, Schedule
from deradiff.sampling.blocked_methods import DialError
from oracle import lock_step
from tiny import NEGATIVE, PROMPTS, SIZE, assert_close, denoiser, denoiser_name, distance, make, noise, sample
from tiny_loras import fused, lora_weights

BLOCKS = {"sdxl": "mid_block.attentions.0.transformer_blocks", "sd3": "transformer_blocks"}


def skipping(kind: str, **settings: Any) -> LayerSkipConfig:
    if kind == "sd3":  # diffusers cannot leave its whole blocks out: it returns their two outputs the wrong way round
        settings.setdefault("skip_attention", False)
    return LayerSkipConfig([0 if kind == "sdxl" else 1], fqn=BLOCKS[kind], **settings)


GUIDERS: dict[str, Any] = {
    "CFG": lambda kind: ClassifierFreeGuidance(guidance_scale=4.0, guidance_rescale=0.3),
    "APG": lambda kind: AdaptiveProjectedGuidance(guidance_scale=4.0, adaptive_projected_guidance_momentum=-0.5),
    "CFG-Zero*": lambda kind: ClassifierFreeZeroStarGuidance(guidance_scale=4.0),
    "TCFG": lambda kind: TangentialClassifierFreeGuidance(guidance_scale=4.0),
    "AutoGuidance": lambda kind: AutoGuidance(guidance_scale=4.0, auto_guidance_config=skipping(kind)),
    "AutoGuidance, feed-forward": lambda kind: AutoGuidance(
        guidance_scale=4.0, auto_guidance_config=skipping(kind, skip_attention=False)
    ),
    "SkipLayer": lambda kind: SkipLayerGuidance(
        guidance_scale=4.0,
        skip_layer_config=skipping(kind),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    ),
    "PAG": lambda kind: PerturbedAttentionGuidance(
        guidance_scale=4.0,
        perturbed_guidance_config=skipping(kind, skip_attention=False, skip_attention_scores=True, skip_ff=False),
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
    ),
    "SEG": lambda kind: SmoothedEnergyGuidance(
        guidance_scale=4.0,
        seg_guidance_config=SmoothedEnergyGuidanceConfig([0 if kind == "sdxl" else 1], fqn=BLOCKS[kind]),
        seg_guidance_start=0.0,
        seg_guidance_stop=1.0,
    ),
}
HOOKING = ("AutoGuidance", "AutoGuidance, feed-forward", "SkipLayer", "PAG", "SEG")


class Modular:
    """A modular pipeline that is called, and answers, as the others are."""

    def __init__(self, kind: str, guider: Any, weights: Any = None):
        plain, anchor, _ = make(kind)
        if isinstance(weights, dict):
            fused(plain, weights)
        elif weights:
            # Frozen, as anchors are: torch takes other kernels where weights require gradients, and rounds otherwise.
            setattr(plain, denoiser_name(plain), anchor.requires_grad_(False))
        if kind == "sdxl":
            blocks = StableDiffusionXLAutoBlocks()
            blocks.sub_blocks.pop("decode")
        else:
            blocks = StableDiffusion3T2ICoreDenoiseStep()
        self.pipe = blocks.init_pipeline()
        parts = {name: part for name, part in plain.components.items() if part is not None}
        known = {**self.pipe.components, "guider": None}
        self.pipe.update_components(guider=guider, **{name: part for name, part in parts.items() if name in known})
        self.pipe.set_progress_bar_config(disable=True)
        # `realign` is annotated for `DiffusionPipeline`, which the tests check and nobody else.
        own = type(self.pipe)
        self.pipe.__class__ = type(own.__name__, (own, DiffusionPipeline), {"__setattr__": object.__setattr__})

    @property
    def scheduler(self) -> Any:
        return self.pipe.scheduler

    def __call__(self, **call: Any) -> Any:
        return SimpleNamespace(images=self.pipe(output="latents", **call))


CALLS: dict[str, dict[str, Any]] = {
    "sdxl": {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "num_inference_steps": 4, **SIZE},
    "sd3": {
        "prompt_embeds": noise(2, 5, 16, seed=7),
        "negative_prompt_embeds": noise(2, 5, 16, seed=8),
        "pooled_prompt_embeds": noise(2, 16, seed=9),
        "negative_pooled_prompt_embeds": noise(2, 16, seed=10),
        "num_inference_steps": 4,
        **SIZE,
    },
}
# diffusers knows nothing to skip in the attention processor of SD3.
LEFT_OUT = (("sd3", "PAG"), ("sd3", "AutoGuidance, feed-forward"))
CASES = [(kind, name) for kind in CALLS for name in GUIDERS if (kind, name) not in LEFT_OUT]


@pytest.mark.parametrize("anchored", ["full", "LoRA"])
@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.cases(10)
def test_a_guider_guides_every_model_by_itself(kind, name, anchored, tmp_path):
    call, guider = CALLS[kind], GUIDERS[name]
    pipe, source, weights = Modular(kind, guider(kind)), make(kind)[1], None
    if anchored == "LoRA":
        weights, source = lora_weights(make(kind)[0], seed=20), tmp_path / "lora.safetensors"
        save_file(weights, source)
    own = [Modular(kind, guider(kind)), Modular(kind, guider(kind), weights or True)]
    plain = [sample(each, call) for each in own]
    if name in HOOKING:
        assert distance(sample(Modular(kind, GUIDERS["CFG"](kind)), call), plain[0]) > 1e-3
    with realign(pipe.pipe, source, 0.0) as dial:
        assert torch.equal(sample(pipe, call), plain[0])
        dial.lam = 1.0
        assert_close(sample(pipe, call), plain[1], tolerance=3e-5)
        assert anchored == "LoRA" or torch.equal(sample(pipe, call), plain[1])
        dial.lam = 0.37
        assert_close(sample(pipe, call), lock_step(own, call, 0.37), tolerance=3e-5)
    assert torch.equal(sample(pipe, call), plain[0])


def test_what_a_guider_drops_at_random_is_the_same_for_every_model():
    def guider() -> AutoGuidance:
        return AutoGuidance(guidance_scale=4.0, auto_guidance_config=skipping("sd3", dropout=0.5))

    call, pipe, twin = CALLS["sd3"], Modular("sd3", guider()), make("sd3")[0]
    plain = sample(Modular("sd3", guider()), call)
    with pytest.warns(UserWarning, match="same weights"), realign(pipe.pipe, denoiser(twin), 0.37) as dial:
        assert_close(sample(pipe, call), plain)
        dial.lam = 1.0
        assert_close(sample(pipe, call), plain)


class Until(Schedule):
    """λ = ½ up to some part of the run and 0 from there on."""

    def __init__(self, end: float) -> None:
        self.end = end

    def __str__(self) -> str:
        return f"until {self.end}"

    def _value(self, s: float) -> float:
        return 0.5 if s < self.end else 0.0


@pytest.mark.parametrize("schedule", [Power(1.0), Until(0.5)], ids=["from 0", "to 0"])
def test_a_guider_that_remembers_steps_without_one_of_the_models_is_refused(schedule):
    call, guider = CALLS["sd3"], GUIDERS["APG"]
    pipe = Modular("sd3", guider("sd3"))
    own = [Modular("sd3", guider("sd3")), Modular("sd3", guider("sd3"), True)]
    with realign(pipe.pipe, make("sd3")[1], schedule) as dial:
        with pytest.raises(DialError, match="other models were evaluated"):
            sample(pipe, call)
        dial.watching = True
        expected = lock_step(own, call, lambda i: schedule.at(Progress(i / 4, i / 4)))
        assert_close(sample(pipe, call), expected, tolerance=3e-5)
