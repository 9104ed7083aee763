"""Reuse between steps: which models run when, what stands for those that do not, and what it says of itself."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler, StableDiffusionPAGPipeline

import deradiff
from anchor_files import lora
from deradiff.algorithm.noise_levels import impacts
from deradiff.sampling import reuse as reusing
from deradiff.sampling.reuse import PredictionEstimator, Reuse
from deradiff.worlds import digits
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


def test_a_tolerance_chooses_steps_and_keeps_them_on_the_digits() -> None:
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def drawn(lam: float, reuse: Reuse | None) -> torch.Tensor:
        dial.lam, dial.reuse = lam, reuse
        generator = torch.Generator().manual_seed(5)
        call: dict[str, Any] = {"num_images_per_prompt": 8, "num_inference_steps": 25, "guidance_scale": 1.0}
        return pipe("a green four", generator=generator, output_type="latent", **call).images

    with deradiff.realign(pipe, digits.anchor_path(250)) as dial:
        exact, base = drawn(0.5, None), drawn(0.0, None)
        effects = (exact - base).flatten(1).norm(dim=1)
        costs = []
        for tolerance in (0.02, 0.05, 0.15):
            errors = (drawn(0.5, Reuse(tolerance=tolerance)) - exact).flatten(1).norm(dim=1)
            assert dial.reused is not None
            assert float(errors.median() / effects.median()) < 1.5 * tolerance
            # What the run says of itself is what it did, within a factor.
            assert 0.3 < dial.reused.error / float(errors.median() / effects.median()) < 3
            costs.append(dial.reused.evaluations / 25)
        assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
        assert costs[1] <= 1.45 and costs[2] <= 1.3


def test_a_tolerance_that_was_not_kept_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reusing, "TURNOVER", 1e-3)  # a run that begins by expecting hardly any change
    pipe, anchor, call = make("sd")
    with deradiff.realign(pipe, anchor, 0.5, tolerance=0.001) as dial:
        with pytest.warns(UserWarning, match="ABOVE the tolerance of 0.001") as told:
            sample(pipe, call, num_inference_steps=20)
        assert len(told) == 1
        assert dial.reused is not None and not dial.reused.kept and dial.reused.record()["kept"] is False
        dial.reuse = 3
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            sample(pipe, call, **STEPS)
        assert dial.reused.kept, "none was asked for"


def test_weights_and_verdict_know_of_it() -> None:
    pipe, anchor, call = make("sd")
    with deradiff.realign(pipe, anchor, 0.4, reuse=2) as dial:
        assert "approximate: all models every 2 steps" in repr(dial)
        sample(pipe, call, **STEPS, guidance_scale=1.0)
        assert dial.importance_weights.obstacles == {"reuse"}
        assert "estimated from earlier steps" in dial.verdict().words
        with pytest.raises(ValueError, match=r"reuse only estimates: set dial.reuse = None"):
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
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        deradiff.realign(pipe, {name: anchor}, {name: 0.5})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tolerance": 0.0}, r"above 0 and below 1; got 0\.0"),
    ({"tolerance": -0.1}, "above 0 and below 1"),
    ({"tolerance": float("nan")}, "tolerance must be finite"),
    ({"tolerance": 1.5}, "above 0 and below 1"),
    ({"reuse": 0}, "every must be a whole number of steps, 1 at least; got 0"),
    ({"reuse": True}, "every must be a whole number of steps"),
    ({"reuse": 2, "tolerance": 0.1}, "reuse or tolerance, not both"),
    ({"reuse": 2, "method": "interpolate"}, "one model, with nothing to carry over"),
    ({"reuse": Reuse(every=2, carrier="style")}, "carrier is one of auto, interpolate, reference, anchor; got 'style'"),
    ({"reuse": Reuse(every=2, carrier="interpolate"), "lam": [0.1, 0.2]}, "needs one model for each"),
    ({"reuse": Reuse(every=2, carrier="interpolate"), "anchor_device": "cpu"}, "need all models on one device"),
    ({"reuse": 2, "path": "posterior"}, "cannot be carried over between steps where posteriors are mixed"),
]


@pytest.mark.parametrize(("asked", "message"), BAD, ids=lambda value: str(value)[:50])
def test_what_reuse_cannot_be_is_said(asked: dict[str, Any], message: str) -> None:
    pipe, anchor, call = make("sd")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    before = sample(pipe, call)
    with pytest.raises(ValueError, match=message):
        deradiff.realign(pipe, anchor, **{"lam": 0.5, **asked})
    assert torch.equal(sample(pipe, call), before), "nothing was changed"


@pytest.mark.parametrize(
    "asked", [{}, {"every": 2, "tolerance": 0.1}, {"steps": (-1,)}, {"every": 2, "slope": 2.0}, {"every": True}]
)
def test_a_reuse_that_means_nothing_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"reuse needs one way|whole numbers, counted|slope must lie|every must be"):
        Reuse(**asked)


def test_a_scheduler_that_mixes_posteriors_is_refused_when_it_comes_later() -> None:
    pipe, anchor, call = make("sd")
    with deradiff.realign(pipe, anchor, 0.4, reuse=2) as dial:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.register_to_config(clip_sample=True)
        with pytest.raises(ValueError, match="where posteriors are mixed"):
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


def digits_run(lam: Any, reuse: Reuse | None, **changes: Any) -> tuple[torch.Tensor, Any]:
    """Latents of eight digits, and the dial's word."""
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_images_per_prompt": 8, "num_inference_steps": 25, "guidance_scale": 1.0, **changes}
    with deradiff.realign(pipe, digits.anchor_path(250), lam, reuse=reuse) as dial:
        latents = pipe("a green four", generator=torch.Generator().manual_seed(5), output_type="latent", **call).images
        return latents, dial.reused


