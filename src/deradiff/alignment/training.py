"""What a training is described by: its plan, the parts of its batches, its loss and the curve of its losses."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deradiff.algorithm.schedules import finite

Report = Callable[[int, int, str], None]
"""Called with (steps done, steps planned, a line of words)."""


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train.

    With `patience`, training stops once the held-out loss is *flat*: the best of the last `patience` evaluations is not
    lower than the best before them by `tolerance` of what has been gained since the first evaluation. The weights kept
    are then the best on held-out data, otherwise the last; the exponential moving average either way (`average` = 0:
    the weights themselves).

    A step sums the gradients of `accumulate` micro-batches per process and clips their norm to `max_norm`.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    cosine: int | None = None
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.99)
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    accumulate: int = 1
    max_norm: float = 1.0
    average: float = 0.999
    evaluate_every: int = 100
    patience: int | None = None
    tolerance: float = 0.02
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not finite(self.learning_rate, "the learning rate") > 0:
            raise ValueError(f"a learning rate of {self.learning_rate:g} moves nothing: it must be above 0")
        if not 0 <= finite(self.average, "the moving average") < 1:
            raise ValueError(f"a moving average of {self.average:g} keeps nothing new: it is 0 to below 1")

    def rate(self, step: int) -> float:
        """The learning rate at `step`: linear warm-up, then constant or a cosine that ends at step `cosine`."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.cosine is None:
            return self.learning_rate * warm
        cosine = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / self.cosine, dtype=torch.float64)).item()
        return self.learning_rate * warm * (0.01 + 0.99 * cosine)


@dataclass(frozen=True)
class TrainingRun:
    """What a training draws its randomness from, where it runs, reports and keeps its state (see `loop.train`).

    `accelerator` brings devices, processes, mixed precision and trackers; without it, this process trains on the CPU.
    `identity` says what is trained on what.
    """

    seed: int
    checkpoint: Path
    report: Report
    accelerator: Accelerator | None = None
    identity: str = ""


@dataclass
class LossCurve:
    """Losses by step: training loss averaged since the last evaluation, held-out loss of the averaged weights."""

    step: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    stopped: str = ""
    kept_step: int = 0

    def is_flat(self, patience: int, tolerance: float) -> bool:
        """Whether the last `patience` evaluations brought less than `tolerance` of the gain (see `TrainingPlan`)."""
        if len(self.held_out) <= patience + 1:
            return False
        before, recent = min(self.held_out[:-patience]), min(self.held_out[-patience:])
        return before - recent < tolerance * (self.held_out[0] - min(before, recent))


@dataclass(frozen=True)
class BatchPart:
    """One of `of` equal parts of the global batch of `step`: what one process sees of it in one micro-batch."""

    step: int = 0
    index: int = 0
    of: int = 1

    def positions(self, batch: int) -> range:
        """Where this part's rows stand in the endless sequence of all batches, each of `batch` rows.

        Raises `ValueError` if the parts cannot be equal.
        """
        if batch % self.of:
            raise ValueError(
                f"a batch of {batch} does not split into {self.of} equal parts (processes x micro-batches)"
            )
        size = batch // self.of
        start = self.step * batch + self.index * size
        return range(start, start + size)


Loss = Callable[[nn.Module, torch.Generator, BatchPart], Tensor]
"""The mean loss of a model on its part of the global batch that the generator draws."""


@runtime_checkable
class Stateful(Protocol):
    """What remembers where it stands: data whose order is no function of the step."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        ...
