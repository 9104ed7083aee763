"""DRaFT-K, AlignProp and ReFL: gradients by finite differences, the KL term, resuming, and a reward that rises."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from deradiff.algorithm.estimates import mean
from deradiff.alignment.base import Base, Policy
from deradiff.alignment.data_order import order, row_generators
from deradiff.alignment.draft import Truncation, drawn_from, objective, train_alignprop, train_draft
from deradiff.alignment.lora_targets import WIDER_TARGETS
from deradiff.alignment.parameters import trainable
from deradiff.alignment.refl import train_refl
from deradiff.alignment.rwr import ReferenceSamples
from deradiff.alignment.sampling import SamplerSettings, conditions, decode, sample, unconditional
from deradiff.alignment.scoring import DroppedReward, RewardTask
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun
from deradiff.worlds import digits
from deradiff.worlds.digits import captions
from deradiff.worlds.digits.rewards import BoldReward
from messages import naming
from test_sampling_gradients import PROMPTS, base_of

PLAN = TrainingPlan(
    steps=4, learning_rate=1e-3, warmup=0, average=0.5, evaluate_every=2, patience=4, checkpoint_seconds=0, max_norm=1.0
)
SAMPLING = SamplerSettings("ddim", 3, 2.0)


class Brightness:
    """How light a picture is, with a curvature, so that its gradient is not the same everywhere."""

    name = "brightness"

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return (images + images.square()).flatten(1).mean(1)


def task_of(base: Base, policy: Policy, kl: float = 0.0, **changed: Any) -> RewardTask:
    run = TrainingRun(0, Path("nowhere"), lambda *_: None)
    given: dict[str, Any] = {"reward": Brightness(), "prompts": PROMPTS, "held_out": ["a tree"], "batch": 2, "run": run}
    return RewardTask(base=base, policy=policy, kl=kl, plan=PLAN, sampling=SAMPLING, **given | changed)


def nudged(policy: Policy, seed: int = 0) -> None:
    """Away from the reference, so that there is a divergence."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(policy.model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def by_hand(base: Base, policy: Policy, latents: torch.Tensor, keep: int, kl: float) -> torch.Tensor:
    """J from the latents before the last `keep` steps, written out."""
    scheduler, prompted, unprompted = SAMPLING.prepared(base), conditions(base, PROMPTS), unconditional(base, 2)
    away = torch.zeros(2, dtype=latents.dtype)
    for t in scheduler.timesteps[SAMPLING.steps - keep :]:
        at = t.expand(2)
        w = SAMPLING.guidance_scale
        with_prompt, without = (base.call.predict(policy.model, latents, at, known) for known in (prompted, unprompted))
        guided = w * with_prompt + (1 - w) * without
        with policy.reference(policy.model) as reference:
            asked, free = (base.call.predict(reference, latents, at, known) for known in (prompted, unprompted))
        away = away + (guided - w * asked - (1 - w) * free).square().sum((1, 2, 3)) / latents[0].numel()
        latents = scheduler.step(guided, t, latents).prev_sample
    return (kl * away - Brightness()(decode(base, latents), PROMPTS)).mean()


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.cases(2)
def test_the_gradient_is_that_of_finite_differences(rank: int | None, keep: int) -> None:
    base = base_of(dtype=torch.float64)
    policy = Policy(base, rank, seed=1)
    policy.model.double()
    nudged(policy)
    kl = 5.0
    found = objective(task_of(base, policy, kl), policy.model, PROMPTS, row_generators(2, range(2)), Truncation(keep))
    found.backward()
    parameters: list[torch.Tensor] = [*trainable(policy.model)]
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    gradient = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
    with torch.no_grad():
        noise = SAMPLING.noise(base, row_generators(2, range(2)))
        before = noise
        if keep < SAMPLING.steps:
            scheduler, prompted, unprompted = SAMPLING.prepared(base), conditions(base, PROMPTS), unconditional(base, 2)
            for t in scheduler.timesteps[: SAMPLING.steps - keep]:
                at = t.expand(2)
                without = base.call.predict(policy.model, before, at, unprompted)
                guided = without + SAMPLING.guidance_scale * (
                    base.call.predict(policy.model, before, at, prompted) - without
                )
                before = scheduler.step(guided, t, before).prev_sample

        def moved(size: float) -> float:
            torch._foreach_add_(parameters, direction, alpha=size)
            value = by_hand(base, policy, before, keep, kl).item()
            torch._foreach_add_(parameters, direction, alpha=-size)
            return value

        assert found.item() == pytest.approx(moved(0.0), rel=1e-6)
        assert gradient == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-4)


