"""Flows aligned from pairs and rewards to anchors on disk, the times of their training, and what is refused."""

import inspect
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from PIL import Image

import deradiff
from deradiff.alignment import runs
from deradiff.alignment.base import Base, Policy
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.draft import Truncation, objective, train_draft
from deradiff.alignment.methods import METHODS, fitted
from deradiff.alignment.noising import DiffusionNoising, FlowNoising, noising_of
from deradiff.alignment.presets import usual
from deradiff.alignment.refl import train_refl
from deradiff.alignment.rehearsal import rehearse
from deradiff.alignment.sampling import SamplerSettings
from deradiff.alignment.scoring import RewardTask
from deradiff.alignment.settings import Preset
from deradiff.alignment.training import TrainingPlan, TrainingRun
from deradiff.alignment.training_data import prepare_pairs
from deradiff.anchors import load_anchor
from deradiff.sweep import pipelines
from messages import naming
from tiny_families import built
from trainable_families import trainable

PROMPTS = ["a red fox", "two blue owls in"]
PLAN = TrainingPlan(steps=2, learning_rate=1e-2, warmup=0, average=0.0, evaluate_every=2, checkpoint_seconds=0)


class Brightness:
    """The mean of a picture."""

    name = "brightness"

    def __call__(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return images.flatten(1).mean(1)


def pairs_folder(path: Path, count: int = 6) -> Path:
    path.mkdir(parents=True)
    for i in range(2 * count):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
    rows = [{"prompt": PROMPTS[i % 2], "winner": f"{2 * i}.png", "loser": f"{2 * i + 1}.png"} for i in range(count)]
    (path / "pairs.json").write_text(json.dumps(rows))
    return path


def settings_for(tmp_path: Path, side: int, **changes: Any) -> Preset:
    start = replace(usual("some/flow", "dpo"), base="some/flow", data=str(tmp_path / "pairs"), plan=PLAN, reward=None)
    small = replace(start, resolution=side, batch=2, held_out=2, sampling=start.sampling | {"steps": 3})
    return replace(small, **{"lora_rank": 2, "density": "logit-normal", **changes})


def silent(*_: Any) -> None:
    pass


def latents_of(pipe: Any, side: int) -> torch.Tensor:
    call: dict[str, Any] = {
        "num_inference_steps": 2,
        "output_type": "latent",
        "return_dict": False,
        "height": side,
        "width": side,
    }
    if "use_resolution_binning" in inspect.signature(type(pipe).__call__).parameters:
        call["use_resolution_binning"] = False
    return pipe(prompt=list(PROMPTS), generator=torch.Generator().manual_seed(0), **call)[0]


@pytest.mark.parametrize(("family", "rank"), [("sd3", 2), ("sd3", None), ("pixart", None), ("z_image", 2)])
@pytest.mark.cases(2)
def test_an_anchor_is_written_that_realign_loads(family: str, rank: int | None, tmp_path: Path) -> None:
    pipe, side = trainable(family)
    pairs_folder(tmp_path / "pairs")
    settings = settings_for(tmp_path, side, lora_rank=rank, density=None if family == "pixart" else "logit-normal")
    settings = fitted(settings, pipe)
    data = prepare_pairs(pipe, settings, tmp_path, None, 0, silent)
    anchor = runs.align(pipe, data, 100.0, settings, tmp_path, silent)
    record = json.loads((anchor / "alignment.json").read_text())
    away = record["path_kl"]
    assert away["scheduler"] == ("ddim" if family == "pixart" else "flow-sde") and away["value"] > 0
    assert record["made_of"]["settings"].get("density") == settings.density
    plain = latents_of(trainable(family)[0], side)
    assert torch.equal(latents_of(pipe, side), plain)  # given back as it was
    dial = deradiff.realign(pipe, anchor, lam=1.0)
    assert not torch.equal(latents_of(pipe, side), plain)
    dial.lam = 0.0
    assert torch.equal(latents_of(pipe, side), plain)


def task_of(base: Base, tmp_path: Path, scale: float, kl: float = 0.0, rank: int | None = 2) -> RewardTask:
    run, sampling = TrainingRun(0, tmp_path, silent), SamplerSettings("flow-euler", 3, scale)
    plan = replace(PLAN, steps=4, evaluate_every=4)
    return RewardTask(base, Policy(base, rank), PROMPTS, PROMPTS[:1], Brightness(), kl, plan, run, 2, sampling)


@pytest.mark.parametrize(("family", "scale"), [("sd3", 3.0), ("flux", 2.0)])
def test_rewards_rise_through_the_samplers_of_flows(family: str, scale: float, tmp_path: Path) -> None:
    pipe, side = trainable(family)
    base = Base(pipe, side)
    curve = train_draft(task_of(base, tmp_path / "draft", scale, rank=None), keep=2)
    assert curve.held_out[-1] < curve.held_out[0]
    late = task_of(base, tmp_path / "refl", scale, kl=0.1)
    assert train_refl(late, window=(2, 3)).held_out[-1] < curve.held_out[0]


def test_a_flow_stopped_early_is_at_its_estimate_of_the_clean_picture(tmp_path: Path) -> None:
    pipe, side = trainable("sd3")
    base = Base(pipe, side)
    task = task_of(base, tmp_path, 1.0)
    with torch.no_grad():
        value = objective(task, base.denoiser, PROMPTS, row_generators(0, range(2)), Truncation(1, 1))
        noise = task.sampling.noise(base, row_generators(0, range(2)))
        told = base.call.encode_prompts(PROMPTS)
        velocity = base.call.predict(base.denoiser, noise, torch.full((2,), 1000.0), told)
        config = pipe.vae.config
        pictures = pipe.vae.decode((noise - velocity) / config.scaling_factor + config.shift_factor).sample
    clean = (pictures / 2 + 0.5).clamp(0, 1)
    assert value.item() == pytest.approx(-clean.mean().item(), abs=1e-5)


# -- times ------------------------------------------------------------------------------------------------------------


def test_times_of_a_flow_are_spread_and_shifted_as_is_said() -> None:
    generator, steps = torch.Generator().manual_seed(0), 4000
    for density, shift in (("uniform", 1.0), ("uniform", 3.0), ("logit-normal", 3.0)):
        noising = FlowNoising(1000, shift, density)  # type: ignore[arg-type]
        times = torch.cat([noising.drawn(generator) for _ in range(steps)]) / 1000
        share = times / (shift - (shift - 1) * times)  # the shift undone
        assert bool((times > 0).all() and (times < 1).all())
        expected = share.logit().std().item()
        # The logistic distribution's standard deviation is π/√3, the normal's 1.
        assert expected == pytest.approx(math.pi / math.sqrt(3) if density == "uniform" else 1.0, rel=0.05)
        assert share.mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_error_of_a_velocity_is_that_of_noise_over_the_share_of_the_picture() -> None:
    noising, generator = FlowNoising(1000, 1.0), torch.Generator().manual_seed(0)
    latents, noise, predicted = torch.randn(3, 2, 4, 4, 4, generator=generator, dtype=torch.float64)
    times = torch.tensor([100.0, 800.0])
    noisy, sigma = noising.noised(latents, noise, times), (times / 1000).view(-1, 1, 1, 1)
    implied = noisy + (1 - sigma) * predicted  # ε of a velocity
    off = (predicted - noising.target(latents, noise, times)).square()
    assert torch.allclose((implied - noise).square(), (1 - sigma) ** 2 * off)


def test_the_shift_is_that_of_the_scheduler_and_the_density_is_of_flows() -> None:
    assert noising_of(FlowMatchEulerDiscreteScheduler(shift=2.5)).shift == 2.5  # type: ignore[attr-defined]
    moving = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert noising_of(moving, mu=0.5).shift == pytest.approx(math.exp(0.5))  # type: ignore[attr-defined]
    wan = built("wan")[0].scheduler
    assert isinstance(noising := noising_of(wan), FlowNoising) and noising.shift == 3.0
    pixart = trainable("pixart")[0].scheduler
    assert isinstance(noising_of(pixart), DiffusionNoising)
    with pytest.raises(ValueError, match=naming("--density logit-normal", "epsilon")):
        noising_of(pixart, "logit-normal")


# -- what is refused, and what is warned of ---------------------------------------------------------------------------


def test_pipelines_that_cannot_be_captured_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=naming("WanPipeline", "transformer", "transformer_2")):
        Base(built("wan22")[0])
    parts = trainable("sd3")[0].components
    with pytest.raises(ValueError, match=naming("StableDiffusion3Img2ImgPipeline")):
        Base(StableDiffusion3Img2ImgPipeline(**parts), 16)
    with pytest.raises(ValueError, match=naming("StableVideoDiffusionPipeline", "prompt")):
        Base(built("stable_video_diffusion")[0])


