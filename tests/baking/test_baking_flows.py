"""Students of transformers and flows: taught at the model's own times, told what its pipeline tells it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import deradiff
import tiny
from anchor_files import lora, lora_weights
from deradiff.algorithm.lams import parse_lam
from deradiff.algorithm.schedules import Power
from deradiff.algorithm.step import mixed
from deradiff.alignment.base import Base
from deradiff.alignment.lora_targets import WIDER_JOINT_TARGETS
from deradiff.alignment.sampling import conditions
from deradiff.anchors import load_anchor
from deradiff.baking import Distillation, Sampler, bake
from deradiff.baking.distillation import Teacher, lam_by_timestep, lams_at
from deradiff.sampling.denoisers import Denoisers
from deradiff.worlds import digits_flow
from deradiff.worlds.digits.captions import sample_prompts
from messages import naming
from test_baking_distilled import PROMPTS, QUICK, SHORT
from trainable_families import trainable

CALL: dict[str, Any] = {"prompt": PROMPTS[:2], "num_inference_steps": 4, "output_type": "latent"}


def made(family: str) -> Any:
    """A pipeline whose default size is that of its tiny parts."""
    pipe, side = trainable(family)
    pipe.default_sample_size = side // pipe.vae_scale_factor
    return pipe


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_the_teacher_of_a_flow_says_what_a_dial_steps_with(tmp_path: Path, kind: str) -> None:
    pipe = made(kind)
    save_file(lora_weights(lora(tiny.denoiser(pipe))), tmp_path / "lora.safetensors")
    anchors: dict[str, Any] = {"full": tiny.anchor_of(pipe), "lora": tmp_path / "lora.safetensors"}
    base, lam = Base(pipe), {"full": 0.3, "lora": 0.4}
    told = conditions(base, PROMPTS[:2], guidance_scale=1.0)
    seen: list[Any] = []

    def look(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(dial.last)
        return kwargs

    with deradiff.realign(pipe, anchors, lam) as dial:
        tiny.sample(pipe, CALL, guidance_scale=1.0, callback_on_step_end=look)
    opened = [load_anchor(source, pipe, name=name) for name, source in anchors.items()]
    teacher = Teacher(base, Denoisers(base.denoiser, opened))
    assert len(seen) == 4
    for last in seen:
        t, weights = last.timestep.expand(2), torch.tensor([[0.3], [0.4]]).expand(2, 2)
        expected = mixed(last.predictions, last.mixture_weights)
        tiny.assert_close(teacher(last.sample, t, told, weights), expected)


def test_lam_at_a_flows_own_times_is_that_of_its_steps() -> None:
    clock = Base(made("sd3")).call.prepared(made("sd3").scheduler, 20)
    table = lam_by_timestep(parse_lam(Power(2, lam=0.8), ("a",)), clock)
    expected = 0.8 * (torch.arange(20) / 20) ** 2
    tiny.assert_close(lams_at(table, clock.timesteps)[0].float(), expected, 5e-3)


def test_times_of_flows_have_the_lam_of_the_nearest_whole_one() -> None:
    table = torch.arange(1000.0)[None]
    assert lams_at(table, torch.tensor([0.2, 499.6, 1000.0])).tolist() == [[0.0, 500.0, 999.0]]
    assert lams_at(table, torch.tensor([3, 999])).tolist() == [[3.0, 999.0]]


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_lora_of_a_transformer_is_distilled_into_one_lora(tmp_path: Path, kind: str) -> None:
    pipe = made(kind)
    save_file(lora_weights(lora(tiny.denoiser(pipe))), tmp_path / "lora.safetensors")
    settings = replace(SHORT, learning_rate=1e-12)
    images: dict[str, Any] = {"prompts": PROMPTS, "sampler": QUICK, "images": 2, "distillation": settings}
    done = bake(pipe, tmp_path / "lora.safetensors", 0.5, tmp_path / "out", method="distill", **images)
    assert done.form == "lora"
    keys = load_file(tmp_path / "out/pytorch_lora_weights.safetensors").keys()
    assert all(key.startswith("transformer.") for key in keys)
    # Untrained, it is half of the anchor.
    with deradiff.realign(pipe, tmp_path / "lora.safetensors", 0.5, method="interpolate"):
        half = tiny.sample(pipe, CALL)
    pipe.load_lora_weights(tmp_path / "out")
    tiny.assert_close(tiny.sample(pipe, CALL), half, 1e-4)


@pytest.mark.cases(0)
def test_a_student_of_the_flow_digits_comes_nearer(tmp_path: Path) -> None:
    pipe, prompts = digits_flow.load_pipeline(), sample_prompts(60, 1)
    settings = Distillation(8, WIDER_JOINT_TARGETS, samples=48, held_out=8, steps=40, batch=16, learning_rate=2e-3)
    sampler = Sampler(steps=8, guidance_scale=1.0, batch_size=48)
    anchor, errors = digits_flow.anchor_path(5), {}
    for method, more in (("interpolate", {}), ("distill", {"distillation": settings})):
        texts = prompts if method == "distill" else prompts[-12:]
        out = tmp_path / method
        done = bake(pipe, anchor, 0.5, out, method=method, prompts=texts, images=12, sampler=sampler, **more)  # type: ignore[arg-type]
        errors[method] = done.judgements[0].error
        absent = {"text_encoder_3": None, "tokenizer_3": None}
        assert isinstance(DiffusionPipeline.from_pretrained(out, local_files_only=True, **absent), type(pipe))
    gap = errors["interpolate"].value - errors["distill"].value
    assert gap > 3 * (errors["interpolate"].error + errors["distill"].error)


def test_latents_of_another_form_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = made("sd3")
    monkeypatch.setattr(Sampler, "latents", lambda self, pipe, prompts, seeds, scale=None: torch.zeros(len(seeds), 3))
    with pytest.raises(ValueError, match=naming("StableDiffusion3Pipeline", "interpolate", 3)):
        bake(
            pipe,
            tiny.anchor_of(pipe),
            0.5,
            tmp_path / "out",
            method="distill",
            prompts=PROMPTS,
            sampler=QUICK,
            distillation=SHORT,
        )


def test_guidance_that_a_model_is_told_cannot_be_folded_in(tmp_path: Path) -> None:
    pipe = made("flux")
    folded = replace(SHORT, fold_guidance=True)
    more: dict[str, Any] = {"prompts": PROMPTS, "sampler": QUICK, "distillation": folded}
    with pytest.raises(ValueError, match=naming("FluxPipeline", "fold_guidance")):
        bake(pipe, tiny.anchor_of(pipe), 0.5, tmp_path / "out", method="distill", **more)
    assert not list(tmp_path.iterdir())
