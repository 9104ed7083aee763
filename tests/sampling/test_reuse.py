"""Reuse between steps: which models run when, what stands for those that do not, and what it says of itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler, StableDiffusionPAGPipeline

import deradiff
from anchor_files import lora
from deradiff.algorithm.noise_levels import impacts
from deradiff.sampling.reuse import PredictionEstimator, Reuse
from messages import naming
from tiny import Counter, assert_close, denoiser, make, sample

STEPS = {"num_inference_steps": 6}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA for the tiny Stable Diffusion."""
    lora(denoiser(make("sd")[0])).save_pretrained(tmp_path)
    return tmp_path


def records(pipe: Any, dial: Any, call: dict[str, Any], **changes: Any) -> list[Any]:
    """What every step of a run was taken from."""
    steps: list[Any] = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(dial.last)
        return tensors

    sample(pipe, call, callback_on_step_end=keep, **{**STEPS, **changes})
    return steps


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd_inpaint", "sd_adapter", "sd_controlnet", "sd3", "flux", "pixart"])
@pytest.mark.parametrize("carrier", ["reference", "anchor", "interpolate"])
@pytest.mark.cases(6)
def test_all_models_at_every_step_is_exact(kind: str, carrier: str) -> None:
    pipe, anchor, call = make(kind)
    with deradiff.realign(pipe, anchor, 0.4) as dial:
        exact = sample(pipe, call)
        assert dial.reused is None
        dial.reuse = Reuse(every=1, carrier=carrier)
        assert torch.equal(sample(pipe, call), exact)
        assert dial.reused is not None and dial.reused.error == 0 and dial.reused.kept


@pytest.mark.parametrize(("carrier", "number"), [("reference", 0), ("anchor", 1)])
@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
def test_between_full_steps_differences_go_on_along_a_line(carrier: str, number: int, slope: float) -> None:
    pipe, anchor, call = make("sd")
    with deradiff.realign(pipe, anchor, 0.4, reuse=Reuse(every=2, carrier=carrier, slope=slope)) as dial:
        steps = records(pipe, dial, call)
        assert dial.reused is not None and dial.reused.steps == (0, 2, 4)
        apart = [step.predictions - step.predictions[number] for step in steps]
        for i in (1, 3, 5):
            expected = apart[i - 1] + (slope / 2 * (apart[i - 1] - apart[i - 3]) if i > 1 else 0)
            assert_close(apart[i], expected)
        # and the carrier itself is evaluated where it stands, at the guided prediction that a run of its own would have
        dial.reuse, dial.lam = None, float(number)
        assert_close(records(pipe, dial, call)[0].predictions[0], steps[0].predictions[number])


def test_only_the_carrier_runs_in_between() -> None:
    pipe, anchor, call = make("sd")
    ways: list[tuple[float, Reuse | None, tuple[int, int]]] = [
        (0.4, None, (6, 6)),
        (0.4, Reuse(every=3, carrier="reference"), (6, 2)),
        (0.4, Reuse(every=3, carrier="anchor"), (2, 6)),
        (0.0, Reuse(every=3, carrier="anchor"), (6, 0)),
        (1.0, Reuse(every=3, carrier="reference"), (0, 6)),
    ]
    with deradiff.realign(pipe, anchor) as dial:
        for lam, reuse, expected in ways:
            dial.lam, dial.reuse = lam, reuse
            with Counter(denoiser(pipe)) as reference, Counter(anchor) as other:
                sample(pipe, call, **STEPS)
            assert (reference.number, other.number) == expected
            if reuse is not None and 0 < lam < 1:
                assert dial.reused is not None and dial.reused.evaluations == sum(expected)


def test_chosen_steps_are_the_full_ones_and_the_first_always_is() -> None:
    pipe, anchor, call = make("sd")
    with deradiff.realign(pipe, anchor, 0.4, reuse=Reuse(steps=(2, 3))) as dial:
        sample(pipe, call, **STEPS)
        assert dial.reused is not None and dial.reused.steps == (0, 2, 3)


def test_an_annealed_weight_needs_no_second_model_where_it_is_zero_or_one() -> None:
    pipe, anchor, call = make("sd")
    lam = deradiff.schedules.Step(0.5)
    with deradiff.realign(pipe, anchor, lam) as dial:
        exact = sample(pipe, call, **STEPS)
        dial.reuse = Reuse(every=2)
        assert torch.equal(sample(pipe, call, **STEPS), exact)
        assert dial.reused is None, "no step mixes"


