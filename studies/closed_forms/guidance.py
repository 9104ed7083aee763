"""`python -m studies.closed_forms.guidance`: weights of guided runs, against retrained models so guided.

Worlds, samplers, β, λ and guidance scales are drawn at random, seeded by the case's number. Reference, anchor and
retrained model are exact with a prompt and without, so the target, the retrained model sampled with the same guidance,
is exact but for the sampler's own steps, which it shares. The verdict's thresholds were chosen on the first cases
(`CHOSEN_ON`) and are judged on the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import diffusers
import torch
import typer
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from rich.table import Table
from torch import Tensor, nn

from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.guided_weights import left_out
from deradiff.algorithm.verdict import EVEN, GUIDED_TRUSTED, MOST_LEFT_OUT, Kind, compare, guided_kind, margin
from deradiff.cli import terminal
from deradiff.files.folders import begin_or_resume
from deradiff.files.locks import taken
from deradiff.files.reading import Record as FileRecord
from deradiff.files.reading import read
from deradiff.files.writing import write_json
from deradiff.sampling.realignment import realign
from deradiff.sweep.workers import Processes, Todo, cores, work
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

LEAST_SHIFT = 0.2
"""Standard deviations of the reward that a shift has at least, for errors to be told as shares of it."""

ARMS = ("plain", "conditional", "combined", "guided")
"""Algorithm 1; weighted by log W_c; by `w log W_c + (1-w) log W_u`; by the squares of guided differences."""

app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})

CHOSEN_ON = 80
"""How many cases, the first ones, the verdict's thresholds were chosen with."""

CLAIMS: tuple[Kind, ...] = ("trust", "off", "unclear")
"""The verdicts that say how far off a run is."""


# -- one case ---------------------------------------------------------------------------------------------------------


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


class _GuidedWorld:
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
    world = _GuidedWorld(case)
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


# -- all cases --------------------------------------------------------------------------------------------------------


def run(count: int, steps: int, samples: int, out: Path, workers: int) -> list[GuidedRecord]:
    """The first `count` cases, of which those that `out` does not hold yet are computed.

    Raises what `begin_or_resume` raises.
    """
    begin_or_resume(out, {"steps": steps, "samples": samples}, "comparison under guidance")
    (out / "cases").mkdir(exist_ok=True)
    cases = [GuidedCase.drawn(number, steps, samples) for number in range(count)]
    missing = [case for case in cases if not _file(out, case).exists()]
    with taken(out, "a comparison under guidance"), terminal.progress("comparing") as on_step:
        for done, _ in enumerate(_computed(out, missing, workers), count - len(missing) + 1):
            on_step(done, count)
    return [read(GuidedRecord, _file(out, case), "case", "delete it, and it is computed again") for case in cases]


def _computed(out: Path, cases: Sequence[GuidedCase], workers: int) -> Iterator[Any]:
    with Processes(workers, partial(_store, out), torch.set_num_threads, 1) as processes:
        yield from work([Todo(None, partial(_itself, case)) for case in cases], processes)


def _itself(case: GuidedCase) -> GuidedCase:
    return case


def _file(out: Path, case: GuidedCase) -> Path:
    return out / "cases" / f"{case.number}.json"


def _store(out: Path, case: GuidedCase) -> None:
    write_json(_file(out, case), compute(case))


# -- the report -------------------------------------------------------------------------------------------------------


def _judged(record: GuidedRecord) -> Kind:
    """What `verdict` says of the case, by the reference's mean under the same guidance."""
    if record.evenness["combined"] < EVEN:
        return "uneven"
    error, unknown = _told(record)
    return guided_kind(error, unknown)


def _told(record: GuidedRecord) -> tuple[Estimate, float]:
    """Algorithm 1's error and the bound on what weights leave out, as a run knows them: shares of its own shift."""
    shift = abs(record.mean["combined"][0] - record.baseline)
    bias, error = record.bias["combined"]
    return Estimate(bias / shift, error / shift), record.left_out * record.deviation / shift


def _typical(records: Sequence[GuidedRecord], arm: str) -> Measured | None:
    """The median of an arm's absolute error, its standard error as of a normal sample, and the greatest.

    None for fewer than two cases.
    """
    if len(records) < 2:
        return None
    off = torch.tensor([abs(record.error[arm][0]) for record in records], dtype=torch.float64)
    return [float(off.median()), 1.2533 * float(off.std()) / len(off) ** 0.5, float(off.max())]


