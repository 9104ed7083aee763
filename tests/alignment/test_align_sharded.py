"""Weights divided between two processes by FSDP2: the same training, and whole before, after and in checkpoints."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

import test_flow_policies
from deradiff.alignment.base import Policy
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.dpo import train_dpo
from deradiff.alignment.draft import train_draft
from deradiff.alignment.latent_cache import CachedBatch
from deradiff.alignment.loop import TrainingFailed, train
from deradiff.alignment.sampling import SamplerSettings
from deradiff.alignment.scoring import RewardTask
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun
from test_align_command import command, sampled
from test_alignment import InMemory, Interrupted, base_of
from test_draft import Brightness
from two_processes import run_by_two

Weights = dict[str, torch.Tensor]
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""What `accelerate launch` sets."""
PLAN = TrainingPlan(
    steps=3, learning_rate=1e-3, warmup=2, average=0.5, evaluate_every=2, patience=4, checkpoint_seconds=0
)
SHORT = TrainingPlan(steps=1, learning_rate=1e-3, warmup=0, average=0.0)
SMALL = ["digits", "--count", 6, "--held-out", 2, "--steps", 2, "--batch", 2, "--sampling-steps", 3]
COMMANDS: dict[str, list[object]] = {
    "lora": [*SMALL, "--learning-rate", 0.01, "--beta", "100,200"],
    "whole": [*SMALL, "--learning-rate", 0.0001, "--beta", "200", "--lora-rank", 0, "--gradient-checkpointing"],
}


def pretend(kind: DistributedType, **plugin: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What Accelerate's states are to hold: of processors alone it would divide nothing."""
    found = {"distributed_type": kind, "fsdp_plugin": FullyShardedDataParallelPlugin(**plugin)}
    yield PartialState._shared_state, {"distributed_type": kind}
    yield AcceleratorState._shared_state, found


def sharded(efficient_loading: str = "false", **settings: Any) -> Accelerator:
    """As on a GPU, launched with `fsdp_version: 2`."""
    os.environ |= LAUNCHED | {"FSDP_CPU_RAM_EFFICIENT_LOADING": efficient_loading}
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    accelerator = Accelerator(**{"cpu": True} | settings)
    for state, held in pretend(DistributedType.FSDP):
        state |= held
    if accelerator.mixed_precision != "no":
        accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    assert accelerator.is_fsdp2
    return accelerator


class Block(nn.Sequential):
    """Of odd sizes, which two processes cannot share equally; frozen in part."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh())
        self[2].requires_grad_(False)


class Blocks(nn.Module):
    """One block that is divided by itself, and a last layer that the whole model holds on to."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.block, self.last = Block(), nn.Linear(5, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(rows))


def fitted(folder: Path, accelerator: Accelerator | None, break_at: int | None) -> tuple[nn.Module, LossCurve | None]:
    def error(model: nn.Module, places: range) -> torch.Tensor:
        rows = torch.stack([torch.randn(3, generator=generator) for generator in row_generators(3, places)])
        return (model(rows)[:, 0] - rows.sum(1) - 3).square().mean()

    def loss(model: nn.Module, _: torch.Generator, part: BatchPart) -> torch.Tensor:
        if part.step == break_at:
            raise Interrupted
        return error(model, part.positions(4))

    def held_out_loss(model: nn.Module) -> float:
        return error(model, range(1000, 1008)).item()

    model, curve = Blocks(), None
    with suppress(Interrupted):
        curve = train(
            model,
            loss,
            held_out_loss,
            replace(PLAN, learning_rate=0.1),
            run=TrainingRun(
                seed=0,
                checkpoint=folder / "weights",
                report=lambda *_: None,
                accelerator=accelerator,
            ),
        )
    return model, curve


class Breaking(InMemory):
    """Pairs whose machine goes away at step `at`, for every process."""

    at: int | None = None

    def batch(self, part: BatchPart, size: int) -> CachedBatch:
        if part.step == self.at:
            raise Interrupted
        return super().batch(part, size)


def aligned(folder: Path, accelerator: Accelerator | None, break_at: int | None) -> tuple[nn.Module, LossCurve | None]:
    base = base_of()
    policy, pairs = Policy(base, 2, seed=4), Breaking(base, 10, held_out=2)
    pairs.at, curve = break_at, None
    with suppress(Interrupted):
        curve = train_dpo(
            base,
            policy,
            pairs,
            500.0,
            replace(PLAN, patience=None),
            batch=2,
            dropout=0.1,
            per_pass=2,
            run=TrainingRun(
                seed=7,
                checkpoint=folder / "lora",
                report=lambda *_: None,
                accelerator=accelerator,
            ),
        )
    return policy.model, curve


KINDS = {"weights": fitted, "lora": aligned}


def trained(
    kind: str, folder: Path, accelerator: Accelerator | None = None, break_at: int | None = None
) -> tuple[Weights, list[float]]:
    """All weights after training, or after an interruption, and the held-out losses."""
    model, curve = KINDS[kind](folder, accelerator, break_at)
    assert (curve is None) == (break_at is not None)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    return {name: p.detach() for name, p in model.named_parameters()}, curve.held_out if curve else []


def at_the_start(kind: str) -> nn.Module:
    return Blocks() if kind == "weights" else Policy(base_of(), 2, seed=4).model


def drafted(folder: Path, accelerator: Accelerator | None = None) -> Weights:
    """A LoRA by DRaFT-2 with a divergence, whose reference is differentiated as well, and computed anew."""
    base = base_of()
    policy = Policy(base, 2, seed=4)
    policy.model.enable_gradient_checkpointing()
    prompts = ["a red fox", "two blue owls"]
    run, sampling = TrainingRun(7, folder / "draft", lambda *_: None, accelerator), SamplerSettings("ddim", 2, 1.0)
    train_draft(RewardTask(base, policy, prompts, prompts[:1], Brightness(), 0.1, SHORT, run, 2, sampling), keep=2)
    return {name: p.detach() for name, p in policy.model.named_parameters() if p.requires_grad}


def first_loss(folder: Path, accelerator: Accelerator) -> list[float]:
    """The held-out loss before training, of weights that half precision would round."""
    base = base_of()
    with torch.no_grad():
        for parameter in base.denoiser.parameters():
            parameter *= 1 + 0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0))
    return train_dpo(
        base,
        Policy(base),
        InMemory(base, 8, held_out=4),
        5000.0,
        replace(PLAN, steps=0),
        batch=2,
        dropout=0.0,
        run=TrainingRun(
            seed=7,
            checkpoint=folder / "half",
            report=lambda *_: None,
            accelerator=accelerator,
        ),
    ).held_out


