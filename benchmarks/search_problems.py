"""Random problems in closed form for benchmarks/search.py: a world, and a score whose best λ is known."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

import deradiff
from deradiff.algorithm import posteriors
from deradiff.search import Tables
from deradiff.worlds.gaussian_mixture import SCHEDULE, World, linear_reward, mixture

Kind = Literal["plain", "weighted"]
Batch = Literal["new", "same prompts", "same noise"]
Array = NDArray[np.float64]

PROMPTS, SEEDS, STEPS = 64, 8, 50
SPREAD = 0.3
"""Standard deviation of the prompts' targets."""
EASE = 0.5
"""And of what is added to all scores of a prompt."""
FINE = np.round(np.linspace(0, 1, 101), 2)
KNOTS = np.linspace(0, 1, 21)
GRID = np.linspace(-9, 9, 161)


@dataclass
class Problem:
    """A random world, and a score whose best λ is asked for."""

    seed: int
    kind: Kind
    _cache: dict[tuple[float, int], tuple[Array, Array, Array | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chance = np.random.default_rng(self.seed)
        count = int(chance.integers(2, 5))
        means, variances = chance.normal(0, 1.5, count), chance.uniform(0.05, 0.5, count)
        shares = chance.dirichlet(np.full(count, 2.0)) + 0.02
        self.tilt = float(chance.uniform(0.5, 3))
        reference = mixture(shares.tolist(), means[:, None].tolist(), variances.tolist())
        self.world = World(f"problem {self.seed}", reference, {"reward": linear_reward([1.0])})
        ends = [float(self.world.aligned(tilts).expected(linear_reward([1.0]))) for tilts in ({}, self.tilts(1))]
        self.target = ends[0] + chance.uniform(0.1, 0.9) * (ends[1] - ends[0])
        self.saturating = bool(chance.integers(2))
        self.steepness, self.price = float(chance.uniform(1.5, 4)), float(chance.uniform(0.02, 0.3))
        self.scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)

    def tilts(self, lam: float) -> dict[str, float]:
        return {"reward": self.tilt * lam}

    def score(self, x: Array, target: Any) -> Array:
        """A peak at the target, or a threshold there with a price on going further."""
        if self.saturating:
            return 1 / (1 + np.exp(-self.steepness * (x - target))) - self.price * x
        return -((x - target) ** 2) / 2

    # -- exactly ------------------------------------------------------------------------------------------------------

    def of_any_prompt(self, x: Array) -> Array:
        """The score expected over prompts."""
        return sum(w * self.score(x, self.target + SPREAD * z) for z, w in zip(*normal(15), strict=True))

    @cached_property
    def exact(self) -> Array:
        """The expected score at every λ of `FINE`: from the last step back, `E[score | x_t]` on a grid of x_t."""
        self.scheduler.set_timesteps(STEPS)
        nodes, shares = normal(16)
        expected: list[Callable[[Array], Array]] = [self.of_any_prompt] * len(KNOTS)
        for t in reversed(self.scheduler.timesteps.tolist()):
            carry, gain, variance = posteriors.coefficients(self.scheduler, torch.tensor(t), eta=1.0)
            for i, prediction in enumerate(self.predictions(t)):
                mean = float(carry) * GRID + float(gain) * prediction
                points = mean[:, None] + math.sqrt(float(variance)) * nodes
                expected[i] = CubicSpline(GRID, expected[i](np.clip(points, GRID[0], GRID[-1])) @ shares)
        nodes, shares = normal(40)
        return np.asarray(CubicSpline(KNOTS, [one(nodes) @ shares for one in expected])(FINE))

    def predictions(self, t: int) -> list[Array]:
        """What is predicted on `GRID` at every λ of `KNOTS`: by Algorithm 1, or by the retrained model."""
        at = torch.from_numpy(GRID)[:, None]
        found: list[Array] = [model(at, t).sample[:, 0].numpy() for model in self.denoisers]
        if self.kind == "weighted":
            return found
        return [(1 - lam) * found[0] + lam * found[1] for lam in KNOTS]

    @cached_property
    def denoisers(self) -> list[Any]:
        """The retrained models at every λ of `KNOTS`, or the two that Algorithm 1 mixes."""
        lams = KNOTS if self.kind == "weighted" else (0.0, 1.0)
        return [self.world.denoiser(self.tilts(lam)) for lam in lams]

    @property
    def best(self) -> float:
        return float(FINE[self.exact.argmax()])

    @property
    def range(self) -> float:
        return float(np.ptp(self.exact))

    @property
    def is_interior(self) -> bool:
        """Whether the best λ is inside, and better than both ends by a tenth of the range."""
        ends = max(self.exact[0], self.exact[-1])
        return 0.08 <= self.best <= 0.92 and self.exact.max() - ends >= 0.1 * self.range and self.range > 0.02

    def regret(self, lam: float) -> float:
        """As a share of the range."""
        return float((self.exact.max() - np.interp(lam, FINE, self.exact)) / self.range)

    # -- by images ----------------------------------------------------------------------------------------------------

    @cached_property
    def realigned(self) -> tuple[Any, Any]:
        pipe: Any = self.world.pipeline(self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe, deradiff.realign(pipe, self.world.denoiser(self.tilts(1)), lam=0.0)

    def drawn(self, lam: float, noise_of: int) -> tuple[Array, Array, Array | None]:
        """Images, log W and log ratios at λ, [prompt, seed] each, from the noise of that number."""
        key = round(lam, 4), noise_of
        if key not in self._cache:
            pipe, dial = self.realigned
            dial.lam = lam
            noise = torch.Generator().manual_seed(1000 * self.seed + noise_of)
            x = pipe(num_images_per_prompt=PROMPTS * SEEDS, num_inference_steps=STEPS, eta=1.0, generator=noise).images
            run = dial.importance_weights
            ratio = next((one.numpy().reshape(PROMPTS, SEEDS) for one in run.log_ratios.values()), None)
            images, log_weights = x[:, 0].double().numpy(), run.log_weights.numpy()
            self._cache[key] = images.reshape(PROMPTS, SEEDS), log_weights.reshape(PROMPTS, SEEDS), ratio
        return self._cache[key]

    def images(self, lam: float, noise_of: int = 0, prompts_of: int = 0) -> tuple[Array, Array, Array | None]:
        """Scores, log W and log ratios at λ, for the noise and the prompts of these numbers."""
        x, log_weights, ratio = self.drawn(lam, noise_of)
        targets, ease = np.random.default_rng([self.seed, 1, prompts_of]).normal(size=(2, PROMPTS, 1))
        return self.score(x, self.target + SPREAD * targets) + EASE * ease, log_weights, ratio

    def by_prompt(self, lam: float, noise_of: int = 0, prompts_of: int = 0) -> torch.Tensor:
        """The mean score of each prompt, weighted where the retrained model's is asked for."""
        scores, log_weights, _ = self.images(lam, noise_of, prompts_of)
        return torch.from_numpy((shares(log_weights * (self.kind == "weighted")) * scores).sum(1))

    def evaluator(self, batch: Batch) -> Callable[[float], float]:
        """The mean score at λ, of a new batch or of the same for every evaluation."""
        numbers = itertools.count(1)

        def evaluate(lam: float) -> float:
            number = next(numbers)
            noise_of, prompts_of = {"new": (number, number), "same prompts": (number, 0), "same noise": (0, 0)}[batch]
            return float(self.by_prompt(lam, noise_of, prompts_of).mean())

        return evaluate

    def tables(self, points: Sequence[tuple[float, ...]]) -> Tables:
        rows = [self.by_prompt(lam) for (lam,) in points]
        return Tables({"score": self.by_prompt(0.0)}, {"score": torch.stack(rows)})


def normal(count: int) -> tuple[Array, Array]:
    """Nodes and weights of the expectation over a standard normal."""
    nodes, weights = hermegauss(count)
    return nodes, weights / weights.sum()


def shares(log_weights: Array) -> Array:
    """Weights that sum to one within each prompt."""
    found = np.exp(log_weights - log_weights.max(1, keepdims=True))
    return found / found.sum(1, keepdims=True)


def problems(kind: Kind, first: int = 0) -> Iterator[Problem]:
    for seed in itertools.count(first):
        problem = Problem(seed, kind)
        if problem.is_interior:
            yield problem
