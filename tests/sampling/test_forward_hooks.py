"""Forward hooks, patched layers and hooks of one's own on one of two models: they look on, or are refused."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from torch import Tensor, nn

from companions import BEFORE_AND_AFTER, SIDES, agrees, refused
from deradiff import realign
from deradiff.sampling.blocked_methods import UnmirroredState
from messages import naming
from oracle import lock_step
from tiny import assert_close, make, sample, trio

LAYER = "conv_out"


def halved(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 0.5 * output


def halved_in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(0.5)


def halved_input(module: nn.Module, args: Any) -> Any:
    return (0.5 * args[0], *args[1:])


def halved_keyword(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    kwargs["encoder_hidden_states"] = 0.5 * kwargs["encoder_hidden_states"]


def halved_output(module: nn.Module, args: Any, output: Any) -> Any:
    return (0.5 * output[0],)


FORWARD_HOOKS: dict[str, Callable[[Any], Any]] = {
    "halved": lambda model: model.get_submodule(LAYER).register_forward_hook(halved),
    "halved_in_place": lambda model: model.get_submodule(LAYER).register_forward_hook(halved_in_place),
    "halved_input": lambda model: model.get_submodule(LAYER).register_forward_pre_hook(halved_input),
    "halved_output": lambda model: model.register_forward_hook(halved_output),
    "halved_keyword": lambda model: model.register_forward_pre_hook(halved_keyword, with_kwargs=True),
}


@SIDES
@BEFORE_AND_AFTER
@pytest.mark.parametrize("hook", FORWARD_HOOKS)
@pytest.mark.cases(5)
def test_a_forward_hook_that_changes_one_model_is_refused(hook, order, side):
    refused(FORWARD_HOOKS[hook], "sd", order, side, hook, "anchor", "reference")


@pytest.mark.parametrize("hook", FORWARD_HOOKS)
@pytest.mark.cases(2)
def test_a_forward_hook_on_both_models_acts_on_both(hook):
    pipe, anchor, call, own = trio()
    dial = realign(pipe, anchor, 0.37)
    for model in (pipe.unet, dial.modules["anchor"], own[0].unet, own[1].unet):
        FORWARD_HOOKS[hook](model)
    agrees(pipe, dial, own, call)


def test_a_forward_hook_that_looks_on_sees_one_model_at_every_call():
    pipe, anchor, call, own = trio()
    model: Any = anchor
    seen = []
    handle = pipe.unet.conv_out.register_forward_hook(lambda module, args, output: seen.append(module))
    with realign(pipe, anchor, 0.37) as dial:
        assert_close(sample(pipe, call), lock_step(own, call, 0.37))
        assert seen == [pipe.unet.conv_out] * 4
        seen.clear()
        dial.lam = 1.0
        assert torch.equal(sample(pipe, call), sample(own[1], call))
        assert seen == [model.conv_out] * 4
        assert not model.conv_out._forward_hooks and len(pipe.unet.conv_out._forward_hooks) == 1
        handle.remove()
        assert torch.equal(sample(pipe, call), sample(own[1], call))


def patch_forward(model: Any) -> None:
    layer = model.get_submodule(LAYER)
    layer.forward = functools.partial(patched_forward, layer.forward)


def patched_forward(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return 0.5 * forward(hidden)


def patch_class(model: Any) -> None:
    layer = model.get_submodule(LAYER)
    layer.__class__ = type("Merging", (type(layer),), {"forward": lambda self, x: 0.5 * nn.Conv2d.forward(self, x)})


class Halving(ModelHook):
    """A hook of somebody's own in diffusers' registry."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 0.5 * output


def hook_layer(model: Any, hook: Callable[[], ModelHook] = Halving) -> None:
    HookRegistry.check_if_exists_or_initialize(model.get_submodule(LAYER)).register_hook(hook(), "halving")


PATCHES = {"patched_forward": patch_forward, "Merging": patch_class, "Halving": hook_layer}


@SIDES
@BEFORE_AND_AFTER
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.cases(3)
def test_a_patched_layer_is_refused(patch, order, side):
    refused(PATCHES[patch], "sd", order, side, patch, LAYER, "anchor", "reference")


@pytest.mark.parametrize("patch", PATCHES)
def test_layers_patched_alike_are_mixed(patch):
    pipe, anchor, call, own = trio()
    dial = realign(pipe, anchor, 0.37)
    for model in (pipe.unet, anchor, own[0].unet, own[1].unet):
        PATCHES[patch](model)
    agrees(pipe, dial, own, call)


def test_a_hook_of_another_kind_is_refused_for_a_patch_below_it_too():
    pipe, anchor, call = make("sd")
    with realign(pipe, anchor, 0.5):
        patch_forward(pipe.unet)
        for model in (pipe.unet, anchor):
            hook_layer(model)
        with pytest.raises(UnmirroredState, match=naming("patched_forward", LAYER)):
            sample(pipe, call)


def test_context_parallelism_is_refused():
    pipe, anchor, call = make("sd")
    with realign(pipe, anchor, 0.5):
        hook_layer(pipe.unet, lambda: ContextParallelSplitHook({}, None))
        with pytest.raises(UnmirroredState, match=naming("ContextParallelSplitHook", LAYER)):
            sample(pipe, call)
