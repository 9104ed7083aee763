"""Exact realignment by particles: sequential Monte Carlo around a realigned pipeline.

Algorithm 1 is the proposal; the factor that it drops (`path_weights`) is the weight. K particles per prompt walk
through the pipeline as one batch; where their weights grow uneven, the light ones are replaced by copies of the heavy
ones before noise separates them again. As K grows they follow the distribution of the model aligned at β/λ, at exactly
K times the network evaluations of one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from jaxtyping import Bool, Float, Int
from torch import Tensor

from deradiff.algorithm import posteriors
from deradiff.algorithm.estimates import Estimate, effective_sample_size
from deradiff.algorithm.path_weights import ImportanceWeights, PathWeights
from deradiff.algorithm.verdict import OBSTACLES
from deradiff.sampling import pictures
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.dial import Dial, dial_of


@dataclass(frozen=True)
class Particles:
    """All particles of a run, prompt after prompt: image `p K + k` is particle k of prompt p.

    Attributes:
        images: the pipeline's output, `P K` images (or one tensor of latents).
        log_weights: normalised, so that every prompt's weights sum to one.
        ancestors: the starting noise that each particle descends from, 0 to K-1 of its prompt.
        lineage: `(step, parents)` of every resampling, `parents` being `[prompt, particle]`; steps count from 0.
        evenness: the share of effective particles after every step, before it was resampled.
        log_normalizer: the estimate of `log E[W]` for every prompt.
        run: log weights and path densities summed along each particle's own lineage.
        resampled_by: how the sampler allowed resampling, or why it did not.
        blacked_out: images that the pipeline's safety checker put a black one in the place of: no pictures to score.
    """

    images: Any
    log_weights: Float[Tensor, "prompt particle"]
    ancestors: Int[Tensor, "prompt particle"]
    lineage: list[tuple[int, Int[Tensor, "prompt particle"]]]
    evenness: Float[Tensor, "step prompt"]
    log_normalizer: Float[Tensor, " prompt"]
    run: ImportanceWeights
    resampled_by: str
    blacked_out: Bool[Tensor, " image"]

    @property
    def effective(self) -> Float[Tensor, " prompt"]:
        """Effective particles of each prompt, 1 to K, at the end."""
        return effective_sample_size(self.log_weights)

    @property
    def families(self) -> Int[Tensor, " prompt"]:
        """How many different starting noises are left among a prompt's particles."""
        return torch.tensor([len(row.unique()) for row in self.ancestors])

    @property
    def collapsed(self) -> Bool[Tensor, " prompt"]:
        """Prompts of which fewer than two particles count, or whose particles all descend from one."""
        alone = (self.effective < 2) | (self.families < 2)
        return alone if self.log_weights.shape[1] > 1 else torch.ones_like(alone)

    def picks(self, generator: torch.Generator | None = None) -> Int[Tensor, " prompt"]:
        """One particle of every prompt, drawn by weight, as an index into `images`."""
        chosen = torch.multinomial(self.log_weights.exp(), 1, generator=generator)[:, 0]
        return torch.arange(len(chosen)) * self.log_weights.shape[1] + chosen

    def mean(self, scores: Float[Tensor, " image"]) -> Estimate:
        """The weighted mean of a score of every image, averaged over prompts; standard error given the prompts.

        The error is that of sequential Monte Carlo (Lee and Whiteley 2018, Biometrika 105): particles of one ancestor
        count as one. It is NaN where all particles of a prompt descend from one.
        """
        f = scores.double().cpu().view(self.log_weights.shape)
        weights = self.log_weights.exp()
        means = (weights * f).sum(1)
        parts = weights * (f - means[:, None])
        by_ancestor = torch.zeros_like(parts).scatter_add_(1, self.ancestors, parts)
        variances = torch.where(self.families > 1, by_ancestor.square().sum(1), torch.nan)
        return Estimate(float(means.mean()), float(variances.sum().sqrt() / len(means)))

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
        return "; ".join(OBSTACLES[obstacle] for obstacle in sorted(self.run.obstacles))


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
    population = Population(prompts, count, float(ess_threshold), float(temper), chance)
    given = "given" if micro_batch is None else f"{micro_batch} at a time"
    try:
        with _attached(dial, pipe, population, micro_batch, generator):
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
    return population.result(drawn.require_finite(names), dial.importance_weights)