def test_methods_of_noise_are_refused_for_flows() -> None:
    pipe, _ = trainable("sd3")
    for method in ("mapo", "ddpo"):
        with pytest.raises(ValueError, match=naming(METHODS[method].title, "some/flow", "dpo")):
            fitted(replace(usual("some/flow", method), base="some/flow"), pipe)
    assert fitted(replace(usual("some/flow", "draft"), base="x"), pipe).sampling["scheduler"] == "flow-euler"


def test_a_cache_of_another_vae_is_refused(tmp_path: Path) -> None:
    pipe, side = trainable("sd3")
    pairs_folder(tmp_path / "pairs")
    settings = settings_for(tmp_path, side)
    cache = prepare_pairs(pipe, settings, tmp_path, None, 0, silent)
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match=naming("vae", cache.settings["vae"])):  # type: ignore[union-attr]
        prepare_pairs(pipe, settings, tmp_path, None, 0, silent)


def test_an_anchor_with_another_shift_is_warned_of(tmp_path: Path) -> None:
    pipe, _ = trainable("sd3")
    other, _ = trainable("sd3")
    with torch.no_grad():
        next(other.transformer.parameters()).add_(0.1)
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
    other.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=naming(1.5, 3)):
        load_anchor(tmp_path, pipe)


def test_a_lora_of_a_denoiser_that_takes_none_is_refused() -> None:
    with pytest.raises(ValueError, match=naming("PixArtTransformer2DModel", "--lora-rank")):
        Policy(Base(trainable("pixart")[0]), lora_rank=2)


