"""The training loop that every method shares: step, average, evaluate, checkpoint, stop.

A run is a function of its seed alone. Every step draws its randomness from a generator seeded with (seed, step), so
that an interrupted run needs to save no generator and continues with the very bits it would have had. Processes and
accumulated micro-batches are parts of one global batch (`BatchPart`): how many there are changes only how sums are
rounded.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from deradiff.alignment import checkpoints, folders, sharding
from deradiff.alignment.parameters import OldPolicy, copy_to, swapped, trainable
from deradiff.alignment.training import BatchPart, Loss, LossCurve, Stateful, TrainingPlan, TrainingRun


class TrainingFailed(RuntimeError):
    """The loss stopped being a number; the last good checkpoint still stands."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step."""
    return torch.Generator().manual_seed((seed << 32) + step)


def make_optimizer(parameters: list[nn.Parameter], plan: TrainingPlan) -> torch.optim.Optimizer:
    """The optimizer that `plan` names. Raises `ImportError` for AdamW with states of 8 bits without bitsandbytes.

    8 bits: Dettmers et al. 2022. Adafactor (Shazeer and Stern 2018) has no moment of the gradient; it takes the plan's
    rate as it is, as where Diffusion-DPO was trained on SDXL.
    """
    settings: dict[str, Any] = {"lr": plan.learning_rate, "betas": plan.adam_betas, "weight_decay": plan.weight_decay}
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    if plan.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        plain: dict[str, Any] = {"scale_parameter": False, "relative_step": False}
        return Adafactor(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay, **plain)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ImportError("an 8-bit optimizer needs bitsandbytes: pip install bitsandbytes, or take adamw") from None
    return AdamW8bit(parameters, **settings)


def train(
    model: nn.Module,
    loss: Loss,
    held_out_loss: Callable[[nn.Module], float],
    plan: TrainingPlan,
    *,
    run: TrainingRun,
    data: Stateful | None = None,
    old: OldPolicy | None = None,
) -> LossCurve:
    """Minimise `loss` over the parameters of `model` that require gradients; the model ends with the kept weights.

    `loss` gets the model as Accelerate prepared it, the step's own generator and its `BatchPart` of the batch.
    `held_out_loss` is computed by every process alike, the first one's value counts. The accelerator of `run` forgets
    the model afterwards.

    `data` is what `loss` takes its rows from, where that has a state, and `old` the policy that draws what it learns
    from, where that is not the one that is trained.

    State is written to the folder `run.checkpoint` every `plan.checkpoint_seconds` and read from there if it exists;
    the caller deletes it once it has saved the result. A checkpoint with another `run.identity` raises `ValueError`. A
    disk that is full costs a warning, the last good checkpoint stays. Raises `TrainingFailed` if the loss is no longer
    finite.

    Where Accelerate's configuration says FSDP, version 2, what is trained is divided between the processes, and `model`
    has no weights meanwhile (see `sharding.divided`). A checkpoint holds whole weights all the same, which the first
    process gathers in its host memory; any number of processes goes on from it. FSDP of version 1 and DeepSpeed raise
    `ValueError`.
    """
    accelerator = run.accelerator or Accelerator(cpu=True)
    sharding.require_supported(accelerator, plan.optimizer)
    with sharding.divided(model, accelerator) if accelerator.is_fsdp2 else nullcontext(model) as trained:
        try:
            return _Training(trained, loss, held_out_loss, plan, run, accelerator, data, old).finished()
        finally:
            accelerator.free_memory()