def test_several_anchors_and_images_of_their_own_weights() -> None:
    pipe, anchor, call = make("sd")
    other = make("sd", seed=3)[1]
    lams = {"a": [0.0, 0.5], "b": [0.7, 0.2]}
    with deradiff.realign(pipe, {"a": anchor, "b": other}, lams) as dial:
        exact = sample(pipe, call, **STEPS)
        dial.reuse = Reuse(every=2, carrier="a")
        approximate = sample(pipe, call, **STEPS)
        assert dial.reused is not None and dial.reused.evaluations == 3 * 3 + 3
        assert 0 < (approximate - exact).norm() < 0.1 * exact.norm()


def test_loras_have_a_scale_for_each_image(adapter: Path) -> None:
    pipe, _, call = make("sd")
    lams = [0.2, 0.9]
    with deradiff.realign(pipe, adapter, 0.0, method="interpolate") as dial:
        assert dial.blends_rows
        alone = []
        for row, dial.lam in enumerate(lams):
            alone.append(sample(pipe, call)[row])
        dial.lam = lams
        assert_close(sample(pipe, call), torch.stack(alone))
        dial.micro_batch = 1
        assert_close(sample(pipe, call), torch.stack(alone))


def test_interpolated_loras_carry_a_sweep(adapter: Path) -> None:
    pipe, _, call = make("sd")
    with deradiff.realign(pipe, adapter, [0.2, 0.9]) as dial:
        exact = sample(pipe, call, **STEPS)
        dial.reuse = 3
        near = sample(pipe, call, **STEPS)
        assert dial.reused is not None and dial.reused.carrier == "interpolate"
        assert dial.reused.evaluations == 2 * 3 + 4
        dial.reuse = Reuse(every=3, carrier="reference")
        far = sample(pipe, call, **STEPS)
        assert 0 < (near - exact).norm() < (far - exact).norm()


def test_interpolated_weights_that_carry_nothing_cost_little_more_than_exactness(adapter: Path) -> None:
    pipe, _, call = make("sd")
    with deradiff.realign(pipe, adapter, 0.5) as dial:
        exact = sample(pipe, call, num_inference_steps=20)
        dial.reuse = Reuse(tolerance=1e-6)
        near = sample(pipe, call, num_inference_steps=20)
        assert dial.reused is not None and dial.reused.evaluations / 20 < 2.3, "a full step by itself costs three"
        assert_close(near, exact, 1e-4)


def test_a_scheduler_that_evaluates_twice_and_a_run_that_starts_inside() -> None:
    pipe, anchor, call = make("sd")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with deradiff.realign(pipe, anchor, 0.4, reuse=2) as dial:
        sample(pipe, call, **STEPS)
        assert dial.reused is not None and dial.reused.steps == (0, 2, 4, 6, 8, 10)
        assert all(length > 0 for length in impacts(pipe.scheduler)), "a repeated timestep counts too"
    pipe, anchor, call = make("sd_img2img")
    with deradiff.realign(pipe, anchor, 0.4, reuse=2) as dial:
        sample(pipe, call, num_inference_steps=8)
        assert dial.reused is not None and dial.reused.steps[0] > 0
        assert dial.reused.predictions == 8 - dial.reused.steps[0]


def test_weights_and_verdict_know_of_it() -> None:
    pipe, anchor, call = make("sd")
    with deradiff.realign(pipe, anchor, 0.4, reuse=2) as dial:
        assert "approximate: all models every 2 steps" in repr(dial)
        sample(pipe, call, **STEPS, guidance_scale=1.0)
        assert dial.importance_weights.obstacles == {"reuse"}
        assert "estimated from earlier steps" in dial.verdict().words
        with pytest.raises(ValueError, match=r"dial\.reuse = None"):
            deradiff.sample_particles(pipe, "a", 4)
        dial.reuse = None
        sample(pipe, call, **STEPS, guidance_scale=1.0)
        assert not dial.importance_weights.obstacles


def test_memory_that_runs_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, anchor, call = make("sd")
    seen: list[int] = []
    forward = type(anchor).forward

    def short_of_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(args[0]))
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return forward(self, *args, **kwargs)

    with deradiff.realign(pipe, anchor, 0.4) as dial:
        whole = sample(pipe, call)
        with monkeypatch.context() as patch:
            patch.setattr(type(anchor), "forward", short_of_memory)
            assert_close(sample(pipe, call), whole)
        assert seen[:3] == [4, 2, 1] and max(seen[3:]) == 1, "two images with guidance, then what fits"
        assert dial.micro_batch == 1