def test_noise_in_every_step_of_a_distilled_model_is_warned_of() -> None:
    pipe, _ = trainable("sd3")
    own = pipe.scheduler
    for scheduler, named in (("flow-sde", "black/turbo"), ("flow-sde", "black/plain"), ("flow-euler", "black/turbo")):
        pipe.scheduler = pipelines.scheduler_like(own, scheduler)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            pipelines.warn_of_noise(named, pipe, pipe.scheduler)
        said = [warning for warning in heard if "flow-euler" in str(warning.message)]
        assert bool(said) == (scheduler == "flow-sde" and "turbo" in named)


def test_a_rehearsal_tries_one_step_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, side = trainable("sd3")
    pairs_folder(tmp_path / "pairs")
    before, whole = sorted(tmp_path.rglob("*")), pipe.transformer
    said = "\n".join(rehearse(settings_for(tmp_path, side), pipe))
    assert sorted(tmp_path.rglob("*")) == before and pipe.transformer is whole
    assert not hasattr(whole, "peft_config")
    for value in ("StableDiffusion3Pipeline", "num_layers = 1", "6 rows", "logit-normal", "one step: loss", "GB"):
        assert value in said, said
    weights = sum(parameter.numel() for parameter in whole.parameters())
    assert f"{weights:,} weights" in said
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\na dog\na cat")
    drawn = replace(settings_for(tmp_path, side), method="draft", data=str(prompts), reward="brightness", held_out=1)
    monkeypatch.setattr("deradiff.alignment.rehearsal.reward_of", lambda *_: Brightness())
    assert "brightness says" in "\n".join(rehearse(drawn, pipe))
    with pytest.raises(ValueError, match=naming(9, 3, "--held-out")):
        list(rehearse(replace(drawn, held_out=9), pipe))
