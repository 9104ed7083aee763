"""State that is on one of two models alone: the lock-step oracle's result, or a refusal that names it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_layer_skip,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from companions import BEFORE_AND_AFTER, SIDES, agrees, apply, refused
from deradiff import realign
from deradiff.sampling.blocked_methods import UnmirroredState
from deradiff.sampling.layer_pairs import LayerPair, layer_pairs
from messages import naming
from tiny import denoiser, distance, make, sample, trio
from tiny_loras import fused, lora_weights
from tiny_parts import noise

LAYER = "conv_out"


# --- caches -----------------------------------------------------------------------------------------------------------

CACHES: dict[str, Callable[[nn.Module], None]] = {
    "FBCHeadBlockHook": lambda model: apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.2)),
    "PyramidAttentionBroadcastHook": lambda model: apply_pyramid_attention_broadcast(
        model,
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
    ),
    "FasterCacheDenoiserHook": lambda model: apply_faster_cache(
        model,
        FasterCacheConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500, is_guidance_distilled=True
        ),
    ),
    "TaylorSeerCacheHook": lambda model: apply_taylorseer_cache(model, TaylorSeerCacheConfig(cache_interval=2)),
    "MagCacheHeadHook": lambda model: apply_mag_cache(
        model, MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4))
    ),
}


@BEFORE_AND_AFTER
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("side", ["reference", "anchor", "LoRA anchor"])
@pytest.mark.cases(7)
def test_a_cache_applied_by_function_is_refused(cache, side, order, tmp_path):
    pipe, anchor, call = make("flux")
    source: Any = anchor
    if side == "LoRA anchor":
        source = tmp_path / "lora.safetensors"
        save_file(lora_weights(pipe, seed=20), source)
    model = anchor if side == "anchor" else denoiser(pipe)
    if order == "before":
        CACHES[cache](model)
    with realign(pipe, source, 0.5) as dial:
        if order == "after":
            CACHES[cache](model)
        for lam in (0.5, 1.0):
            dial.lam = lam
            with pytest.raises(UnmirroredState, match=naming(cache, "remove_hook")):
                sample(pipe, call)
        registry = HookRegistry.check_if_exists_or_initialize(model)
        names = {name for each in model.modules() for name in getattr(each, "_diffusers_hook", registry).hooks}
        for name in names:
            registry.remove_hook(name)
        assert sample(pipe, call).isfinite().all()


# --- storage and precision --------------------------------------------------------------------------------------------


def cast_for_storage(pipe: DiffusionPipeline) -> None:
    denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@BEFORE_AND_AFTER
@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.cases(2)
def test_layerwise_casting_reaches_both_models(kind, order):
    pipe, anchor, call, own = trio(kind)
    plain = sample(own[1], call)
    dial = apply(cast_for_storage, order, pipe, anchor, own, 0.37)
    assert distance(sample(own[1], call), plain) > 1e-3
    for lam in (0.0, 1.0):
        dial.lam = lam
        assert torch.equal(sample(pipe, call), sample(own[int(lam)], call))
    agrees(pipe, dial, own, call)


def test_layerwise_casting_beside_a_style_lora():
    pipe, anchor, call, own = trio()
    style = lora_weights(pipe, seed=70)

    def change(each: DiffusionPipeline) -> None:
        each.load_lora_weights(dict(style), adapter_name="style")
        cast_for_storage(each)

    dial = apply(change, "after", pipe, anchor, own, 0.37)
    agrees(pipe, dial, own, call, tolerance=3e-5)


def test_weights_cast_for_storage_are_not_interpolated():
    pipe, anchor, call = make("sd")
    with realign(pipe, anchor, 0.5, method="interpolate"):
        cast_for_storage(pipe)
        with pytest.raises(UnmirroredState, match=naming("torch.float8_e4m3fn", "method='mixture'")):
            sample(pipe, call)


def test_layerwise_casting_of_the_anchor_alone_is_refused():
    refused(
        lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        "sd",
        "after",
        "anchor",
        "LayerwiseCastingHook",
        "anchor",
        "reference",
    )


class Packed(nn.Linear):
    """A layer with weights in 8 bits in a `Linear`'s place, as bitsandbytes, quanto and GGUF put there."""

    scale: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> "Packed":
        packed = cls(linear.in_features, linear.out_features, bias=False)
        packed.bias = linear.bias
        packed.register_buffer("scale", linear.weight.detach().abs().amax() / 127)
        packed.weight = nn.Parameter((linear.weight.detach() / packed.scale).round().to(torch.int8), False)
        return packed

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight * self.scale, self.bias)


class PackedTensor(Tensor):
    """A tensor of another class as a `Linear`'s weights, as torchao puts there, and tensor parallelism."""


def pack_layer(model: Any) -> None:
    block = next(module for module in model.modules() if hasattr(module, "to_out"))
    block.to_q = Packed.of(block.to_q)


