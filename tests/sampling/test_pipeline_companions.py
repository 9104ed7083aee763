"""What people attach to a pipeline beside an anchor: style LoRAs, LoRA anchors, interpolated weights."""

from typing import Any

import pytest
import torch
from diffusers import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter
from safetensors.torch import save_file
from torch import Tensor

from companions import BEFORE_AND_AFTER, agrees, apply
from deradiff import realign
from messages import naming
from oracle import lock_step
from tiny import (
    SIZE,
    Counter,
    assert_close,
    denoiser,
    distance,
    make,
    sample,
    seeded,
    trio,
    with_denoiser,
)
from tiny_loras import fused, lora_weights

# --- style LoRAs act on both models -----------------------------------------------------------------------------------


@BEFORE_AND_AFTER
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.cases(3)
def test_a_style_lora_acts_on_both_models(kind, order):
    pipe, anchor, call, own = trio(kind)
    plain, unstyled = sample(pipe, call), lock_step(own, call, 0.37)
    style = lora_weights(pipe)
    dial = apply(lambda each: each.load_lora_weights(dict(style), adapter_name="style"), order, pipe, anchor, own, 0.37)
    assert distance(lock_step(own, call, 0.37), unstyled) > 1e-2
    agrees(pipe, dial, own, call)

    for each in (pipe, *own):
        each.set_adapters(["style"], [0.3])
    agrees(pipe, dial, own, call)
    for each in (pipe, *own):
        each.disable_lora()
    agrees(pipe, dial, own, call)
    for each in (pipe, *own):
        each.enable_lora()
    agrees(pipe, dial, own, call)

    for each in (pipe, *own):
        each.unload_lora_weights()
    dial.lam = 0.37
    assert_close(sample(pipe, call), unstyled)
    dial.remove()
    assert torch.equal(sample(pipe, call), plain)


def test_a_style_lora_loaded_while_realigned_stays_on_the_reference_and_leaves_the_anchor():
    pipe, anchor, call, own = trio()
    aligned, style = sample(own[1], call), lora_weights(pipe)
    own[0].load_lora_weights(dict(style), adapter_name="style")
    dial = realign(pipe, anchor, 0.37)
    pipe.load_lora_weights(dict(style), adapter_name="style")
    sample(pipe, call)
    dial.remove()
    assert torch.equal(sample(pipe, call), sample(own[0], call))
    assert_close(sample(with_denoiser("sd", anchor), call), aligned)


def test_two_styles_with_weights():
    pipe, anchor, call, own = trio()
    first, second = lora_weights(pipe, seed=50), lora_weights(pipe, seed=90)

    def load(each: DiffusionPipeline) -> None:
        each.load_lora_weights(dict(first), adapter_name="one")
        each.load_lora_weights(dict(second), adapter_name="two")
        each.set_adapters(["one", "two"], [0.7, -0.4])

    dial = apply(load, "after", pipe, anchor, own, 0.37)
    agrees(pipe, dial, own, call)
    for each in (pipe, *own):
        each.delete_adapters("one")
    agrees(pipe, dial, own, call)
    call["cross_attention_kwargs"] = {"scale": 0.5}
    agrees(pipe, dial, own, call)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_style_lora_fused_into_the_reference_alone_is_refused(kind, lora_anchor):
    pipe, anchor, call, own = trio()
    style = lora_weights(pipe)
    if kind == "lora":
        anchor, weights = lora_anchor(pipe)
        own[1] = fused(make("sd")[0], weights)
    with realign(pipe, anchor, 0.37):
        pipe.load_lora_weights(dict(style), adapter_name="style")
        with pytest.raises(RuntimeError, match=naming("LoRA", "realign()")):
            pipe.fuse_lora()
        for each in own:
            each.load_lora_weights(dict(style), adapter_name="style")
        assert_close(sample(pipe, call), lock_step(own, call, 0.37), tolerance=3e-5)
    pipe.fuse_lora()
    assert_close(sample(pipe, call), sample(own[0], call))
    if kind == "full":
        with (
            realign(pipe, anchor, 0.37),
            pytest.raises(RuntimeError, match=naming("LoRA", "style", "'anchor'", "unfuse_lora()")),
        ):
            sample(pipe, call)


