"""Exact realignment by particles: sequential Monte Carlo around a realigned pipeline.

Algorithm 1 is the proposal; the factor that it drops (`path_weights`) is the weight. K particles per prompt walk
through the pipeline as one batch; where their weights grow uneven, the light ones are replaced by copies of the heavy
ones before noise separates them again (`algorithm.smc`). As K grows they follow the distribution of the model aligned
at β/λ, at exactly K times the network evaluations of one image. Under guidance the weights are those of
`algorithm.guided_weights`, and the target is the retrained model under the same guidance, but for what these leave out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from jaxtyping import Bool
from torch import Tensor

from deradiff.algorithm import posteriors
from deradiff.algorithm.guided_weights import left_out
from deradiff.algorithm.path_weights import ImportanceWeights, Obstacle, PathWeights
from deradiff.algorithm.smc import Population, WeightedParticles
from deradiff.algorithm.verdict import OBSTACLES
from deradiff.sampling import pictures
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.dial import Dial, dial_of


@dataclass(frozen=True, kw_only=True)
class Particles(WeightedParticles):
    """All particles of a run, prompt after prompt.

    Attributes:
        images: the pipeline's output, `P K` images (or one tensor of latents).
        run: log weights and path densities summed along each particle's own lineage.
        resampled_by: how the sampler allowed resampling, or why it did not.
        blacked_out: images that the pipeline's safety checker put a black one in the place of: no pictures to score.
    """

    images: Any
    run: ImportanceWeights
    resampled_by: str
    blacked_out: Bool[Tensor, " image"]

    @property
    def words(self) -> str:
        """What became of the weights, in a sentence, and what they do not mean."""
        prompts, count = self.log_weights.shape
        lost = int(self.collapsed.sum())
        state = f"{float(self.effective.mean()):.3g} of {count} particles effective at the end"
        if lost:
            state = (
                f"weights collapsed for {lost} of {prompts} prompts: these results are hardly more than one sample. "
                f"Use more particles, a smaller λ, or temper < 1 ({state})"
            )
        return f"{state}; {self.resampled_by}" + (f". No exact target: {self.why_inexact}" if self.why_inexact else "")

    @property
    def why_inexact(self) -> str:
        """Why these particles have no retrained model as their target; empty where they have one."""
        return "; ".join(self._obstacle(obstacle) for obstacle in sorted(self.run.obstacles))

    def _obstacle(self, obstacle: Obstacle) -> str:
        guidance = self.run.guidance
        if obstacle != "guidance" or guidance is None:
            return OBSTACLES[obstacle]
        prompts, count = self.log_weights.shape
        unknown = left_out(guidance, torch.arange(prompts).repeat_interleave(count))
        return (
            f"weights at guidance {guidance.scale:.3g} leave out up to {unknown:.2g} of a score's standard deviations"
        )


def sample_particles(
    pipe: DiffusionPipeline,
    prompt: str | list[str] | None,
    count: int = 16,
    *,
    ess_threshold: float | int = 0.5,
    temper: float | int = 1.0,
    micro_batch: int | None = None,
    generator: torch.Generator | None = None,
    **call: Any,
) -> Particles:
    """Sample `count` particles of every prompt from a realigned pipeline, weighted and resampled.

    Args:
        pipe: a pipeline after `realign`, at one λ; any number of anchors. Resampling needs noise in every step and no
            memory of earlier ones: DDPM, DDIM with `eta > 0`, Euler ancestral, `schedulers.FlowMatchSDEScheduler`.
            Other samplers weight without resampling, which the result says.
        prompt: one prompt or several, whose particles do not compete; None with `prompt_embeds` among the arguments.
        count: K, the particles of a prompt.
        ess_threshold: resample a prompt whose share of effective particles falls below this, 0 (never) to 1 (always).
        temper: the exponent of the weights, 0 (Algorithm 1) to 1 (exact). Between them lies a compromise for weights
            that would collapse: less bias than Algorithm 1, less noise than the exact target.
        micro_batch: how many rows of the batch the networks see at a time, all by default. Memory is then bounded by
            that number and results are the same; pictures are decoded one by one.
        generator: draws the noise, and decides the resampling.
        call: further arguments of the pipeline's call.

    Raises:
        ValueError: the pipeline is not realigned or has several λ; a number outside its range; diffusers' stochastic
            flow-matching step, which is no discretised diffusion.
        MemoryError: the particles do not fit.
        FloatingPointError: the weights of a prompt are all zero or NaN; `NotFinite` where an image is NaN or infinite.
    """
    prompts = 1 if isinstance(prompt, str) else len(call.get("prompt_embeds", ()) if prompt is None else prompt)
    dial = _realigned(pipe, prompts, count, ess_threshold, temper, micro_batch)
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    chance = torch.Generator().manual_seed(generator.initial_seed() + 1)
    paths = RealignedPaths(Population(prompts, count, float(ess_threshold), chance), float(temper))
    given = "given" if micro_batch is None else f"{micro_batch} at a time"
    try:
        with _attached(dial, pipe, paths, micro_batch, generator):
            if "generator" in signature(pipe.__call__).parameters:
                call["generator"] = generator
            if prompt is None:  # diffusers repeats some embeddings for several images of a prompt, and others not
                call = {name: _repeated(value, prompts, count) for name, value in call.items()}
            else:
                call |= {"prompt": prompt if isinstance(prompt, str) else list(prompt), "num_images_per_prompt": count}
            drawn = pictures.draw(pipe, **call)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise MemoryError(
            f"{prompts} prompts x {count} particles do not fit in memory ({given}): set micro_batch to a smaller "
            "number, or pass fewer prompts at a time"
        ) from None
    names = [f"particle {k + 1} of prompt {p + 1}" for p in range(prompts) for k in range(count)]
    return paths.result(drawn.require_finite(names), dial.importance_weights)


class RealignedPaths:
    """The Feynman-Kac model of a realigned run: a pipeline takes its transitions, and its potentials are path weights.

    Called after every step of the scheduler with what it returned, may reorder it.
    """

    def __init__(self, population: Population, temper: float) -> None:
        self.population, self.temper = population, temper
        self.resampled_by = "no step was taken"
        self._counted: dict[bool, Tensor] = {}
        """The log weights that particles have by now, of guidance's parts apart and of the mixed predictions."""
        self._scheduler: SchedulerMixin | None = None

    def __call__(self, path_weights: PathWeights, scheduler: SchedulerMixin, previous: Tensor) -> Tensor:
        """Weigh the step that led to `previous`, and resample the prompts whose weights have grown uneven."""
        if self._scheduler not in (None, scheduler):
            raise DialError(
                "particles weigh and reorder what one scheduler steps, and this pipeline steps parts of its samples by "
                "several: draw without particles"
            )
        self._scheduler = scheduler
        if not path_weights.noisy:
            self.resampled_by = f"not resampled: {_why_not(scheduler)}"
            return previous
        if path_weights.ahead is not None:
            path_weights.add_first_half(path_weights.ahead)
            self._weigh(path_weights)
            rows = self.population.resample()
            if rows is not None:
                self._counted = {apart: total[rows] for apart, total in self._counted.items()}
                path_weights.select(rows.to(previous.device))
                previous = previous[rows.to(previous.device)]
        times, threshold = len(self.population.lineage), self.population.threshold
        self.resampled_by = f"resampled {times} times, below {threshold:g} effective"
        return previous

    def result(self, drawn: pictures.DrawnPictures, run: ImportanceWeights) -> Particles:
        """The particles at the end of the run."""
        self._weigh(run)
        return Particles(
            **vars(self.population.result()),
            images=drawn.images,
            run=run,
            resampled_by=self.resampled_by,
            blacked_out=torch.tensor(drawn.blacked_out),
        )

    def _weigh(self, run: PathWeights | ImportanceWeights) -> None:
        """Take over what has been added to the log weights since the last time.

        Those of guidance's parts apart while one scale explains the guidance, and of the mixed predictions otherwise.
        """
        totals = {False: run.log_weights.cpu().double()}
        if run.guidance is not None:
            totals[True] = run.guidance.combined.cpu().double()
        apart = run.guidance is not None
        self.population.weigh(self.temper * (totals[apart] - self._counted.get(apart, 0)))
        self._counted = totals


