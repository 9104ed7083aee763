"""Policy gradients: the estimator against closed forms and float64, resuming, parts of a batch, and what they raise."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import Tensor, nn

from deradiff.algorithm.estimates import mean
from deradiff.algorithm.gaussian import Gaussian
from deradiff.alignment.base import Base, Policy
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.path_kl import Chain, path_kl
from deradiff.alignment.policy_gradient import (
    advantages,
    clipped_policy_gradient,
    log_density,
    loss,
    train_ddpo,
)
from deradiff.alignment.sampling import SamplerSettings, decode
from deradiff.alignment.scoring import RewardTask
from deradiff.alignment.training import LossCurve, TrainingPlan, TrainingRun
from messages import naming
from tiny import make

PROMPTS = ["a red fox", "two blue owls", "a fox", "an owl"]
PLAN = TrainingPlan(steps=4, learning_rate=1e-3, warmup=2, average=0.5, evaluate_every=2, checkpoint_seconds=0)


class Redness:
    """How red a picture is, and a little more for longer prompts; without a gradient."""

    name = "redness"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        longer = torch.tensor([0.01 * len(prompt) for prompt in prompts])
        return 10 * (images[:, 0] - images[:, 2]).detach().mean((1, 2)) + longer


class Broken:
    """A reward that fails on one prompt."""

    name = "broken"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([math.nan if prompt == PROMPTS[1] else 0.0 for prompt in prompts])


def base_of(kind: str = "sd") -> Base:
    return Base(make(kind)[0])


# --- the objective


def test_advantages_compare_the_samples_of_a_prompt() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    found = advantages(rewards, 3, normalized=False)
    # 1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2
    torch.testing.assert_close(found, torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]))
    normalized = advantages(rewards, 3, normalized=True)
    torch.testing.assert_close(normalized[:3], torch.tensor([-2.0, -1.0, 3.0]) / torch.tensor([1.0, 2.0, 6.0]).std())
    assert normalized[3:].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(advantages(7 * rewards + 3, 3, normalized=True), normalized)
    for group, count in ((1, 4), (3, 4)):
        with pytest.raises(ValueError, match=naming(4, group)):
            advantages(torch.zeros(count), group, normalized=True)


def test_log_density_is_that_of_independent_normals() -> None:
    mean_of, x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    found = log_density(Gaussian(mean_of, torch.full((1, 1, 1, 1), 0.04, dtype=torch.float64)), x)
    torch.testing.assert_close(found, torch.distributions.Normal(mean_of, 0.2).log_prob(x).sum((1, 2, 3)))


def test_ratio_of_one_has_the_policy_gradient_and_a_far_one_stops() -> None:
    log_probs = torch.tensor([-3.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    value = clipped_policy_gradient(log_probs, log_probs, advantage)
    assert value.item() == pytest.approx(-0.5)
    (gradient,) = torch.autograd.grad(value, log_probs)
    torch.testing.assert_close(gradient, -advantage / 3)
    # What has become likelier already by more than the clip is not pushed on, only back.
    drawn = log_probs.detach() - 0.1
    (gradient,) = torch.autograd.grad(clipped_policy_gradient(log_probs, drawn, advantage, clip=0.05), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([0.0, math.exp(0.1) / 3, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("normalized", [False, True])
def test_score_function_gradient_is_the_analytic_one(normalized: bool) -> None:
    # x ~ N(θ, ½²) with the reward -(x - 2)²: the mean reward is -(θ - 2)² - ¼, its derivative -2 (θ - 2) = 3.
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    group, parts = 5, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        x = theta.detach() + 0.5 * torch.randn(20 * group, 1, generator=generator, dtype=torch.float64)
        log_probs = log_density(Gaussian(theta.expand_as(x), torch.full((1, 1), 0.25, dtype=torch.float64)), x)
        weight = advantages(-(x[:, 0] - 2).square(), group, normalized=normalized)
        parts.append(torch.autograd.grad(-clipped_policy_gradient(log_probs, log_probs, weight), theta)[0].item())
    found = mean(parts)
    if normalized:  # the same direction, in another unit
        assert found.value > 10 * found.error
    else:
        assert abs(found.value - 3) < 4 * found.error < 0.3


def gradients(base: Base, policy: Policy, kl: float, sampling: SamplerSettings, texts: list[str], seed: int) -> Any:
    """The loss of `texts`, in twos, and its gradient in every trained weight."""
    parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = None
    generators = row_generators(seed, range(len(texts)), "path")
    run = TrainingRun(0, Path("nowhere"), lambda *_: None)
    task = RewardTask(base, policy, texts, texts, Redness(), kl, PLAN, run, len(texts), sampling)
    value = loss(task, policy.model, texts, 2, generators, Accelerator(cpu=True))
    value.backward()
    return value.item(), {name: p.grad for name, p in parameters.items()}


@pytest.mark.parametrize("rank, guidance_scale, kl", [(None, 1.0, 0.0), (None, 2.5, 0.3), (2, 1.0, 0.3)])
def test_loss_and_gradient_are_those_of_a_path_by_hand_in_float64(
    rank: int | None, guidance_scale: float, kl: float
) -> None:
    base = base_of()
    policy = Policy(base, rank)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    with torch.no_grad():
        for number, parameter in enumerate(trained):
            parameter += 0.005 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    pipe: Any = base.pipe.to(torch.float64)
    policy.model.double()
    texts, steps = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, 3
    value, found = gradients(base, policy, kl, SamplerSettings("ddim", steps, guidance_scale), texts, 6)

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps)
    prompted, unprompted, *_ = pipe.encode_prompt(texts, "cpu", 1, True)

    def noiseless(unet: Any, x: Tensor, t: Tensor) -> Tensor:
        epsilon = unet(x, t, encoder_hidden_states=prompted).sample
        if guidance_scale > 1:
            without = unet(x, t, encoder_hidden_states=unprompted).sample
            epsilon = without + guidance_scale * (epsilon - without)
        return scheduler.step(epsilon, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample

    generators = row_generators(6, range(4), "path")
    drawn = [torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]).double()]
    deviations, known = [], []
    with torch.no_grad():
        for t in scheduler.timesteps:
            deviations.append(float(scheduler._get_variance(int(t), int(t) - 1000 // steps)) ** 0.5)
            with policy.reference(policy.model) as reference:
                known.append(noiseless(reference, drawn[-1], t))
            noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
            drawn.append(noiseless(policy.model, drawn[-1], t) + deviations[-1] * noise)
        rewards = Redness()(decode(base, drawn[-1]), texts).double().view(2, 2)
    weight = (rewards - rewards.flip(1)).flatten()
    if kl == 0:
        weight = weight / 2 / rewards.std(1).repeat_interleave(2)

    def by_hand() -> tuple[float, float]:
        """What has the policy gradient, and the divergence."""
        score = divergence = 0.0
        with torch.no_grad():
            for x, after, t, deviation, reference in zip(
                drawn, drawn[1:], scheduler.timesteps, deviations, known, strict=False
            ):
                mine = noiseless(policy.model, x, t)
                densities = torch.distributions.Normal(mine, deviation).log_prob(after).flatten(1).sum(1)
                score -= float(weight @ densities) / 4
                divergence += float((mine - reference).square().sum()) / (2 * deviation**2) / 4
        return score, divergence

    assert value == pytest.approx(-rewards.mean().item() + kl * by_hand()[1], rel=1e-5)
    # The derivative along a random direction, by central differences.
    parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    slope = sum(float((found[name] * directions[name]).sum()) for name in parameters)
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in parameters.items():
                parameter += sign * 1e-6 * directions[name]
            score, divergence = by_hand()
            ends.append(score + kl * divergence)
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)
    assert abs(slope) > 1e-3


def test_half_precision_has_nearly_the_same_gradient() -> None:
    base = base_of()
    policy = Policy(base)
    sampling, texts = SamplerSettings("ddim", 2, 1.0), [PROMPTS[0]] * 2
    _, expected = gradients(base, policy, 0.0, sampling, texts, 3)
    # The path is drawn without gradients first: weights cast for it must not serve where gradients are wanted.
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(base, policy, 0.0, sampling, texts, 3)
    assert found.keys() == expected.keys()
    one, other = (torch.cat([p.flatten() for p in some.values() if p is not None]) for some in (found, expected))
    assert torch.cosine_similarity(one, other, dim=0) > 0.95


# --- training


class Interrupted(Exception):
    """Stands for a machine that went away."""


def aligned(
    folder: Path,
    rank: int | None = None,
    plan: TrainingPlan = PLAN,
    stop_at: int = 0,
    accelerator: Accelerator | None = None,
    **changed: Any,
) -> tuple[dict[str, Tensor], LossCurve]:
    base = base_of()
    policy = Policy(base, rank, seed=4)

    def report(done: int, planned: int, line: str) -> None:
        if done == stop_at:
            raise Interrupted

    settings: dict[str, Any] = {
        "prompts": PROMPTS,
        "held_out": ["a red owl", "foxes", "owls"],
        "reward": Redness(),
        "kl": 0.01,
        "batch": 4,
        "sampling": SamplerSettings("ddim", 2, 1.0),
        "per_pass": 2,
    } | changed
    run = TrainingRun(7, folder / "checkpoint", report, accelerator, "kl")
    per_prompt = settings.pop("per_prompt", 2)
    curve = train_ddpo(RewardTask(base, policy, plan=plan, run=run, **settings), per_prompt)
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}, curve


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.cases(1)
def test_interrupted_alignment_ends_with_the_same_bits(tmp_path: Path, rank: int | None) -> None:
    whole, curve = aligned(tmp_path / "whole", rank)
    with pytest.raises(Interrupted):
        aligned(tmp_path / "broken", rank, stop_at=2)
    assert json.loads((tmp_path / "broken" / "checkpoint" / "progress.json").read_text())["step"] == 1
    weights, again = aligned(tmp_path / "broken", rank)
    assert again == curve and all(torch.equal(weights[name], whole[name]) for name in whole)
    start = Policy(base_of(), rank, seed=4).model.state_dict()
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


@pytest.mark.parametrize("kl", [0.0, 0.01])
@pytest.mark.cases(1)
def test_micro_batches_only_round_differently(tmp_path: Path, kl: float) -> None:
    plan = replace(PLAN, steps=2)
    whole, curve = aligned(tmp_path / "whole", plan=plan, kl=kl)
    parts, again = aligned(tmp_path / "parts", plan=replace(plan, accumulate=2), kl=kl)
    start = dict(base_of().denoiser.named_parameters())
    moved = max((whole[name] - start[name]).abs().max().item() for name in whole)
    assert max((whole[name] - parts[name]).abs().max().item() for name in whole) < 0.05 * moved
    assert again.held_out == pytest.approx(curve.held_out, rel=1e-4)
    assert again.train == pytest.approx(curve.train, rel=1e-4)


class Tint(nn.Module):
    """A denoiser with one weight for each channel of the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, noisy: Tensor, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(sample=0.9 * noisy + self.shift.view(4, 1, 1))