def test_a_style_replaced_by_another_of_the_same_name():
    pipe, anchor, call, own = trio()
    styles = [lora_weights(pipe, seed=seed) for seed in (50, 90)]
    dial = realign(pipe, anchor, 0.37)
    for style in styles:
        for each in (pipe, *own):
            each.unload_lora_weights()
            each.load_lora_weights(dict(style), adapter_name="style")
        agrees(pipe, dial, own, call)


# --- LoRA anchors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lora_anchor(tmp_path):
    """For a pipeline: the path of a LoRA file, and the same LoRA's weights."""

    def write(pipe: DiffusionPipeline) -> tuple[Any, dict[str, Tensor]]:
        weights = lora_weights(pipe, seed=20)
        path = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(weights, path)
        return path, weights

    return write


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd_adapter", "sd_controlnet", "sd_ip_adapter", "sd3", "flux"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.cases(3)
def test_a_lora_anchor_is_the_full_model_with_the_lora_fused(kind, batched, lora_anchor):
    pipe, _, call = make(kind)
    path, weights = lora_anchor(pipe)
    own = [make(kind)[0], fused(make(kind)[0], weights)]
    plain, state = sample(pipe, call), set(denoiser(pipe).state_dict())
    assert distance(sample(own[1], call), plain) > 1e-2
    dial = realign(pipe, path, 0.0, batched=batched)
    with Counter(denoiser(pipe)) as passes:
        assert torch.equal(sample(pipe, call), plain)
        once, passes.number = passes.number, 0
        dial.lam = 0.37
        assert_close(sample(pipe, call), lock_step(own, call, 0.37), tolerance=3e-5)
        assert passes.number == (once if batched else 2 * once)
    for lam in (1.0, 1.4, [0.2, -0.3]):
        dial.lam = lam
        by_hand = torch.tensor(lam) if isinstance(lam, list) else lam
        assert_close(sample(pipe, call), lock_step(own, call, by_hand), tolerance=3e-5)
    dial.remove()
    assert torch.equal(sample(pipe, call), plain)
    assert set(denoiser(pipe).state_dict()) == state


@BEFORE_AND_AFTER
def test_a_lora_anchor_beside_a_style_lora(order, lora_anchor):
    pipe, _, call = make("sd")
    path, weights = lora_anchor(pipe)
    own = [make("sd")[0], fused(make("sd")[0], weights)]
    style = lora_weights(pipe, seed=70)
    dial = apply(lambda each: each.load_lora_weights(dict(style), adapter_name="style"), order, pipe, path, own, 0.37)
    agrees(pipe, dial, own, call, tolerance=3e-5)
    for each in (pipe, *own):
        each.set_adapters(["style"], [0.4])
    agrees(pipe, dial, own, call, tolerance=3e-5)
    dial.remove()
    assert_close(sample(pipe, call), sample(own[0], call))


def test_a_lora_anchor_does_not_become_active_when_the_last_style_is_deleted(lora_anchor):
    """PEFT activates a remaining adapter then, and the only one is the anchor's."""
    pipe, _, call = make("sd")
    path, weights = lora_anchor(pipe)
    own = [make("sd")[0], fused(make("sd")[0], weights)]
    dial = realign(pipe, path, 0.0)
    pipe.load_lora_weights(lora_weights(own[0], seed=70), adapter_name="style")
    pipe.delete_adapters("style")
    assert torch.equal(sample(pipe, call), sample(own[0], call))
    assert pipe.get_active_adapters() == []
    agrees(pipe, dial, own, call, tolerance=3e-5)


@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_the_lora_scale_of_a_call_is_for_styles_and_leaves_a_lora_anchor(scale, lora_anchor):
    pipe, _, call = make("sd")
    path, weights = lora_anchor(pipe)
    own = [make("sd")[0], fused(make("sd")[0], weights)]
    dial = realign(pipe, path, 0.37)
    call["cross_attention_kwargs"] = {"scale": scale}
    agrees(pipe, dial, own, call, tolerance=3e-5)
    style = lora_weights(own[0], seed=70)
    pipe.load_lora_weights(dict(style), adapter_name="style")
    scaled = [fused(each, style, scale) for each in own]
    agrees(pipe, dial, scaled, call, tolerance=3e-5)


def test_projections_fused_past_a_lora_anchor_are_refused(lora_anchor):
    pipe, _, call = make("sd")
    path, weights = lora_anchor(pipe)
    dial = realign(pipe, path, 1.0)
    with pytest.raises(RuntimeError, match=naming("LoRA", "dial.remove()")):
        pipe.fuse_qkv_projections(vae=False)
    assert_close(sample(pipe, call), sample(fused(make("sd")[0], weights), call), tolerance=3e-5)
    dial.remove()
    pipe.fuse_qkv_projections(vae=False)
    assert_close(sample(pipe, call), sample(make("sd")[0], call))


