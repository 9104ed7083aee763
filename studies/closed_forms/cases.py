"""What a comparison compares: worlds, and a plan of cases over samplers, β, λ, rewards, particles and steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from deradiff.worlds.gaussian_mixture import World, crossing, linear_reward, mixture, random_world

Study = Literal["grid", "two rewards", "particles", "steps", "fine"]
"""What a case is for: the grid of β, λ and samplers; two anchors at once; error against K; error against steps; and
particles alone at many steps of Euler ancestral, which takes any number of them, where only their own bias is left."""

MOST_STEPS = 1000
"""The timesteps of Stable Diffusion's schedule."""

PAIRS = ((0.5, 0.25), (1.0, 0.5), (1.0, 2.0))
"""(β, λ) of the studies of K and of steps: the anchor far too strong, a usual one, and extrapolation."""


def gaussian() -> World:
    """One Gaussian and a linear reward: the anchors differ from the reference in their mean alone.

    The mean is a parameter of the denoiser, so this is where interpolated weights are exact, and Algorithm 1 is too.
    """
    return World("gaussian", mixture([1.0], [[0.5, -0.5]], 0.5), {"slope": linear_reward([1.0, 0.6])})


WORLDS: dict[str, Callable[[], World]] = {
    "crossing": crossing,
    "gaussian": gaussian,
    "random-2-peaked": partial(random_world, 2, 4, 2, 2, peaked=True),
    "random-4-linear": partial(random_world, 4, 5, 4, 2),
    "random-16-peaked": partial(random_world, 16, 4, 16, 2, peaked=True),
}
"""The worlds that are compared, by name; those drawn at random are named after dimension and form of reward."""

QUICK_WORLDS = ("crossing", "gaussian", "random-4-linear")
"""The worlds of a quick comparison."""

PAIRED_REWARDS = ("crossing", "random-4-linear")
"""The worlds in which two rewards are mixed."""


@dataclass(frozen=True)
class Case:
    """One comparison. `lam` is λ of every anchor, one for each of `rewards`, all aligned at `beta`.

    `count` is K, the particles that compete with one another: all samples but in the study of K.
    """

    study: Study
    world: str
    rewards: tuple[str, ...]
    eta: float
    beta: float
    lam: float
    steps: int
    samples: int
    count: int

    @property
    def name(self) -> str:
        """What tells this case from all others of a plan, fit for a file name."""
        return (
            f"{self.study.replace(' ', '-')}_{self.world}_eta{self.eta:g}_beta{self.beta:g}_lam{self.lam:g}"
            f"_steps{self.steps}_K{self.count}"
        )

    @property
    def tilts(self) -> dict[str, float]:
        """λ/β of every reward: the model that realignment claims to sample."""
        return dict.fromkeys(self.rewards, self.lam / self.beta)

    def as_json(self) -> dict[str, Any]:
        """The case as it is stored."""
        return {**asdict(self), "rewards": list(self.rewards)}


@dataclass(frozen=True)
class Plan:
    """Which cases are compared: `samples` and `steps` of each, in `worlds`; `quick` takes a reduced grid.

    Raises `ValueError` for an unknown world and for numbers that show nothing.
    """

    worlds: tuple[str, ...] = tuple(WORLDS)
    samples: int = 20_000
    steps: int = 100
    quick: bool = False

    def __post_init__(self) -> None:
        for name in self.worlds:
            if name not in WORLDS:
                raise ValueError(f"there is no world {name!r}; there are {', '.join(WORLDS)}.")
        if self.samples < 100:
            raise ValueError(f"{self.samples} samples show nothing beyond their own noise; 100 are the least.")
        if not 2 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps must lie between 2 and {MOST_STEPS}, got {self.steps}.")

    def cases(self) -> list[Case]:
        """All cases, those of one world and sampler together."""
        return [case for world in self.worlds for case in (*self._grid(world), *self._studies(world))]

    def _grid(self, world: str) -> Iterator[Case]:
        betas = (0.5, 1.0) if self.quick else (0.5, 1.0, 2.0)
        lams = (0.25, 0.5, 1.0, 2.0) if self.quick else (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
        names = tuple(WORLDS[world]().rewards)
        for eta in (1.0, 0.0) if self.quick else (1.0, 0.5, 0.0):
            for beta in betas:
                for lam in lams:
                    yield self._case("grid", world, names[:1], eta, beta, lam)
                for lam in (0.25, 0.5, 1.0) if world in PAIRED_REWARDS and (beta == 1 or not self.quick) else ():
                    yield self._case("two rewards", world, names[:2], eta, beta, lam)

    def _studies(self, world: str) -> Iterator[Case]:
        if world != "crossing":
            return
        for beta, lam in PAIRS[:1] if self.quick else PAIRS:
            for count in (1, 4, 16, 64, 256):
                if 2 * count <= self.samples:
                    yield self._case("particles", world, ("slope",), 1.0, beta, lam, count=count)
            for eta in (1.0, 0.0):
                for steps in (10, 20, 40) if self.quick else (25, 50, 100, 200, 500):
                    yield self._case("steps", world, ("slope",), eta, beta, lam, steps=steps)
        if not self.quick:
            for grid in self._grid(world):
                if grid.study == "grid" and grid.eta == 1 and grid.lam != 1:
                    yield self._case("fine", world, grid.rewards, 1.0, grid.beta, grid.lam, steps=400)

    def _case(
        self,
        study: Study,
        world: str,
        rewards: tuple[str, ...],
        eta: float,
        beta: float,
        lam: float,
        *,
        steps: int | None = None,
        count: int | None = None,
    ) -> Case:
        return Case(study, world, rewards, eta, beta, lam, steps or self.steps, self.samples, count or self.samples)


def planned(
    *, quick: bool = False, worlds: tuple[str, ...] = (), samples: int | None = None, steps: int | None = None
) -> Plan:
    """The plan of these settings, of which those not given follow from `quick`. Raises `ValueError` as `Plan` does."""
    usual = Plan(QUICK_WORLDS, samples=2000, steps=50, quick=True) if quick else Plan()
    return Plan(
        worlds=tuple(dict.fromkeys(worlds)) or usual.worlds,
        samples=usual.samples if samples is None else samples,
        steps=usual.steps if steps is None else steps,
        quick=quick,
    )
