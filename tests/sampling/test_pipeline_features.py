"""What people do with a pipeline call, on a realigned pipeline: guidance, callbacks, λ in all its forms."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion

from deradiff import lam_for_beta, realign
from deradiff.algorithm.schedules import Power, Step
from messages import naming
from oracle import lock_step
from tiny import Counter, anchor_of, assert_close, denoiser, distance, make, sample, trio, with_denoiser


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sd", {"guidance_scale": 1.0}),
        ("sd", {"guidance_scale": 9.0}),
        ("sd", {"guidance_rescale": 0.7}),
        ("sd", {"negative_prompt": None}),
        ("sd", {"num_images_per_prompt": 2}),
        ("sdxl", {"guidance_rescale": 0.7, "guidance_scale": 5.0}),
        ("sdxl", {"negative_original_size": (8, 8), "crops_coords_top_left": (4, 4)}),
        ("sd_controlnet", {"guess_mode": True, "controlnet_conditioning_scale": 0.5}),
        ("sd_controlnet", {"control_guidance_end": 0.5}),
        ("sd_adapter", {"adapter_conditioning_scale": 0.5}),
        ("sd3", {"guidance_scale": 1.0}),
        ("sd3", {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_start": 0.0}),
        ("flux", {"true_cfg_scale": 1.0}),
        ("pixart", {"guidance_scale": 1.0}),
    ],
    ids=str,
)
@pytest.mark.cases(3)
def test_call_arguments(kind, changes):
    pipe, anchor, call, own = trio(kind)
    with realign(pipe, anchor, 0.37) as dial:
        assert_close(sample(pipe, call, **changes), lock_step(own, call, 0.37, **changes))
        dial.lam = 0.0
        assert torch.equal(sample(pipe, call, **changes), sample(own[0], call, **changes))


@pytest.mark.parametrize("lam", [0.37, 1.0])
def test_denoising_end_and_a_refiner_from_there(lam):
    base, anchor, call, own = trio("sdxl")
    call["num_inference_steps"] = 6
    refiner, refiner_anchor, refiner_call, refiner_own = trio("sdxl_img2img")
    refiner_call |= {"num_inference_steps": 6, "denoising_start": 0.5}
    with realign(base, anchor, lam), realign(refiner, refiner_anchor, lam):
        half = sample(base, call, denoising_end=0.5)
        whole = sample(refiner, refiner_call, image=half)
    half_by_hand = lock_step(own, call, lam, denoising_end=0.5)
    assert_close(half, half_by_hand)
    assert_close(whole, lock_step(refiner_own, refiner_call, lam, image=half_by_hand), tolerance=2e-5)


def test_images_come_out_as_images():
    pipe, anchor, call, own = trio()
    with realign(pipe, anchor, 1.0) as dial:
        assert torch.equal(sample(pipe, call, output_type="pt"), sample(own[1], call, output_type="pt"))
        dial.lam = 0.5
        pictures = sample(pipe, call, output_type="pil")
        assert [picture.size for picture in pictures] == [(16, 16)] * 2


def test_img2img_runs_the_end_of_a_schedule():
    """Strength ½ starts halfway through the noise levels, and there λ begins: an image is half done."""
    pipe, anchor, call, own = trio("sd_img2img")
    call |= {"num_inference_steps": 8, "strength": 0.5}
    with realign(pipe, anchor, Power(2)):
        assert_close(sample(pipe, call), lock_step(own, call, lambda i: ((i + 4) / 8) ** 2))


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_a_callback_turns_lambda_from_the_next_step_on():
    pipe, anchor, call, own = trio()
    values, seen = [0.2, 0.9, 0.0, 1.3], []

    def turn(_, step, timestep, tensors):
        seen.append((step, int(timestep), tuple(tensors["latents"].shape)))
        dial.lam = values[(step + 1) % 4]
        return tensors

    with realign(pipe, anchor, values[0]) as dial:
        realigned = sample(pipe, call, callback_on_step_end=turn)
        assert seen == [(i, int(t), (2, 4, 8, 8)) for i, t in enumerate(pipe.scheduler.timesteps)]
    assert_close(realigned, lock_step(own, call, lambda i: values[i]))


def test_a_callback_may_change_the_latents():
    pipe, anchor, call, own = trio()

    def dim(_, step, timestep, tensors):
        return {"latents": 0.9 * tensors["latents"]}

    with realign(pipe, anchor, 0.37):
        realigned = sample(pipe, call, callback_on_step_end=dim)
    assert_close(realigned, lock_step(own, call, 0.37, callback_on_step_end=dim))


def test_an_interrupted_or_broken_run_does_not_reach_the_next():
    pipe, anchor, call, _ = trio()

    def interrupt(pipe, step, *_):
        pipe._interrupt = step >= 1
        return {}

    def fail(*_):
        raise KeyboardInterrupt

    with realign(pipe, anchor, Power(2)):
        undisturbed = sample(pipe, call)
        assert distance(sample(pipe, call, callback_on_step_end=interrupt), undisturbed) > 1e-2
        assert torch.equal(sample(pipe, call), undisturbed)
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, call, callback_on_step_end=fail)
        assert torch.equal(sample(pipe, call), undisturbed)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_run_that_fails_between_denoiser_and_step_does_not_reach_the_next(monkeypatch, steps_before):
    pipe, anchor, call, own = trio()
    done = 0

    def fail(prediction, *_, **__):
        nonlocal done
        done += 1
        return prediction if done <= steps_before else 1 / 0

    with realign(pipe, anchor, 0.5) as dial:
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(pipeline_stable_diffusion, "rescale_noise_cfg", fail)
            sample(pipe, call, guidance_rescale=0.5)
        dial.lam = 0.1
        assert_close(sample(pipe, call), lock_step(own, call, 0.1))


def test_dynamic_cfg_cutoff_in_a_callback():
    """diffusers' own callback drops the unconditional half of the batch in mid-run."""
    pipe, anchor, call, own = trio()
    call |= {"prompt": "a red fox", "negative_prompt": "blurry"}
    cutoff = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)}
    with realign(pipe, anchor, 0.37):
        assert_close(sample(pipe, call, **cutoff), lock_step(own, call, 0.37, **cutoff))