def test_a_model_that_folds_frames_into_its_batch_takes_two_passes(lora_anchor):
    parts = {name: part for name, part in make("sd")[0].components.items() if name != "safety_checker"}
    config = parts["unet"].config
    with seeded(3):
        motion = MotionAdapter(
            block_out_channels=tuple(config.block_out_channels),
            motion_layers_per_block=config.layers_per_block,
            motion_norm_num_groups=config.norm_num_groups,
            motion_num_attention_heads=2,
        )
        pipe = AnimateDiffPipeline(**{name: part for name, part in parts.items() if part}, motion_adapter=motion)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red fox", "num_frames": 3, "num_inference_steps": 2, "output_type": "latent", **SIZE}

    def frames(batched: bool) -> Tensor:
        with realign(pipe, lora_anchor(pipe)[0], 0.5, batched=batched):
            return pipe(**call, generator=torch.Generator().manual_seed(0)).frames

    assert torch.equal(frames(True), frames(False))


def test_a_lora_and_a_full_model_as_anchors(lora_anchor):
    pipe, anchor, call, own = trio()
    path, weights = lora_anchor(pipe)
    own.append(fused(make("sd")[0], weights))
    with realign(pipe, {"full": anchor, "lora": path}, {"full": 0.3, "lora": 0.5}):
        assert_close(sample(pipe, call), lock_step(own, call, [0.3, 0.5]), tolerance=3e-5)


# --- weight interpolation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_weight_interpolation_is_one_model_with_interpolated_weights(kind):
    pipe, anchor, call, own = trio(kind)
    plain, aligned = sample(own[0], call), sample(own[1], call)
    between = make(kind)[0]
    dial = realign(pipe, anchor, 0.37, method="interpolate")
    with Counter(denoiser(pipe)) as reference, Counter(anchor) as anchors:
        for lam in (0.37, 1.4):
            with torch.no_grad():
                for weight, a, b in zip(
                    denoiser(between).parameters(), denoiser(own[0]).parameters(), anchor.parameters(), strict=True
                ):
                    weight.copy_((1 - lam) * a + lam * b)
            reference.number = anchors.number = 0
            dial.lam = lam
            assert_close(sample(pipe, call), sample(between, call), tolerance=3e-5)
            with Counter(denoiser(between)) as once:
                sample(between, call)
            assert reference.number + anchors.number == once.number
    dial.lam = 0.0
    assert_close(sample(pipe, call), plain)
    dial.lam = 1.0
    assert_close(sample(pipe, call), aligned)
    dial.remove()
    assert torch.equal(sample(pipe, call), plain)
    assert torch.equal(sample(with_denoiser(kind, anchor), call), aligned)


def test_interpolated_weights_follow_a_style_and_weights_loaded_between_two_calls():
    pipe, anchor, call, own = trio()
    between = make("sd")[0]

    def agree() -> None:
        with torch.no_grad():
            names = dict(own[0].unet.named_parameters()), dict(own[1].unet.named_parameters())
            for name, weight in between.unet.named_parameters():
                if "lora_" not in name:
                    weight.copy_((names[0][name] + names[1][name]) / 2)
        assert_close(sample(pipe, call), sample(between, call), tolerance=3e-5)

    with realign(pipe, anchor, 0.5, method="interpolate"):
        agree()
        everyone = pipe, *own, between
        for each in everyone:
            each.load_lora_weights(lora_weights(each), adapter_name="style")
        agree()
        for each in everyone:
            each.unload_lora_weights()
        agree()
        other = make("sd", seed=7)[0].unet.state_dict()
        pipe.unet.load_state_dict(other)
        own[0].unet.load_state_dict(other)
        agree()


def test_lora_scaling_is_one_pass_at_that_scale(lora_anchor):
    pipe, _, call = make("sd")
    path, weights = lora_anchor(pipe)
    dial = realign(pipe, path, 0.37, method="interpolate")
    with Counter(denoiser(pipe)) as passes:
        assert_close(sample(pipe, call), sample(fused(make("sd")[0], weights, scale=0.37), call))
        assert passes.number == call["num_inference_steps"]
    dial.remove()
    assert torch.equal(sample(pipe, call), sample(make("sd")[0], call))
