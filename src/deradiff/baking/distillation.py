"""A student that predicts in one evaluation what the mixture predicts in several.

It starts as the interpolated weights and is trained on the squared distance to the mixed prediction, at noised latents
of the realigned model's own samples. With guidance left outside it learns the mixture itself, with a prompt and
without, so that a pipeline can guide it as it likes: guidance and mixing are both linear, in whatever order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import cast_training_params
from jaxtyping import Float, Int, Shaped
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from deradiff.algorithm.lams import Lams
from deradiff.algorithm.schedules import Progress, finite
from deradiff.algorithm.step import mixed, with_reference_weight
from deradiff.alignment.base import Base, Conditions, EncodedPrompts
from deradiff.alignment.data_order import passes, row_generators
from deradiff.alignment.loop import train
from deradiff.alignment.lora_targets import WIDEST_TARGETS
from deradiff.alignment.objectives import squared_error
from deradiff.alignment.sampling import conditions, unconditional
from deradiff.alignment.training import BatchPart, LossCurve, Report, TrainingPlan, TrainingRun
from deradiff.anchors.full_weights import empty_copy
from deradiff.baking.drawing import Sampler, seeds_for
from deradiff.baking.weights import Blend
from deradiff.files.folders import begin_or_resume
from deradiff.files.tensors import joined
from deradiff.files.tensors import rows as rows_of
from deradiff.files.writing import atomic_file
from deradiff.sampling.denoisers import Denoisers
from deradiff.sampling.dial import Dial
from deradiff.worlds import find

CONDITION_WIDTH = 256
"""Of the embedding of λ, for a student that is told λ; as wide as latent consistency models have theirs."""

ADAPTER = "default"

WHAT, CURE = "file of drawn samples", "delete it, and they are drawn again"


@dataclass(frozen=True)
class Distillation:
    """How a student is trained.

    Args:
        lora_rank: of the LoRA that is trained on top of the interpolated weights; None trains all weights.
        lora_targets: the layers it changes, by the endings of their names; what a model does not have is passed over.
        samples: of the realigned model, which the student is trained at. The last `held_out` only measure progress.
        held_out: see there.
        steps: of training, `batch` noised latents each.
        batch: see there.
        accumulate: micro-batches of each step, for less memory.
        gradient_checkpointing: compute activations anew in the backward pass, for less memory still.
        learning_rate: at its peak; a cosine brings it down.
        dropout: the share of rows that are trained without a prompt. Guidance needs the student to know that as well,
            if it is by a second prediction.
        fold_guidance: train on the guided prediction instead: half the cost again, at one guidance scale for good.
        span: make one student for every λ between these two, told λ in the place of a guidance scale: see
            `lam_embedding`. Folds guidance in, for the pipeline then guides no more.
        per_pass: how many rows are evaluated at a time where nothing is trained.

    Raises `ValueError` for numbers out of range.
    """

    lora_rank: int | None = 32
    lora_targets: tuple[str, ...] = WIDEST_TARGETS
    samples: int = 1024
    held_out: int = 64
    steps: int = 2000
    batch: int = 64
    accumulate: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-4
    dropout: float = 0.2
    fold_guidance: bool = False
    span: tuple[float, float] | None = None
    per_pass: int = 64

    def __post_init__(self) -> None:
        counts = ("samples", "held_out", "steps", "batch", "accumulate", "per_pass", "lora_rank")
        for name in counts:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be 1 or more")
        if self.batch % self.accumulate:
            raise ValueError(f"a batch of {self.batch} does not split into {self.accumulate} equal micro-batches")
        if self.held_out >= self.samples:
            raise ValueError(f"{self.held_out} of {self.samples} samples are held out: leave some to train on")
        if not finite(self.learning_rate, "the learning rate") > 0:
            raise ValueError(f"a learning rate of {self.learning_rate:g} moves nothing: it must be above 0")
        if not 0 <= finite(self.dropout, "dropout") < 1:
            raise ValueError(f"dropout = {self.dropout:g} is a share of the prompts: 0 to below 1")
        if self.span is not None:
            low, high = (finite(end, "an end of the span of λ") for end in self.span)
            if not low < high:
                raise ValueError(f"a student for λ from {low:g} to {high:g}: name the lower end first")

    @property
    def guided(self) -> bool:
        """Whether the student's prediction is the guided one."""
        return self.fold_guidance or self.span is not None

    def plan(self) -> TrainingPlan:
        """The training loop's settings."""
        return TrainingPlan(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup=min(50, self.steps // 4),
            cosine=self.steps,
            accumulate=self.accumulate,
            average=0.99,
            evaluate_every=max(1, self.steps // 20),
        )


SHIPPED = Distillation(steps=1500, learning_rate=3e-3)
"""For a world that ships with deradiff, which is small and bears a high rate."""


def usual(reference: str) -> Distillation:
    """What a distillation of `reference` starts from."""
    return SHIPPED if find(reference) else Distillation()


# -- the teacher ------------------------------------------------------------------------------------------------------


def lam_by_timestep(lams: Lams, scheduler: Any) -> Float[Tensor, "anchor timestep"]:
    """λ of every anchor at every whole timestep of the noise schedule.

    A λ that runs over steps is read at the steps of `scheduler`, whose timesteps are set, and between two of them on
    the straight line: the clock by which samplers of that kind, of any number of steps, turn it.
    """
    duration = int(scheduler.config.num_train_timesteps)
    if lams.is_constant:
        return lams.at(Progress(0.0, 0.0), 1).expand(-1, duration)
    known = np.unique(torch.as_tensor(scheduler.timesteps).double().cpu().numpy())  # ascending
    done = 1 - np.arange(1, len(known) + 1) / len(known)
    by_steps = np.interp(np.arange(duration), known, done)
    rows = [lams.at(Progress(float(by_steps[t]), 1 - t / duration), 1) for t in range(duration)]
    return torch.cat(rows, dim=1)


def lams_at(
    table: Float[Tensor, "anchor timestep"], timesteps: Shaped[Tensor, " batch"]
) -> Float[Tensor, "anchor batch"]:
    """λ at these times, those of flows by the nearest whole one: `table` is from `lam_by_timestep`."""
    return table[:, timesteps.round().long().clamp(max=table.shape[1] - 1)]


class _Model(nn.Module):
    """One of the models of a mixture as a denoiser of its own."""

    def __init__(self, denoisers: Denoisers, index: int) -> None:
        super().__init__()
        self.denoisers, self.index = denoisers, index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.denoisers.predict([self.index], args, kwargs)[self.index]


class Teacher:
    """The mixed prediction `Σ w_k ε_k` of a reference and its anchors: what a realigned pipeline steps with."""

    def __init__(self, base: Base, denoisers: Denoisers) -> None:
        self.base = base
        self.models = [_Model(denoisers, index) for index in range(len(denoisers.names))]

    @torch.no_grad()
    def __call__(
        self,
        noisy: Float[Tensor, "batch *latent"],
        timesteps: Shaped[Tensor, " batch"],
        told: Conditions,
        lams: Float[Tensor, "anchor batch"],
    ) -> Float[Tensor, "batch *latent"]:
        """The prediction for each row at its own λ, without guidance, in single precision."""
        shown, mixture_weights = noisy.to(self.base.denoiser.dtype), with_reference_weight(lams)
        needed = [index for index, row in enumerate(mixture_weights) if row.any()]
        predictions = [self.base.call.predict(self.models[index], shown, timesteps, told) for index in needed]
        return mixed(torch.stack(predictions), mixture_weights[needed]).float()


# -- the student ------------------------------------------------------------------------------------------------------


def lam_embedding(lams: Float[Tensor, " batch"], width: int = CONDITION_WIDTH) -> Float[Tensor, "batch width"]:
    """λ as `StableDiffusionPipeline.get_guidance_scale_embedding` embeds `guidance_scale - 1`, told `1 + λ`.

    Sines, then cosines, of 1000 λ at `width`/2 frequencies from 1 down to 1/10000 in equal ratios.
    """
    # In single precision throughout, as there: the angles are large, and their rounding shows.
    step = torch.tensor(10_000.0).log() / (width // 2 - 1)
    frequencies = torch.exp(torch.arange(width // 2) * -step).to(lams.device)
    angles = 1000 * lams.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TellingLam(nn.Module):
    """A student that is told λ, as a denoiser that need not be told."""

    def __init__(self, student: nn.Module, lams: Float[Tensor, " batch"]) -> None:
        super().__init__()
        self.student, self.lams = [student], lams  # in a list: not a part of this module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output."""
        return self.student[0](*args, timestep_cond=lam_embedding(self.lams), **kwargs)


def student_of(blend: Blend, settings: Distillation, seed: int) -> Any:
    """The interpolated model, in memory, with what is to be trained: a LoRA in single precision, or all its weights.

    For a `span` it gets an input for λ, whose weights are zero at first.
    """
    reference = blend.reference
    config = {key: value for key, value in reference.config.items() if key != "_use_default_values"}
    state = {name: blend.tensor(name).clone() for name in blend.names}
    if settings.span is not None:
        config["time_cond_proj_dim"] = CONDITION_WIDTH
        like = state["time_embedding.linear_1.weight"]
        state["time_embedding.cond_proj.weight"] = like.new_zeros(like.shape[1], CONDITION_WIDTH)
    student: Any = empty_copy(reference, config)
    student.load_state_dict(state, assign=True)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if settings.lora_rank is None:
        return student.float().requires_grad_(True)
    student.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rank = settings.lora_rank
        student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(settings.lora_targets)), ADAPTER)
    if settings.span is not None:
        told = student.time_embedding.cond_proj.requires_grad_(True)
        # Trained in single precision beside layers that may be in half.
        told.register_forward_hook(lambda module, inputs, output: output.to(student.dtype))
    cast_training_params(student, torch.float32)
    return student


# -- what it is trained on --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealignedSamples:
    """Final latents of the realigned model, the number of each one's prompt, and λ of each where that varies."""

    latents: Float[Tensor, "sample *latent"]
    prompts: Int[Tensor, " sample"]
    lams: Float[Tensor, " sample"] | None


def draw_samples(
    folder: Path,
    pipe: Any,
    dial: Dial,
    prompts: Sequence[str],
    sampler: Sampler,
    count: int,
    span: tuple[float, float] | None,
    made_of: Mapping[str, Any],
    shape: Sequence[int],
    seed: int,
    report: Report,
) -> RealignedSamples:
    """Fill `folder` with `count` samples of a realigned pipeline, or finish what an interrupted call began there.

    Prompts take turns. For a `span` of λ every sample has a λ of its own, uniform there. Raises `ValueError` where the
    folder was begun with other settings than `made_of`, a file in it is damaged, or the pipeline's latents do not have
    the `shape` of those that it denoises.
    """
    begin_or_resume(folder, made_of, "set of drawn samples")
    parts = {}
    seeds, numbers, lams = seeds_for(seed, count, "own sample"), torch.arange(count) % len(prompts), None
    if span is not None:
        low, high = span
        draws = [torch.rand(1, generator=g) for g in row_generators(seed, range(count), "λ")]
        lams = low + (high - low) * torch.cat(draws).double()
    for start in range(0, count, sampler.batch_size):
        rows, path = slice(start, start + sampler.batch_size), folder / f"samples-{start:07d}.safetensors"
        if not path.exists():
            if lams is not None:
                dial.lam = lams[rows].tolist()
            drawn = sampler.latents(pipe, [prompts[i] for i in numbers[rows].tolist()], seeds[rows])
            if drawn.shape[1:] != torch.Size(shape):
                raise ValueError(
                    f"{type(pipe).__name__} gives latents of shape {tuple(drawn.shape[1:])} and denoises some of shape "
                    f"{tuple(shape)}, so that a student cannot be trained on them: bake with method='interpolate'"
                )
            with atomic_file(path) as temporary:
                save_file({"latents": drawn.contiguous()}, temporary)
        parts[path] = rows_of(path, {"latents": None}, len(numbers[rows]), WHAT, CURE)
        report(min(start + sampler.batch_size, count), count, "samples of the realigned model")
    return RealignedSamples(joined(parts, WHAT, CURE)["latents"], numbers, lams)


def distil(
    base: Base,
    teacher: Teacher,
    student: Any,
    samples: RealignedSamples,
    prompts: Sequence[str],
    lams: Float[Tensor, "anchor timestep"],
    settings: Distillation,
    guidance: float | int,
    run: TrainingRun,
    telling: Callable[[nn.Module, Float[Tensor, " batch"]], nn.Module] = TellingLam,
) -> LossCurve:
    """Train `student` to predict what `teacher` does at noised `samples`, uniformly over the noise schedule.

        mean over (x_0, c), t, ε of  || student(x_t, t, c) - teacher(x_t, t, c) ||²,   x_t the noised x_0

    The teacher's prediction is the mixture with the λ that belongs to t, of ε, v or velocity as the model predicts,
    guided where the settings say so. Where samples have a λ each, `telling(student, λ)` is the student that predicts
    for these rows. An interrupted training goes on where it was, and ends with the weights of an unbroken one. Raises
    what `loop.train` raises.
    """
    encode = partial(conditions, base, guidance_scale=guidance)
    nothing = partial(encode, [""]) if base.call.guidance_is_embedded else partial(unconditional, base, 1)
    told = EncodedPrompts.of(encode, prompts, nothing, settings.per_pass)
    dropout = 0 if settings.guided or base.call.guidance_is_embedded else settings.dropout
    trained_on = settings.samples - settings.held_out
    device, dtype = base.denoiser.device, student.dtype

    def errors(
        model: nn.Module, rows: Sequence[int], share: float | int, generators: Sequence[torch.Generator]
    ) -> Float[Tensor, " batch"]:
        chosen = torch.tensor(rows)
        clean = samples.latents[chosen].to(device)
        noise, t, dropped = base.noise_of(generators, clean.shape[1:], share)
        own = lams_at(lams, t) if samples.lams is None else samples.lams[chosen][None]
        t = t.to(device)
        noisy = base.noising.noised(clean, noise.to(device), t)
        numbers = samples.prompts[chosen]
        given = told.rows(numbers, dropped, device)
        target = teacher(noisy, t, given, own)
        if settings.guided and guidance != 1:
            without = told.rows(numbers, torch.ones_like(dropped), device)
            target = torch.lerp(teacher(noisy, t, without, own), target, guidance)
        shown = model if samples.lams is None else telling(model, samples.lams[chosen].to(device))
        given = {name: rows.to(dtype) for name, rows in given.items()}
        return squared_error(base.call.predict(shown, noisy.to(dtype), t, given).float(), target)

    def loss(model: nn.Module, _: torch.Generator, part: BatchPart) -> Tensor:
        generators = row_generators(run.seed, part.positions(settings.batch))
        rows = [int(torch.randint(trained_on, (1,), generator=g)) for g in generators]
        return errors(model, rows, dropout, generators).mean()

    def held_out_loss(model: nn.Module) -> float:
        held_out = range(trained_on, settings.samples)
        chunks = (held_out[rows.start : rows.stop] for rows in passes(len(held_out), settings.per_pass))
        parts = [errors(model, rows, 0, row_generators(run.seed, rows, "held out")) for rows in chunks]
        return float(torch.cat(parts).double().cpu().mean())

    return train(student, loss, held_out_loss, settings.plan(), run=run)


def accelerator_of(base: Base) -> Accelerator | None:
    """Where the pipeline is, in the precision it has; None on a processor, the training loop's own default."""
    if base.denoiser.device.type == "cpu":
        return None
    AcceleratorState._reset_state()
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(base.denoiser.dtype, "no")
    return Accelerator(mixed_precision=precision)
