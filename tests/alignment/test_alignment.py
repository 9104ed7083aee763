"""Diffusion-DPO on Stable Diffusion and SDXL: the loss by hand, a LoRA's reference, resuming."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deradiff.alignment import folders
from deradiff.alignment.base import Base, Policy, stable_diffusion
from deradiff.alignment.checkpoints import CURE
from deradiff.alignment.data_order import order, row_generators
from deradiff.alignment.dpo import Noised, errors, loss, noise_pairs, train_dpo, train_mapo
from deradiff.alignment.latent_cache import CachedBatch
from deradiff.alignment.loop import TrainingFailed, train
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun
from messages import naming
from tiny import make

PLAN = TrainingPlan(
    steps=4, learning_rate=1e-3, warmup=2, average=0.5, evaluate_every=2, patience=4, checkpoint_seconds=0, max_norm=1.0
)


def base_of(kind: str = "sd") -> Base:
    pipe, _, _ = make(kind)
    return Base(pipe)


class InMemory:
    """Random latents for two prompts."""

    def __init__(self, base: Base, count: int, seed: int = 0, held_out: int = 1) -> None:
        self.training: int | None = count - held_out
        self.held_out = held_out
        self._seed = seed
        self.latents = torch.randn(count, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.prompts, self.empty = (
            base.call.encode_prompts(["a red fox", "two blue owls"]),
            base.call.encode_prompts([""]),
        )
        self.time_ids = torch.arange(count * 12.0).view(count, 2, 6)

    def take(self, rows: Sequence[int]) -> CachedBatch:
        prompts = {name: embeds[torch.tensor(rows) % 2] for name, embeds in self.prompts.items()}
        return CachedBatch(self.latents[rows], self.time_ids[rows], prompts, [""] * len(rows))

    def batch(self, part: BatchPart, size: int) -> CachedBatch:
        return self.take(order(len(self.latents) - self.held_out, self._seed, part.positions(size)))

    def held_out_batch(self, places: range) -> CachedBatch:
        return self.take([len(self.latents) - self.held_out + place for place in places])

    def empty_prompt(self) -> dict[str, torch.Tensor]:
        return self.empty

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def noised(base: Base, pairs: InMemory, rows: Sequence[int], dropout: float, places: range, seed: int) -> Noised:
    return noise_pairs(base, pairs.take(rows), pairs.empty, dropout, row_generators(seed, places))


def noised_pairs(base: Base, count: int = 3) -> Noised:
    return noised(base, InMemory(base, count), range(count), 0.0, range(count), 5)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("rank", [None, 2])
def test_loss_at_the_start_is_log_two(kind: str, rank: int | None) -> None:
    base = base_of(kind)
    policy = Policy(base, rank)
    noised = noised_pairs(base)
    assert loss(base, policy, policy.model, noised, 2000.0).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_loss_and_gradient_are_the_formula_in_float64(rank: int | None) -> None:
    base = base_of()
    policy = Policy(base, rank)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    if rank is None:
        base.denoiser.double()
    policy.model.double()
    noised = noised_pairs(base)
    noised = replace(
        noised,
        noisy=noised.noisy.double(),
        target=noised.target.double(),
        conditions={name: rows.double() for name, rows in noised.conditions.items()},
    )
    beta, found = 300.0, 0.0
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    mine = loss(base, policy, policy.model, noised, beta)
    gradients = torch.autograd.grad(mine, parameters, allow_unused=True)

    # By hand, one pair at a time, and the derivative of the loss along a direction by finite differences.
    def by_hand() -> float:
        total = 0.0
        for pair in range(3):
            gaps = []
            for row in (pair, 3 + pair):
                told = {"encoder_hidden_states": noised.conditions["prompt_embeds"][row : row + 1]}
                arguments = noised.noisy[row : row + 1], noised.timesteps[row : row + 1]
                with torch.no_grad():
                    own = policy.model(*arguments, **told).sample
                    with policy.reference(policy.model) as reference:
                        known = reference(*arguments, **told).sample
                target = noised.target[row : row + 1]
                gaps.append((own - target).square().mean() - (known - target).square().mean())
            total += math.log1p(math.exp(0.5 * beta * (gaps[0] - gaps[1]).item())) / 3
        return total

    found = by_hand()
    # The errors are taken in float32.
    assert mine.item() == pytest.approx(found, rel=1e-4)
    parameter, gradient = next(
        (p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None and g.norm() > 0
    )
    direction = gradient / gradient.norm()
    with torch.no_grad():
        parameter += 1e-4 * direction
        above = by_hand()
        parameter -= 2e-4 * direction
        below = by_hand()
    assert (above - below) / 2e-4 == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_the_reference_of_a_lora_is_the_base_and_is_left_trainable() -> None:
    base, whole = base_of(), base_of()
    policy = Policy(base, 2)
    noised = noised_pairs(base)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
        expected = errors(whole, whole.denoiser, noised)
        with policy.reference(policy.model) as reference:
            assert all(torch.equal(a, b) for a, b in zip(errors(base, reference, noised), expected, strict=True))
        assert not torch.equal(errors(base, policy.model, noised)[0], expected[0])
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.model.named_parameters())


def test_a_full_policy_leaves_the_bases_weights_alone() -> None:
    base = base_of()
    policy = Policy(base)
    assert policy.model is not base.denoiser
    assert all(p.requires_grad for p in policy.model.parameters())
    assert not any(p.requires_grad for p in base.denoiser.parameters())


def test_mapo_asks_no_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of()
    policy = Policy(base, 2)
    monkeypatch.setattr(Policy, "reference", None)
    run = TrainingRun(0, tmp_path / "c", lambda *_: None)
    curve = train_mapo(base, policy, InMemory(base, 8), 0.1, PLAN, batch=2, dropout=0.1, run=run)
    assert curve.step[-1] == PLAN.steps and curve.held_out[-1] != curve.held_out[0]


def test_what_cannot_be_aligned_is_refused() -> None:
    with pytest.raises(ValueError, match=naming("StableDiffusion3Pipeline", "prompts")):  # it has no text encoders
        base_of("sd3")
    with pytest.raises(ValueError, match=naming("StableDiffusion3Pipeline", "transformer")):
        stable_diffusion(make("sd3")[0], "this")
    base = base_of()
    policy, pairs = Policy(base), InMemory(base, 8)
    arguments: dict[str, Any] = {
        "batch": 2,
        "dropout": 0.0,
        "run": TrainingRun(seed=0, checkpoint=Path("none"), report=lambda *_: None),
    }
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=naming("β", beta)):
            train_dpo(base, policy, pairs, beta, PLAN, **arguments)
    with pytest.raises(ValueError, match=naming("β", -0.1)):
        train_mapo(base, policy, pairs, -0.1, PLAN, **arguments)
    with pytest.raises(ValueError, match=naming("batch", 8)):
        train_dpo(base, policy, pairs, 1.0, PLAN, **arguments | {"batch": 8})
    with pytest.raises(ValueError, match="held out"):
        train_dpo(base, policy, InMemory(base, 4, held_out=0), 1.0, PLAN, **arguments)
    with pytest.raises(ValueError, match=naming("batch", 6, 4)):
        BatchPart(0, 0, 4).positions(6)
    with pytest.raises(ValueError, match="rank 0"):
        Policy(base, 0)


def test_what_a_pair_gets_depends_on_its_place_alone() -> None:
    base = base_of("sdxl")
    pairs = InMemory(base, 8)
    together = noised(base, pairs, order(8, 3, range(4, 12)), 0.5, range(4, 12), 3)
    alone = noised(base, pairs, order(8, 3, range(6, 7)), 0.5, range(6, 7), 3)
    assert torch.equal(together.noisy[[2, 10]], alone.noisy) and torch.equal(
        together.timesteps[[2, 10]], alone.timesteps
    )
    assert torch.equal(together.conditions["prompt_embeds"][[2, 10]], alone.conditions["prompt_embeds"])
    assert sorted(order(8, 3, range(8))) == list(range(8)) == sorted(order(8, 3, range(8, 16)))
    assert order(8, 3, range(8)) != order(8, 3, range(8, 16))
    assert torch.equal(together.conditions["time_ids"][[2, 10]], alone.conditions["time_ids"])
    assert not torch.equal(together.conditions["time_ids"][2], together.conditions["time_ids"][10])


def test_dropped_prompts_are_as_many_as_asked() -> None:
    base = base_of()
    pairs = InMemory(base, 400)
    found = noised(base, pairs, range(400), 0.25, range(400), 1)
    dropped = (found.conditions["prompt_embeds"][:400] == pairs.empty["prompt_embeds"]).flatten(1).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 400) ** 0.5)


# --- resuming


class Interrupted(Exception):
    """Stands for a machine that went away."""


def aligned(
    folder: Path, rank: int | None, stop_at: int = 0, plan: TrainingPlan = PLAN
) -> tuple[dict[str, torch.Tensor], LossCurve]:
    base = base_of()
    policy = Policy(base, rank, seed=4)

    def report(done: int, planned: int, line: str) -> None:
        if done == stop_at:
            raise Interrupted

    curve = train_dpo(
        base,
        policy,
        InMemory(base, 17, held_out=5),
        500.0,
        plan,
        batch=4,
        dropout=0.1,
        per_pass=2,
        run=TrainingRun(
            seed=7,
            checkpoint=folder / "checkpoint",
            report=report,
            identity="β = 500",
        ),
    )
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}, curve


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.cases(1)
def test_interrupted_alignment_ends_with_the_same_bits(tmp_path: Path, rank: int | None) -> None:
    whole, curve = aligned(tmp_path / "whole", rank)
    with pytest.raises(Interrupted):
        aligned(tmp_path / "broken", rank, stop_at=4)
    assert json.loads((tmp_path / "broken" / "checkpoint" / "progress.json").read_text())["step"] == 3
    weights, again = aligned(tmp_path / "broken", rank)
    assert again == curve and weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_micro_batches_only_round_differently(tmp_path: Path) -> None:
    plan = replace(PLAN, steps=2, patience=None)
    whole, _ = aligned(tmp_path / "whole", None, plan=plan)
    parts, _ = aligned(tmp_path / "parts", None, plan=replace(plan, accumulate=2))
    start = dict(base_of().denoiser.named_parameters())

    def norm(differences: list[torch.Tensor]) -> float:
        return torch.cat([difference.flatten() for difference in differences]).norm().item()

    # Together: Adam's first steps are as long for a gradient of 1e-8, which rounding can turn, as for any other.
    moved = norm([whole[name] - start[name] for name in whole])
    assert 0 < norm([whole[name] - parts[name] for name in whole]) < 0.01 * moved


def test_a_checkpoint_of_another_run_is_refused_and_a_broken_one_named(tmp_path: Path) -> None:
    def fit(stop_at: int = 0) -> None:
        """One weight: what a checkpoint is asked does not depend on what is trained."""

        def report(done: int, planned: int, line: str) -> None:
            if done == stop_at:
                raise Interrupted

        run = TrainingRun(seed=7, checkpoint=tmp_path / "checkpoint", report=report, identity="β = 500")
        train(nn.Linear(1, 1), lambda model, *_: model(torch.ones(1, 1)).sum(), lambda _: 0.0, PLAN, run=run)

    with pytest.raises(Interrupted):
        fit(stop_at=4)
    progress = tmp_path / "checkpoint" / "progress.json"
    good = progress.read_text()
    progress.write_text(good.replace("500", "600"))
    with pytest.raises(ValueError, match=naming(tmp_path / "checkpoint", 500, 600)):
        fit()
    for content in ("{", "[]", "{}", good.replace('"step": 3', '"step": 300')):
        progress.write_text(content)
        with pytest.raises(ValueError, match=naming(tmp_path / "checkpoint", CURE)):
            fit()


GOOD = {
    "identity": "",
    "step": 3,
    "recent": 0.0,
    "data": {},
    "curve": {"step": [0], "train": [1.0], "held_out": [1.0], "stopped": "", "kept_step": 0},
}


def test_the_last_good_checkpoint_survives_a_kill_and_a_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "state"

    def good(path: Path) -> None:
        (path / "progress.json").write_text(json.dumps(GOOD))

    def full(path: Path) -> None:
        (path / "state.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    folders.write(folder, good)
    with pytest.warns(UserWarning, match=naming(folder)):
        folders.write(folder, full)
    assert folders.read(folder, "").step == 3 and not folder.with_name("state.tmp").exists()
    # Killed between the two renames: the former one comes back.
    folder.replace(tmp_path / "state.old")
    folder.with_name("state.tmp").mkdir()
    folders.recover(folder, first=True)
    assert folders.read(folder, "").step == 3 and [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_loss_that_is_no_number_stops_before_it_is_saved(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)

    def objective(trained: nn.Module, generator: torch.Generator, part: BatchPart) -> torch.Tensor:
        return trained(torch.ones(1, 2)).sum() * (math.nan if part.step == 3 else 1.0)

    with pytest.raises(TrainingFailed, match=naming("nan", "step 4")):
        train(
            model,
            objective,
            lambda _: 0.0,
            replace(PLAN, patience=None),
            run=TrainingRun(
                seed=0,
                checkpoint=tmp_path / "state",
                report=lambda *_: None,
            ),
        )
    assert json.loads((tmp_path / "state" / "progress.json").read_text())["step"] == 3
