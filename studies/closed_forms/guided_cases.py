"""Worlds with prompts and runs under guidance, drawn at random, and what is known of one in closed form."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn

from deradiff.algorithm.comparisons import compare
from deradiff.algorithm.guided_weights import left_out
from deradiff.files.reading import Record as FileRecord
from deradiff.sampling.realignment import realign
from deradiff.worlds.closed_form import GaussianMixture, QuadraticReward, linear_reward
from deradiff.worlds.gaussian_mixture import SCHEDULE, MixtureDenoiser, MixturePipeline, Prediction
from studies.closed_forms.comparison import difference

Empty = Literal["tilt", "average", "negative"]
"""What the predictions without the prompt are of: the reference of all prompts and its own tilt; the average of the
aligned models over all prompts, as dropping captions in training makes it; another prompt's model, a negative prompt.
"""

SCALES = (1.25, 1.5, 2.0, 3.0, 5.0, 7.5)
MODES = 2
"""Components that each prompt favours."""

_DDIM: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SAMPLERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "DDPM": ("DDPMScheduler", {**SCHEDULE, "clip_sample": False}, 0.0),
    "DDIM η = ½": ("DDIMScheduler", {**SCHEDULE, **_DDIM}, 0.5),
    "DDIM η = 0": ("DDIMScheduler", {**SCHEDULE, **_DDIM}, 0.0),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", dict(SCHEDULE), 0.0),
    "flow matching": ("FlowMatchEulerDiscreteScheduler", {}, 0.0),
}
"""Class, settings and η."""

ARMS = ("plain", "conditional", "combined", "guided")
"""Algorithm 1; weighted by log W_c; by `w log W_c + (1-w) log W_u`; by the squares of guided differences."""


@dataclass(frozen=True)
class GuidedCase:
    """One world and one way of sampling it. `overlap` is by how much a prompt favours its modes, in logarithms."""

    number: int
    prompts: int
    dim: int
    overlap: float
    even: bool
    """Whether all components have the same variance."""
    empty: Empty
    sampler: str
    scale: float
    beta: float
    """In standard deviations of the reward under the reference."""
    lam: float
    steps: int
    samples: int

    @classmethod
    def drawn(cls, number: int, steps: int, samples: int) -> GuidedCase:
        """The case of this number: guidance scales in turn, the rest at random."""
        chance = random.Random(number)
        beta, lam = chance.choice([(0.5, 0.25), (0.5, 0.5), (1.0, 0.25), (1.0, 0.5), (1.0, 0.75)])
        return cls(
            number=number,
            prompts=chance.choice([2, 3, 4, 8]),
            dim=chance.choice([2, 4, 8, 16]),
            overlap=chance.choice([1.5, 3.0, 5.0]),
            even=chance.random() < 0.3,
            empty=chance.choice(get_args(Empty)),
            sampler=chance.choice(list(SAMPLERS)),
            scale=SCALES[number // 2 % len(SCALES)],
            beta=beta,
            lam=lam,
            steps=steps,
            samples=samples,
        )


class PromptedDenoiser(MixtureDenoiser):
    """A world's denoiser whose predictions without a prompt are of a model of their own, by its log weights."""

    @register_to_config
    def __init__(self, components: int, dim: int, prediction: Prediction = "epsilon") -> None:
        super().__init__(components, dim, prediction)
        self.empty = nn.Parameter(torch.zeros(components, dtype=torch.float64), requires_grad=False)

    def forward(
        self, sample: Tensor, timestep: Any, encoder_hidden_states: Any = None, return_dict: bool = True
    ) -> Any:
        """As `MixtureDenoiser`; rows of zeros are without a prompt."""
        shifts = encoder_hidden_states
        own = torch.where((shifts == 0).all(1, keepdim=True), self.empty - self.log_weights, shifts)
        return super().forward(sample, timestep, own, return_dict)