def test_reward_rises_and_rises_less_with_a_larger_kl(tmp_path: Path) -> None:
    base, sampling = base_of(), SamplerSettings("ddim", 3, 1.0)
    plan = TrainingPlan(steps=20, learning_rate=0.02, warmup=0, adam_betas=(0.9, 0.9), average=0.0, evaluate_every=20)

    def trained(kl: float) -> tuple[Tensor, float]:
        """By how much the rewards of 24 pictures rose, and how far the policy went."""
        policy = Policy(base)
        policy.model, policy._reference = Tint(), Tint()

        def rewards() -> Tensor:
            chain = Chain(base, PROMPTS[:1] * 24, sampling)
            *_, last = chain.walk(policy.model, row_generators(99, range(24), "judged"))
            return Redness()(decode(base, last.after), PROMPTS[:1] * 24)

        before = rewards()
        run = TrainingRun(1, tmp_path / f"{kl}", lambda *_: None)
        task = RewardTask(base, policy, PROMPTS[:2], PROMPTS[:2], Redness(), kl, plan, run, 32, sampling)
        train_ddpo(task, per_prompt=16)
        return rewards() - before, path_kl(base, policy, PROMPTS, sampling).value

    gains, distances = zip(*map(trained, (0.0, 0.003, 0.3)), strict=True)
    free = mean(gains[0])
    assert free.value > 2 * free.error > 0
    for more, less in pairwise(gains):
        difference = mean(more - less)
        assert difference.value > 2 * difference.error > 0
    assert distances[0] > distances[1] > distances[2] > 0