def summary(records: Sequence[GuidedRecord]) -> dict[str, Any]:
    """The tables: errors by guidance scale, bound, sampler and kind of empty prompt; the verdict."""
    kept = [record for record in records if abs(record.shift) >= LEAST_SHIFT]

    def row(chosen: Sequence[GuidedRecord]) -> dict[str, Any]:
        claims = sum(_judged(record) in CLAIMS for record in chosen)
        return {"cases": len(chosen), "claims": claims} | {arm: _typical(chosen, arm) for arm in ARMS}

    def by(key: Callable[[GuidedRecord], Any], values: Sequence[Any]) -> dict[str, Any]:
        return {str(value): row([record for record in kept if key(record) == value]) for value in values}

    bounds = {f"up to {low:.0%}": [r for r in kept if _told(r)[1] <= low] for low in (0.05, 0.1, MOST_LEFT_OUT)}
    bounds[f"above {MOST_LEFT_OUT:.0%}"] = [r for r in kept if _told(r)[1] > MOST_LEFT_OUT]
    parts = {"chosen on": [r for r in kept if r.case["number"] < CHOSEN_ON]}
    parts["judged on"] = [r for r in kept if r.case["number"] >= CHOSEN_ON]
    return {
        "drawn": len(records),
        "steps": records[0].case["steps"],
        "samples": records[0].case["samples"],
        "guidance": by(lambda r: r.case["scale"], SCALES),
        "bound": {name: row(chosen) for name, chosen in bounds.items()},
        "sampler": by(lambda r: r.case["sampler"], list(SAMPLERS)),
        "empty": by(lambda r: r.case["empty"], get_args(Empty)),
        "verdict": {name: _verdicts(part) for name, part in parts.items()},
        "all": [
            {"case": record.case, "shift": record.shift, "bound": _told(record)[1], "kind": _judged(record)}
            | {"error": record.error}
            for record in kept
        ],
    }


def _verdicts(records: Sequence[GuidedRecord]) -> dict[str, Any]:
    """How often something is claimed, and how often it is not so, beyond two standard errors."""
    claims = [record for record in records if _judged(record) in CLAIMS]
    trusted = [record for record in claims if _judged(record) == "trust"]
    wrong = [r for r in claims if abs(r.error["combined"][0]) - 2 * r.error["combined"][1] > margin(_told(r)[1])]
    missed = [r for r in trusted if abs(r.error["plain"][0]) - 2 * r.error["plain"][1] > GUIDED_TRUSTED]
    large = [record for record in claims if abs(record.error["plain"][0]) > 0.05]
    return {
        "cases": len(records),
        "claims": len(claims),
        "beyond the margin": [r.case["number"] for r in wrong],
        "trusted": len(trusted),
        "trusted and off": [r.case["number"] for r in missed],
        "Algorithm 1 off by over 5%": {arm: _typical(large, arm) for arm in ARMS} | {"cases": len(large)},
    }


def _print(told: dict[str, Any]) -> None:
    console = terminal.LiteralConsole()
    for name in ("guidance", "bound", "sampler", "empty"):
        table = Table(caption="median error ± standard error (greatest), as shares of the target's shift")
        for heading in (name, "cases", "claims", *ARMS):
            table.add_column(heading, justify="left" if heading == name else "right")
        for value, row in told[name].items():
            errors = ["-" if (found := row[arm]) is None else _words(found) for arm in ARMS]
            table.add_row(value, str(row["cases"]), str(row["claims"]), *errors)
        console.print(table)
    for part, counts in told["verdict"].items():
        large = counts["Algorithm 1 off by over 5%"]
        console.print(
            f"{part} {counts['cases']} cases: {counts['claims']} claims, of which beyond the margin: cases "
            f"{counts['beyond the margin']}; {counts['trusted']} trusted, of which off by more than "
            f"{GUIDED_TRUSTED:.0%}: {counts['trusted and off']}"
        )
        if large["plain"] is not None:
            console.print(
                f"  where Algorithm 1 is off by over 5% ({large['cases']} of the claims): {_words(large['plain'])}, "
                f"weighted {_words(large['combined'])}"
            )


def _words(typical: Measured) -> str:
    middle, error, most = typical
    return f"{middle:.1%} ± {error:.1%} ({most:.1%})"


@app.command()
def guidance(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the cases; an interrupted run continues.")],
    cases: Annotated[int, typer.Option(min=2, help="How many cases; more of them continue a finished run.")] = 240,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps.")] = 60,
    samples: Annotated[int, typer.Option(min=100, help="Samples of every run.")] = 4000,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per processor by default.")] = None,
) -> None:
    """Weigh guided runs in every way and compare with the retrained model under the same guidance."""
    with terminal.refusing_wrong_input():
        told = summary(run(cases, steps, samples, out, workers or cores()))
        write_json(out / "guidance-truth.json", told)
    _print(told)
    terminal.files([out / "guidance-truth.json", out / "cases"])


if __name__ == "__main__":
    app(prog_name="python -m studies.closed_forms.guidance")
