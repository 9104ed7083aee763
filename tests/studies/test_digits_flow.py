"""The digits' flow: what its training computes is what its pipeline draws by, and a miniature of the build."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import nn

from deradiff.alignment.training import TrainingPlan
from deradiff.worlds import digits
from deradiff.worlds.digits import quality
from messages import naming
from studies.digits.models import token_ids
from studies.digits_flow import models
from studies.digits_flow.build import build
from studies.digits_flow.settings import FlowSettings
from tiny import seeded

CAPTIONS = ["a blue seven", "a red two on pink paper", ""]
PLAN = TrainingPlan(steps=4, learning_rate=1e-3, warmup=1, evaluate_every=2, checkpoint_seconds=0)
SMALL = FlowSettings()
MINIATURE = FlowSettings(
    workers=1,
    batch=8,
    width=16,
    layers=2,
    pictures=32,
    held_out_pictures=16,
    reference=PLAN,
    pairs=6,
    betas=(100.0,),
    dpo=replace(SMALL.dpo, plan=replace(PLAN, steps=2), batch=2, held_out=2),
    lora=replace(SMALL.lora, plan=replace(PLAN, steps=2), batch=2, held_out=2),
    grpo=replace(SMALL.grpo, plan=replace(PLAN, steps=2), batch=8, held_out=2),
    measured_samples=20,
)


class Interrupted(Exception):
    pass


def silent(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    """With random weights that are not those of the start, which predict nothing."""
    with seeded(0):
        denoiser = models.transformer(16, 2)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        encoders = nn.ModuleList([models.text_encoder() for _ in range(2)])
    vae = AutoencoderKL.from_pretrained(digits.reference_path() / "vae")
    return models.pipeline(vae, encoders.eval(), denoiser.eval())


@torch.no_grad()
def test_training_tells_the_transformer_what_the_pipeline_does(pipe: StableDiffusion3Pipeline) -> None:
    told, _, pooled, _ = pipe.encode_prompt(CAPTIONS, None, None, device=torch.device("cpu"))
    encoders, tokens = nn.ModuleList([pipe.text_encoder, pipe.text_encoder_2]), token_ids(CAPTIONS)
    context, both = models.embedded(encoders, tokens, models.ABSENT)
    assert torch.equal(context, told) and torch.equal(both, pooled)

    latents, times = torch.randn(3, 4, 8, 8), torch.tensor([20.0, 500.0, 1000.0])
    usual = pipe.transformer(latents, told, pooled, times).sample
    context, _ = models.embedded(encoders, tokens)
    before = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(models.EqualTokens())
    short = pipe.transformer(latents, context, pooled, times).sample
    pipe.transformer.set_attn_processor(models.EqualTokens(1))
    forgetful = pipe.transformer(latents, context, pooled, times).sample
    pipe.transformer.set_attn_processor(before)
    torch.testing.assert_close(short, usual, rtol=1e-4, atol=1e-4)
    assert (forgetful - usual).abs().max() > 0.1


def test_its_decoder_is_the_digits_own(pipe: StableDiffusion3Pipeline) -> None:
    images = quality.draw(pipe, CAPTIONS, seed=3, steps=2)
    assert images.shape == (3, 3, 32, 32) and bool(images.std(0).gt(0).any())
    latents = torch.randn(2, 4, 8, 8)
    theirs, ours = digits.load_pipeline().vae, pipe.vae
    assert ours.config.scaling_factor == 1.0 and ours.config.shift_factor == 0.0
    torch.testing.assert_close(ours.decode(latents).sample, theirs.decode(latents).sample)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("build"), MINIATURE, silent)


def weights_in(folder: Path) -> list[Path]:
    return sorted(file.relative_to(folder) for file in folder.rglob("*.safetensors"))


def test_a_miniature_makes_all_that_ships(whole: Path) -> None:
    names = ("reference", "anchors", "lora-beta-100", "lora-grpo")
    assert {file.parts[0] for file in weights_in(whole)} == {*names}
    anchor = load_file(whole / "anchors" / "beta-100" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in anchor.values()} == {torch.float16}
    record = json.loads((whole / "build.json").read_text())
    assert [row["model"] for row in record["anchors"]] == ["reference", "beta-100", *names[2:]]
    assert {"reference", "beta-100", *names[2:]} == json.loads((whole / "curves.json").read_text()).keys()
    with pytest.raises(ValueError, match=naming("seed")):
        build(whole.parent, replace(MINIATURE, seed=1), silent)


@pytest.mark.cases(0)
def test_a_miniature_is_interrupted_and_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    def interrupting(_: str, done: int, *__: Any) -> None:
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        build(tmp_path, MINIATURE, interrupting)
    again = build(tmp_path, MINIATURE, silent)
    assert all((whole / file).read_bytes() == (again / file).read_bytes() for file in weights_in(whole))
