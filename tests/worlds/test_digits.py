"""The digits world: data, captions, reward, what ships, and a miniature of the build that made it."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from deradiff.alignment.loop import train
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun
from deradiff.worlds import digits
from deradiff.worlds.digits import captions, classifier, data, quality
from deradiff.worlds.digits.rewards import DigitsReward, boldness, vividness
from messages import naming
from studies.digits.build import build
from studies.digits.models import token_ids, tokenizer
from studies.digits.settings import Settings

# --- data


def test_split_is_fixed_disjoint_and_complete() -> None:
    train_split, held_out = data.load("train"), data.load("held-out")
    assert (len(train_split.labels), len(held_out.labels)) == (1437, 360)
    # Handwriting repeats nowhere in the data set, so shared digits would be equal rows.
    assert torch.cdist(train_split.strokes.flatten(1), held_out.strokes.flatten(1)).min() > 0.1
    counts = torch.bincount(held_out.labels)
    assert counts.min() >= 34 and counts.max() <= 38
    with pytest.raises(ValueError, match="'test'"):
        data.load("test")


def test_rendering_depends_on_the_seed_alone_and_stays_in_range() -> None:
    first, again, other = data.render("train", 64, 5), data.render("train", 64, 5), data.render("train", 64, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.images, other.images)
    assert first.images.shape == (64, 3, 32, 32) and first.images.min() >= 0 and first.images.max() <= 1


def test_classifier_reads_real_pictures() -> None:
    real = data.render("held-out", 720, 7)
    seen = classifier.read(real.images)
    assert (seen.digits == real.digits).float().mean() > 0.96
    assert (seen.inks == real.inks).float().mean() > 0.99
    assert (seen.papers == real.papers).float().mean() > 0.99
    error = (classifier.recover_ink_map(real.images) - real.ink_maps).abs().mean()
    assert error < 0.02


# --- captions


def all_parts() -> list[captions.Parts]:
    combinations = itertools.product(range(10), [*data.INKS, None], [*data.PAPERS, None])
    return [captions.Parts(*combination) for combination in combinations]


def test_captions_are_parsed_back() -> None:
    for parts, wording in itertools.product(all_parts(), range(3)):
        assert captions.parse(captions.caption(parts, wording)) == parts
    with pytest.raises(ValueError, match=naming("'a blue elephant'")):
        captions.parse("a blue elephant")


def test_every_caption_has_its_own_tokens_and_no_unknown_ones() -> None:
    texts = [captions.caption(parts, wording) for parts in all_parts() for wording in range(3)]
    ids = token_ids([*texts, ""])
    assert ids.shape == (len(texts) + 1, digits.MAX_LENGTH)
    assert len(set(map(tuple, ids.tolist()))) == len(texts) + 1
    words = tokenizer()
    for text, row in zip(texts, ids.tolist(), strict=False):
        # start, one token per word, end: nothing unknown, nothing cut
        assert row[: len(text.split()) + 2] == [0, *words.convert_tokens_to_ids([w + "</w>" for w in text.split()]), 1]
        assert 1 not in row[1 : len(text.split()) + 1]


# --- reward


def test_reward_grows_with_boldness_and_with_vividness_and_is_differentiable() -> None:
    maps = data.render("train", 32, 3).ink_maps
    blue, grey = torch.tensor([data.INKS["blue"]] * 32), torch.tensor([[0.3, 0.3, 0.3]] * 32)
    white = torch.tensor([data.PAPERS["white"]] * 32)
    thin, thick = data.paint(maps, blue, white), data.paint(maps.sqrt(), blue, white)
    assert (boldness(thick) > boldness(thin)).all()
    assert (vividness(thin) > vividness(data.paint(maps, grey, white))).all()
    reward, prompts = DigitsReward(), ["a blue seven"] * 32
    assert (reward(thick, prompts) > reward(thin, prompts)).all()
    images = thin.clone().requires_grad_()
    reward(images, prompts).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and (images.grad != 0).any(1).any(1).any(1).all()
    step = reward((thin + 0.01 * images.grad.sign()).clamp(0, 1), prompts)
    assert (step > reward(thin, prompts)).all()
    with pytest.raises(ValueError, match=naming(32, "images", 1, "prompts")):
        reward(thin, ["a blue seven"])


# --- what ships


def test_shipped_files_are_safetensors_of_at_most_40_mb() -> None:
    files = [path for path in digits.FILES.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".txt"}
    assert sum(path.stat().st_size for path in files) <= 40e6


def test_shipped_reference_draws_what_the_prompt_says() -> None:
    pipe = digits.load_pipeline()
    assert pipe.tokenizer.model_max_length == digits.MAX_LENGTH
    prompts = captions.sample_prompts(60, seed=9)
    assert torch.equal(
        pipe.tokenizer(prompts, padding="max_length", max_length=digits.MAX_LENGTH, return_tensors="pt").input_ids,
        token_ids(prompts),
    )
    scores = quality.score(quality.draw(pipe, prompts, seed=9, steps=15), prompts)
    assert scores.legible.value >= 0.9 and scores.ink_right.value >= 0.9 and scores.paper_right.value >= 0.9


def test_shipped_anchors_prefer_what_the_reward_prefers() -> None:
    pipe, reward, prompts = digits.load_pipeline(), DigitsReward(), captions.sample_prompts(40, seed=10)

    def mean_reward() -> float:
        return reward(quality.draw(pipe, prompts, seed=10, steps=10), prompts).mean().item()

    found = [mean_reward()]
    for beta in digits.BETAS:
        pipe.unet = UNet2DConditionModel.from_pretrained(digits.anchor_path(beta))
        found.append(mean_reward())
    assert found == sorted(found), "the smaller β, the higher the reward"
    pipe = digits.load_pipeline()
    pipe.load_lora_weights(digits.lora_path(), local_files_only=True)
    assert mean_reward() > found[0]


def test_build_record_describes_what_ships() -> None:
    record = json.loads((digits.FILES / "build.json").read_text())
    curves = json.loads((digits.FILES / "curves.json").read_text())
    assert tuple(record["settings"]["betas"]) == digits.BETAS and record["settings"]["lora_beta"] == digits.LORA_BETA
    assert len(digits.BETAS) == 6
    for beta in digits.BETAS:
        assert curves[f"beta-{beta:g}"]["stopped"] == "flat"
    assert record["stored precision"]["float32"]["error of the difference of weights"] == 0


def test_measured_rewards_rise_as_beta_falls() -> None:
    measured = {row["model"]: row["reward"] for row in json.loads((digits.FILES / "build.json").read_text())["anchors"]}
    rewards = [measured[f"beta-{beta:g}"] for beta in sorted(digits.BETAS, reverse=True)]
    for weaker, stronger in itertools.pairwise([measured["reference"], *rewards]):
        assert stronger["value"] > weaker["value"]
    gained = rewards[-1]["value"] - rewards[0]["value"]
    assert gained > 2 * math.hypot(rewards[-1]["error"], rewards[0]["error"])


def test_unknown_beta_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=naming("β = 3", f"{digits.BETAS[0]:g}")):
        digits.anchor_path(3.0)


# --- the training loop and the build


class Interrupted(Exception):
    """Stands for a machine that went away."""


def quadratic(
    folder: Path, plan: TrainingPlan, report: Callable[[int, int, str], None]
) -> tuple[list[float], LossCurve]:
    """Fit four numbers to noisy targets."""
    trained = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(trained.weight)
    target = torch.tensor([[1.0, -2.0, 0.5, 3.0]])

    def loss(model: nn.Module, generator: torch.Generator, _: BatchPart) -> torch.Tensor:
        x = torch.randn(16, 4, generator=generator)
        return (model(x) - x @ target.T).square().mean()

    curve = train(
        trained,
        loss,
        lambda _: (trained.weight - target).square().sum().item(),
        plan,
        run=TrainingRun(
            seed=3,
            checkpoint=folder / "state",
            report=report,
        ),
    )
    return trained.weight.flatten().tolist(), curve


PLAN = TrainingPlan(
    steps=400, learning_rate=0.05, warmup=5, average=0.9, evaluate_every=20, patience=3, checkpoint_seconds=0
)


def test_training_stops_when_the_held_out_loss_is_flat_and_keeps_the_best(tmp_path: Path) -> None:
    weights, curve = quadratic(tmp_path, replace(PLAN, checkpoint_seconds=1000), lambda *_: None)
    assert curve.stopped == "flat" and curve.step[-1] < 400
    assert curve.kept_step == curve.step[curve.held_out.index(min(curve.held_out))]
    assert weights == pytest.approx([1.0, -2.0, 0.5, 3.0], abs=0.1)
    _, short = quadratic(tmp_path / "..", replace(PLAN, steps=20), lambda *_: None)
    assert short.stopped == "all steps done"


def test_interrupted_training_continues_with_the_same_bits(tmp_path: Path) -> None:
    def interrupt(done: int, planned: int, line: str) -> None:
        if done == 60:
            raise Interrupted

    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    plan = replace(PLAN, steps=90)
    whole = quadratic(tmp_path / "whole", plan, lambda *_: None)
    with pytest.raises(Interrupted):
        quadratic(tmp_path / "broken", plan, interrupt)
    assert (tmp_path / "broken" / "state").exists()
    assert quadratic(tmp_path / "broken", plan, lambda *_: None) == whole


def miniature() -> Settings:
    """The whole build with so few steps and pictures that it takes seconds."""

    def plan(steps: int, patience: int | None = None) -> TrainingPlan:
        return TrainingPlan(
            steps, 1e-3, warmup=2, average=0.9, evaluate_every=1, patience=patience, checkpoint_seconds=0
        )

    return Settings(
        threads=1,
        workers=1,
        batch=4,
        vae_pictures=8,
        vae_batch=2,
        vae=plan(3),
        pictures=8,
        held_out_pictures=4,
        reference=plan(3),
        pairs=4,
        held_out_pairs=2,
        pairs_chunk=2,
        sampling_steps=2,
        betas=(2000.0, 100.0),
        dpo=plan(3, 1),
        lora_beta=100.0,
        lora_rank=2,
        lora=plan(2, 1),
        measured_samples=20,
    )


@pytest.mark.cases(0)
def test_miniature_build_is_interrupted_everywhere_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How good the digits are is measured three times here, and nobody asks: two steps, and few real ones to compare.
    draw = quality.draw
    monkeypatch.setattr(quality, "draw", lambda pipe, prompts, seed, *_, **__: draw(pipe, prompts, seed, steps=2))
    monkeypatch.setattr(quality, "render", lambda split, count, seed: data.render(split, count // 20, seed))
    build(tmp_path / "whole", miniature(), lambda *_: None)
    seen: set[tuple[str, int]] = set()

    def interrupt_once(stage: str, done: int, planned: int, line: str) -> None:
        # The second anchor is trained by the code of the first.
        if done == 2 and stage != "anchor β = 2000" and (stage, done) not in seen:
            seen.add((stage, done))
            raise Interrupted

    for _ in range(6):
        with pytest.raises(Interrupted):
            build(tmp_path / "broken", miniature(), interrupt_once)
    files = build(tmp_path / "broken", miniature(), interrupt_once)
    assert len(seen) == 6  # autoencoder, reference, pairs, an anchor, LoRA, export

    for path in (tmp_path / "whole" / "files").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (files / path.relative_to(tmp_path / "whole" / "files")).read_bytes(), path
    assert not list((tmp_path / "broken").glob("*.pt"))
    with pytest.raises(ValueError, match=naming(tmp_path / "broken", "seed", 1)):
        build(tmp_path / "broken", replace(miniature(), seed=1), interrupt_once)
