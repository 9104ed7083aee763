"""Realignment judged where the truth is a formula: every way of sampling, over worlds, samplers, β and λ.

A `Case` is one world, one sampler, anchors aligned at β and one λ. `compute` draws it with the shipped code, in every
way there is, and sets it beside the exact values; `run` does so for all cases of a `Plan` and keeps one JSON file per
case, so that an interrupted run goes on where it was.

Two truths are kept apart. *Exact* is the formula at β/λ. *Aligned* is the exactly aligned model run through the same
sampler, whose finite steps and starting noise are no fault of realignment: what Algorithm 1 and its weights are off by
is counted from there, with the same noise in both runs, and standard errors of the paired differences.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from deradiff.algorithm import verdict
from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.path_weights import ImportanceWeights
from deradiff.algorithm.schedules import Power
from deradiff.files.folders import begin_or_resume
from deradiff.files.locks import taken
from deradiff.files.reading import Record as FileRecord
from deradiff.files.reading import read
from deradiff.files.writing import write_json
from deradiff.sampling.particles import Particles, sample_particles
from deradiff.sampling.realigned_steps import Method
from deradiff.sampling.realignment import realign
from deradiff.sweep.workers import Processes, Todo, work
from deradiff.worlds.gaussian_mixture import SCHEDULE, QuadraticReward, World
from studies.closed_forms.cases import WORLDS, Case, Plan

Record = dict[str, Any]
"""What `compute` found, as it is stored. Estimates are `[value, standard error]`."""

ANNEALING = 2.0
"""The power of annealed guidance's schedule, the paper's choice for its qualitative study."""

RESAMPLE_BELOW = 0.5
"""The share of effective particles below which particles are resampled."""


# -- one case ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """The model aligned at β/λ by formula: expected reward, its shift from the reference, mode weights, divergence."""

    reward: float
    shift: float
    modes: list[float]
    divergence: float
    """`KL(aligned || reference)` in nats."""


def exact(case: Case) -> Exact:
    """The exact values of a case. The reward of several anchors is the sum of theirs."""
    world = WORLDS[case.world]()
    model, reward = world.aligned(case.tilts), _reward(world, case)
    value = model.expected(reward)
    return Exact(
        value, value - world.reference.expected(reward), model.mode_weights.tolist(), world.divergence(case.tilts)
    )


def compute(case: Case) -> Record:
    """Draw a case in every way that its study asks for, with seeds that follow from its name.

    `arms` holds, by name: `aligned`, the exactly aligned model through the same sampler; `plain`, Algorithm 1;
    `weighted`, the weighted mean of the same samples; `particles` where the sampler draws noise; `annealed`, λ growing
    as a power; `interpolated` weights where the models differ in their mean alone. Each with the expected reward, the
    error relative to the exact shift (`against_exact`, and `against_aligned` from the exactly aligned model), and the
    total variation of its mode weights (`modes_off`) beside what sampling error alone makes of it (`modes_allowance`).
    """
    bench = _Bench(case)
    found: Record = {"case": case.as_json(), "exact": asdict(bench.truth)}
    arms = found["arms"] = {"aligned": bench.arm(verdict.mean, bench.samples)}
    if case.study not in ("particles", "fine"):
        x, run = bench.realigned(case.lam)
        arms["plain"] = bench.paired(x)
        arms["weighted"] = bench.paired(x, run.log_weights)
        found["verdict"] = _verdict(case, run, bench.reward(x))
    if case.eta > 0:
        arms["particles"] = bench.particles()
    if case.study in ("grid", "two rewards"):
        arms["annealed"] = bench.paired(bench.realigned(Power(ANNEALING, case.lam))[0])
        if bench.differ_in_means_alone:
            arms["interpolated"] = bench.paired(bench.realigned(case.lam, "interpolate")[0])
    return found


Measured = Annotated[list[float], Field(min_length=2, max_length=2)]
"""A value and its standard error, as they are stored."""


class _Exact(FileRecord):
    reward: float
    shift: float
    modes: list[float]
    divergence: float


class _Arm(FileRecord):
    reward: Measured
    against_exact: Measured
    against_aligned: Measured | None
    modes: list[float]
    modes_off: float
    modes_allowance: float
    evenness: float | None = None


class _Judged(FileRecord):
    kind: str
    words: str
    error: Measured | None
    evenness: float
    path_kl: Measured | None


class CaseRecord(FileRecord):
    """What `compute` found, as a file."""

    case: dict[str, Any]
    exact: _Exact
    arms: dict[str, _Arm]
    verdict: _Judged | None = None


class _Bench:
    """One case on the bench: its world, its exact values, and samples of the exactly aligned model to compare with."""

    def __init__(self, case: Case) -> None:
        self.case, self.world, self.truth = case, WORLDS[case.world](), exact(case)
        self.model, self.reward = self.world.aligned(case.tilts), _reward(self.world, case)
        self.seed = zlib.crc32(case.name.encode())
        self.samples = _sample(_pipeline(self.world, case, case.tilts), case, self.seed)

    @property
    def differ_in_means_alone(self) -> bool:
        """Whether interpolating the parameters of reference and anchor gives the model at β/λ."""
        return len(self.model.means) == 1 and not bool(self.reward.curvature.any())

    def arm(
        self, estimate: Callable[[Tensor], Estimate], x: Float[Tensor, "sample dim"], gap: Estimate | None = None
    ) -> Record:
        """What is stored of samples `x`, from which `estimate` makes means; `gap` is the difference from `aligned`."""
        truth, value = self.truth, estimate(self.reward(x))
        shares = [estimate(column) for column in self.model.modes_of(x).T]
        off = [abs(share.value - weight) for share, weight in zip(shares, truth.modes, strict=True)]
        return {
            "reward": list(value),
            "against_exact": [(value.value - truth.reward) / truth.shift, value.error / truth.shift],
            "against_aligned": None if gap is None else [part / truth.shift for part in gap],
            "modes": [share.value for share in shares],
            "modes_off": sum(off) / 2,
            # E|error| of a normal deviate is √(2/π) standard errors.
            "modes_allowance": (2 / math.pi) ** 0.5 * sum(share.error for share in shares) / 2,
        }

    def paired(self, x: Float[Tensor, "sample dim"], log_weights: Float[Tensor, " sample"] | None = None) -> Record:
        """Samples drawn from the same noise as the aligned model's, plain or weighted."""
        logs = torch.zeros(len(x), dtype=torch.float64) if log_weights is None else log_weights
        return self.arm(
            lambda values: verdict.compare(values, logs).weighted,
            x,
            difference(self.reward(x), self.reward(self.samples), logs),
        )

    def realigned(self, lam: float | Power, method: Method = "mixture") -> tuple[Tensor, Any]:
        """Samples of the realigned reference, and their weights where it mixes."""
        pipe = _pipeline(self.world, self.case)
        with realign(pipe, self._anchors(), self._lams(lam), method=method) as dial:
            x = _sample(pipe, self.case, self.seed)
            return x, dial.importance_weights if method == "mixture" else None

    def particles(self) -> Record:
        """Particles, from noise of their own: resampled ones are no pairs of anything."""
        case, pipe = self.case, _pipeline(self.world, self.case)
        prompts = [""] * (case.samples // case.count)
        with realign(pipe, self._anchors(), self._lams(case.lam)):
            call = _call(case, self.seed + 1)
            found = sample_particles(pipe, prompts, case.count, ess_threshold=RESAMPLE_BELOW, **call)
        estimate = partial(_over_prompts, found)
        ours, theirs = estimate(self.reward(found.images)), verdict.mean(self.reward(self.samples))
        gap = Estimate(ours.value - theirs.value, math.hypot(ours.error, theirs.error))
        return {**self.arm(estimate, found.images, gap), "evenness": float(found.effective.mean()) / case.count}

    def _anchors(self) -> dict[str, Any]:
        return {name: self.world.denoiser({name: 1 / self.case.beta}) for name in self.case.rewards}

    def _lams(self, lam: float | Power) -> dict[str, Any]:
        return dict.fromkeys(self.case.rewards, lam)


def _verdict(case: Case, run: ImportanceWeights, scores: Float[Tensor, " sample"]) -> Record:
    baseline = _reference_mean(case.world, case.rewards, case.eta, case.steps, case.samples)
    found = verdict.verdict(run, scores, baseline=baseline)
    return {
        "kind": found.kind,
        "words": found.words,
        "error": None if found.error is None else list(found.error),
        "evenness": found.comparison.evenness,
        "path_kl": None if found.path_kl is None else list(found.path_kl),
    }


def difference(
    scores: Float[Tensor, " sample"], others: Float[Tensor, " sample"], log_weights: Float[Tensor, " sample"]
) -> Estimate:
    """Weighted mean of `scores` minus plain mean of `others`, sample i of both drawn from the same noise.

    The pairs are independent of one another, and the standard error is theirs.
    """
    f, g, w, n = scores.double(), others.double(), torch.softmax(log_weights.double(), 0), len(scores)
    value = w @ f - g.mean()
    influence = n * w * (f - w @ f) - (g - g.mean())
    return Estimate(float(value), float((influence.square().sum() / (n * (n - 1))).sqrt()))


def _reward(world: World, case: Case) -> QuadraticReward:
    return world.exponent(dict.fromkeys(case.rewards, 1.0))


def _pipeline(world: World, case: Case, tilts: dict[str, float] | None = None) -> Any:
    """Sampled as Stable Diffusion's own configuration does.

    DDIM's steps have to divide its thousand timesteps, or a run starts in mid-schedule (at t = 799 with 400 of them).
    """
    scheduler: Any = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    if case.study == "fine":
        scheduler = EulerAncestralDiscreteScheduler(**SCHEDULE)
    pipe = world.pipeline(scheduler, tilts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _call(case: Case, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"num_inference_steps": case.steps, "eta": case.eta, "generator": generator}


def _sample(pipe: Any, case: Case, seed: int) -> Float[Tensor, "sample dim"]:
    return pipe(num_images_per_prompt=case.samples, **_call(case, seed)).images


def _over_prompts(particles: Particles, values: Float[Tensor, " sample"]) -> Estimate:
    """The mean over prompts of their weighted means; where there are several, the error is that between them."""
    if len(particles.log_weights) == 1:
        return particles.mean(values)
    return verdict.mean((particles.log_weights.exp() * values.view(particles.log_weights.shape)).sum(1))


@lru_cache(maxsize=64)
def _reference_mean(world: str, rewards: tuple[str, ...], eta: float, steps: int, samples: int) -> float:
    """The reference's mean reward through the same sampler, the same run for every β and λ."""
    case = Case("grid", world, rewards, eta, 1.0, 0.0, steps, samples, samples)
    place = WORLDS[world]()
    x = _sample(_pipeline(place, case), case, zlib.crc32(f"reference {case.name}".encode()))
    return float(_reward(place, case)(x).mean())


# -- all cases --------------------------------------------------------------------------------------------------------


def run(plan: Plan, out: Path, on_step: Callable[[int, int], None], workers: int = 1) -> list[Record]:
    """Compute the cases of `plan` that `out` does not hold yet; returns all of them, in the plan's order.

    Cases go to `workers` processes of one thread each; a script that asks for more than one needs the usual
    `if __name__ == "__main__"`. Numbers do not depend on how many there are.

    Raises:
        FileExistsError: `out` holds files that are not of a comparison.
        ValueError: `out` holds a comparison with other settings.
    """
    cases = plan.cases()
    folder = _folder_of(plan, out)
    todo = [case for case in cases if not _file(folder, case).exists()]
    done = len(cases) - len(todo)
    on_step(done, len(cases))
    with taken(out, "a comparison"):
        for _ in _computed(todo, folder, workers):
            done += 1
            on_step(done, len(cases))
    return [_read(folder, case) for case in cases]


def _folder_of(plan: Plan, out: Path) -> Path:
    """The folder of the cases."""
    settings = {"worlds": list(plan.worlds), "samples": plan.samples, "steps": plan.steps, "quick": plan.quick}
    begin_or_resume(out, settings, "comparison")
    folder = out / "cases"
    folder.mkdir(exist_ok=True)
    return folder


def _computed(cases: Sequence[Case], folder: Path, workers: int) -> Iterator[Case]:
    """Compute and store, yielding every case that is done."""
    if workers == 1 or len(cases) < 2:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for case in cases:
                yield _store(folder, case)
        finally:
            torch.set_num_threads(threads)
        return
    todos = [Todo(None, lambda case=case: case) for case in cases]  # type: ignore[misc]
    with Processes(workers, partial(_store, folder), torch.set_num_threads, 1) as processes:
        yield from (case for _, case in work(todos, processes))


def _store(folder: Path, case: Case) -> Case:
    write_json(_file(folder, case), compute(case))
    return case


def _file(folder: Path, case: Case) -> Path:
    return folder / f"{case.name}.json"


def _read(folder: Path, case: Case) -> Record:
    file, cure = _file(folder, case), "delete it, and it is computed again"
    record = read(CaseRecord, file, "case of a comparison", cure)
    if lacking := _wanted(case) - record.arms.keys() - ({"verdict"} if record.verdict else set()):
        raise ValueError(f"{file} is no whole case of a comparison: it lacks {', '.join(sorted(lacking))}: {cure}")
    if record.case != json.loads(json.dumps(case.as_json())):
        raise ValueError(f"{file} is another case of a comparison than {case.name}: {cure}")
    return record.model_dump(exclude_unset=True)


def _wanted(case: Case) -> set[str]:
    """What a case has at least: its arms, and the verdict on Algorithm 1."""
    plain = set() if case.study in ("particles", "fine") else {"plain", "weighted", "verdict"}
    annealed = {"annealed"} if case.study in ("grid", "two rewards") else set()
    return {"aligned"} | plain | annealed | ({"particles"} if case.eta > 0 else set())
