"""Reward-weighted denoising: the weights, what they draw, the loss by hand, and where training leads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from deradiff.alignment.base import Base, Policy
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.lora_targets import WIDER_TARGETS
from deradiff.alignment.own_samples import draw_samples
from deradiff.alignment.rwr import ReferenceSamples, pick, tilted_weights, train_rwr, weighted_mean
from deradiff.alignment.sampling import SamplerSettings
from deradiff.alignment.training import LossCurve, TrainingPlan, TrainingRun
from deradiff.worlds import digits
from deradiff.worlds.digits import captions
from deradiff.worlds.digits.rewards import BoldReward
from messages import naming
from test_sampling_gradients import PROMPTS, base_of

PLAN = TrainingPlan(
    steps=4, learning_rate=1e-3, warmup=0, average=0.5, evaluate_every=2, patience=4, checkpoint_seconds=0, max_norm=1.0
)

# --- weights


def normal_pool(count: int, condition_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores drawn from N(offset of the condition, 1): tilting them by e^score moves their mean by exactly 1."""
    generator = torch.Generator().manual_seed(5)
    conditions = torch.arange(count) // condition_size
    return torch.randn(count, generator=generator, dtype=torch.float64) + 3 * (conditions % 4), conditions


def test_weights_are_the_exponential_over_its_mean_among_the_others() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 5.0, 7.0, 7.0])
    weights = tilted_weights(scores, torch.tensor([0, 0, 0, 1, 2, 2]))
    e = torch.e
    by_hand = [2 / (e + e**2), e / ((1 + e**2) / 2), e**2 / ((1 + e) / 2), 1.0, 1.0, 1.0]
    assert weights.tolist() == pytest.approx(by_hand, rel=1e-6)


def test_a_conditions_level_does_not_matter_even_far_beyond_what_exponentials_hold() -> None:
    scores, conditions = normal_pool(400, 20)
    shifted = scores + 900.0 * (conditions - 10)
    assert torch.allclose(tilted_weights(scores, conditions), tilted_weights(shifted, conditions), rtol=1e-9)
    with pytest.raises(ValueError, match="β"):
        tilted_weights(torch.tensor([0.0, 900.0]), torch.tensor([0, 0]))


def test_small_conditions_do_not_damp_the_tilt() -> None:
    scores, conditions = normal_pool(80_000, 10)
    own = scores - 3 * (conditions % 4)
    found = weighted_mean(own, tilted_weights(scores, conditions))
    assert abs(found.value - 1) < 4 * found.error and found.error < 0.02
    # Divided by a mean that includes themselves, they fall short by 1/(n f) = e/10 or so of the shift.
    assert weighted_mean(own, torch.softmax(scores.view(-1, 10), 1).flatten()).value < 0.9


def test_rows_are_drawn_as_their_weights_demand() -> None:
    scores, conditions = normal_pool(400, 40)
    weights = tilted_weights(scores, conditions)
    drawn = scores[pick(weights, row_generators(6, range(20_000)))]
    exact = weighted_mean(scores, weights).value
    assert drawn.mean().item() == pytest.approx(exact, abs=4 * drawn.std().item() / 20_000**0.5)
    assert exact > scores.mean() + 0.7
    assert set(pick(torch.tensor([0.0, 1.0, 0.0]), row_generators(1, range(50)))) == {1}


# --- training


class Interrupted(Exception):
    """Stands for a machine that went away."""


def samples_of(count: int = 12) -> ReferenceSamples:
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return ReferenceSamples(latents, [PROMPTS[i % 2] for i in range(count)])


