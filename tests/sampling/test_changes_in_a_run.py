"""What is done to a model's layers by code of one's own: noticed in mid-image, and never divided into rows unseen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from torch import Tensor, nn

from companions import BEFORE_AND_AFTER, SIDES, agrees, apply, refused
from deradiff import realign
from deradiff.sampling.blocked_methods import DialError, UnmirroredState
from messages import naming
from oracle import lock_step
from tiny import assert_close, distance, make, noise, sample, trio
from tiny_loras import fused, lora_weights


def tiling(model: Any) -> None:
    """The usual way to pictures that tile."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"


@SIDES
@BEFORE_AND_AFTER
def test_a_setting_of_one_models_layers_is_refused(order, side):
    refused(tiling, "sd", order, side, "padding_mode", "conv_in", "circular", "zeros", "dial.modules")


def test_a_setting_of_both_models_layers_acts_on_both():
    pipe, anchor, call, own = trio()
    plain = sample(own[0], call)
    dial = realign(pipe, anchor, 0.37)
    for model in (pipe.unet, dial.modules["anchor"], own[0].unet, own[1].unet):
        tiling(model)
    assert distance(sample(own[0], call), plain) > 1e-3
    agrees(pipe, dial, own, call)


@SIDES
def test_a_layer_that_one_model_alone_has_is_refused(side):
    def extended(model: Any) -> None:
        model.mid_block.add_module("fuser", nn.Linear(2, 2))

    refused(extended, "sd", "after", side, "fuser", "mid_block")


class Doubled(nn.Module):
    """A layer with something of one's own behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Tensor:
        return 2 * self.layer(*args)


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


CHANGES = {
    "forward hook": lambda unet: unet.conv_in.register_forward_hook(doubled),
    "forward": lambda unet: setattr(unet.conv_in, "forward", Doubled(make("sd")[0].unet.conv_in).forward),
    "layer": lambda unet: setattr(unet, "conv_in", Doubled(unet.conv_in)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_one_model_in_mid_image_is_refused(change):
    pipe, anchor, call = make("sd")

    def callback(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == 1:
            CHANGES[change](pipe.unet)
        return kwargs

    with realign(pipe, anchor, 0.5), pytest.raises(UnmirroredState, match=naming("conv_in", "reference", "anchor")):
        sample(pipe, call, callback_on_step_end=callback)


def test_another_denoiser_in_mid_image_is_refused():
    pipe, anchor, call = make("sd")
    other = make("sd")[1]

    def callback(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.unet = other
        return kwargs

    with realign(pipe, anchor, 0.5), pytest.raises(DialError, match=naming("pipe.unet", "without its anchors")):
        sample(pipe, call, callback_on_step_end=callback)


def test_a_prediction_that_lost_its_models_is_refused():
    pipe, anchor, _ = make("sd")
    with realign(pipe, anchor, 0.5) as dial:
        pipe.scheduler.set_timesteps(4)
        t, sample = pipe.scheduler.timesteps[0], noise(2, 4, 8, 8)
        predicted = pipe.unet(sample, t, encoder_hidden_states=noise(2, 5, 16)).sample
        first = next(iter(predicted.parts.values()))  # as what runs outside of torch sees it
        with pytest.raises(DialError, match="plain tensor"):
            pipe.scheduler.step(first, t, sample)
        dial.lam = 0.0
        predicted = pipe.unet(sample, t, encoder_hidden_states=noise(2, 5, 16)).sample
        pipe.scheduler.step(predicted, t, sample)


# --- rows of a batch --------------------------------------------------------------------------------------------------


class OfTheFirst(AttnProcessor):
    """Self-attention in which all images look at the first one, as StyleAligned's."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if encoder_hidden_states is None:
            halves = hidden_states.chunk(2)
            encoder_hidden_states = torch.cat([half[:1].expand_as(half) for half in halves])
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


class OfTheFirstRow(nn.Conv2d):
    """A layer from elsewhere that looks at its first row."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output + output[:1]


def of_the_first(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + output[:1]


def another_class(pipe: Any) -> None:
    pipe.unet.conv_in.__class__ = OfTheFirstRow


def with_another_forward(layer: Any) -> None:
    def forward(sample: Tensor) -> Tensor:
        output = nn.Conv2d.forward(layer, sample)
        return output + output[:1]

    layer.forward = forward


MIXING_ROWS = {
    "processor": lambda pipe: pipe.unet.set_attn_processor(OfTheFirst()),
    "forward hook": lambda pipe: pipe.unet.conv_in.register_forward_hook(of_the_first),
    "class": another_class,
    "forward": lambda pipe: with_another_forward(pipe.unet.conv_in),
}


@pytest.mark.parametrize("mixing", MIXING_ROWS)
@pytest.mark.cases(2)
def test_a_lora_where_rows_look_at_one_another(mixing, tmp_path: Path):
    pipe, _, call = make("sd")
    weights = lora_weights(pipe, seed=20)
    save_file(weights, tmp_path / "lora.safetensors")
    own = [make("sd")[0], fused(make("sd")[0], weights)]
    plain = sample(own[0], call)
    dial = apply(MIXING_ROWS[mixing], "after", pipe, tmp_path / "lora.safetensors", own, 0.37)
    expected = lock_step(own, call, 0.37)
    assert distance(sample(own[0], call), plain) > 1e-3
    assert_close(sample(pipe, call), expected, tolerance=3e-5)
    dial.micro_batch = 2
    with pytest.raises(UnmirroredState, match="micro_batch = None"):
        sample(pipe, call)


@pytest.mark.parametrize("mixing", ["forward hook", "forward"])
def test_a_batch_whose_rows_look_at_one_another_is_not_divided(mixing):
    pipe, anchor, call = make("sd")
    for model in (pipe.unet, anchor):
        layer: Any = model.get_submodule("conv_in")
        if mixing == "forward hook":
            layer.register_forward_hook(of_the_first)
        else:
            with_another_forward(layer)
    with realign(pipe, anchor, 0.5) as dial:
        dial.micro_batch = 2
        with pytest.raises(UnmirroredState, match="micro_batch = None"):
            sample(pipe, call)
        dial.micro_batch = None
        sample(pipe, call)


def test_a_forward_hook_that_looks_on_leaves_batches_divided(tmp_path: Path):
    pipe, _, call = make("sd")
    save_file(lora_weights(pipe, seed=20), tmp_path / "lora.safetensors")
    rows = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    with realign(pipe, tmp_path / "lora.safetensors", 0.5) as dial:
        sample(pipe, call)
        assert rows == [8] * 4
        rows.clear()
        dial.micro_batch = 2
        sample(pipe, call)
        assert rows == [4] * 8
