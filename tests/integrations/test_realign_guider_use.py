"""`RealignGuider` in a person's hands: saved and loaded, shared, misused, broken off in the middle."""

import copy
import json
import threading
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    DDIMScheduler,
    LayerSkipConfig,
    SkipLayerGuidance,
)
from diffusers.guiders import BaseGuidance, LTX2Guidance
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from deradiff import realign
from deradiff.algorithm.schedules import Power, Spline
from deradiff.anchors import AnchorError, IncompatibleAnchor
from deradiff.integrations.diffusers import RealignGuider
from deradiff.sampling.blocked_methods import DialError
from messages import naming
from oracle import lock_step
from tiny import assert_close, denoiser_name, sample
from tiny_families import built
from tiny_loras import lora_weights
from tiny_modular import call_of, modular
from tiny_parts import perturbed

CALL = call_of("sd3") | {"num_inference_steps": 3}


@cache
def anchor(seed: int = 1) -> nn.Module:
    """Nobody changes it but for a copy."""
    return perturbed(built("sd3")[0].transformer, seed).requires_grad_(False)


def guided(lam: Any = 0.4, source: Any = None, **settings: Any) -> tuple[Any, RealignGuider]:
    pipe = modular("sd3")
    guider = RealignGuider(anchor() if source is None else source, lam, pipe=pipe, **settings)
    pipe.update_components(guider=guider)
    return pipe, guider


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    save_file(lora_weights(built("sd3")[0], seed=20), tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


LAMS = {
    "number": 0.3,
    "power": Power(2, lam=0.8, over="time"),
    "spline": Spline([(0, 0.2), (1, 0.9)]),
    "per image": [0.2, Power(1)],
}
INNER = {
    "CFG": ClassifierFreeGuidance(4.0, guidance_rescale=0.2, start=0.1),
    "APG": AdaptiveProjectedGuidance(4.0, adaptive_projected_guidance_momentum=-0.5, enabled=False),
    "skip": SkipLayerGuidance(skip_layer_config=LayerSkipConfig([1], fqn="transformer_blocks", skip_attention=False)),
}


@pytest.mark.cases(4)
@pytest.mark.parametrize(("lam", "inner"), [*((lam, "CFG") for lam in LAMS), ("number", "APG"), ("number", "skip")])
def test_a_saved_guider_is_the_same_guider(lam, inner, lora, tmp_path):
    pipe, guider = guided(LAMS[lam], lora, guider=INNER[inner])
    expected = sample(pipe, CALL)
    guider.save_pretrained(tmp_path / "guider")
    stored = json.loads((tmp_path / "guider" / "guider_config.json").read_text())
    assert stored["anchor"] == str(lora) and stored["guider"]["_class_name"] == type(INNER[inner]).__name__
    other = modular("sd3")
    loaded = RealignGuider.from_pretrained(tmp_path / "guider", pipe=other)
    other.update_components(guider=loaded)
    assert {*stored} == {*guider.config}
    assert json.loads(loaded.to_json_string()) == stored
    assert torch.equal(sample(other, CALL), expected)


def test_settings_that_were_turned_are_saved_and_copied(lora, tmp_path):
    pipe, guider = guided(0.5, lora)
    guider.lam, guider.guidance_scale = Power(2), 5.0
    expected = sample(pipe, CALL)
    guider.save_pretrained(tmp_path)
    with pytest.raises(DialError, match=r"attach\(pipe\)"):
        sample(modular("sd3", guider=RealignGuider.from_pretrained(tmp_path)), CALL)
    other = modular("sd3")
    other.update_components(guider=RealignGuider.from_pretrained(tmp_path).attach(other))
    assert torch.equal(sample(other, CALL), expected)
    pipe.update_components(guider=guider.new(lam=0.0, pipe=pipe))
    assert torch.equal(sample(pipe, CALL), sample(modular("sd3", guider=ClassifierFreeGuidance(5.0)), CALL))
    assert guider.lam == Power(2)


def test_a_loaded_anchor_has_to_be_given_again(tmp_path):
    pipe, guider = guided()
    expected = sample(pipe, CALL)
    guider.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=naming("'anchor'", "from_pretrained")):
        RealignGuider.from_pretrained(tmp_path)
    other = modular("sd3")
    other.update_components(guider=RealignGuider.from_pretrained(tmp_path, anchor=anchor(), pipe=other))
    assert torch.equal(sample(other, CALL), expected)


class Elsewhere(BaseGuidance):
    """A guider that is not diffusers'."""

    _input_predictions = ["pred_cond"]  # noqa: RUF012