def trained(
    folder: Path,
    kind: str = "sd",
    rank: int | None = 2,
    stop_at: int | None = None,
    plan: TrainingPlan = PLAN,
    **changed: Any,
) -> tuple[dict[str, torch.Tensor], LossCurve]:
    base = base_of(kind)
    policy = Policy(base, rank, seed=4)

    def report(done: int, planned: int, line: str) -> None:
        if done == stop_at:
            raise Interrupted

    given: dict[str, Any] = {"samples": samples_of(), "weights": torch.arange(12.0), "held_out": 3} | changed
    curve = train_rwr(
        base,
        policy,
        given["samples"],
        given["weights"],
        plan,
        held_out=given["held_out"],
        batch=4,
        dropout=0.2,
        per_pass=2,
        run=TrainingRun(
            seed=7,
            checkpoint=folder / "checkpoint",
            report=report,
        ),
    )
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}, curve


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_held_out_loss_is_the_weighted_error_by_hand(tmp_path: Path, kind: str) -> None:
    _, curve = trained(tmp_path, kind, plan=replace(PLAN, steps=1))
    base, samples, weights = base_of(kind), samples_of(), torch.arange(12.0)
    total = 0.0
    for row, generator in enumerate(row_generators(7, range(9, 12), "held out"), 9):
        noise = torch.randn(4, 8, 8, generator=generator)
        t = torch.randint(1000, (1,), generator=generator)
        kept = DDPMScheduler.from_config(base.pipe.scheduler.config).alphas_cumprod[t]
        noisy = kept.sqrt() * samples.latents[row] + (1 - kept).sqrt() * noise
        with torch.no_grad():
            prediction = base.call.predict(
                base.denoiser, noisy[None], t, base.call.encode_prompts([samples.prompts[row]])
            )
        total += (weights[row] * (prediction[0] - noise).square().mean()).item()
    assert curve.held_out[0] == pytest.approx(total / (9 + 10 + 11), rel=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.cases(1)
def test_interrupted_training_ends_with_the_same_bits(tmp_path: Path, rank: int | None) -> None:
    whole, curve = trained(tmp_path / "whole", rank=rank)
    with pytest.raises(Interrupted):
        trained(tmp_path / "broken", rank=rank, stop_at=4)
    again, same = trained(tmp_path / "broken", rank=rank)
    assert same == curve and all(torch.equal(again[name], value) for name, value in whole.items())


def test_micro_batches_only_round_differently(tmp_path: Path) -> None:
    plan = replace(PLAN, steps=2)
    whole, _ = trained(tmp_path / "whole", plan=plan)
    parts, _ = trained(tmp_path / "parts", plan=replace(plan, accumulate=2))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weights": torch.ones(3)}, naming(12, 3, "weights")),
        ({"held_out": 0}, naming("0 of 12")),
        ({"held_out": 12}, naming("12 of 12")),
        ({"weights": -torch.ones(12)}, naming("weights", "zero")),
        ({"weights": torch.full((12,), torch.inf)}, naming("weights", "zero")),
        ({"weights": torch.zeros(12)}, naming("weights", "zero")),
    ],
)
def test_wrong_input_is_said(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trained(tmp_path, **changed)


# --- own samples


def test_samples_are_drawn_once_and_go_on_where_they_were(tmp_path: Path) -> None:
    base, prompts, sampling = (
        Base(digits.load_pipeline()),
        captions.sample_prompts(3, 1),
        SamplerSettings("ddim", 2, 1.5),
    )

    def interrupt(done: int, planned: int, line: str) -> None:
        raise Interrupted

    def draw(folder: Path, **others: Any) -> Any:
        settings = {"seed": 2, "chunk": 5} | others
        return draw_samples(folder, base, "digits", prompts, 4, BoldReward(), sampling, **settings)

    whole = draw(tmp_path / "whole")
    with pytest.raises(Interrupted):
        draw(tmp_path / "broken", report=interrupt)
    broken = draw(tmp_path / "broken")
    assert torch.equal(whole.samples.latents, broken.samples.latents) and torch.equal(whole.rewards, broken.rewards)
    assert whole.samples.prompts == [text for text in prompts for _ in range(4)]
    assert whole.conditions().tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert whole.fingerprint == broken.fingerprint and json.dumps(whole.fingerprint)
    other = draw(tmp_path / "other", chunk=12)
    torch.testing.assert_close(other.samples.latents, whole.samples.latents, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match=naming(tmp_path / "whole", "seed 2", 3)):
        draw(tmp_path / "whole", seed=3)
    with pytest.raises(ValueError, match=naming("0 prompts", 4)):
        draw_samples(tmp_path / "none", base, "digits", [], 4, BoldReward(), sampling, seed=0)


def test_a_folder_of_an_earlier_version_did_not_say_full_noise_and_goes_on(tmp_path: Path) -> None:
    base, prompts = Base(digits.load_pipeline()), captions.sample_prompts(2, 1)
    settings: dict[str, Any] = {"reward": BoldReward(), "sampling": SamplerSettings("ddim", 2, 1.0), "seed": 0}
    first = draw_samples(tmp_path, base, "digits", prompts, 2, **settings)
    assert "eta" not in json.loads((tmp_path / "settings.json").read_text()) and "eta" not in first.fingerprint
    quieter = settings | {"sampling": SamplerSettings("ddim", 2, 1.0, eta=0.5)}
    with pytest.raises(ValueError, match=naming("eta", 0.5)):
        draw_samples(tmp_path, base, "digits", prompts, 2, **quieter)


def test_training_on_bold_samples_makes_bold_pictures(tmp_path: Path) -> None:
    base, reward, sampling = Base(digits.load_pipeline()), BoldReward(), SamplerSettings("ddim", 4, 1.0)
    drawn = draw_samples(tmp_path / "s", base, "digits", captions.sample_prompts(12, 1), 8, reward, sampling, seed=2)
    weights = tilted_weights(drawn.rewards / 0.1, drawn.conditions())
    policy = Policy(base, 8, WIDER_TARGETS)
    train_rwr(
        base,
        policy,
        drawn.samples,
        weights,
        TrainingPlan(steps=25, learning_rate=3e-3, warmup=0, average=0.0),
        held_out=8,
        batch=16,
        dropout=0.1,
        run=TrainingRun(
            seed=3,
            checkpoint=tmp_path / "c",
            report=lambda *_: None,
        ),
    )
    after = draw_samples(tmp_path / "after", base, "tuned", captions.sample_prompts(12, 1), 8, reward, sampling, seed=2)
    gained = (after.rewards - drawn.rewards).view(12, 8).mean(1)
    assert gained.mean() > 2 * gained.std() / 12**0.5