def test_the_record_of_a_step_holds_what_it_was_taken_from():
    """Both guided predictions, x_t and the noise level, against the two models asked by hand."""
    pipe, anchor, call, own = trio()
    records: list[Any] = []

    def keep(_, step, timestep, tensors):
        records.append(dial.last)
        return {}

    with realign(pipe, anchor, 0.37) as dial:
        assert dial.last is None
        sample(pipe, call, callback_on_step_end=keep)
        dial.lam = 0.0
        sample(pipe, call)
        alone: Any = dial.last
        assert alone.models == ("reference",) and alone.predictions.shape == (1, 2, 4, 8, 8)

    prompt, null = own[0].encode_prompt(call["prompt"], "cpu", 1, True, call["negative_prompt"])
    abar = pipe.scheduler.alphas_cumprod.double()
    assert len(records) == 4
    for i, (record, t) in enumerate(zip(records, pipe.scheduler.timesteps, strict=True)):
        assert record.models == ("reference", "anchor") and record.timestep == t and record.progress.steps == i / 4
        assert record.mixture_weights.flatten().tolist() == pytest.approx([0.63, 0.37])
        assert record.log_snr == pytest.approx(float((abar[t] / (1 - abar[t])).log()), rel=1e-5)
        for prediction, each in zip(record.predictions, own, strict=True):
            with torch.no_grad():
                both = each.unet(torch.cat([record.sample] * 2), t, torch.cat([null, prompt])).sample
            uncond, cond = both.chunk(2)
            assert_close(prediction, uncond + call["guidance_scale"] * (cond - uncond))
    assert torch.equal(records[0].sample, torch.randn(2, 4, 8, 8, generator=generators(11)[0]))


# --- λ in all its forms -----------------------------------------------------------------------------------------------


def test_a_sweep_in_one_call_is_the_separate_calls():
    pipe, anchor, call, own = trio()
    lams = [0.0, 0.25, 0.5, 1.0, 1.5]
    single = call | {"prompt": "a red fox", "negative_prompt": "blurry"}
    with realign(pipe, anchor, lams) as dial:
        sweep = pipe(**single, num_images_per_prompt=5, generator=generators(*[7] * 5)).images
        for lam, latents in zip(lams, sweep, strict=True):
            dial.lam = lam
            assert_close(latents[None], pipe(**single, generator=generators(7)).images)
    assert_close(sweep[:1], own[0](**single, generator=generators(7)).images)