# --- what cannot be trained


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"kl": -0.1}, naming("λ_KL = -0.1")),
        ({"kl": math.nan}, "λ_KL = nan"),
        ({"prompts": []}, "0 prompts"),
        ({"held_out": []}, "0 held out"),
        ({"per_prompt": 1}, naming("per_prompt = 1")),
        ({"per_prompt": 3}, naming("per_prompt = 3", "batch of 4", "1 parts", 4)),
        ({"plan": replace(PLAN, accumulate=4)}, naming("batch of 4", "4 parts", 1)),
        ({"sampling": SamplerSettings("dpmpp", 2, 1.0)}, "'dpmpp'"),
        ({"sampling": SamplerSettings("ddpm", 1, 1.0)}, naming("'ddpm'", "steps=1")),
        ({"reward": Broken()}, naming("'broken'", "nan", "'two blue owls'", "sound")),
    ],
)
def test_what_cannot_be_aligned_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aligned(tmp_path, **changed)


def test_a_policy_that_broke_is_told_from_a_reward_that_did(tmp_path: Path) -> None:
    base = base_of()
    policy = Policy(base)
    with torch.no_grad():
        next(policy.model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=naming("'redness'", "nan", "NaN", "learning rate")):
        gradients(base, policy, 0.0, SamplerSettings("ddim", 2, 1.0), [PROMPTS[0]] * 2, 0)
