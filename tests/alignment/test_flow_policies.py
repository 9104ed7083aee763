"""Flow-GRPO and DiffusionNFT: their formulas by hand, the policy that draws, resuming, and what they refuse."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from deradiff.alignment.base import Base, Policy
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.diffusion_nft import loss as loss_of_nft
from deradiff.alignment.diffusion_nft import nft_loss, optimality, ramp, train_diffusion_nft
from deradiff.alignment.flow_grpo import group_advantages, train_flow_grpo
from deradiff.alignment.flow_grpo import loss as loss_of_grpo
from deradiff.alignment.methods import METHODS
from deradiff.alignment.parameters import OldPolicy, trainable
from deradiff.alignment.presets import usual
from deradiff.alignment.sampling import SamplerSettings, conditions
from deradiff.alignment.scoring import RewardTask
from deradiff.alignment.training import LossCurve, TrainingPlan, TrainingRun
from messages import naming
from trainable_families import trainable as pipeline_of

PROMPTS = ["a red fox", "two blue owls", "a fox", "an owl"]
PLAN = TrainingPlan(steps=4, learning_rate=1e-2, warmup=0, average=0.0, evaluate_every=2, checkpoint_seconds=0)
SDE, EULER = SamplerSettings("flow-sde", 4, 1.0, eta=0.5), SamplerSettings("flow-euler", 3, 1.0)
TRAINED: dict[str, tuple[SamplerSettings, Callable[..., LossCurve], dict[str, Any]]] = {
    "flow-grpo": (SDE, train_flow_grpo, {"per_prompt": 2, "updates": 2, "clip": 1e-2}),
    "diffusion-nft": (EULER, train_diffusion_nft, {"per_prompt": 2, "updates": 2, "memory": (0, 0.1, 0.5)}),
}


class Interrupted(Exception):
    pass


class Redness:
    """How red a picture is; without a gradient. Breaks off at its `at`-th call."""

    name = "redness"

    def __init__(self, at: int | None = None) -> None:
        self.at, self.calls = at, 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise Interrupted
        return 10 * (images[:, 0] - images[:, 2]).detach().mean((1, 2))


def task_of(
    folder: Path, sampling: SamplerSettings = SDE, *, rank: int | None = 2, kl: float = 0.0, **changes: Any
) -> RewardTask:
    pipe, side = pipeline_of("sd3")
    base = Base(pipe, side)
    plan = replace(
        PLAN, **{key: changes.pop(key) for key in ("steps", "accumulate", "learning_rate") if key in changes}
    )
    run = TrainingRun(0, folder / "run", lambda *_: None, changes.pop("accelerator", None))
    policy, reward, batch = Policy(base, rank, seed=3), changes.pop("reward", Redness()), changes.pop("batch", 4)
    return RewardTask(base, policy, PROMPTS, PROMPTS[:2], reward, kl, plan, run, batch, sampling, **changes)


def trained(folder: Path, method: str, accelerator: Accelerator | None = None) -> tuple[dict[str, Tensor], LossCurve]:
    """A LoRA after two rounds of two updates, by name, and its curve."""
    sampling, train, options = TRAINED[method]
    task = task_of(folder, sampling, kl=0.1, accelerator=accelerator)
    curve = train(task, **options)
    return {name: p.detach() for name, p in task.policy.model.named_parameters() if p.requires_grad}, curve


def nudged(model: nn.Module, size: float = 0.02) -> None:
    """Another policy than the one before."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in trainable(model):
            p.add_(size * torch.randn(p.shape, generator=generator))


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    parameters = trainable(model)
    value.backward()
    found = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters]
    for p in parameters:
        p.grad = None
    return found