def test_a_file_names_no_code():
    with pytest.raises(ValueError, match=naming("Elsewhere", "guider=")):
        RealignGuider("somewhere", guider={"_class_name": "Elsewhere"})
    with pytest.raises(ValueError, match="BaseOutput"):
        RealignGuider("somewhere", guider={"_class_name": "BaseOutput"})
    assert type(RealignGuider("somewhere", guider=Elsewhere()).guiders[1]) is Elsewhere


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [float("nan"), float("inf"), "0.5", True, None, [], {"other": 1.0}, {"schedule": "x"}])
def test_a_bad_lam_is_refused_and_changes_nothing(lam):
    with pytest.raises(ValueError):
        RealignGuider("somewhere", lam, ClassifierFreeGuidance())
    guider = RealignGuider("somewhere", 0.25, ClassifierFreeGuidance())
    with pytest.raises(ValueError):
        guider.lam = lam
    assert guider.lam == guider.config["lam"] == 0.25


def test_a_lam_outside_0_and_1_extrapolates():
    own = [modular("sd3"), modular("sd3", anchor())]
    pipe, guider = guided(1.7)
    assert_close(sample(pipe, CALL), lock_step(own, CALL, 1.7), tolerance=3e-5)
    guider.lam = -0.4
    assert_close(sample(pipe, CALL), lock_step(own, CALL, -0.4), tolerance=3e-5)
    guider.lam = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match=naming(3, 2)):
        sample(pipe, CALL)


def test_what_cannot_be_an_anchor_is_refused_and_the_pipeline_is_as_it_was(tmp_path):
    pipe, before = modular("sd3"), sample(modular("sd3"), CALL)
    transformer, attributes = pipe.transformer, {*vars(pipe.transformer)}
    save_file({"lora_te_nothing.lora_A.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    for source, error, names in [
        (built("flux")[0].transformer, IncompatibleAnchor, ("FluxTransformer2DModel", "SD3Transformer2DModel")),
        (tmp_path / "other.safetensors", AnchorError, ("other.safetensors",)),
        (transformer, AnchorError, ("reference",)),
    ]:
        with pytest.raises(error) as caught:
            RealignGuider(source, pipe=pipe)
        assert all(name in str(caught.value) for name in names)
    assert {*vars(transformer)} == attributes and not any(isinstance(m, BaseTunerLayer) for m in transformer.modules())
    with pytest.raises(AnchorError):  # the first anchor is let go of again
        RealignGuider({"one": anchor(), "two": tmp_path / "nowhere"}, {"one": 0.1, "two": 0.2}, pipe=pipe)
    assert torch.equal(sample(pipe, CALL), before)


def test_pipelines_and_guiders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=naming("FluxModularPipeline", "'guider'", "realign")):
        RealignGuider(anchor(), pipe=modular("flux"))
    with pytest.raises(ValueError, match="LTX2Guidance"):
        RealignGuider("somewhere", guider=LTX2Guidance())
    with pytest.raises(ValueError, match="float"):
        RealignGuider("somewhere", guider=7.5)
    with pytest.raises(ValueError, match="guider="):
        RealignGuider("somewhere")
    pipe, guider = guided()
    with pytest.raises(ValueError, match="RealignGuider"):
        RealignGuider(anchor(), guider=guider)
    xl = modular("sdxl")
    xl.update_components(scheduler=DDIMScheduler(clip_sample=True))
    with pytest.raises(ValueError, match=naming("DDIMScheduler", "clip_sample")):
        RealignGuider(perturbed(xl.unet, 1), pipe=xl)
    for realigned in (lambda: realign(pipe, anchor(), 0.5), lambda: RealignGuider(anchor(2), pipe=modular_of(pipe))):
        with pytest.raises(DialError, match=naming("SD3Transformer2DModel", "remove()")):
            realigned()
    with pytest.raises(TypeError, match=r"remove\(\)"):
        copy.deepcopy(pipe.transformer)
    pipe.transformer = anchor(3)
    with pytest.raises(DialError, match=naming("SD3Transformer2DModel", "guider.attach(pipe)")):
        sample(pipe, CALL)


def modular_of(pipe: Any) -> Any:
    """Another pipeline around the same denoiser, with a guider of diffusers and a scheduler of its own."""
    return modular("sd3", pipe.transformer)


def test_a_dial_and_a_guider_exclude_each_other():
    pipe = modular("sd3")
    with realign(pipe, anchor(), 0.5), pytest.raises(DialError, match=naming("dial.remove()")):
        RealignGuider(anchor(), pipe=pipe)


# --- in the middle ----------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def break_off(pipe: Any, layer: Any, call: int) -> None:
    """A run that fails in the middle of the `call`-th evaluation."""
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Broken

    handle = layer.register_forward_pre_hook(hook)
    try:
        with pytest.raises(Broken):
            sample(pipe, CALL)
    finally:
        handle.remove()