class _Training:
    """One call of `train`: what changes from step to step, and what is done with it."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        held_out_loss: Callable[[nn.Module], float],
        plan: TrainingPlan,
        run: TrainingRun,
        accelerator: Accelerator,
        data: Stateful | None,
        old: OldPolicy | None,
    ) -> None:
        self.loss, self.held_out_loss, self.plan = loss, held_out_loss, plan
        self.run, self.accelerator, self.data, self.old = run, accelerator, data, old
        accelerator.gradient_accumulation_steps = plan.accumulate
        # What micro-batches exchange only once is a whole gradient in every process until then.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = accelerator.is_fsdp2
        self.model, self.optimizer = accelerator.prepare(model, make_optimizer(trainable(model), plan))
        self.parameters = trainable(self.model)
        self.average = [p.detach().clone() for p in self.parameters] if plan.average else []
        """The moving average of the weights, if there is one."""
        self.best = [p.detach().clone() for p in self.parameters] if plan.patience else []
        """The weights of the lowest held-out loss so far, if those are kept."""
        if old:
            old.begin(self.parameters)
        self.curve = LossCurve()
        self.step = 0
        """How many steps are done."""
        self.recent = torch.zeros((), device=accelerator.device)
        """The sum of this process's losses since the last evaluation."""
        self.saved = time.monotonic()
        """When the last checkpoint was written or read."""

    def finished(self) -> LossCurve:
        """Train from the start or from the checkpoint, and leave the kept weights in the model."""
        plan = self.plan
        if self.has_checkpoint():
            self.load()
        if self.step == 0:
            self.evaluate()
        while self.step < plan.steps and not self.curve.stopped:
            self.take_step()
            self.update_average()
            self.step += 1
            if self.old:
                self.old.follow(self.step, self.parameters)
            if self.step % plan.evaluate_every == 0 or self.step == plan.steps:
                self.require_finite()
                self.evaluate()
                self.stop_if_flat()
                self.report_losses()
            if self.elapsed() > plan.checkpoint_seconds:
                self.save()
        self.require_finite()
        if self.elapsed() > min(plan.checkpoint_seconds, 10):
            # What comes after training may fail as well, and the steps since the last checkpoint are paid for.
            self.save()
        self.keep_weights()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return self.curve

    # -- a step

    def take_step(self) -> None:
        """Move the weights along the gradient of one global batch."""
        accelerator, plan = self.accelerator, self.plan
        parts = plan.accumulate * accelerator.num_processes
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(self.step)
        for micro in range(plan.accumulate):
            part = BatchPart(self.step, micro * accelerator.num_processes + accelerator.process_index, parts)
            # What draws from torch's own generator, like dropout, is a function of the step as well.
            torch.manual_seed((self.run.seed << 32) + self.step * parts + part.index)
            with accelerator.accumulate(self.model), accelerator.autocast():
                value = self.loss(self.model, step_generator(self.run.seed, self.step), part)
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    # As `accelerator.clip_grad_norm_` does, which unscales twice where a LoRA is divided and in fp16.
                    accelerator.unscale_gradients()
                    nn.utils.clip_grad_norm_(self.parameters, plan.max_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.recent += value.detach() / plan.accumulate

    def update_average(self) -> None:
        """Draw the moving average towards the weights; a young one follows closely, not to carry the start along."""
        if self.plan.average:
            pull = 1 - min(self.plan.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], pull)

    # -- an evaluation

    def require_finite(self) -> None:
        """Raise `TrainingFailed` in every process where the loss or a weight is no number in one of them."""
        broken = torch.tensor(float(not sharding.is_finite(self.parameters)), device=self.accelerator.device)
        # Together, since one process alone would stop while the others wait for it.
        total, broken = self.accelerator.reduce(torch.stack([self.recent.float(), broken]), "sum")
        if not total.isfinite() or broken:
            what = "a weight was no number any more" if total.isfinite() else f"the loss was {total.item()}"
            exists = self.run.checkpoint.exists()
            last = f"the checkpoint in {self.run.checkpoint} is good" if exists else "there is no checkpoint yet"
            raise TrainingFailed(
                f"{what} before step {self.step}: lower the learning rate ({self.plan.learning_rate:g}), "
                f"or look for NaN in the data or the reward; {last}"
            )

    def evaluate(self) -> None:
        """Add the losses of this step to the curve."""
        accelerator, curve, step = self.accelerator, self.curve, self.step
        value = self.held_out()
        if not math.isfinite(value):
            raise TrainingFailed(
                f"the held-out loss is {value} at step {step}: lower the learning rate ({self.plan.learning_rate:g}), "
                "or look for NaN in the data or the reward"
            )
        if not curve.held_out or value < min(curve.held_out):
            curve.kept_step = step
            if self.plan.patience:
                self.best = [a.clone() for a in self.average or (p.detach() for p in self.parameters)]
        steps = step - curve.step[-1] if curve.step else 1
        recent = accelerator.reduce(self.recent, "mean").item() / steps
        self.recent = torch.zeros((), device=accelerator.device)
        curve.step.append(step)
        curve.held_out.append(value)
        curve.train.append(recent if step else value)
        rate = self.plan.rate(step)
        accelerator.log({"loss": curve.train[-1], "held-out loss": value, "learning rate": rate}, step=step)

    def held_out(self) -> float:
        """The held-out loss of the averaged weights, as the first process computes it."""
        averaged = swapped(self.parameters, self.average) if self.average else nullcontext()
        with averaged, torch.no_grad(), self.accelerator.autocast():
            value = torch.tensor(self.held_out_loss(self.model), dtype=torch.float64)
            sharding.free(self.model)
        return self.of_first_process(value)

    def stop_if_flat(self) -> None:
        """Let this step be the last where the held-out loss does not fall any more (see `TrainingPlan`)."""
        if self.plan.patience and self.curve.is_flat(self.plan.patience, self.plan.tolerance):
            self.curve.stopped = "flat"

    def report_losses(self) -> None:
        """Report the last evaluation, in the first process alone."""
        if self.accelerator.is_main_process:
            losses = f"loss {self.curve.train[-1]:.4f}, held-out {self.curve.held_out[-1]:.5f}"
            self.run.report(self.step, self.plan.steps, losses)

    def keep_weights(self) -> None:
        """Leave the best weights in the model if those are kept, otherwise the last."""
        self.curve.stopped = self.curve.stopped or "all steps done"
        if self.plan.patience:
            copy_to(self.parameters, self.best)
        else:
            self.curve.kept_step = self.curve.step[-1]
            copy_to(self.parameters, self.average or self.parameters)

    # -- checkpoints

    def has_checkpoint(self) -> bool:
        """Whether there is one, as the first process finds it once it has mended what a kill left."""
        folders.recover(self.run.checkpoint, self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        exists = self.run.checkpoint.exists()
        self.accelerator.wait_for_everyone()
        return exists

    def load(self) -> None:
        """Go on from the checkpoint."""
        accelerator, parameters, optimizer = self.accelerator, self.parameters, self.optimizer
        progress = folders.read(self.run.checkpoint, self.run.identity, self.plan.steps)
        state = checkpoints.read_state(
            self.run.checkpoint, progress, [p.shape for p in parameters], self.plan, self.old is not None
        )
        if self.data is not None:
            self.data.load_state_dict(progress.data)
        copy_to(parameters, sharding.parts(state.parameters, parameters))
        self.average = sharding.parts(state.average, parameters[: len(state.average)])
        self.best = sharding.parts(state.best, parameters[: len(state.best)])
        if self.old:
            self.old.weights = sharding.parts(state.old, parameters)
        held = {"state": state.optimizer, "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(sharding.optimizer_parts(held, parameters))
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)
        self.curve, self.step = LossCurve(**progress.curve.model_dump()), progress.step
        self.recent = torch.tensor(progress.recent, device=accelerator.device)
        self.saved = time.monotonic()

    def save(self) -> None:
        """Write a checkpoint: all processes gather its tensors, and the first one writes."""
        self.require_finite()
        accelerator = self.accelerator
        tensors = {
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "best": self.best,
            "old": self.old.weights if self.old else [],
            "optimizer": self.optimizer.state_dict()["state"],
        }
        tensors = sharding.gathered(tensors, accelerator.is_main_process)
        recent = accelerator.reduce(self.recent, "mean").item()

        def write(folder: Path) -> None:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
            progress = {
                "identity": self.run.identity,
                "step": self.step,
                "recent": recent,
                "curve": asdict(self.curve),
                "data": self.data.state_dict() if self.data is not None else {},
            }
            checkpoints.write(folder, checkpoints.TrainingState(**tensors, scaler=scaler), progress)

        if accelerator.is_main_process:
            folders.write(self.run.checkpoint, write)
        self.saved = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the last checkpoint, by the first process's clock: all take part in the next."""
        return self.of_first_process(torch.tensor(time.monotonic() - self.saved, dtype=torch.float64))

    def of_first_process(self, value: Tensor) -> float:
        """What the first process has for `value`."""
        if self.accelerator.num_processes > 1:
            value = broadcast(value.to(self.accelerator.device))
        return value.item()
