"""What is set on one model and meant for both: attention processors, FreeU, IP-Adapters, PAG, step caches."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, StableDiffusionPAGPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from companions import BEFORE_AND_AFTER, agrees, apply
from deradiff import realign
from oracle import lock_step
from tiny import assert_close, distance, make, sample, trio, with_denoiser
from tiny_parts import load_ip_adapter, noise

# --- set on one model, meant for both ---------------------------------------------------------------------------------


class Halved(AttnProcessor):
    """Attention whose output is halved: a processor whose presence can be seen."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * super().__call__(*args, **kwargs)


SWITCHES = {
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6),
    "attention processor": lambda pipe: pipe.unet.set_attn_processor(Halved()),
    "attention processors": lambda pipe: pipe.unet.set_attn_processor(
        {name: Halved() if "attn2" in name else AttnProcessor() for name in pipe.unet.attn_processors}
    ),
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(vae=False),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
}


@BEFORE_AND_AFTER
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.cases(3)
def test_what_is_set_on_the_denoiser_is_set_on_both_models(switch, order):
    pipe, anchor, call, own = trio()
    plain, aligned = sample(own[0], call), sample(own[1], call)
    dial = apply(SWITCHES[switch], order, pipe, anchor, own, 0.37)
    agrees(pipe, dial, own, call)
    if switch in ("FreeU", "attention processor", "attention processors"):
        assert distance(sample(own[0], call), plain) > 1e-3
    dial.remove()
    assert torch.equal(sample(pipe, call), sample(own[0], call))
    assert_close(sample(with_denoiser("sd", anchor), call), aligned)


def test_freeu_switched_off_again():
    pipe, anchor, call, own = trio()
    expected = lock_step(own, call, 0.37)
    with realign(pipe, anchor, 0.37):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        assert distance(sample(pipe, call), expected) > 1e-3
        pipe.disable_freeu()
        assert_close(sample(pipe, call), expected)


@BEFORE_AND_AFTER
def test_an_ip_adapter_acts_on_both_models(order):
    pipe, anchor, call, own = trio()
    for each in (pipe, *own):
        each.register_modules(image_encoder=make("sd_ip_adapter")[0].image_encoder)
    call |= {"prompt": "a red fox", "negative_prompt": "dull", "num_images_per_prompt": 2}

    def load(each: DiffusionPipeline) -> None:
        load_ip_adapter(each)
        each.set_ip_adapter_scale(0.8)

    dial = apply(load, order, pipe, anchor, own, 0.37)
    with_image = call | {"ip_adapter_image": noise(1, 3, 16, 16, seed=6)}
    agrees(pipe, dial, own, with_image)
    for each in (pipe, *own):
        each.set_ip_adapter_scale(0.3)
    agrees(pipe, dial, own, with_image)
    for each in (pipe, *own):
        each.unload_ip_adapter()
    agrees(pipe, dial, own, call)
    dial.remove()
    assert torch.equal(sample(pipe, call), sample(own[0], call))


def test_perturbed_attention_guidance():
    def pag(unet: nn.Module) -> DiffusionPipeline:
        parts = {**make("sd")[0].components, "unet": unet}
        pipe = StableDiffusionPAGPipeline(**parts, pag_applied_layers="mid")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    plain, anchor, call = make("sd")
    pipe, own = pag(plain.unet), [pag(make("sd")[0].unet), pag(make("sd")[1])]
    call["pag_scale"] = 3.0
    dial = realign(pipe, anchor, 0.37)
    assert_close(sample(pipe, call), lock_step(own, call, 0.37))
    agrees(pipe, dial, own, call)
    dial.remove()
    assert torch.equal(sample(pipe, call), sample(own[0], call))


def test_a_step_cache_is_refused():
    pipe, anchor, call = make("flux")
    with realign(pipe, anchor, 0.5) as dial:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
        with pytest.raises(RuntimeError, match="disable_cache"):
            sample(pipe, call)
        pipe.transformer.disable_cache()
        assert dial.lam == 0.5 and sample(pipe, call).isfinite().all()