def _repeated(value: Any, prompts: int, count: int) -> Any:
    """A tensor with a row per prompt, with a row per particle."""
    batched = isinstance(value, Tensor) and value.ndim > 1 and len(value) == prompts
    return value.repeat_interleave(count, 0) if batched else value


def _why_not(scheduler: SchedulerMixin) -> str:
    name = type(scheduler).__name__
    if posteriors.has_posterior(scheduler):
        return f"{name} draws no noise as it is set (eta = 0), and copies would stay copies"
    return f"{name} is deterministic, or remembers earlier steps, which copies would not share"


def _realigned(
    pipe: DiffusionPipeline, prompts: int, count: Any, ess_threshold: Any, temper: Any, micro_batch: Any
) -> Dial:
    """The dial of `pipe`; `ValueError` for anything that particles cannot be made of."""
    dial = dial_of(pipe)
    if dial is None:
        raise ValueError("this pipeline is not realigned: call deradiff.realign(pipe, anchor, lam) first")
    if dial.method == "interpolate":
        raise ValueError("interpolated weights are one model, with nothing to weigh: use method='mixture'")
    if dial.reuse is not None:
        raise ValueError(
            "particles are weighed by how far the models' predictions are apart, which reuse only estimates: set "
            "dial.reuse = None"
        )
    if not prompts:
        raise ValueError("particles need at least one prompt, or prompt_embeds")
    for name, number in (("count", count), ("micro_batch", 1 if micro_batch is None else micro_batch)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number, 1 at least; got {number!r}")
    for name, share in (("ess_threshold", ess_threshold), ("temper", temper)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share!r}")
    if not dial.one_lam:
        raise ValueError("particles of one run share one λ: set dial.lam to a single value for each anchor")
    if pipe.scheduler.config.get("stochastic_sampling"):
        raise ValueError(
            "stochastic_sampling of FlowMatchEulerDiscreteScheduler noises its estimate of x_0 all anew at every step: "
            "it is no discretised diffusion, and its weights converge to nothing. Use "
            "deradiff.schedulers.FlowMatchSDEScheduler.from_config(pipe.scheduler.config, stochastic_sampling=False)"
        )
    return dial


@contextmanager
def _attached(
    dial: Dial, pipe: Any, paths: RealignedPaths, micro_batch: int | None, generator: torch.Generator
) -> Iterator[None]:
    """While the pipeline runs, the dial hands every step to `paths` and feeds the networks `micro_batch` rows."""
    changes: list[tuple[Any, str, Any]] = [(dial, "population", paths), (dial, "micro_batch", micro_batch)]
    if micro_batch is not None and hasattr(getattr(pipe, "vae", None), "use_slicing"):
        changes.append((pipe.vae, "use_slicing", True))
    if hasattr(pipe.scheduler, "generator"):  # ours for flow matching, whose pipelines do not hand theirs over
        changes.append((pipe.scheduler, "generator", generator))
    before = [getattr(owner, name) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)
