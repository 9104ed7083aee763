"""The parameters that training changes, and other values that they hold for a while: an average, an older policy."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deradiff.alignment import sharding


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def swapped(parameters: list[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """`parameters` hold `values` inside the block."""
    former = [p.detach().clone() for p in parameters]
    try:
        copy_to(parameters, values)
        yield
    finally:
        copy_to(parameters, former)


@torch.no_grad()
def copy_to(parameters: list[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Write `values` into `parameters`. Autocast would go on with halves of those before, which it keeps."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
    torch.clear_autocast_cache()


def latest(step: int) -> float:
    """No memory at all: the old policy is the trained one at the end of each round."""
    return 0.0


@dataclass
class OldPolicy:
    """The policy that draws, θ_old: what is trained as it was a round ago, or an average of such.

    A round is `updates` steps of training, at the end of which `θ_old ← m θ_old + (1 - m) θ` with `m = memory(steps
    done)`. `loop.train` keeps its weights, in checkpoints as well, so that what it draws is a function of the step.
    """

    updates: int = 1
    memory: Callable[[int], float] = latest
    weights: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"{self.updates} updates for each round of drawing: take 1 or more")

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        """Start as the policy that is trained."""
        self.weights = [p.detach().clone() for p in parameters]

    def follow(self, done: int, parameters: Sequence[nn.Parameter]) -> None:
        """After `done` steps of training: at the end of a round, move."""
        if done % self.updates == 0:
            torch._foreach_lerp_(self.weights, [p.detach() for p in parameters], 1 - self.memory(done))

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """`model`, as Accelerate prepared it, is the old policy inside the block; without gradients."""
        with torch.no_grad(), swapped(trainable(model), self.weights):
            yield
            # Whole weights that FSDP may still hold are the old ones.
            sharding.free(model)