# -- the objectives, by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kl", "guidance"), [(0.0, 1.0), (0.3, 2.5)])
def test_flow_grpo_is_its_equation_with_densities_averaged_over_elements(
    kl: float, guidance: float, tmp_path: Path
) -> None:
    """Against the SDE's steps, densities and ratios written out, differentiated as a whole."""
    clip, texts = 1e-3, ["a red fox"] * 2 + ["an owl"] * 2
    task = task_of(tmp_path, replace(SDE, guidance_scale=guidance), rank=None, kl=kl)
    model, base = task.policy.model, task.base
    old = OldPolicy(2)
    old.begin(trainable(model))
    first = [p.detach().clone() for p in trainable(model)]
    nudged(model)
    accelerator = Accelerator(cpu=True)
    found = loss_of_grpo(task, model, texts, 2, row_generators(5, range(4)), accelerator, old=old, clip=clip)
    by_steps = gradients(found, model)

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(base.pipe.scheduler.config)
    scheduler.set_timesteps(4)
    prompted, nothing = conditions(base, texts, 16), conditions(base, [""] * 4, 16)

    def velocity(of: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        with_prompt = base.call.predict(of, x, t.expand(4), prompted)
        without = base.call.predict(of, x, t.expand(4), nothing)
        return without + guidance * (with_prompt - without)

    generators = row_generators(5, range(4))
    x, surrogate, divergence = task.sampling.noise(base, generators), torch.zeros(()), torch.zeros(())
    new, ratios = [p.detach().clone() for p in trainable(model)], []
    rewards_of: list[tuple[Tensor, Tensor, Tensor, float, float]] = []

    def mean_of(of: nn.Module, x: Tensor, i: int) -> tuple[Tensor, float]:
        sigma, after = scheduler.sigmas[i].item(), scheduler.sigmas[i + 1].item()
        v = velocity(of, x, scheduler.timesteps[i])
        s2 = 0.25 * (after / sigma) ** 2 * (sigma**2 - (after * (1 - sigma) / (1 - after)) ** 2) if after else 0.0
        return (1 - after) * (x - sigma * v) + math.sqrt(after**2 - s2) * (x + (1 - sigma) * v), s2

    def load(values: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(trainable(model), values, strict=True):
                p.copy_(value)

    load(first)
    with torch.no_grad():
        for i in range(4):
            mean, s2 = mean_of(model, x, i)
            after = mean + math.sqrt(s2) * task.sampling.noise(base, generators)
            rewards_of.append((x, after, mean, s2, float(scheduler.sigmas[i] - scheduler.sigmas[i + 1])))
            x = after
        images = (
            base.pipe.vae.decode(x / base.pipe.vae.config.scaling_factor + base.pipe.vae.config.shift_factor)[0] / 2
        )
        rewards = task.reward((images + 0.5).clamp(0, 1), texts)
    pairs = rewards.view(2, 2)
    advantage = ((pairs - pairs.mean(1, keepdim=True)) / (pairs.std(1, keepdim=True) + 1e-8)).flatten()
    load(new)
    for i, (before, after, old_mean, s2, length) in enumerate(rewards_of[:2]):
        mean, _ = mean_of(model, before, i)
        logs = [(-(after - m).square() / (2 * s2)).flatten(1).mean(1) for m in (mean, old_mean)]
        ratio = (logs[0] - logs[1]).exp()
        ratios += ratio.tolist()
        clipped = torch.where(advantage > 0, ratio.clamp(max=1 + clip), ratio.clamp(min=1 - clip))
        surrogate = surrogate - (clipped * advantage).mean() / 2
        with torch.no_grad():
            known, _ = mean_of(base.denoiser, before, i)
        # σ² is the noise per unit of time.
        divergence = divergence + ((mean - known).square() / (2 * s2 / length)).flatten(1).mean(1).mean() / 2
    assert max(ratios) > 1 + clip and min(abs(r - 1) for r in ratios) < clip, "one is clipped, another is not"
    torch.testing.assert_close(found.detach(), -rewards.mean() + kl * divergence.detach(), rtol=1e-4, atol=1e-5)
    whole = gradients(surrogate + kl * divergence, model)
    scale = max(g.abs().max().item() for g in whole)
    for ours, by_hand in zip(by_steps, whole, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-3, atol=2e-4 * scale)


def test_the_nft_loss_is_its_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise, velocity, old = (torch.randn(3, 2, 4, 4, generator=generator).double() for _ in range(4))
    sigma, beta, r = torch.tensor(0.7, dtype=torch.float64), 0.4, torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    noisy = 0.3 * clean + 0.7 * noise
    by_hand = []
    for i in range(3):
        parts = []
        for sign in (1, -1):
            implicit = (1 - sign * beta) * old[i] + sign * beta * velocity[i]
            x_0 = noisy[i] - 0.7 * implicit
            parts.append(((x_0 - clean[i]) ** 2).mean() / (x_0 - clean[i]).abs().mean())
        by_hand.append(5 * (r[i] * parts[0] + (1 - r[i]) * parts[1]) / beta)
    torch.testing.assert_close(nft_loss(clean, noisy, sigma, velocity, old, r, beta), torch.stack(by_hand))
    # Where a picture is neither good nor bad and the policies agree, there is nothing to learn.
    moving = old.clone().requires_grad_(True)
    nft_loss(clean, noisy, sigma, moving, old, torch.full((3,), 0.5).double(), beta).sum().backward()
    assert moving.grad is not None and moving.grad.abs().max() < 1e-12


def test_a_good_picture_draws_the_velocity_to_its_own_and_a_bad_one_away() -> None:
    clean, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    old, sigma = torch.randn(2, 1, 4, 4), torch.tensor(0.5)
    velocity = old.clone().requires_grad_(True)
    noisy = 0.5 * clean + 0.5 * noise
    nft_loss(clean, noisy, sigma, velocity, old, torch.tensor([1.0, 0.0]), 1.0).sum().backward()
    assert velocity.grad is not None
    towards = (-velocity.grad * (noise - clean - old)).flatten(1).sum(1)
    assert towards[0] > 0 > towards[1]


def test_nft_learns_at_every_time_of_the_sampler_from_what_the_old_policy_drew(tmp_path: Path) -> None:
    task = task_of(tmp_path, EULER, rank=None, kl=0.3)
    texts, model, base = ["a red fox"] * 2, task.policy.model, task.base
    old = OldPolicy(1)
    old.begin(trainable(model))
    nudged(model)
    accelerator = Accelerator(cpu=True)
    found = loss_of_nft(task, model, texts, 2, row_generators(5, range(2)), accelerator, old=old, mixing=0.5)
    by_times = gradients(found, model)

    generators, known = row_generators(5, range(2)), conditions(base, texts, 16)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(base.pipe.scheduler.config)
    scheduler.set_timesteps(3)
    # The old policy has the base's own weights.
    x = task.sampling.noise(base, generators)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            v = base.call.predict(base.denoiser, x, t.expand(2), known)
            x = x + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * v
        config = base.pipe.vae.config
        images = base.pipe.vae.decode(x / config.scaling_factor + config.shift_factor)[0] / 2 + 0.5
        rewards = task.reward(images.clamp(0, 1), texts)
    r = 0.5 + 0.1 * (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    total = torch.zeros(())
    for t in scheduler.timesteps:
        sigma = t / 1000
        noisy = (1 - sigma) * x + sigma * task.sampling.noise(base, generators)
        with torch.no_grad():
            before = base.call.predict(base.denoiser, noisy, t.expand(2), known)
        now = base.call.predict(model, noisy, t.expand(2), known)
        total = total + nft_loss(x, noisy, sigma, now, before, r, 0.5).mean() / 3
        total = total + 0.3 * (now - before).square().mean() / 3
    whole = gradients(total, model)
    scale = max(g.abs().max().item() for g in whole)
    for ours, by_hand in zip(by_times, whole, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-3, atol=2e-4 * scale)


def test_advantages_and_optimality_are_bounded() -> None:
    rewards = torch.cat([torch.zeros(63), torch.tensor([100.0]), torch.ones(64)])
    assert group_advantages(rewards, 64).max() == 5.0 and optimality(rewards, 64).max() == 1.0
    for reward in (1.0, 0.9, 0.7, 21.7):  # the mean of 24 times 0.9 is not 0.9 in single precision
        assert group_advantages(torch.full((24,), reward), 24).tolist() == [0.0] * 24
        assert optimality(torch.full((24,), reward), 24).tolist() == [0.5] * 24


# -- the policy that draws --------------------------------------------------------------------------------------------


def test_an_old_policy_follows_at_the_end_of_a_round() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    model = nn.Module()
    model.register_parameter("p", parameter)
    old = OldPolicy(2, lambda done: 0.25)
    old.begin([parameter])
    with torch.no_grad():
        parameter.fill_(4.0)
    old.follow(1, [parameter])
    assert old.weights[0].tolist() == [0.0, 0.0]
    old.follow(2, [parameter])
    assert old.weights[0].tolist() == [3.0, 3.0]
    with old.in_place(model):
        assert parameter.tolist() == [3.0, 3.0] and not torch.is_grad_enabled()
    assert parameter.tolist() == [4.0, 4.0] and torch.is_grad_enabled()


def test_in_mixed_precision_each_policy_computes_with_its_own_weights() -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    old = OldPolicy(2)
    old.begin([*model.parameters()])
    with torch.no_grad():
        model.weight.mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        with old.in_place(model):
            before = model(x)
        after = model(x)
    assert torch.equal(after, expected) and not torch.equal(before, expected)


@pytest.mark.parametrize("method", TRAINED)
def test_a_run_in_half_precision_follows_one_in_single(method: str, tmp_path: Path) -> None:
    """In a second step of a round, where the policies differ."""
    values = []
    for half in (False, True):
        sampling = TRAINED[method][0]
        task = task_of(tmp_path / f"{half}", sampling, rank=None)
        model, old = task.policy.model, OldPolicy(2)
        old.begin(trainable(model))
        nudged(model, 0.1)
        objective = loss_of_grpo if method == "flow-grpo" else loss_of_nft
        own = {"clip": 0.5} if method == "flow-grpo" else {"mixing": 1.0}
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = objective(
                task, model, ["a red fox"] * 4, 4, row_generators(5, range(4)), Accelerator(cpu=True), old=old, **own
            )
        values.append(torch.cat([g.flatten() for g in gradients(value, model)]))
    single, half_ = values
    assert torch.cosine_similarity(single, half_, dim=0) > 0.9


def test_the_memory_grows_as_in_the_released_code() -> None:
    slow, late = ramp(0, 0.001, 0.5), ramp(75, 0.0075, 0.999)
    assert [slow(step) for step in (0, 100, 500, 5000)] == [0.0, 0.1, 0.5, 0.5]
    assert [late(step) for step in (74, 75, 175, 1000)] == [0.0, 0.0, 0.75, 0.999]
    for wrong in ((-1, 0.1, 0.5), (0, -0.1, 0.5), (0, 0.1, 1.0), (0, math.inf, 0.5), (0, math.nan, 0.5)):
        with pytest.raises(ValueError, match=naming(*wrong[:2])):
            ramp(*wrong)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("method", "rank", "rate", "gain"),  # about half of the least gain of three seeds
    [
        ("flow-grpo", None, 0.003, 0.2),
        ("flow-grpo", 2, 0.03, 0.007),
        ("diffusion-nft", 2, 0.03, 0.008),
        ("diffusion-nft", None, 0.003, 0.008),
    ],
)
def test_the_reward_rises_without_a_gradient_of_its_own_and_less_for_a_divergence_to_pay_for(
    method: str, rank: int | None, rate: float, gain: float, tmp_path: Path
) -> None:
    sampling, train, options = TRAINED[method]
    options, small = options | {"per_prompt": 8}, {"rank": rank, "steps": 8, "batch": 32}
    free, held = (task_of(tmp_path / f"{kl}", sampling, kl=kl, learning_rate=rate, **small) for kl in (0.0, 1e3))
    curve, held_to_base = train(free, **options), train(held, **options)
    assert curve.held_out[-1] < curve.held_out[0] - gain
    assert held_to_base.held_out[-1] > curve.held_out[0] - gain / 2


def weights(task: RewardTask) -> list[Tensor]:
    return [p.detach().clone() for p in trainable(task.policy.model)]


@pytest.mark.parametrize("method", TRAINED)
def test_a_run_that_breaks_off_within_a_round_ends_with_the_same_bits(method: str, tmp_path: Path) -> None:
    sampling, train, options = TRAINED[method]
    whole = task_of(tmp_path / "whole", sampling, kl=0.1)
    curve = train(whole, **options)
    # One call for each step and one for each evaluation, the first before any step: in the last step of four.
    broken = task_of(tmp_path / "broken", sampling, kl=0.1, reward=Redness(at=6))
    with pytest.raises(Interrupted):
        train(broken, **options)
    assert json.loads((tmp_path / "broken" / "run" / "progress.json").read_text())["step"] == 3
    again = task_of(tmp_path / "broken", sampling, kl=0.1)
    assert train(again, **options).held_out == curve.held_out
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(whole), strict=True))