class Population:
    """The particles of one run: called after every step of the scheduler with what it returned, may reorder it."""

    def __init__(self, prompts: int, count: int, threshold: float, temper: float, generator: torch.Generator):
        self.threshold, self.temper, self.generator = threshold, temper, generator
        self.log_weights = torch.zeros(prompts, count, dtype=torch.float64)
        self.log_normalizer = torch.zeros(prompts, dtype=torch.float64)
        self.ancestors = torch.arange(count).repeat(prompts, 1)
        self.lineage: list[tuple[int, Tensor]] = []
        self.evenness: list[Tensor] = []
        self.resampled_by = "no step was taken"
        self._counted = torch.zeros_like(self.log_weights)
        self._scheduler: SchedulerMixin | None = None

    def __call__(self, path_weights: PathWeights, scheduler: SchedulerMixin, previous: Tensor) -> Tensor:
        """Weigh the step that led to `previous`, and resample the prompts whose weights have grown uneven."""
        count = self.log_weights.shape[1]
        if self._scheduler not in (None, scheduler):
            raise DialError(
                "particles weigh and reorder what one scheduler steps, and this pipeline steps parts of its samples by "
                "several: draw without particles"
            )
        self._scheduler = scheduler
        if not path_weights.noisy:
            self.resampled_by = f"not resampled: {_why_not(scheduler)}"
            return previous
        self.resampled_by = f"resampled {len(self.lineage)} times, below {self.threshold:g} effective"
        if path_weights.ahead is None:
            return previous
        path_weights.add_first_half(path_weights.ahead)
        self._count(path_weights.log_weights)
        evenness = effective_sample_size(self.log_weights) / count
        self.evenness.append(evenness)
        uneven = evenness < self.threshold
        if count == 1 or not bool(uneven.any()):
            return previous
        parents = torch.arange(count).repeat(len(uneven), 1)
        parents[uneven] = systematic(self.log_weights[uneven], self.generator)
        self.lineage.append((len(self.evenness) - 1, parents))
        self.log_normalizer += torch.where(uneven, _log_mean_exp(self.log_weights), 0)
        self.log_weights[uneven] = 0
        self.ancestors, self._counted = self.ancestors.gather(1, parents), self._counted.gather(1, parents)
        rows = (parents + count * torch.arange(len(parents))[:, None]).flatten().to(previous.device)
        path_weights.select(rows)
        return previous[rows]

    def result(self, drawn: pictures.DrawnPictures, run: ImportanceWeights) -> Particles:
        """The particles at the end of the run."""
        self._count(run.log_weights)
        if not bool(torch.isfinite(self.log_weights).any(1).all()):
            raise FloatingPointError("the weights of a prompt's particles are all zero or NaN")
        prompts = len(self.log_weights)
        return Particles(
            images=drawn.images,
            log_weights=torch.log_softmax(self.log_weights, 1),
            ancestors=self.ancestors,
            lineage=self.lineage,
            evenness=torch.stack(self.evenness) if self.evenness else torch.empty(0, prompts, dtype=torch.float64),
            log_normalizer=self.log_normalizer + _log_mean_exp(self.log_weights),
            run=run,
            resampled_by=self.resampled_by,
            blacked_out=torch.tensor(drawn.blacked_out),
        )

    def _count(self, log_weights: Float[Tensor, " image"]) -> None:
        """Take over what has been added to the log weights since the last time."""
        total = log_weights.double().cpu().view(self.log_weights.shape)
        self.log_weights = self.log_weights + self.temper * (total - self._counted)
        self._counted = total


def systematic(
    log_weights: Float[Tensor, "prompt particle"], generator: torch.Generator | None = None
) -> Int[Tensor, "prompt particle"]:
    """Systematic resampling: parents in proportion to the weights, from one uniform number per prompt.

    Particle k of normalised weight w_k has between `⌊K w_k⌋` and `⌈K w_k⌉` children, K w_k on average (Kitagawa 1996).
    """
    prompts, count = log_weights.shape
    cumulative = torch.softmax(log_weights.double(), 1).cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    start = torch.rand(prompts, 1, dtype=torch.float64, generator=generator)
    return torch.searchsorted(cumulative, (start + torch.arange(count)) / count).clamp(max=count - 1)


def _repeated(value: Any, prompts: int, count: int) -> Any:
    """A tensor with a row per prompt, with a row per particle."""
    batched = isinstance(value, Tensor) and value.ndim > 1 and len(value) == prompts
    return value.repeat_interleave(count, 0) if batched else value


def _log_mean_exp(log_weights: Float[Tensor, "prompt particle"]) -> Float[Tensor, " prompt"]:
    return torch.logsumexp(log_weights, 1) - torch.tensor(log_weights.shape[1]).log()


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
    dial: Dial, pipe: Any, population: Population, micro_batch: int | None, generator: torch.Generator
) -> Iterator[None]:
    """While the pipeline runs, the dial hands every step to `population` and feeds the networks `micro_batch` rows."""
    changes: list[tuple[Any, str, Any]] = [(dial, "population", population), (dial, "micro_batch", micro_batch)]
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
