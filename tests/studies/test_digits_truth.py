"""The digits' ground truth: rewards to judge by, weights of a pool, pairs from it, and a miniature of the training."""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import deradiff
from deradiff.alignment.rwr import tilted_weights
from deradiff.alignment.training import TrainingPlan
from deradiff.worlds import digits
from deradiff.worlds.digits import captions, classifier, data, quality
from deradiff.worlds.digits.rewards import BOLD_POINTS, INK_POINTS, INK_SCORES, BoldReward, InkReward, boldness
from messages import naming
from studies.digits.truth_models import Pool, TruthSettings, describe_weights, draw_pairs, load_pool, train_truth

# --- rewards


def painted(ink: str, paper: str, seed: int = 3) -> torch.Tensor:
    maps = data.render("held-out", 20, seed).ink_maps
    return data.paint(maps, torch.tensor([data.INKS[ink]] * 20), torch.tensor([data.PAPERS[paper]] * 20))


def test_ink_reward_ranks_the_inks_as_scored_on_every_paper() -> None:
    assert set(INK_SCORES) == set(data.INKS) and len(set(INK_SCORES.values())) == len(data.INKS)
    for ink, paper in itertools.product(data.INKS, data.PAPERS):
        found = InkReward()(painted(ink, paper), [""] * 20)
        assert found == pytest.approx([INK_POINTS * INK_SCORES[ink]] * 20, abs=0.02), (ink, paper)


def test_ink_reward_of_samples_is_the_score_of_the_ink_that_the_classifier_reads() -> None:
    pipe, prompts = digits.load_pipeline(), ["a seven", "a blue three on pink paper"] * 20
    images = quality.draw(pipe, prompts, seed=4, steps=10, guidance_scale=1.0)
    seen = classifier.nearest(classifier.colours(images)[0], data.INKS)
    scores = torch.tensor([INK_SCORES[name] for name in data.INKS])[seen]
    assert (InkReward()(images, prompts) - INK_POINTS * scores).abs().quantile(0.9) < 0.1


@pytest.mark.parametrize("reward", [BoldReward(), InkReward()])
def test_rewards_rise_along_their_gradient(reward: BoldReward | InkReward) -> None:
    images = (0.9 * painted("purple", "mint") + 0.05).requires_grad_()
    prompts = ["a purple seven"] * len(images)
    before = reward(images, prompts)
    before.sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert (reward((images + 0.03 * images.grad.sign()).clamp(0, 1), prompts) > before).all()
    with pytest.raises(ValueError, match=naming(20, "images", 1, "prompts")):
        reward(images, ["a purple seven"])


def test_gradient_is_finite_on_bare_paper() -> None:
    bare = torch.ones(2, 3, 32, 32).requires_grad_()
    InkReward()(bare, ["", ""]).sum().backward()
    assert bare.grad is not None and bare.grad.isfinite().all()


def test_bold_reward_is_boldness_in_points() -> None:
    images = painted("black", "white")
    assert torch.equal(BoldReward()(images, [""] * 20), BOLD_POINTS * boldness(images))


# --- weights


def hand_made(prompts: list[str], bold: list[float]) -> Pool:
    return Pool(torch.randn(len(prompts), 4, 8, 8), prompts, {"bold": torch.tensor(bold)})


def test_description_names_the_smallest_condition_and_what_is_to_be_reached() -> None:
    # Two wordings of one request are one condition.
    prompts = ["a seven", "the digit seven", "a red seven", "a handwritten red seven", "a red seven"]
    pool = hand_made(prompts, [0.0, 1.0, 1.0, 1.0, 1.0])
    assert pool.conditions().tolist() == [0, 0, 1, 1, 1]
    weights = tilted_weights(pool.weighted_sum({"bold": 2.0}), pool.conditions())
    low, high = torch.tensor([-2.0, 2.0], dtype=torch.float64).exp().tolist()
    assert weights.tolist() == pytest.approx([low, high, 1, 1, 1])
    found = describe_weights(pool, weights)
    assert found["effective_samples"] == pytest.approx((low + high + 3) ** 2 / (low**2 + high**2 + 3))
    of_two = pytest.approx((low + high) ** 2 / (low**2 + high**2))
    smallest = {"digit": 7, "ink": None, "paper": None, "samples": 2, "effective_samples": of_two}
    assert found["smallest_condition"] == smallest
    assert found["mean_rewards"]["bold"]["reference"]["value"] == pytest.approx(0.8)
    assert found["mean_rewards"]["bold"]["tilted"]["value"] == pytest.approx((high + 3) / (low + high + 3))
    assert describe_weights(pool, tilted_weights(pool.weighted_sum({}), pool.conditions()))[
        "effective_samples"
    ] == pytest.approx(5)


# --- pairs