def test_all_weights_of_one_noise_share_the_first_step() -> None:
    pipe, anchor, call = make("sd")
    call |= {"prompt": ["a red fox"], "negative_prompt": ["blurry"], "num_images_per_prompt": 3}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    rows: list[int] = []
    hook = anchor.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with deradiff.realign(pipe, anchor, [0.2, 0.5, 0.9]) as dial:
        together = sample(pipe, call, latents=latents)
        assert rows == [2, 6, 6, 6], "one image with guidance, then all"
        alone = []
        for row, dial.lam in enumerate((0.2, 0.5, 0.9)):
            alone.append(sample(pipe, call, latents=latents)[row])
        assert_close(together, torch.stack(alone))
        rows.clear()
        dial.lam = [0.2, 0.5, 0.9]
        sample(pipe, call)
        assert rows == [6, 6, 6, 6], "different noise"
    hook.remove()


@pytest.mark.parametrize("name", ["auto", "interpolate", "weights", "reference"])
def test_an_anchor_has_no_name_that_means_something_else(name: str) -> None:
    pipe, anchor, _ = make("sd")
    with pytest.raises(ValueError, match=naming(f"'{name}'")):
        deradiff.realign(pipe, {name: anchor}, {name: 0.5})


BAD: list[tuple[dict[str, Any], list[Any]]] = [
    ({"tolerance": 0.0}, ["tolerance", 0, 1, 0.0]),
    ({"tolerance": -0.1}, ["tolerance", 0, 1, -0.1]),
    ({"tolerance": float("nan")}, ["tolerance", "nan"]),
    ({"tolerance": 1.5}, ["tolerance", 0, 1, 1.5]),
    ({"reuse": 0}, ["every", 1, 0]),
    ({"reuse": True}, ["every", True]),
    ({"reuse": 2, "tolerance": 0.1}, ["reuse", "tolerance", "Reuse(tolerance=..., carrier=...)"]),
    ({"reuse": 2, "method": "interpolate"}, ["reuse", "method='mixture'"]),
    ({"reuse": Reuse(every=2, carrier="style")}, ["carrier", "auto, interpolate, reference, anchor", "'style'"]),
    ({"reuse": Reuse(every=2, carrier="interpolate"), "lam": [0.1, 0.2]}, ["λ", 2, "method='mixture'"]),
    ({"reuse": Reuse(every=2, carrier="interpolate"), "anchor_device": "cpu"}, ["anchor_device"]),
    ({"reuse": 2, "path": "posterior"}, ["reuse", "path='prediction'"]),
]


@pytest.mark.parametrize(("asked", "values"), BAD, ids=lambda value: str(value)[:50])
def test_what_reuse_cannot_be_is_said(asked: dict[str, Any], values: list[Any]) -> None:
    pipe, anchor, call = make("sd")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    before = sample(pipe, call)
    with pytest.raises(ValueError, match=naming(*values)):
        deradiff.realign(pipe, anchor, **{"lam": 0.5, **asked})
    assert torch.equal(sample(pipe, call), before), "nothing was changed"


@pytest.mark.parametrize(
    ("asked", "values"),
    [
        ({}, ["tolerance", "every", "steps", "none"]),
        ({"every": 2, "tolerance": 0.1}, ["tolerance and every"]),
        ({"steps": (-1,)}, ["steps", (-1,)]),
        ({"every": 2, "slope": 2.0}, ["slope", 2.0]),
        ({"every": True}, ["every", True]),
    ],
)
def test_a_reuse_that_means_nothing_is_refused(asked: dict[str, Any], values: list[Any]) -> None:
    with pytest.raises(ValueError, match=naming(*values)):
        Reuse(**asked)


def test_a_scheduler_that_mixes_posteriors_is_refused_when_it_comes_later() -> None:
    pipe, anchor, call = make("sd")
    with deradiff.realign(pipe, anchor, 0.4, reuse=2) as dial:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.register_to_config(clip_sample=True)
        with pytest.raises(ValueError, match=naming("DDIMScheduler", "clip_sample", "path='prediction'")):
            sample(pipe, call)
        dial.reuse = None
        sample(pipe, call)


@pytest.mark.parametrize("carrier", ["reference", "anchor"])
def test_timesteps_that_repeat_are_steps_of_their_own(carrier: str) -> None:
    pipe, anchor, call = make("sd")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    with deradiff.realign(pipe, anchor, 0.4) as dial:
        exact = sample(pipe, call, num_inference_steps=8)
        dial.reuse = Reuse(every=1, carrier=carrier)
        assert torch.equal(sample(pipe, call, num_inference_steps=8), exact)
        dial.reuse = Reuse(steps=(1, 2, 3), carrier=carrier)
        sample(pipe, call, num_inference_steps=8)
        assert dial.reused is not None and dial.reused.error > 0


