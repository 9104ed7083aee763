"""The training loop that every stage of a build shares: step, average, evaluate, checkpoint, stop.

A run is a function of its seed alone. Every step draws its randomness from a generator seeded with (seed, step), so
that an interrupted run needs to save no generator and continues with the very bits it would have had.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Report = Callable[[int, int, str], None]
"""Called with (steps done, steps planned, a line of words)."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    With `patience`, training stops once the held-out loss is *flat*: the best of the last `patience` evaluations is not
    lower than the best before them by `tolerance` of what has been gained since the first evaluation. The weights kept
    are then the best on held-out data, otherwise the last; the exponential moving average either way.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    cosine: int | None = None
    weight_decay: float = 0.0
    average: float = 0.999
    evaluate_every: int = 100
    patience: int | None = None
    tolerance: float = 0.02
    checkpoint_seconds: float = 60.0

    def rate(self, step: int) -> float:
        """The learning rate at `step`: linear warm-up, then constant or a cosine that ends at step `cosine`."""
        warm = min(1.0, (step + 1) / self.warmup)
        if self.cosine is None:
            return self.learning_rate * warm
        cosine = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / self.cosine, dtype=torch.float64)).item()
        return self.learning_rate * warm * (0.01 + 0.99 * cosine)


@dataclass
class Curve:
    """Losses by step: training loss averaged since the last evaluation, held-out loss of the averaged weights."""

    step: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    stopped: str = ""
    kept_step: int = 0

    def is_flat(self, patience: int, tolerance: float) -> bool:
        """Whether the last `patience` evaluations brought less than `tolerance` of the whole gain (see `Plan`)."""
        if len(self.held_out) <= patience + 1:
            return False
        before, recent = min(self.held_out[:-patience]), min(self.held_out[-patience:])
        return before - recent < tolerance * (self.held_out[0] - min(before, recent))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step."""
    return torch.Generator().manual_seed((seed << 32) + step)


@contextmanager
def swapped(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """`parameters` hold `values` inside the block."""
    mine = [p.detach().clone() for p in parameters]
    try:
        copy_to(parameters, values)
        yield
    finally:
        copy_to(parameters, mine)


@torch.no_grad()
def copy_to(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    """Write `values` into `parameters`."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def train(
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    held_out_loss: Callable[[], float],
    plan: Plan,
    *,
    seed: int,
    checkpoint: Path,
    report: Report,
) -> Curve:
    """Minimise `loss` over the parameters of `model` that require gradients; the model ends with the kept weights.

    `loss` gets the step's own generator. State is written to `checkpoint` every `plan.checkpoint_seconds` and read from
    there if it exists; the caller deletes it once it has saved the result.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True
    )
    average = [p.detach().clone() for p in parameters]
    best = [p.detach().clone() for p in parameters]
    curve, start, recent = Curve(), 0, torch.zeros(())

    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        copy_to(parameters, state["parameters"])
        average, best, recent = state["average"], state["best"], state["recent"]
        optimizer.load_state_dict(state["optimizer"])
        curve, start = Curve(**state["curve"]), state["step"]

    def save(step: int) -> None:
        state = {
            "parameters": [p.detach() for p in parameters],
            "average": average,
            "best": best,
            "recent": recent,
            "optimizer": optimizer.state_dict(),
            "curve": asdict(curve),
            "step": step,
        }
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(checkpoint)

    def evaluate(step: int) -> None:
        nonlocal recent
        with swapped(parameters, average), torch.no_grad():
            value = held_out_loss()
        if not curve.held_out or value < min(curve.held_out):
            curve.kept_step = step
            best[:] = [a.clone() for a in average]
        curve.step.append(step)
        curve.held_out.append(value)
        curve.train.append(recent.item() / plan.evaluate_every if step else value)
        recent = torch.zeros(())

    saved = time.monotonic()
    if start == 0:
        evaluate(0)
    for step in range(start, plan.steps):
        if curve.stopped:
            break
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        value = loss(step_generator(seed, step))
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # A young average follows closely, so that it does not carry the start along.
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(plan.average, (1 + step) / (10 + step)))
        recent += value.detach()
        if (step + 1) % plan.evaluate_every == 0:
            evaluate(step + 1)
            if plan.patience and curve.is_flat(plan.patience, plan.tolerance):
                curve.stopped = "flat"
            report(step + 1, plan.steps, f"loss {curve.train[-1]:.4f}, held-out {curve.held_out[-1]:.5f}")
        if time.monotonic() - saved > plan.checkpoint_seconds:
            save(step + 1)
            saved = time.monotonic()
    curve.stopped = curve.stopped or "all steps done"
    if plan.patience:
        copy_to(parameters, best)
    else:
        curve.kept_step = curve.step[-1]
        copy_to(parameters, average)
    return curve