@pytest.mark.parametrize("method", TRAINED)
def test_micro_batches_only_round_differently(method: str, tmp_path: Path) -> None:
    sampling, train, options = TRAINED[method]
    whole, parts = (task_of(tmp_path / f"{n}", sampling, kl=0.1, accumulate=n, steps=2) for n in (1, 2))
    start = weights(whole)
    train(whole, **options), train(parts, **options)
    moved = sum((a - b).square().sum() for a, b in zip(weights(whole), start, strict=True))
    apart = sum((a - b).square().sum() for a, b in zip(weights(whole), weights(parts), strict=True))
    assert moved > 0 and apart < 1e-4 * moved


@pytest.mark.parametrize(
    ("method", "changes", "options", "values"),
    [
        ("flow-grpo", {}, {"per_prompt": 1}, [1, 2]),
        ("diffusion-nft", {}, {"per_prompt": 1}, [1, 2]),
        ("flow-grpo", {}, {"per_prompt": 3}, [3, 4]),
        ("flow-grpo", {"sampling": EULER}, {}, ["flow-euler", "flow-sde"]),
        ("flow-grpo", {"sampling": replace(SDE, steps=2)}, {}, ["flow-sde", 2, 3]),
        ("flow-grpo", {}, {"clip": 0.0}, ["clip", 0]),
        ("flow-grpo", {}, {"updates": 0}, ["updates", 0]),
        ("diffusion-nft", {}, {"mixing": 0.0}, ["mixing", 0]),
        ("diffusion-nft", {}, {"mixing": math.inf}, ["mixing", "inf"]),
        ("diffusion-nft", {}, {"memory": (0, 0.1, 1.0)}, ["memory", 1]),
    ],
)
def test_what_cannot_be_trained_is_refused(
    method: str, changes: dict[str, Any], options: dict[str, Any], values: list[Any], tmp_path: Path
) -> None:
    sampling, train, usual_options = TRAINED[method]
    with pytest.raises(ValueError, match=naming(*values)):
        train(task_of(tmp_path, **{"sampling": sampling, **changes}), **(usual_options | options))
    # Before anything is drawn, and so by a rehearsal as well.
    task = task_of(tmp_path, **{"sampling": sampling, **changes})
    chosen, preset = changes.get("sampling", sampling), usual("some/flow", method)
    settings = replace(
        preset,
        batch=task.batch,
        sampling={"scheduler": chosen.scheduler, "steps": chosen.steps, "guidance_scale": 1.0},
        options=preset.options | usual_options | options,
    )
    with pytest.raises(ValueError, match=naming(*values)):
        METHODS[method].require(task.base, settings)
