"""The files that alignments write: a valid one of every kind by its real writer, and the function that reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deradiff.alignment import folders, own_samples, runs, sharding
from deradiff.alignment.base import Base
from deradiff.alignment.checkpoints import read_state
from deradiff.alignment.data_order import DataOrder, permuted
from deradiff.alignment.loop import train
from deradiff.alignment.pairs import open_pairs
from deradiff.alignment.presets import usual
from deradiff.alignment.sampling import SamplerSettings
from deradiff.alignment.settings import Preset
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun
from deradiff.alignment.training_data import prepare_pairs
from deradiff.baking import distillation
from deradiff.baking.drawing import Sampler
from deradiff.sampling.dial import Dial
from deradiff.sweep.alignment_records import known_beta
from deradiff.worlds.digits.rewards import DigitsReward
from restorable import Written, pipe
from small_experiment import silent

# -- alignments --------------------------------------------------------------------------------------------------------


class Numbers:
    """A source of numbers, for a data order."""

    fingerprint: dict[str, Any] = {"kind": "numbers", "count": 6}  # noqa: RUF012
    held_out_rows = 0

    def steps(self, seed: int, cursor: Any) -> Any:
        return permuted(torch.arange(6), seed, cursor)

    def open(self, row: int) -> int:
        return row


class Stopped(Exception):
    """The machine went away."""


LINE = TrainingPlan(4, 0.01, warmup=0, average=0.5, evaluate_every=1, patience=5, checkpoint_seconds=1e9)


def fitted(checkpoint: Path, stop_at: int | None = None, seconds: float = 1e9) -> LossCurve:
    """A line through numbers, which is interrupted at a step."""
    torch.manual_seed(0)
    order = DataOrder(Numbers(), seed=1)

    def loss(model: nn.Module, _: torch.Generator, part: BatchPart) -> Tensor:
        if part.step == stop_at:
            raise Stopped
        return (model(torch.tensor(order.take(2)).float()[:, None]) - 1).square().mean()

    return train(
        nn.Linear(1, 1),
        loss,
        lambda model: float(model(torch.ones(1, 1)).square()),
        replace(LINE, checkpoint_seconds=seconds),
        run=TrainingRun(
            seed=0,
            checkpoint=checkpoint,
            report=silent,
            identity="a line",
        ),
        data=order,
    )


def checkpoints(folder: Path) -> Iterator[Written]:
    """Of an interrupted training."""
    place = folder / "checkpoint"
    with suppress(Stopped):
        fitted(place, stop_at=3, seconds=0)
    for name, form in (("progress.json", "json"), ("state.safetensors", "tensors")):
        yield Written(f"checkpoint's {name}", place / name, lambda: resumed(place), form, 20, folder)


def resumed(place: Path) -> None:
    """What `train` does with a checkpoint, but for the training."""
    progress = folders.read(place, "a line", LINE.steps)
    parameters = [torch.zeros(1, 1), torch.zeros(1)]
    state = read_state(place, progress, [value.shape for value in parameters], LINE)
    DataOrder(Numbers(), seed=1).load_state_dict(progress.data)
    sharding.optimizer_parts({"state": state.optimizer, "param_groups": []}, parameters)
    LossCurve(**progress.curve.model_dump())


def small_preset() -> Preset:
    """Of the digits, for six pairs."""
    preset = usual("digits", "dpo")
    return replace(preset, held_out=2, batch=2, plan=replace(preset.plan, steps=1, warmup=0, patience=None))


def alignments(folder: Path) -> Iterator[Written]:
    """All that `align` leaves: own pairs, cache, an anchor."""
    settings, out = small_preset(), folder / "aligned"
    [anchor] = runs.align_all(settings, [100.0], out, silent, count=6, cpu=True)
    made_of = json.loads((anchor / "alignment.json").read_text())["made_of"]

    def prepared() -> object:
        return prepare_pairs(pipe(), settings, out, 6, 0, silent).take([0, 3])  # type: ignore[union-attr]

    def finished() -> None:
        known_beta(str(anchor))
        runs.require_finished(anchor, made_of)

    for name, form, weight in (
        ("pairs/settings.json", "json", 4),
        ("pairs/chunks/00000.json", "json", 8),
        ("pairs/pairs.jsonl", "json", 3),
        ("cache/settings.json", "json", 5),
        ("cache/finished.json", "json", 8),
        ("cache/shard-00000.safetensors", "tensors", 8),
    ):
        yield Written(f"align's {name}", out / name, prepared, form, weight, out)
    yield Written("align's picture", next((out / "pairs/images").glob("*.png")), prepared, "picture", 3, out)
    yield Written("alignment.json", anchor / "alignment.json", finished, "json", 20, out)
    weights = next(anchor.glob("*.safetensors"))
    yield Written("an anchor's weights, found finished", weights, finished, "tensors", 10, out)

    listed = folder / "listed"
    shutil.copytree(out / "pairs", listed)
    yield Written("list of pairs", listed / "pairs.jsonl", lambda: open_pairs(listed), "json", 10, listed)


def samples(folder: Path) -> Iterator[Written]:
    """What reward-weighted denoising and distillation draw."""
    out, base = folder / "samples", Base(pipe())

    def drawn() -> object:
        sampling = SamplerSettings("ddim", 1, 1.0)
        return own_samples.draw_samples(out, base, "digits", ["a seven"], 2, DigitsReward(), sampling, seed=0, chunk=2)

    drawn()
    yield Written("own samples", out / "samples-0000000.safetensors", drawn, "tensors", 8, out)

    other = folder / "of-student"

    def of_student() -> object:
        dial = object.__new__(Dial)  # which is only asked for students of many λ
        sampler = Sampler(1, 1.0, 2)
        return distillation.draw_samples(
            other, pipe(), dial, ["a seven"], sampler, 4, None, {"a": 1}, (4, 8, 8), 0, silent
        )

    of_student()
    yield Written("samples of a student", other / "samples-0000002.safetensors", of_student, "tensors", 8, other)