def test_pairs_answer_one_request_use_nothing_twice_and_follow_the_preference() -> None:
    prompts = captions.sample_prompts(3000, seed=7)
    pool = hand_made(prompts, torch.randn(3000).tolist())
    # Each latent says in its first element which sample it is.
    pool.latents[:, 0, 0, 0] = torch.arange(3000.0)
    pairs = draw_pairs(pool, pool.rewards["bold"], 0.5, torch.Generator().manual_seed(8))
    members = pairs.latents[:, :, 0, 0, 0].long()
    assert len(members.flatten().unique()) == members.numel() > 2500
    parts = [captions.parse(prompt) for prompt in prompts]
    assert all(parts[first] == parts[second] for first, second in members.tolist())
    assert torch.equal(pairs.rewards, pool.rewards["bold"][members])
    expected = torch.sigmoid((pairs.rewards[:, 0] - pairs.rewards[:, 1]) / 0.5)
    error = (expected * (1 - expected)).sum().sqrt() / len(expected)
    better = (expected > 0.5) == pairs.first_wins
    assert abs((pairs.first_wins.float() - expected).mean()) < 4 * error
    assert abs(better.float().mean() - torch.maximum(expected, 1 - expected).mean()) < 4 * error


# --- the miniature


class Interrupted(Exception):
    """Stands for a machine that went away."""


def miniature() -> TruthSettings:
    """Everything with so few samples and steps that it takes seconds; no patience, so that the last step counts."""
    plan = TrainingPlan(3, 1e-3, warmup=2, average=0.9, evaluate_every=1, checkpoint_seconds=0)
    return TruthSettings(
        samples=150,
        samples_chunk=75,
        sampling_batch=75,
        sampling_steps=2,
        batch=4,
        held_out_samples=8,
        held_out_pairs=4,
        measured_samples=8,
        weighted=plan,
        dpo=plan,
        targets=({"bold": 0.5, "ink": 0.25}, {}),
    )


@pytest.mark.cases(0)
def test_miniature_is_interrupted_everywhere_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, broken, settings = tmp_path / "whole", tmp_path / "broken", miniature()
    train_truth(whole, settings, lambda *_: None, workers=1)
    seen: set[str] = set()

    def interrupt_once(stage: str, done: int, planned: int, line: str) -> None:
        # Weighted models are trained by the same code.
        if done == 2 and stage not in seen and "control" not in stage:
            seen.add(stage)
            raise Interrupted

    for _ in range(3):
        with pytest.raises(Interrupted):
            train_truth(broken, settings, interrupt_once, workers=1)
    train_truth(broken, settings, interrupt_once, workers=1)
    assert len(seen) == 3  # the pool, a weighted model, one by DPO

    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(broken) for path in broken.rglob("*") if path.is_file())
    assert all((whole / path).read_bytes() == (broken / path).read_bytes() for path in files)
    mixed = "bold-0.5+ink-0.25"
    assert {path.parent for path in files if path.name == "truth.json"} == {
        Path("weighted", mixed),
        Path("weighted", "control"),
        Path("dpo", mixed),
    }

    pool = load_pool(whole, settings)
    assert pool.captions == captions.sample_prompts(150, settings.seed) and len(pool.latents) == 150
    record = json.loads((whole / "weighted" / mixed / "truth.json").read_text())
    tilts = {"bold": 0.5 / settings.betas["bold"], "ink": 0.25 / settings.betas["ink"]}
    assert record["tilts"] == tilts and record["curve"]["step"] == [0, 1, 2, 3]
    assert 1 < record["effective_samples"] < 150
    assert record["reached"]["ink"]["reference"] == asdict(quality.mean(pool.rewards["ink"][:8]))
    assert record["reached"]["ink"]["model"] != record["reached"]["ink"]["reference"]
    by_dpo = json.loads((whole / "dpo" / mixed / "truth.json").read_text())
    assert by_dpo["β"] == settings.dpo_beta / 0.5 and by_dpo["pairs"] > settings.held_out_pairs

    pipe, prompt = digits.load_pipeline(), {"prompt": ["a seven"], "num_inference_steps": 2, "output_type": "latent"}
    reference = pipe(**prompt, generator=torch.manual_seed(0)).images
    deradiff.realign(pipe, whole / "weighted" / mixed, lam=1.0)
    assert not torch.equal(pipe(**prompt, generator=torch.manual_seed(0)).images, reference)

    with pytest.raises(ValueError, match=naming(broken, "seed", 1)):
        train_truth(broken, replace(settings, seed=1), lambda *_: None)


def test_one_model_is_trained_alone(tmp_path: Path) -> None:
    train_truth(tmp_path, miniature(), lambda *_: None, workers=1, only=["weighted/control"])
    assert [path.parent.name for path in tmp_path.rglob("truth.json")] == ["control"]
    with pytest.raises(ValueError, match=naming("dpo/ink-1", "weighted/bold-0.5")):
        train_truth(tmp_path, miniature(), lambda *_: None, workers=1, only=["dpo/ink-1"])


def test_a_target_without_an_anchor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("'vivid'", "bold, ink")):
        train_truth(tmp_path, replace(miniature(), targets=({"vivid": 1.0},)), lambda *_: None)