def state_of(module: Any) -> list[Any]:
    """What runs in a module: every layer's own forward, diffusers' hooks, and the adapters that are active."""
    hooks = [{*m._diffusers_hook.hooks} for m in module.modules() if hasattr(m, "_diffusers_hook")]
    active = [tuple(m.active_adapters) for m in module.modules() if isinstance(m, BaseTunerLayer)]
    forwards = [m.forward for m in module.modules() if "forward" in vars(m) and not hasattr(m, "_diffusers_hook")]
    return [set().union(*hooks), active, forwards]


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("kind", "call"),
    # From the second step on the guider inside has every model skip a layer in its third evaluation.
    [("the reference", 2), ("the reference", 5), ("the anchor", 5), ("the anchor", 1), ("a LoRA", 10), ("a LoRA", 3)],
)
def test_an_exception_leaves_the_models_as_they_were(kind, call, lora):
    config = LayerSkipConfig([1], fqn="transformer_blocks", skip_attention=False)
    inner = SkipLayerGuidance(4.0, skip_layer_config=config, skip_layer_guidance_start=0, skip_layer_guidance_stop=1)
    module = anchor()
    pipe, guider = guided(0.4, lora if kind == "a LoRA" else module, guider=inner)
    expected, states = sample(pipe, CALL), [state_of(model) for model in (pipe.transformer, module)]
    reference = sample(modular("sd3", pipe.transformer), CALL)
    assert torch.equal(reference, sample(modular("sd3"), CALL))
    break_off(pipe, (module if kind == "the anchor" else pipe.transformer).context_embedder, call)
    assert [state_of(model) for model in (pipe.transformer, module)] == states
    assert torch.equal(sample(modular("sd3", pipe.transformer), CALL), reference)
    assert torch.equal(sample(pipe, CALL), expected)
    guider.remove()
    assert {*vars(pipe.transformer)} <= {*vars(built("sd3")[0].transformer), "_diffusers_hook"}


def test_a_pipeline_that_fails_between_the_denoisers_calls_leaves_no_turn_behind():
    pipe, guider = guided()
    expected, embeddings = sample(modular("sd3"), CALL), torch.zeros(0)
    prepare = guider.prepare_models

    def failing(denoiser: nn.Module) -> None:
        prepare(denoiser)
        if guider._count_prepared == 3:
            raise Broken(embeddings)

    guider.prepare_models = failing  # type: ignore[method-assign]
    with pytest.raises(Broken):
        sample(pipe, CALL)
    del guider.prepare_models
    assert torch.equal(sample(modular("sd3", pipe.transformer), CALL), expected)


def test_lam_turns_in_mid_run_and_a_guider_with_a_memory_says_where_it_cannot():
    own = [modular("sd3"), modular("sd3", anchor())]
    pipe, guider = guided(0.0)
    step = pipe.scheduler.step

    def turning(*args: Any, **kwargs: Any) -> Any:
        guider.lam = 0.5
        return step(*args, **kwargs)

    pipe.scheduler.step = turning
    assert_close(sample(pipe, CALL), lock_step(own, CALL, lambda i: 0.5 if i else 0.0), tolerance=3e-5)
    pipe.update_components(
        guider=guider.new(lam=0.0, guider=AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5))
    )
    guider = pipe.guider
    with pytest.raises(DialError, match=naming(0.5, "AdaptiveProjectedGuidance")):
        sample(pipe, CALL)


def share(steps: int, i: int) -> float:
    return i / steps


def test_two_pipelines_share_a_guider():
    schedule = Power(1.0)
    pipe, guider = guided(schedule)
    around, other = modular_of(pipe), modular("sd3", perturbed(built("sd3")[0].transformer, 7))
    own = [modular("sd3"), modular("sd3", anchor())]
    others = [modular("sd3", perturbed(built("sd3")[0].transformer, 7)), own[1]]
    for each in (around, other):
        each.update_components(guider=guider.attach(each))
    around.scheduler.set_timesteps(7)
    for each, models, steps in ((around, own, 4), (pipe, own, 3), (other, others, 2), (around, own, 2)):
        call = CALL | {"num_inference_steps": steps}
        expected = lock_step(models, call, partial(share, steps))
        assert_close(sample(each, call), expected, tolerance=3e-5)
    guider.remove()
    assert torch.equal(sample(modular_of(pipe), CALL), sample(own[0], CALL))


def test_two_threads_in_one_guider_are_told_so():
    pipe, guider = guided()
    other = modular_of(pipe)
    other.update_components(guider=guider.attach(other))
    step = pipe.scheduler.step

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        thread = threading.Thread(target=sample, args=(other, CALL))
        thread.start()
        thread.join()
        return step(*args, **kwargs)

    pipe.scheduler.step = interrupted
    with pytest.raises(DialError, match=naming("guider.new()")):
        sample(pipe, CALL)
    expected = [modular("sd3"), modular("sd3", anchor())]
    assert_close(sample(other, CALL), lock_step(expected, CALL, 0.4), tolerance=3e-5)


def test_precision_follows_the_reference_and_guidance_switches_off():
    module = copy.deepcopy(anchor())
    pipe, guider = guided(0.4, module)
    assert guider.modules == {"anchor": module} and guider.num_conditions == 2
    guider.disable()
    assert guider.num_conditions == 1
    own = [modular("sd3", m, ClassifierFreeGuidance(enabled=False)) for m in (None, anchor())]
    assert_close(sample(pipe, CALL), lock_step(own, CALL, 0.4), tolerance=3e-5)
    pipe.to(torch.float64)
    assert module.dtype == torch.float64
    assert denoiser_name(built("sd3")[0]) == "transformer"