def test_checkpointed_activations_change_no_gradient() -> None:
    found = []
    for recomputed in (False, True):
        base = base_of(dtype=torch.float64)
        policy = Policy(base, 2, seed=1)
        policy.model.double()
        nudged(policy)
        if recomputed:
            policy.model.enable_gradient_checkpointing()
        task, generators = task_of(base, policy, 100.0), row_generators(2, range(2))
        objective(task, policy.model, PROMPTS, generators, Truncation(2)).backward()
        found.append([p.grad for p in trainable(policy.model)])
        assert base.denoiser.is_gradient_checkpointing == recomputed
    for plain, anew in zip(*found, strict=True):
        torch.testing.assert_close(plain, anew)


@pytest.mark.parametrize("rank", [None, 2])
def test_there_is_no_divergence_at_the_start(rank: int | None) -> None:
    base = base_of("sdxl")
    policy = Policy(base, rank)
    without, regularised = (
        objective(task_of(base, policy, kl), policy.model, PROMPTS, row_generators(2, range(2)), Truncation(1))
        for kl in (0, 10_000.0)
    )
    assert regularised.item() == pytest.approx(without.item(), abs=1e-6)


def test_the_scale_multiplies_the_reward_alone() -> None:
    base = base_of(dtype=torch.float64)
    policy = Policy(base, 2, seed=1)
    policy.model.double()
    nudged(policy)

    def value(kl: float, scale: float) -> float:
        task, generators = task_of(base, policy, kl, scale=scale), row_generators(2, range(2))
        return objective(task, policy.model, PROMPTS, generators, Truncation(1)).item()

    assert value(0, 100.0) == pytest.approx(100 * value(0, 1.0), rel=1e-9)
    assert value(300.0, 100.0) == pytest.approx(100 * value(3.0, 1.0), rel=1e-9)
    assert value(3.0, 100.0) - value(0, 100.0) == pytest.approx(value(3.0, 1.0) - value(0, 1.0), rel=1e-6)


def test_refl_scores_what_an_early_step_takes_for_clean() -> None:
    base = base_of(dtype=torch.float64)
    policy = Policy(base)
    policy.model.double()
    generators = row_generators(2, range(2))
    found = objective(task_of(base, policy), policy.model, PROMPTS, generators, Truncation(1, until=2))
    scheduler, prompted, unprompted = SAMPLING.prepared(base), conditions(base, PROMPTS), unconditional(base, 2)
    latents = SAMPLING.noise(base, row_generators(2, range(2)))
    for t in scheduler.timesteps[:2]:
        without = base.call.predict(policy.model, latents, t.expand(2), unprompted)
        guided = without + 2.0 * (base.call.predict(policy.model, latents, t.expand(2), prompted) - without)
        alpha = scheduler.alphas_cumprod[t].double()
        clean = (latents - (1 - alpha).sqrt() * guided) / alpha.sqrt()
        latents = scheduler.step(guided, t, latents).prev_sample
    rewards = Brightness()(decode(base, clean), PROMPTS)
    assert found.item() == pytest.approx(-rewards.mean().item(), rel=1e-6)
    # Above the ceiling there is nothing to gain.
    generators = row_generators(2, range(2))
    low = objective(task_of(base, policy), policy.model, PROMPTS, generators, Truncation(1, 2), ceiling=-1.0)
    low.backward()
    assert low.item() == 1.0 and not any(p.grad.any() for p in trainable(policy.model) if p.grad is not None)
    stops = [drawn_from((2, 4), 4, 0)(step) for step in range(200)]
    assert all(40 < stops.count(stop) < 95 for stop in (2, 3, 4)) and {*stops} == {2, 3, 4}
    assert stops == [drawn_from((2, 4), 4, 0)(step) for step in range(200)]