def pack_tensor(model: Any) -> None:
    block = next(module for module in model.modules() if hasattr(module, "to_out"))
    block.to_q.weight = nn.Parameter(block.to_q.weight.data.as_subclass(PackedTensor), requires_grad=False)


@SIDES
@BEFORE_AND_AFTER
@pytest.mark.parametrize(
    ("change", "name"), [(pack_layer, "Packed"), (pack_tensor, "PackedTensor")], ids=["layer", "tensor"]
)
@pytest.mark.cases(3)
def test_one_quantised_model_is_refused(change, name, order, side):
    if (order, side) == ("before", "anchor") and change is pack_tensor:
        pytest.skip("realign() casts the anchor's tensors and leaves its class")
    refused(change, "sd", order, side, name, "to_q" if change is pack_layer else "weight", "anchor", "reference")


def test_two_models_quantised_alike_are_mixed():
    pipe, anchor, call, own = trio()
    for model in (pipe.unet, anchor, own[0].unet, own[1].unet):
        pack_layer(model)
    agrees(pipe, realign(pipe, anchor, 0.37), own, call)


def test_a_lora_anchor_over_a_quantised_reference(tmp_path):
    pipe, _, call = make("sd")
    weights = lora_weights(pipe, seed=20)
    save_file(weights, tmp_path / "lora.safetensors")
    own = [make("sd")[0], make("sd")[0]]
    for each in (pipe, *own):
        pack_layer(each.unet)
    own[1].load_lora_weights(dict(weights))
    agrees(pipe, realign(pipe, tmp_path / "lora.safetensors", 0.37), own, call, tolerance=3e-5)


@SIDES
def test_a_layer_in_another_precision_is_refused(side):
    pipe, anchor, call = make("sd")
    with realign(pipe, anchor, 0.5):
        model: Any = pipe.unet if side == "reference" else anchor
        model.conv_out.double()
        with pytest.raises(UnmirroredState, match=naming(LAYER, "torch.float64", "torch.float32", "anchor")):
            sample(pipe, call)
        with pytest.raises(UnmirroredState, match=naming(LAYER)):  # and again, within the run
            pipe.unet(noise(2, 4, 8, 8), pipe.scheduler.timesteps[0], encoder_hidden_states=noise(2, 5, 16))


@BEFORE_AND_AFTER
def test_the_memory_format_of_a_layer_is_the_anchors_too(order):
    pipe, anchor, call, own = trio()
    dial = apply(lambda each: each.unet.conv_in.to(memory_format=torch.channels_last), order, pipe, anchor, own, 0.37)
    agrees(pipe, dial, own, call)
    model: Any = anchor
    assert model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.conv_out.weight.is_contiguous(memory_format=torch.channels_last)


def test_dropout_in_one_model_alone_is_refused():
    pipe, anchor, call = make("sd")
    for model in (pipe.unet, anchor):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
    with realign(pipe, anchor, 0.5):
        pipe.unet.train()
        with pytest.raises(UnmirroredState, match=naming(".eval()")):
            sample(pipe, call)


# --- layers left out --------------------------------------------------------------------------------------------------


@BEFORE_AND_AFTER
@pytest.mark.parametrize("anchored", ["full", "LoRA"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("sd", LayerSkipConfig([0], fqn="mid_block.attentions.0.transformer_blocks")),
        ("sd3", LayerSkipConfig([1], fqn="transformer_blocks", skip_attention=False)),
    ],
    ids=["block", "feed-forward"],
)
@pytest.mark.cases(3)
def test_layers_that_a_person_leaves_out_are_left_out_of_both(kind, config, anchored, order, tmp_path):
    pipe, anchor, call, own = trio(kind)
    source: Any = anchor
    if anchored == "LoRA":
        source = tmp_path / "lora.safetensors"
        weights = lora_weights(pipe, seed=20)
        save_file(weights, source)
        own[1] = fused(make(kind)[0], weights)
    plain = sample(own[0], call)
    dial = apply(lambda each: apply_layer_skip(denoiser(each), config), order, pipe, source, own, 0.37)
    assert distance(sample(own[0], call), plain) > 1e-3
    agrees(pipe, dial, own, call, tolerance=3e-5)
    dial.remove()
    assert not any("_diffusers_hook" in module.__dict__ for module in anchor.modules())


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_models_are_compared_once_a_run(monkeypatch):
    pipe, anchor, call = make("sd")
    walks = []

    def walk(*models: nn.Module) -> list[LayerPair]:
        walks.append(models)
        return layer_pairs(*models)

    monkeypatch.setattr("deradiff.sampling.unshared_state.layer_pairs", walk)
    with realign(pipe, anchor, 0.5):
        for runs in (1, 2):
            sample(pipe, call)
            assert len(walks) == runs