def test_every_weight_of_a_sweep_keeps_the_tolerance_and_zero_is_the_reference() -> None:
    lams = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    exact, base = digits_run(lams, None)[0], digits_run(0.0, None)[0]
    near, told = digits_run(lams, Reuse(tolerance=0.05))
    assert told.carrier == "reference" and told.errors[0] == 0
    assert_close(near[0], base[0])
    away = (near - exact).flatten(1).norm(dim=1)[1:] / (exact - base).flatten(1).norm(dim=1)[1:]
    assert float(away.max()) < 0.15 and float(away.median()) < 0.05


def test_the_error_of_an_annealed_weight_is_that_of_the_steps_where_it_acts() -> None:
    annealed = deradiff.schedules.Power(6)
    exact, base = digits_run(annealed, None)[0], digits_run(0.0, None)[0]
    near, told = digits_run(annealed, Reuse(tolerance=0.05))
    away = (near - exact).flatten(1).norm(dim=1).median() / (exact - base).flatten(1).norm(dim=1).median()
    assert 0.5 < told.error / float(away) < 2
    assert told.evaluations < 1.4 * told.predictions


@pytest.mark.parametrize("rate", [0.1, 0.15, 0.2, 0.3])
def test_a_difference_that_changes_ever_faster_is_expected_to_go_on_so(rate: float) -> None:
    estimator = PredictionEstimator(Reuse(tolerance=0.3), "reference", ("reference", "anchor"), [1.0] * 40, [1.0] * 40)
    for i in range(40):
        both = torch.tensor([0.0, math.exp(rate * i)]).view(2, 1, 1, 1, 1)
        evaluated = (0,) if estimator.wants(i, "alike") == "carrier" else (0, 1)
        estimator.complete(i, both[: len(evaluated)], (0, 1), evaluated, torch.tensor([[0.5], [0.5]]))
    result = estimator.result()
    assert result.error < 0.45 * 0.3 and result.evaluations < 1.4 * 40


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
        with pytest.raises(RuntimeError, match="perturbed-attention"):
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
    with pytest.raises(ValueError, match="is a LoRA, which lives in the reference's weights"):
        deradiff.realign(pipe, adapter, anchor_device="cpu")
    with pytest.raises(ValueError, match="all models on one device"):
        deradiff.realign(pipe, anchor, method="interpolate", anchor_device="cpu")
    with pytest.raises(ValueError, match="torch knows no device"):
        deradiff.realign(pipe, anchor, anchor_device="gpu7")