def caught(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The losses that are to be trained on from now on; nothing is."""
    losses: list[Any] = []

    def train(model: Any, loss: Any, *_: Any, **__: Any) -> LossCurve:
        losses.append(loss)
        return LossCurve()

    monkeypatch.setattr("deradiff.alignment.draft.train", train)
    return losses


def test_refls_pre_training_loss_is_the_denoising_error_of_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = caught(monkeypatch)
    base = base_of()
    policy = Policy(base, 2, seed=1)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    samples, task = ReferenceSamples(latents, [*PROMPTS, PROMPTS[0]]), task_of(base, policy)
    for pretraining in (0, 1000):
        train_refl(task, (2, 3), pretraining=pretraining, samples=samples)
    alone, held = (loss(policy.model, torch.Generator(), BatchPart(step=2)).item() for loss in losses)
    errors = []
    for row, generator in zip(order(3, 0, range(4, 6)), row_generators(0, range(4, 6), "pre-training"), strict=True):
        noise = torch.randn(4, 8, 8, generator=generator)
        t = torch.randint(base.noising.timesteps, (1,), generator=generator)
        alpha = DDPMScheduler.from_config(base.pipe.scheduler.config).alphas_cumprod[t]
        noisy = alpha.sqrt() * latents[row] + (1 - alpha).sqrt() * noise
        told = conditions(base, [samples.prompts[row]])
        errors.append((base.call.predict(policy.model, noisy[None], t, told)[0] - noise).square().mean().item())
    assert held - alone == pytest.approx(1000 * sum(errors) / 2, rel=1e-4)


def test_alignprop_is_draft_through_a_number_of_steps_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = caught(monkeypatch)
    base = base_of(dtype=torch.float64)
    policy = Policy(base, 2, seed=1)
    policy.model.double()
    nudged(policy)
    train_alignprop(task_of(base, policy, 5.0), (1, 3))
    number, seen = drawn_from((1, 3), 3, 0), set()
    for step in range(4):
        keep, positions = number(step), range(2 * step, 2 * step + 2)
        asked = [PROMPTS[row] for row in order(2, 0, positions)]
        found = losses[0](policy.model, torch.Generator(), BatchPart(step))
        drafted = objective(
            task_of(base, policy, 5.0), policy.model, asked, row_generators(0, positions), Truncation(keep)
        )
        weight = [*trainable(policy.model)]
        for got, wanted in zip(torch.autograd.grad(found, weight), torch.autograd.grad(drafted, weight), strict=True):
            torch.testing.assert_close(got, wanted)
        seen.add(keep)
    assert len(seen) > 1


class Learned(torch.nn.Module):
    """A reward with parameters, linear in the mean colour."""

    name = "learned"

    def __init__(self) -> None:
        super().__init__()
        self.colours = torch.nn.Parameter(torch.tensor([1.0, 2.0, 4.0]), requires_grad=False)

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images.mean((2, 3)) @ self.colours


def test_reward_dropout_leaves_out_parameters_and_the_reward_on_average() -> None:
    dropped, images = DroppedReward(Learned(), 0.75), torch.rand(2, 3, 4, 4, requires_grad=True)
    torch.manual_seed(0)
    left, scores = [], []
    for _ in range(2000):
        scores.append(dropped(images, ["a", "b"]).detach())
        left.append(torch.autograd.grad(dropped(images, ["a", "b"])[0], images)[0][0].mean((1, 2)) * 16)
    # Of r = Σ φ x, the gradient tells φ: dropped, or divided by what is kept.
    weights = torch.stack(left) / torch.tensor([1.0, 2.0, 4.0])
    assert torch.isclose(weights, torch.tensor(0.0)).logical_or(torch.isclose(weights, torch.tensor(4.0))).all()
    kept = weights.gt(0).float().mean(0)
    assert ((kept - 0.25).abs() < 4 * (0.25 * 0.75 / 2000) ** 0.5).all()
    plain = Learned()(images, ["a", "b"]).detach()
    for score, expected in zip(torch.stack(scores).T, plain, strict=True):
        found = mean(score)
        assert abs(found.value - expected.item()) < 4 * found.error
    with pytest.raises(ValueError, match=naming("brightness", "--reward-dropout")):
        DroppedReward(Brightness(), 0.5)
    with pytest.raises(ValueError, match=naming("dropout", 1)):
        DroppedReward(Learned(), 1.0)


# --- training


class Interrupted(Exception):
    """Stands for a machine that went away."""


def trained(
    folder: Path, method: str, stop_at: int | None = None, plan: TrainingPlan = PLAN, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], LossCurve]:
    base = base_of(dtype=dtype)
    policy = Policy(base, 2, seed=4)
    policy.model.to(dtype)

    def report(done: int, planned: int, line: str) -> None:
        if done == stop_at:
            raise Interrupted

    more: dict[str, Any] = {"keep": 2} if method == "draft" else {"window": (2, 3)}
    trains: dict[str, Any] = {"draft": train_draft, "refl": train_refl, "alignprop": train_alignprop}
    run = TrainingRun(7, folder / "checkpoint", report, identity="test")
    prompts, held_out = [*PROMPTS, "a house"], ["a tree", "a boat"]
    curve = trains[method](
        RewardTask(base, policy, prompts, held_out, Brightness(), 10, plan, run, 4, SAMPLING), **more
    )
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}, curve


@pytest.mark.parametrize(
    ("method", "plan"),
    [("draft", PLAN), ("refl", PLAN), ("alignprop", replace(PLAN, optimizer="adafactor", weight_decay=0.01))],
)
@pytest.mark.cases(1)
def test_interrupted_training_ends_with_the_same_bits(tmp_path: Path, method: str, plan: TrainingPlan) -> None:
    whole, curve = trained(tmp_path / "whole", method, plan=plan)
    with pytest.raises(Interrupted):
        trained(tmp_path / "broken", method, stop_at=4, plan=plan)
    again, same = trained(tmp_path / "broken", method, plan=plan)
    assert same == curve and all(torch.equal(again[name], value) for name, value in whole.items())
    assert curve.held_out[-1] < curve.held_out[0]


@pytest.mark.parametrize("method", ["draft", "refl"])
@pytest.mark.cases(1)
def test_micro_batches_only_round_differently(tmp_path: Path, method: str) -> None:
    # In float64: Adam's first steps are as long for a gradient of 1e-8 as for any other, rounding errors included.
    plan = replace(PLAN, steps=2)
    whole, _ = trained(tmp_path / "whole", method, plan=plan, dtype=torch.float64)
    parts, _ = trained(tmp_path / "parts", method, plan=replace(plan, accumulate=2), dtype=torch.float64)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-6)


@pytest.mark.cases(0)
def test_the_reward_of_the_digits_rises_less_with_a_divergence_to_pay_for(tmp_path: Path) -> None:
    prompts, reward = captions.sample_prompts(60, 5), BoldReward()
    sampling = SamplerSettings("ddim", 5, 1.0)
    plan = TrainingPlan(steps=8, learning_rate=2e-3, warmup=0, average=0.0, evaluate_every=8)

    def rewards(base: Base, model: Any) -> torch.Tensor:
        generators = row_generators(9, range(20))
        with torch.no_grad():
            drawn = sample(
                base, model, conditions(base, prompts[:20]), None, sampling.noise(base, generators), sampling, keep=0
            )
            return reward(decode(base, drawn.latents), prompts[:20])

    base = Base(digits.load_pipeline())
    before, gained = rewards(base, base.denoiser), {}
    for kl in (0, 1000.0):
        base = Base(digits.load_pipeline())
        policy = Policy(base, 8, WIDER_TARGETS)
        run = TrainingRun(1, tmp_path / f"{kl}", lambda *_: None)
        train_draft(RewardTask(base, policy, prompts[20:], prompts[:4], reward, kl, plan, run, 8, sampling))
        gained[kl] = mean(rewards(base, policy.model) - before)
    assert gained[0].value > 3 * gained[0].error
    assert 0 < gained[1000.0].value < gained[0].value / 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"kl": -1.0}, "λ_KL = -1"),
        ({"kl": float("nan")}, "λ_KL = nan"),
        ({"scale": 0.0}, naming("reward scale", 0)),
        ({"scale": -2.0}, naming("reward scale", -2)),
        ({"dropout": 0.5}, naming("brightness", "--reward-dropout")),
        ({"keep": 0}, naming("keep", 0)),
        ({"keep": 4}, "4 of 3"),
        ({"prompts": []}, naming("0 prompts", 1)),
        ({"held_out": []}, naming("2 prompts", 0)),
    ],
)
def test_wrong_input_is_said(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    base = base_of()
    given: dict[str, Any] = {"run": TrainingRun(0, tmp_path / "c", lambda *_: None), "keep": 1} | changed
    keep = given.pop("keep")
    with pytest.raises(ValueError, match=words):
        train_draft(task_of(base, Policy(base), **given), keep)


def test_rewards_without_a_number_or_a_gradient_are_refused(tmp_path: Path) -> None:
    class Broken(Brightness):
        name = "broken"

        def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return super().__call__(images, prompts) * torch.tensor([1.0, torch.nan])

    class Flat(Brightness):
        name = "flat"

        def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return super().__call__(images.detach(), prompts)

    base = base_of()
    policy = Policy(base)
    for reward, words in (
        (Broken(), naming("'broken'", "nan", "'two blue owls'")),
        (Flat(), naming("flat", "--method ddpo")),
    ):
        with pytest.raises(ValueError, match=words):
            task, generators = task_of(base, policy, reward=reward), row_generators(0, range(2))
            objective(task, policy.model, PROMPTS, generators, Truncation(1))
    task = task_of(base, policy, run=TrainingRun(0, tmp_path / "c", lambda *_: None))
    for train in (train_refl, train_alignprop):
        with pytest.raises(ValueError, match=naming(2, 9, 3)):
            train(task, (2, 9))
    for pretraining in (-1, 1000):
        with pytest.raises(ValueError, match=naming("pre-training", pretraining)):
            train_refl(task, (2, 3), pretraining=pretraining)