class GuidedWorld:
    """The world of a case: every model with the prompt and without it."""

    def __init__(self, case: GuidedCase) -> None:
        chance = torch.Generator().manual_seed(case.number)
        components = MODES * case.prompts

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=chance)

        width = 2.0 if case.dim == 2 else 2.8
        uneven = 0.05 + 0.45 * torch.rand(components, case.dim, dtype=torch.float64, generator=chance)
        self.reference = GaussianMixture(
            torch.log_softmax(0.5 * normal(components), 0),
            width * normal(components, case.dim) / case.dim**0.5,
            torch.full_like(uneven, 0.15) if case.even else uneven,
        )
        direction = normal(case.dim)
        self.reward = linear_reward((direction / direction.norm()).tolist())
        self.deviation = float(self.reward(self.reference.sample(4000, chance)).std())
        self.shifts = case.overlap * torch.eye(case.prompts, dtype=torch.float64).repeat_interleave(MODES, 1)
        self.case = case

    def model(self, tilt: float, prediction: Prediction) -> PromptedDenoiser:
        """The model aligned at β = 1/`tilt`, in standard deviations of the reward."""
        exponent: QuadraticReward = self.reward * (tilt / self.deviation)
        model = self.reference.tilted(exponent)[0]
        prompted = [self.reference.prompted(shift).tilted(exponent)[0] for shift in self.shifts]
        denoiser = PromptedDenoiser.of(model, prediction)
        assert isinstance(denoiser, PromptedDenoiser)
        average = torch.stack([own.mode_weights for own in prompted]).mean(0).log()
        empty = {"tilt": model.log_weights, "average": average, "negative": prompted[1].log_weights}
        denoiser.empty.copy_(empty[self.case.empty])
        return denoiser

    def pipeline(self, tilt: float) -> MixturePipeline:
        """A pipeline around the model aligned at 1/`tilt`, with the case's scheduler."""
        name, settings, _ = SAMPLERS[self.case.sampler]
        prediction: Prediction = "flow" if name.startswith("Flow") else "epsilon"
        pipe = MixturePipeline(self.model(tilt, prediction), getattr(diffusers, name)(**settings))
        pipe.set_progress_bar_config(disable=True)
        return pipe.with_prompts({"": torch.zeros_like(self.shifts[0]), "prompt": self.shifts[0]})

    def sample(self, pipe: MixturePipeline) -> Float[Tensor, "sample dim"]:
        """Guided samples, from noise that is the same for every model."""
        case = self.case
        call: dict[str, Any] = {
            "num_images_per_prompt": case.samples,
            "num_inference_steps": case.steps,
            "guidance_scale": case.scale,
        }
        generator = torch.Generator().manual_seed(case.number)
        return pipe("prompt", **call, eta=SAMPLERS[case.sampler][2], generator=generator).images


Measured = list[float]
"""A value and its standard error."""


class GuidedRecord(FileRecord):
    """What `compute` found. Means are of the reward; errors, from the target, are shares of the target's shift.

    `shift` is in standard deviations of the reward under the reference. `bias` is what weighting changes, as a
    `Comparison` has it.
    """

    case: dict[str, Any]
    scale: float | None
    """As it was found from the predictions."""
    baseline: float
    target: float
    shift: float
    mean: dict[str, Measured]
    bias: dict[str, Measured]
    error: dict[str, Measured]
    evenness: dict[str, float]
    left_out: float
    """`guided_weights.left_out`, a bound in standard deviations of the reward."""
    deviation: float
    """Standard deviation of the reward under the realigned model."""


def compute(case: GuidedCase) -> dict[str, Any]:
    """Draw the reference, the target and the realigned reference, and weight the last in every way."""
    world = GuidedWorld(case)
    pipe = world.pipeline(0.0)
    reference = world.reward(world.sample(pipe))
    target = world.reward(world.sample(world.pipeline(case.lam / case.beta)))
    with realign(pipe, world.model(1 / case.beta, pipe.unet.prediction), case.lam) as dial:
        scores, run = world.reward(world.sample(pipe)), dial.importance_weights
    assert run.guidance is not None
    logs = {
        "plain": torch.zeros_like(run.log_weights),
        "conditional": run.guidance.conditional,
        "combined": run.guidance.combined,
        "guided": run.log_weights,
    }
    compared = {arm: compare(scores, log_weights) for arm, log_weights in logs.items()}
    shift = float(target.mean() - reference.mean())
    errors = {arm: difference(scores, target, log_weights) for arm, log_weights in logs.items()}
    return GuidedRecord(
        case=asdict(case),
        scale=run.guidance.scale,
        baseline=float(reference.mean()),
        target=float(target.mean()),
        shift=shift / float(reference.std()),
        mean={arm: list(one.weighted) for arm, one in compared.items()},
        bias={arm: list(one.bias) for arm, one in compared.items()},
        error={arm: [gap.value / abs(shift), gap.error / abs(shift)] for arm, gap in errors.items()},
        evenness={arm: one.evenness for arm, one in compared.items()},
        left_out=left_out(run.guidance),
        deviation=float(scores.std()),
    ).model_dump()
