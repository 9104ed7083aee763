"""The training loop that every method shares: step, average, evaluate, checkpoint, stop.

A run is a function of its seed alone. Every step draws its randomness from a generator seeded with (seed, step), so
that an interrupted run needs to save no generator and continues with the very bits it would have had. Processes and
accumulated micro-batches are parts of one global batch (`Part`): how many there are changes only how sums are rounded.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from deradiff.algorithm.schedules import finite
from deradiff.alignment import checkpoints, folders, sharding

Report = Callable[[int, int, str], None]
"""Called with (steps done, steps planned, a line of words)."""


@dataclass(frozen=True)
class Plan:
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
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
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


@dataclass(frozen=True)
class Part:
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


Loss = Callable[[nn.Module, torch.Generator, Part], Tensor]
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


class TrainingFailed(RuntimeError):
    """The loss stopped being a number; the last good checkpoint still stands."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step."""
    return torch.Generator().manual_seed((seed << 32) + step)


@contextmanager
def swapped(parameters: list[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """`parameters` hold `values` inside the block."""
    mine = [p.detach().clone() for p in parameters]
    try:
        copy_to(parameters, values)
        yield
    finally:
        copy_to(parameters, mine)


@torch.no_grad()
def copy_to(parameters: list[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Write `values` into `parameters`."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [p for p in model.parameters() if p.requires_grad]


def make_optimizer(parameters: list[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """AdamW, or AdamW with states of 8 bits (Dettmers et al. 2022). Raises `ImportError` without bitsandbytes."""
    settings: dict[str, Any] = {"lr": plan.learning_rate, "betas": plan.adam_betas, "weight_decay": plan.weight_decay}
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ImportError("an 8-bit optimizer needs bitsandbytes: pip install bitsandbytes, or take adamw") from None
    return AdamW8bit(parameters, **settings)


def train(
    model: nn.Module,
    loss: Loss,
    held_out_loss: Callable[[nn.Module], float],
    plan: Plan,
    *,
    seed: int,
    checkpoint: Path,
    report: Report,
    accelerator: Accelerator | None = None,
    identity: str = "",
    data: Stateful | None = None,
) -> Curve:
    """Minimise `loss` over the parameters of `model` that require gradients; the model ends with the kept weights.

    `loss` gets the model as Accelerate prepared it, the step's own generator and its `Part` of the batch.
    `held_out_loss` is computed by every process alike, the first one's value counts. `accelerator` brings devices,
    processes, mixed precision and trackers, and forgets the model afterwards; without it, this process trains on the
    CPU.

    `data` is what `loss` takes its rows from, where that has a state.

    State is written to the folder `checkpoint` every `plan.checkpoint_seconds` and read from there if it exists; the
    caller deletes it once it has saved the result. `identity` says what is trained on what: a checkpoint of another
    run raises `ValueError`. A disk that is full costs a warning, the last good checkpoint stays. Raises
    `TrainingFailed` if the loss is no longer finite.

    Where Accelerate's configuration says FSDP, version 2, what is trained is divided between the processes, and `model`
    has no weights meanwhile (see `sharding.divided`). A checkpoint holds whole weights all the same, which the first
    process gathers in its host memory; any number of processes goes on from it. FSDP of version 1 and DeepSpeed raise
    `ValueError`.
    """
    accelerator = accelerator or Accelerator(cpu=True)
    sharding.require_supported(accelerator, plan.optimizer)
    with sharding.divided(model, accelerator) if accelerator.is_fsdp2 else nullcontext(model) as trained:
        try:
            return _train(trained, loss, held_out_loss, plan, accelerator, seed, checkpoint, report, identity, data)
        finally:
            accelerator.free_memory()


def _train(
    model: nn.Module,
    loss: Loss,
    held_out_loss: Callable[[nn.Module], float],
    plan: Plan,
    accelerator: Accelerator,
    seed: int,
    checkpoint: Path,
    report: Report,
    identity: str,
    data: Stateful | None,
) -> Curve:
    accelerator.gradient_accumulation_steps = plan.accumulate
    # What micro-batches exchange only once is a whole gradient in every process until then.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = accelerator.is_fsdp2
    model, optimizer = accelerator.prepare(model, make_optimizer(trainable(model), plan))
    parameters = trainable(model)
    average = [p.detach().clone() for p in parameters] if plan.average else []
    best = [p.detach().clone() for p in parameters] if plan.patience else []
    curve, start, recent = Curve(), 0, torch.zeros((), device=accelerator.device)

    def load() -> None:
        nonlocal curve, start, recent, average, best
        progress = folders.read(checkpoint, identity, plan.steps)
        state = checkpoints.read_state(checkpoint, progress, [p.shape for p in parameters], plan)
        if data is not None:
            data.load_state_dict(progress.data)
        copy_to(parameters, sharding.parts(state.parameters, parameters))
        average, best = (sharding.parts(values, parameters[: len(values)]) for values in (state.average, state.best))
        held = {"state": state.optimizer, "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(sharding.optimizer_parts(held, parameters))
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)
        curve, start = Curve(**progress.curve.model_dump()), progress.step
        recent = torch.tensor(progress.recent, device=accelerator.device)

    def save(step: int) -> None:
        require_finite(step)
        first = accelerator.is_main_process
        mine = {
            "parameters": [p.detach() for p in parameters],
            "average": average,
            "best": best,
            "optimizer": optimizer.state_dict()["state"],
        }
        # All processes take part in these two; the first one writes.
        state, lately = sharding.whole(mine, first), accelerator.reduce(recent, "mean").item()

        def write(folder: Path) -> None:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
            progress = {
                "identity": identity,
                "step": step,
                "recent": lately,
                "curve": asdict(curve),
                "data": data.state_dict() if data is not None else {},
            }
            checkpoints.write(folder, checkpoints.State(**state, scaler=scaler), progress)

        if first:
            folders.write(checkpoint, write)

    def require_finite(step: int) -> None:
        # Together, since one process alone would stop while the others wait for it.
        broken = torch.tensor(float(not sharding.is_finite(parameters)), device=accelerator.device)
        found, broken = accelerator.reduce(torch.stack([recent.float(), broken]), "sum")
        if not found.isfinite() or broken:
            what = "a weight was no number any more" if found.isfinite() else f"the loss was {found.item()}"
            last = f"the checkpoint in {checkpoint} is good" if checkpoint.exists() else "there is no checkpoint yet"
            raise TrainingFailed(
                f"{what} before step {step}: lower the learning rate ({plan.learning_rate:g}), "
                f"or look for NaN in the data or the reward; {last}"
            )

    def evaluate(step: int) -> None:
        nonlocal recent
        averaged = swapped(parameters, average) if average else nullcontext()
        with averaged, torch.no_grad(), accelerator.autocast():
            mine = torch.tensor(held_out_loss(model), dtype=torch.float64)
            sharding.free(model)
        value = broadcast(mine.to(accelerator.device)).item() if accelerator.num_processes > 1 else mine.item()
        if not math.isfinite(value):
            raise TrainingFailed(
                f"the held-out loss is {value} at step {step}: lower the learning rate ({plan.learning_rate:g}), or "
                "look for NaN in the data or the reward"
            )
        if not curve.held_out or value < min(curve.held_out):
            curve.kept_step = step
            best[:] = [a.clone() for a in average or (p.detach() for p in parameters)] if plan.patience else []
        steps = step - curve.step[-1] if curve.step else 1
        since = accelerator.reduce(recent, "mean").item() / steps
        curve.step.append(step)
        curve.held_out.append(value)
        curve.train.append(since if step else value)
        recent = torch.zeros((), device=accelerator.device)
        accelerator.log({"loss": curve.train[-1], "held-out loss": value, "learning rate": plan.rate(step)}, step=step)

    def elapsed(since: float) -> float:
        mine = time.monotonic() - since
        if accelerator.num_processes == 1:
            return mine
        # By the first process's clock: all take part in a checkpoint.
        return broadcast(torch.tensor(mine, device=accelerator.device)).item()

    folders.recover(checkpoint, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    resumed = checkpoint.exists()
    accelerator.wait_for_everyone()
    if resumed:
        load()
    saved = time.monotonic()
    if start == 0:
        evaluate(0)
    parts = plan.accumulate * accelerator.num_processes
    for step in range(start, plan.steps):
        if curve.stopped:
            break
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        for micro in range(plan.accumulate):
            part = Part(step, micro * accelerator.num_processes + accelerator.process_index, parts)
            # What draws from torch's own generator, like dropout, is a function of the step as well.
            torch.manual_seed((seed << 32) + step * parts + part.index)
            with accelerator.accumulate(model), accelerator.autocast():
                value = loss(model, step_generator(seed, step), part)
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    # As `accelerator.clip_grad_norm_` does, which unscales twice where a LoRA is divided and in fp16.
                    accelerator.unscale_gradients()
                    nn.utils.clip_grad_norm_(parameters, plan.max_norm)
                optimizer.step()
                optimizer.zero_grad()
            recent += value.detach() / plan.accumulate
        # A young average follows closely, so that it does not carry the start along.
        if plan.average:
            pull = 1 - min(plan.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], pull)
        if (step + 1) % plan.evaluate_every == 0 or step + 1 == plan.steps:
            require_finite(step + 1)
            evaluate(step + 1)
            if plan.patience and curve.is_flat(plan.patience, plan.tolerance):
                curve.stopped = "flat"
            if accelerator.is_main_process:
                report(step + 1, plan.steps, f"loss {curve.train[-1]:.4f}, held-out {curve.held_out[-1]:.5f}")
        if elapsed(saved) > plan.checkpoint_seconds:
            save(step + 1)
            saved = time.monotonic()
    require_finite(plan.steps)
    if elapsed(saved) > min(plan.checkpoint_seconds, 10):
        # What comes after training may fail as well, and the steps since the last checkpoint are paid for.
        save(curve.step[-1])
    curve.stopped = curve.stopped or "all steps done"
    if plan.patience:
        copy_to(parameters, best)
    else:
        curve.kept_step = curve.step[-1]
        copy_to(parameters, average or parameters)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return curve
