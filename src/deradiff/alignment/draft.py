"""DRaFT-K: the reward's own gradient through the last K steps of sampling (Clark et al. 2023), with a KL term.

AlignProp is the same with a random K.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deradiff.alignment.base import Base, Conditions, Policy
from deradiff.alignment.data_order import order, passes, row_generators, seeded
from deradiff.alignment.loop import train
from deradiff.alignment.objectives import regularised_reward, squared_error
from deradiff.alignment.sampling import DifferentiatedStep, decode, guided, sample, together, told
from deradiff.alignment.scoring import RewardTask, scored
from deradiff.alignment.training import BatchPart, Loss, LossCurve


class Truncation(NamedTuple):
    """How much of the sampling gradients go through: its last `keep` steps.

    Where `until` is given, sampling stops after so many steps, at what the last one takes the clean picture to be.
    """

    keep: int
    until: int | None = None


def divergence(
    base: Base,
    policy: Policy,
    model: nn.Module,
    steps: Sequence[DifferentiatedStep],
    known: Conditions,
    guidance_scale: float,
) -> Float[Tensor, " batch"]:
    """The sum over `steps` of `||ε_θ - ε_ref||² / D`, D the number of elements of a latent (AIG, equation 4).

    Equation 4 prints no 1/D. The authors' code (NVIDIA/NeMo-Aligner) has it, and takes guided predictions, those that
    are sampled with: the published λ_KL are in these units. `known` is what the reference is told, as `sampling.guided`
    asks for it.
    """
    total = torch.zeros(len(steps[0].noisy), device=steps[0].noisy.device)
    for step in steps:
        # What earlier steps did to the latents is differentiated too: then the reference's own prediction moves.
        moves = step.noisy.requires_grad
        with policy.reference(model) as reference, torch.set_grad_enabled(moves), _remembering(model, moves):
            prediction = guided(base, reference, step.noisy, step.timestep, known, guidance_scale)
        total = total + squared_error(step.prediction, prediction)
    return total


@contextmanager
def _remembering(model: nn.Module, moves: bool) -> Iterator[None]:
    """Activations are kept inside the block: to compute them anew later would find the adapter on again."""
    modules = [module for module in model.modules() if moves and getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def objective(
    task: RewardTask,
    model: nn.Module,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    truncation: Truncation,
    ceiling: float | int = float("inf"),
) -> Float[Tensor, ""]:
    """Minus the mean reward of what `model` draws for `prompts`, plus λ_KL times the divergence over the last steps.

    Rewards are multiplied by the task's scale; they count up to `ceiling`, in their own unit.
    """
    base, sampling = task.base, task.sampling
    prompted, unprompted = told(base, prompts, sampling)
    noise, (keep, until) = sampling.noise(base, generators), truncation
    drawn = sample(base, model, prompted, unprompted, noise, sampling, keep=keep, generators=generators, until=until)
    images = decode(base, drawn.latents)
    rewards = scored(task.reward, images, prompts)
    if images.requires_grad and not rewards.requires_grad:
        raise ValueError(
            f"{task.reward.name} has no gradient in its pictures: policy gradients need none (--method ddpo)"
        )
    # Without a KL term the reference need not be evaluated.
    divergences = torch.zeros_like(rewards)
    if task.kl:
        known = together(unprompted, prompted)
        divergences = divergence(base, task.policy, model, drawn.steps, known, sampling.guidance_scale)
    return regularised_reward(task.scale * rewards.clamp(max=ceiling), divergences, task.kl)


def train_through(
    task: RewardTask,
    truncated: Callable[[int], Truncation],
    whole: Truncation,
    ceiling: float | int = float("inf"),
    beside: Loss | None = None,
) -> LossCurve:
    """Minimise `objective` with `truncated(training step)`, `ceiling` and the task's dropout, plus what is `beside` it.

    The held-out loss is the objective alone, with the truncation `whole`.
    """
    seed, taught = task.run.seed, task.with_dropout()

    def loss(model: nn.Module, generator: torch.Generator, part: BatchPart) -> Tensor:
        positions = part.positions(task.batch)
        asked = [task.prompts[place] for place in order(len(task.prompts), seed, positions)]
        value = objective(taught, model, asked, row_generators(seed, positions), truncated(part.step), ceiling)
        return value if beside is None else value + beside(model, generator, part)

    def held_out_loss(model: nn.Module) -> float:
        total = 0.0
        for places in passes(len(task.held_out), task.per_pass):
            asked, generators = task.held_out[places.start : places.stop], row_generators(seed, places, "held out")
            total += len(asked) * objective(task, model, asked, generators, whole).item()
        return total / len(task.held_out)

    return train(task.policy.model, loss, held_out_loss, task.plan, run=task.run)


def drawn_from(window: tuple[int, int], steps: int, seed: int) -> Callable[[int], int]:
    """For every training step a number drawn evenly from `window`, both ends included.

    Raises `ValueError` for a window outside 1 to `steps`, the sampler's.
    """
    first, last = window
    if not 1 <= first <= last <= steps:
        raise ValueError(
            f"a window of {first},{last} in {steps} sampling steps: name two numbers, 1 ≤ first ≤ last ≤ all steps"
        )
    return lambda step: int(torch.randint(first, last + 1, (), generator=seeded(seed, f"stop {step}")))


def train_draft(task: RewardTask, keep: int = 1) -> LossCurve:
    """Raise the reward with gradients through the last `keep` steps; the KL term is computed over the same steps.

    A batch counts prompts. Raises `ValueError` for `keep` outside 1 to all steps, and for a reward that is no number or
    has no gradient.
    """
    if keep < 1:
        raise ValueError(f"gradients through {keep} steps teach nothing: keep 1 or more")
    return train_through(task, lambda step: Truncation(keep), Truncation(keep))


def train_alignprop(task: RewardTask, window: tuple[int, int]) -> LossCurve:
    """AlignProp: DRaFT through a number of last steps that is drawn for every training step, evenly from `window`.

    Prabhudesai et al. 2023, arXiv 2310.03739, where backpropagation is truncated at random among all 50 steps. (The
    authors' code draws from a normal distribution by default, of mean 8 and standard deviation 5.) The paper has no KL
    term; λ_KL is that of DRaFT, over the steps that were drawn. The held-out loss pays for as many as the end of
    `window`. Raises `ValueError` as `train_draft` and `drawn_from` do.
    """
    number = drawn_from(window, task.sampling.steps, task.run.seed)
    return train_through(task, lambda step: Truncation(number(step)), Truncation(window[1]))