def test_a_list_follows_diffusers_order_of_images():
    pipe, anchor, call, own = trio()
    lams = torch.tensor([0.1, 0.2, 1.3, -0.4])
    with realign(pipe, anchor, lams):
        assert_close(sample(pipe, call, num_images_per_prompt=2), lock_step(own, call, lams, num_images_per_prompt=2))


def test_a_list_may_hold_schedules():
    pipe, anchor, call, own = trio()
    with realign(pipe, anchor, [0.3, Power(2)]):
        assert_close(sample(pipe, call), lock_step(own, call, lambda i: torch.tensor([0.3, (i / 4) ** 2])))


def test_lam_for_beta_is_a_quotient_of_any_positive_numbers():
    assert lam_for_beta(np.float32(5), 10) == 0.5
    for bad in (0, -1.0, float("nan"), float("inf"), 10**400):
        for pair in ((bad, 1.0), (1.0, bad)):
            with pytest.raises(ValueError, match="_beta"):
                lam_for_beta(*pair)
    with pytest.raises(ValueError, match=naming("anchor_beta / target_beta", "inf")):
        lam_for_beta(1e308, 1e-308)


def test_lambda_is_changed_by_setting_it_and_not_in_place():
    pipe, anchor, _ = make("sd")
    given, tensor = [0.1, 0.2], torch.tensor([0.25, 0.5])
    with realign(pipe, anchor, given) as dial:
        given[0] = 0.9
        assert dial.lam == (0.1, 0.2)
        places: list[tuple[Any, Any]] = [([0.25, 0.5], 0), (tensor, 0), ({"anchor": [0.25, 0.5]}, "anchor")]
        for lam, place in places:
            dial.lam = lam
            kept: Any = dial.lam
            with pytest.raises(TypeError, match="does not support item assignment"):
                kept[place] = 1.0
        dial.lam = tensor
        tensor[0] = 9
        assert dial.lam == (0.25, 0.5)


def test_two_anchors_with_a_lambda_each():
    pipe, first, call, own = trio()
    second = anchor_of(pipe, seed=2)
    own.append(with_denoiser("sd", second))
    with realign(pipe, {"bold": first, "clean": second}, {"bold": 0.5, "clean": 0.25}) as dial:
        assert dial.anchors == ("bold", "clean")
        assert_close(sample(pipe, call), lock_step(own, call, [0.5, 0.25]))
        dial.lam = {"bold": [0.2, -0.1], "clean": Power(1)}
        assert_close(sample(pipe, call), lock_step(own, call, lambda i: [torch.tensor([0.2, -0.1]), i / 4]))
        dial.lam = {"bold": 0.0, "clean": 1.0}
        with Counter(denoiser(pipe)) as reference, Counter(first) as bold:
            assert torch.equal(sample(pipe, call), sample(own[2], call))
        assert reference.number == bold.number == 0
        dial.lam = {"bold": 0.0, "clean": 0.5}
        with Counter(first) as bold:
            assert_close(sample(pipe, call), lock_step([own[0], own[2]], call, 0.5))
        assert bold.number == 0


def test_three_anchors():
    pipe, first, call, own = trio("sd3")
    others = [anchor_of(pipe, seed) for seed in (2, 3)]
    own += [with_denoiser("sd3", module) for module in others]
    lams = {"a": 0.5, "b": 0.75, "c": -0.5}
    with realign(pipe, dict(zip(lams, [first, *others], strict=True)), lams):
        assert_close(sample(pipe, call), lock_step(own, call, [*lams.values()]))


def test_a_schedule_runs_a_single_model_where_it_is_zero_or_one():
    pipe, anchor, call, own = trio()
    with realign(pipe, anchor, Step(0.5)), Counter(denoiser(pipe)) as reference, Counter(anchor) as anchors:
        realigned = sample(pipe, call)
        assert (reference.number, anchors.number) == (2, 2)
    assert torch.equal(realigned, lock_step(own, call, lambda i: float(i >= 2)))


def test_another_pipeline_of_the_same_parts_is_realigned_with_it():
    pipe, anchor, call, own = trio("sdxl")
    other_call = make("sdxl_img2img")[2]
    other, *own_other = [
        StableDiffusionXLImg2ImgPipeline(**each.components, add_watermarker=False) for each in (pipe, *own)
    ]
    with realign(pipe, anchor, 0.37):
        assert_close(sample(other, other_call), lock_step(own_other, other_call, 0.37))
        assert_close(sample(pipe, call), lock_step(own, call, 0.37))