def failed(folder: Path, accelerator: Accelerator) -> str:
    """What is said of a loss that is no number in the second process alone."""

    def loss(model: nn.Module, _: torch.Generator, part: BatchPart) -> torch.Tensor:
        value = model(torch.ones(1, 4)).sum()
        return value + math.nan if accelerator.process_index == 1 else value

    try:
        train(
            nn.Sequential(nn.Linear(4, 4)),
            loss,
            lambda _: 0.0,
            SHORT,
            run=TrainingRun(
                seed=0,
                checkpoint=folder / "failed",
                report=lambda *_: None,
                accelerator=accelerator,
            ),
        )
    except TrainingFailed as error:
        return str(error)
    return "nothing"


TWO = """
from types import SimpleNamespace
import shutil
import pytest
import test_flow_policies
from deradiff.alignment import loop
from test_align_sharded import KINDS, drafted, failed, first_loss, sharded, trained
if not accelerator.is_main_process:
    # Left to its own clock, this one would never save.
    loop.time = SimpleNamespace(monotonic=lambda: 0.0)
result = {}
for kind in KINDS:
    accelerator = sharded()
    whole, held_out = trained(kind, folder / "unbroken", accelerator)
    before, _ = trained(kind, folder / "broken", accelerator, break_at=2)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.copytree(folder / "broken" / kind, folder / "for-one" / kind)
    accelerator.wait_for_everyone()
    resumed, again = trained(kind, folder / "broken", accelerator)
    taken_over, _ = trained(kind, folder / "by-one", accelerator)
    result[kind] = {
        "whole": whole, "held_out": held_out, "before": before, "resumed": resumed, "again": again,
        "taken over": taken_over,
    }
result["drafted"] = drafted(folder, sharded())
result["reinforced"], _ = test_flow_policies.trained(folder / "reinforced", "flow-grpo", sharded())
result["failed"] = failed(folder, sharded())
with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading"):
    failed(folder, sharded("true"))
result["first loss"] = first_loss(folder, sharded(mixed_precision="bf16"))
"""
COMMAND = """
from deradiff.alignment import runs
from test_align_command import command
from test_align_sharded import COMMANDS, sharded
runs.Accelerator = lambda **settings: sharded("true", **settings)
for name, arguments in COMMANDS.items():
    done = command(*arguments, "--out", folder / name)
    assert done.exit_code == 0, (done.output, done.exception)
result = None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, tuple[Weights, list[float]]]:
    """What one process makes of it; it also leaves a checkpoint for two."""
    for kind in KINDS:
        trained(kind, folder / "by-one", break_at=2)
    return {kind: trained(kind, folder / "alone") for kind in KINDS}


@pytest.fixture(scope="module")
def two(folder: Path, alone: object) -> Any:
    return run_by_two(TWO, folder)


def norm(tensors: list[torch.Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def assert_near(found: Weights, expected: Weights, start: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    moved = norm([expected[name] - start[name] for name in expected])
    assert moved > 0 and norm([found[name] - expected[name] for name in expected]) < 1e-3 * moved


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_that_share_the_weights_train_what_one_does(two: Any, alone: Any, kind: str) -> None:
    start, (expected, held_out) = dict(at_the_start(kind).named_parameters()), alone[kind]
    assert_near(two[kind]["whole"], expected, start)
    assert two[kind]["held_out"] == pytest.approx(held_out, rel=1e-4)
    frozen = [name for name, p in start.items() if not p.requires_grad]
    assert frozen and all(torch.equal(two[kind]["whole"][name], start[name]) for name in frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_run_gives_the_weights_back_and_ends_with_the_same_bits(two: Any, kind: str) -> None:
    start, found = dict(at_the_start(kind).named_parameters()), two[kind]
    assert all(torch.equal(found["before"][name], start[name]) for name in start)
    assert found["again"] == found["held_out"]
    assert all(torch.equal(found["resumed"][name], found["whole"][name]) for name in start)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(
    two: Any, alone: Any, folder: Path, kind: str
) -> None:
    start, (expected, _) = dict(at_the_start(kind).named_parameters()), alone[kind]
    checkpoint = folder / "for-one" / kind
    assert json.loads((checkpoint / "progress.json").read_text())["step"] == 2
    saved = load_file(checkpoint / "state.safetensors")
    trainable = [p.shape for p in start.values() if p.requires_grad]
    assert [saved[f"parameters.{i}"].shape for i in range(len(trainable))] == trainable
    went_on, _ = trained(kind, folder / "for-one")
    assert_near(went_on, expected, start)
    assert_near(two[kind]["taken over"], expected, start)


def test_a_reference_that_is_differentiated_is_that_of_the_divided_model(two: Any, tmp_path: Path) -> None:
    assert_near(two["drafted"], drafted(tmp_path), dict(at_the_start("lora").named_parameters()))


def test_an_older_policy_of_a_divided_model_draws(two: Any, tmp_path: Path) -> None:
    start = dict(test_flow_policies.task_of(tmp_path / "start").policy.model.named_parameters())
    assert_near(two["reinforced"], test_flow_policies.trained(tmp_path, "flow-grpo")[0], start)


def test_a_loss_that_is_no_number_in_one_process_stops_them_all(two: Any) -> None:
    assert two["failed"].startswith("the loss was nan before step 1")


def test_half_precision_divides_no_model_from_its_reference(two: Any) -> None:
    assert two["first loss"] == [pytest.approx(math.log(2), abs=1e-7)]


@pytest.mark.cases(0)
def test_the_command_leaves_what_it_leaves_with_one_process(tmp_path: Path) -> None:
    run_by_two(COMMAND, tmp_path)
    for name, arguments in COMMANDS.items():
        out = tmp_path / "alone" / name
        done = command(*arguments, "--cpu", "--out", out)
        assert done.exit_code == 0, done.output
        for expected in sorted(out.glob("beta-*")):
            found = tmp_path / name / expected.name
            theirs, ours = (json.loads((path / "alignment.json").read_text()) for path in (found, expected))
            assert theirs["made_of"] == ours["made_of"]
            assert theirs["path_kl"]["value"] == pytest.approx(ours["path_kl"]["value"], rel=1e-2)
            torch.testing.assert_close(sampled(found), sampled(expected), rtol=0.01, atol=0.01)