def test_a_weight_that_changes_does_not_count_twice(adapter: Path) -> None:
    pipe, _, call = make("sd")
    with deradiff.realign(pipe, adapter, deradiff.schedules.Power(3)) as dial:
        exact = sample(pipe, call, num_inference_steps=9)
        away = {}
        for carrier in ("interpolate", "reference"):
            dial.reuse = Reuse(every=3, slope=0.0, carrier=carrier)
            away[carrier] = float((sample(pipe, call, num_inference_steps=9) - exact).norm())
        assert away["interpolate"] < away["reference"]


def test_guidance_that_ends_closes_an_interval() -> None:
    pipe, anchor, call = make("sd")

    def until_half(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    ending: dict[str, Any] = {
        "callback_on_step_end": until_half,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    with deradiff.realign(pipe, anchor, 0.4, reuse=Reuse(steps=(0, 5, 6, 7, 8, 9), slope=0.0)) as dial:
        sample(pipe, call, num_inference_steps=10, **ending)
        assert dial.reused is not None and dial.reused.error > 0.01


def test_nothing_is_carried_over_steps_that_mix_nothing() -> None:
    estimator = PredictionEstimator(Reuse(every=9), "reference", ("reference", "anchor"), [1.0] * 6, [1.0] * 6)
    both, weights = torch.randn(2, 1, 4, 2, 2), torch.tensor([[0.5], [0.5]])
    for i, evaluated, wanted in ((0, (0, 1), "all"), (1, (0,), "carrier"), (3, (0, 1), "all"), (4, (0,), "carrier")):
        assert estimator.wants(i, "alike") == wanted
        estimator.complete(i, both[: len(evaluated)], (0, 1), evaluated, weights)
    assert estimator.result().steps == (0, 3)


def test_watching_does_not_change_images() -> None:
    pipe, anchor, call = make("sd")
    with deradiff.realign(pipe, anchor, 0.0, reuse=Reuse(every=3, carrier="anchor")) as dial:
        alone = sample(pipe, call)
        dial.watching = True
        assert torch.equal(sample(pipe, call), alone)


def test_a_new_reuse_counts_from_the_next_run() -> None:
    pipe, anchor, call = make("sd")

    def set_it(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        dial.reuse = None if step == 2 else dial.reuse
        return tensors

    with deradiff.realign(pipe, anchor, 0.4, reuse=3) as dial:
        sample(pipe, call, callback_on_step_end=set_it, **STEPS)
        assert dial.reused is not None and dial.reused.predictions == 6
        sample(pipe, call, **STEPS)
        assert dial.reused is None


def test_images_of_one_noise_are_shared_also_where_attention_takes_the_batch_apart() -> None:
    pipe, anchor, call = make("sd")
    components = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    pipe = StableDiffusionPAGPipeline(**components, pag_applied_layers=["mid"], requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call |= {"pag_scale": 2.0}
    with deradiff.realign(pipe, anchor, 0.4) as dial:
        single = sample(pipe, call)
        dial.lam = [0.4, 0.4]
        assert_close(sample(pipe, call), single)
        dial.micro_batch = 1
        with pytest.raises(RuntimeError, match=r"dial\.micro_batch"):
            sample(pipe, call)


def test_an_anchor_stays_on_a_device_of_its_own(adapter: Path) -> None:
    pipe, anchor, call = make("sd")
    with deradiff.realign(pipe, anchor, 0.4) as dial:
        beside = sample(pipe, call)
    with deradiff.realign(pipe, anchor, 0.4, anchor_device="cpu") as dial:
        assert torch.equal(sample(pipe, call), beside)
        denoiser(pipe).to("meta", torch.float64)
        assert {p.device.type for p in anchor.parameters()} == {"cpu"}
        assert {p.dtype for p in anchor.parameters()} == {torch.float64}, "its precision goes along"
    assert dial.anchors == ("anchor",)
    pipe, anchor, call = make("sd")
    with pytest.raises(ValueError, match=naming("'anchor'", "LoRA", "anchor_device")):
        deradiff.realign(pipe, adapter, anchor_device="cpu")
    with pytest.raises(ValueError, match=naming("interpolated", "anchor_device")):
        deradiff.realign(pipe, anchor, method="interpolate", anchor_device="cpu")
    with pytest.raises(ValueError, match="'gpu7'"):
        deradiff.realign(pipe, anchor, anchor_device="gpu7")
