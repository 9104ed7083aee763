"""What `deradiff doctor` looks at: it holds on real pipelines, and fails where something is broken on purpose."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FirstBlockCacheConfig, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from deradiff import realign
from deradiff.algorithm import step
from deradiff.sampling.doctor import PipelineReport, drawn, examine
from deradiff.sampling.lock_step import NoLockStep, in_lock_step, plain_pipeline
from deradiff.sampling.pipeline_checks import PipelineCheck, close
from messages import naming
from tiny import make
from tiny_loras import lora_weights

AGAIN, ZERO, ONE, BY_HAND, APART, REMOVED = (
    "the plain pipeline draws the same twice",
    "λ = 0 is the plain pipeline, to the bit",
    "λ = 1 is the anchor's plain pipeline, to the bit",
    "λ = 0.3 is the mixture by hand",
    "λ = 0.3 is neither of its ends",
    "after remove() the pipeline is what it was",
)


def of(kind: str, change: Callable[[Any], None] = lambda pipe: None, anchor: Any = None) -> PipelineReport:
    """The report about a tiny pipeline of that kind, in two steps."""
    pipe, module, call = make(kind)
    change(pipe)
    return examine(pipe, module if anchor is None else anchor, call | {"num_inference_steps": 2}, 0.3)


def held(report: PipelineReport) -> dict[str, bool | None]:
    return {check.name: check.holds for check in report.checks}


def check(report: PipelineReport, name: str) -> PipelineCheck:
    return next(check for check in report.checks if check.name == name)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    save_file(lora_weights(make("sd")[0], seed=20), tmp_path / "pytorch_lora_weights.safetensors")
    return tmp_path


# --- it holds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_it_holds(kind: str) -> None:
    report = of(kind)
    assert report.holds and report.refused is None
    assert held(report) == dict.fromkeys((AGAIN, ZERO, ONE, BY_HAND, APART, REMOVED), True)
    assert all(check(report, name).number == 0 for name in (AGAIN, ZERO, ONE, REMOVED))
    by_hand, apart = check(report, BY_HAND).number, check(report, APART).number
    assert by_hand is not None and by_hand < 1e-4
    assert apart is not None and 0.2 < apart < 0.4
    assert report.facts["mixed in"].startswith("predictions: ")
    assert report.facts["batch can be divided"] == "yes"
    assert report.facts["pipeline"] == type(make(kind)[0]).__name__


def test_it_holds_for_a_lora(lora: Path) -> None:
    report = of("sd", anchor=lora)
    assert report.holds and set(held(report).values()) == {True}
    assert report.facts["LoRAs in one batch"] == "yes"


def test_it_holds_for_a_lora_and_a_whole_model(lora: Path) -> None:
    pipe, module, call = make("sd")
    anchors: dict[str, Any] = {"file": lora, "whole": module}
    report = examine(pipe, anchors, call | {"num_inference_steps": 2}, 0.6)
    assert report.holds and set(held(report).values()) == {True}
    ends = ("λ of file = 1 is the anchor's plain pipeline, to the bit", "λ of whole = 1")
    assert all(any(name.startswith(end) for name in held(report)) for end in ends)
    assert report.facts["LoRAs in one batch"].startswith("no")


def ddpm(**config: Any) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, **config)

    return change


def test_posteriors_are_held_against_a_mixture_of_samples() -> None:
    report = of("sd", ddpm(clip_sample=True))
    assert report.holds and check(report, BY_HAND).holds
    assert report.facts["mixed in"].startswith("posteriors: ")


def test_posteriors_of_learned_variance_are_not_judged() -> None:
    report = of("sd, learned variance", ddpm(variance_type="learned_range", clip_sample=True))
    assert report.holds and check(report, BY_HAND).holds is None
    assert "variances" in check(report, BY_HAND).words


def test_the_pipeline_is_as_it_was_and_can_be_realigned() -> None:
    pipe, anchor, call = make("sd")
    before = drawn(pipe, call, 3)
    assert examine(pipe, anchor, call, 0.3).holds
    assert torch.equal(drawn(pipe, call, 3), before)
    realign(pipe, anchor).remove()


# --- it fails ---------------------------------------------------------------------------------------------------------


def test_wrong_weights_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    own = step.mixed
    monkeypatch.setattr(step, "mixed", lambda predictions, weights: own(predictions, weights.flip(0)))
    report = of("sd")
    assert not report.holds
    assert held(report) == {AGAIN: True, ZERO: True, ONE: True, BY_HAND: False, APART: True, REMOVED: True}
    number = check(report, BY_HAND).number
    assert number is not None and 0.3 < number < 0.5  # 0.7 instead of 0.3


def test_a_model_that_draws_noise_fails_where_it_is_evaluated_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    own = UNet2DConditionModel.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        (output,) = own(self, *args, **kwargs)
        return (output + 0.1 * torch.randn(output.shape),)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    report = of("sd")
    assert not report.holds and held(report)[AGAIN] is True and held(report)[BY_HAND] is False


def test_noise_that_no_seed_reaches_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, own = torch.Generator().manual_seed(1), UNet2DConditionModel.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        (output,) = own(self, *args, **kwargs)
        return (output + 0.1 * torch.randn(output.shape, generator=noise),)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    report = of("sd")
    assert not report.holds and held(report)[AGAIN] is False and "noise" in check(report, AGAIN).words


def test_a_reference_that_returns_nan_fails_and_nothing_else_is_looked_at() -> None:
    report = of("sd", lambda pipe: pipe.unet.conv_out.weight.data.fill_(float("nan")))
    assert not report.holds and held(report) == {AGAIN: False}
    assert "NaN" in check(report, AGAIN).words


def test_an_anchor_that_returns_nan_fails_by_name() -> None:
    pipe, anchor, call = make("sd")
    anchor.get_parameter("conv_out.weight").data.fill_(float("nan"))
    report = examine(pipe, anchor, call | {"num_inference_steps": 2}, 0.3)
    assert not report.holds
    assert held(report) == {AGAIN: True, ZERO: True, ONE: False, BY_HAND: False, REMOVED: True}
    assert "FloatingPointError" in check(report, ONE).words and "anchor" in check(report, ONE).words


def test_an_anchor_equal_to_the_reference_fails() -> None:
    pipe, _, call = make("sd")
    with pytest.warns(UserWarning, match=naming("anchor")):
        report = examine(pipe, make("sd")[0].unet, call | {"num_inference_steps": 2}, 0.3)
    assert not report.holds and held(report)[APART] is False
    assert BY_HAND not in held(report)


def test_a_pipeline_that_stays_realigned_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deradiff.sampling.dial.Dial.remove", lambda dial: None)
    report = of("sd")
    assert not report.holds and held(report) == {AGAIN: True, REMOVED: False}


# --- it is refused ----------------------------------------------------------------------------------------------------


def test_another_architecture_is_refused() -> None:
    report = of("sd", anchor=make("sdxl")[1])
    assert not report.holds and held(report) == {AGAIN: True}
    assert report.refused is not None and "architecture" in report.refused


def test_what_a_realigned_call_refuses_is_the_result() -> None:
    report = of("flux", lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.01)))
    assert not report.holds and held(report)[REMOVED] is True
    assert report.refused is not None and "disable_cache" in report.refused


@pytest.mark.parametrize("lam", [0.0, 1, float("nan")])
def test_a_strength_that_is_looked_at_anyway_is_refused(lam: float) -> None:
    pipe, anchor, call = make("sd")
    with pytest.raises(ValueError, match=naming("λ", f"{lam:g}")):
        examine(pipe, anchor, call, lam)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_pipelines_that_take_other_steps_are_no_lock_step() -> None:
    pipe, anchor, call = make("sd")
    twins = [plain_pipeline(pipe, {}), plain_pipeline(pipe, {"unet": anchor})]
    assert twins[0].scheduler is not pipe.scheduler and twins[0].unet is pipe.unet and twins[1].unet is anchor

    def draw(each: Any) -> Tensor:
        return drawn(each, call | {"num_inference_steps": 1 + (each is twins[1])}, 0)

    with pytest.raises(NoLockStep):
        in_lock_step(twins, draw, [0.5, 0.5], "prediction")
    with pytest.raises(NoLockStep, match="step"):
        in_lock_step(twins, lambda each: torch.zeros(1), [0.5, 0.5], "prediction")
    with pytest.raises(ZeroDivisionError):
        in_lock_step(twins, lambda each: torch.zeros(1 // 0), [0.5, 0.5], "prediction")


@pytest.mark.parametrize(
    ("off", "effect", "rounding", "holds"),
    [(1e-4, 1.0, 1e-2, True), (5e-3, 1.0, 1e-2, True), (5e-3, 0.05, 1e-2, None), (2e-2, 1.0, 1e-2, False)],
)
def test_rounding_tells_in_coarse_numbers_only_what_is_small_beside_the_effect(
    off: float, effect: float, rounding: float, holds: bool | None
) -> None:
    ones = torch.ones(3, dtype=torch.float64)
    assert close("", ones + off, ones, effect, rounding).holds is holds
