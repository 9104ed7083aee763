"""Modular pipelines of diffusers: blocks around the same components, guided by a guider that is one of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    LayerSkipConfig,
    SkipLayerGuidance,
    StableDiffusion3ModularPipeline,
    StableDiffusionXLModularPipeline,
)
from diffusers.guiders import AdaptiveProjectedGuidance, BaseGuidance
from diffusers.modular_pipelines import StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks
from diffusers.utils import BaseOutput
from safetensors.torch import save_file
from torch import Tensor, nn

from deradiff import realign
from deradiff.sampling.doctor import examine
from oracle import lock_step
from tiny import assert_close, denoiser_name, distance, make, sample
from tiny_loras import fused, lora_weights

KINDS = ["sdxl", "sd3"]


class Latents(BaseOutput):
    """What other pipelines return."""

    images: Tensor


class ModularXL(StableDiffusionXLModularPipeline):
    def __call__(self, **call: Any) -> Any:
        return Latents(images=super().__call__(**call, output="latents"))


class Modular3(StableDiffusion3ModularPipeline):
    def __call__(self, **call: Any) -> Any:
        return Latents(images=super().__call__(**call, output="latents"))


def modular(kind: str, module: nn.Module | None = None, guider: BaseGuidance | None = None) -> Any:
    """The tiny pipeline of that kind as a modular one, without decoding."""
    parts = {name: part for name, part in make(kind)[0].components.items() if part is not None}
    if module is not None:
        parts[denoiser_name(make(kind)[0])] = module
    blocks = StableDiffusionXLAutoBlocks() if kind == "sdxl" else StableDiffusion3AutoBlocks()
    blocks.sub_blocks.pop("decode")
    if kind == "sd3":
        blocks.sub_blocks.pop("text_encoder")
    pipe: Any = (ModularXL if kind == "sdxl" else Modular3)(blocks=blocks)
    chosen = {name: part for name, part in parts.items() if name in pipe.component_names}
    pipe.update_components(**chosen, guider=guider or ClassifierFreeGuidance(guidance_scale=3.0))
    return pipe


def call_of(kind: str) -> dict[str, Any]:
    return {name: value for name, value in make(kind)[2].items() if name not in ("guidance_scale", "output_type")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_modular_pipeline_is_realigned_as_any_other(kind: str) -> None:
    pipe, call = modular(kind), call_of(kind)
    own = [modular(kind), modular(kind, make(kind)[1])]
    plain, aligned = sample(own[0], call), sample(own[1], call)
    dial = realign(pipe, make(kind)[1], 0.0)
    assert torch.equal(sample(pipe, call), plain)
    dial.lam = 1.0
    assert torch.equal(sample(pipe, call), aligned)
    for lam in (0.37, [0.2, 0.9]):
        dial.lam = lam
        assert_close(sample(pipe, call), lock_step(own, call, torch.tensor(lam) if isinstance(lam, list) else lam))
    assert dial.last is not None and dial.last.progress.steps == 0.75
    dial.remove()
    assert torch.equal(sample(pipe, call), plain) and type(pipe) is type(own[0])


def test_a_modular_pipeline_and_a_lora(tmp_path: Path) -> None:
    weights = lora_weights(make("sd3")[0], seed=20)
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    pipe, call, own = modular("sd3"), call_of("sd3"), [modular("sd3"), fused(modular("sd3"), weights)]
    plain = sample(pipe, call)
    with realign(pipe, tmp_path, 0.37):
        assert_close(sample(pipe, call), lock_step(own, call, 0.37), tolerance=3e-5)
    assert torch.equal(sample(pipe, call), plain)


GUIDERS = {
    "adaptive projected": lambda: AdaptiveProjectedGuidance(
        guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5, eta=0.0
    ),
    "skip layer": lambda: SkipLayerGuidance(
        guidance_scale=3.0,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig(
            indices=[0], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=False, skip_ff=True
        ),
    ),
}


@pytest.mark.parametrize("guider", GUIDERS)
def test_what_a_guider_does_to_the_denoiser_it_does_to_its_anchor(guider: str) -> None:
    make_guider = GUIDERS[guider]
    pipe, call = modular("sd3", guider=make_guider()), call_of("sd3")
    own = [modular("sd3", module, make_guider()) for module in (None, make("sd3")[1])]
    plain, aligned = sample(own[0], call), sample(own[1], call)
    assert distance(plain, sample(modular("sd3"), call)) > 1e-3
    dial = realign(pipe, make("sd3")[1], 1.0)
    assert torch.equal(sample(pipe, call), aligned)
    dial.lam = 0.37
    assert_close(sample(pipe, call), lock_step(own, call, 0.37))
    dial.remove()
    assert torch.equal(sample(pipe, call), plain)


def test_a_modular_pipeline_is_examined() -> None:
    report = examine(modular("sd3"), make("sd3")[1], call_of("sd3") | {"num_inference_steps": 2}, 0.3)
    assert report.holds and all(check.holds for check in report.checks), report


def test_what_a_realigned_modular_pipeline_saves_is_the_plain_reference(tmp_path: Path) -> None:
    pipe, call = modular("sdxl"), call_of("sdxl")
    with realign(pipe, make("sdxl")[1], 0.37):
        during = sample(pipe, call)
        pipe.save_pretrained(str(tmp_path))
        assert torch.equal(sample(pipe, call), during)
    stored = type(pipe.unet).from_pretrained(tmp_path / "unet").state_dict()
    assert stored.keys() == pipe.unet.state_dict().keys()
    assert all(torch.equal(tensor, pipe.unet.state_dict()[name]) for name, tensor in stored.items())
    assert not any("deradiff" in path.read_text() for path in tmp_path.rglob("*.json"))
