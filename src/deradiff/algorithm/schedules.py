"""λ as a function of sampling progress: constant, power, step, sigmoid, spline; one value or one per image or anchor.

Annealed importance guidance (AIG, §3.3 and appendix A.7.3) mixes `γ(t) base + (1 - γ(t)) aligned` with a monotone γ,
`γ(0) = 0` at the image and `γ(T) = 1` at pure noise. Here the same functions are written as `λ(s) = lam · (1 - γ)` of
the progress `s = (T - t)/T`, which runs from 0 (noise) to 1 (image); `lam` is the λ that is reached in the end, 1 in
the paper.

AIG leaves open what `t/T` is. `over="steps"`, the default, reads it as the fraction of sampling steps left, as the
original implementation does (`w_aligned = (i/N)**p` at step i = 0..N-1 of N: the first step is always at s = 0, and no
step reaches s = 1). `over="time"` reads it as diffusion time, which spaces the same curve differently wherever a
scheduler's timesteps are not uniform.
"""

from __future__ import annotations

import dataclasses
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Over = Literal["steps", "time"]

Number = float | int
"""Spelled out because a run-time type checker takes `float` literally."""

ROUNDING = 1e-9
"""Two progresses closer than this are the same one: `i/N` and `1 - p` are rounded differently."""


class Progress(NamedTuple):
    """How far a sampling run has come, by either clock; 0 is pure noise, 1 the image.

    `steps` is the fraction of steps done, `i/N` at step i = 0..N-1; `time` is `1 - t/T` of the diffusion time t.
    """

    steps: float
    time: float


def finite(value: object, name: str) -> float:
    """Read `value` as a finite float; raises `ValueError` naming it otherwise. Booleans and strings are no numbers.

    Nor is a tensor that requires a gradient: none would flow through the float.
    """
    if getattr(value, "ndim", None) == 0:
        value = numbers_in(value, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}.")
    return number


def numbers_in(array: Any, name: str) -> Any:
    """The numbers of a tensor or array, as Python's. Raises `ValueError` where it has none or requires a gradient."""
    if getattr(array, "requires_grad", False):
        raise ValueError(
            f"{name} requires a gradient, but is read as a plain number, through which none would flow: pass "
            "its .detach()."
        )
    try:
        return array.tolist()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise ValueError(f"{name} is a {type(array).__name__} without numbers that can be read: {array!r}.") from error


@dataclass(frozen=True, repr=False)
class Schedule(ABC):
    """λ as a function of progress. Schedules are values: equal when their parameters are, with a `repr` to paste.

    Every family takes `over`: `"steps"` (the fraction of steps done, the default) or `"time"` (diffusion time).
    """

    over: Over = field(default="steps", kw_only=True)

    families: ClassVar[dict[str, type[Schedule]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Schedule.families[cls.__name__] = cls

    def __post_init__(self) -> None:
        if self.over not in get_args(Over):
            raise ValueError(f"over must be 'steps' or 'time', got {self.over!r}.")

    def _read(self, *names: str) -> None:
        """Validate and store the parameters `names` as floats."""
        for name in names:
            object.__setattr__(self, name, finite(getattr(self, name), f"{type(self).__name__}'s {name}"))

    def __repr__(self) -> str:
        given = [f for f in dataclasses.fields(self) if f.default is MISSING or getattr(self, f.name) != f.default]
        # `over` is the base's field and so comes first, but it can only be given by name.
        given.sort(key=lambda f: f.name == "over")
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    @abstractmethod
    def _value(self, s: float) -> float:
        """λ at progress s in [0, 1]."""

    def __call__(self, s: Number) -> float:
        """λ at progress `s`, 0 (noise) to 1 (image). Raises `ValueError` for an s outside [0, 1]."""
        s = finite(s, "progress")
        if not -ROUNDING <= s <= 1 + ROUNDING:
            raise ValueError(f"progress runs from 0 (noise) to 1 (image), got {s}.")
        return self._value(min(max(s, 0.0), 1.0))

    def at(self, progress: Progress) -> float:
        """λ at `progress`, by this schedule's own clock (`over`)."""
        return self(getattr(progress, self.over))

    def scaled(self, factor: Number) -> Schedule:
        """The same curve with every λ multiplied by `factor`."""
        return dataclasses.replace(self, lam=factor * self.lam)  # type: ignore[call-arg, attr-defined]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw λ against progress on `ax`, a new figure's when there is none, and return it."""
        if ax is None:
            from matplotlib import pyplot

            _, ax = pyplot.subplots(figsize=(4.8, 3.2), layout="constrained")
        # A grid fine enough that the jump of a `Step` looks vertical.
        progress = [i / 2000 for i in range(2001)]
        ax.plot(progress, [self(s) for s in progress], linewidth=2, label=str(self))
        ax.set_xlim(0, 1)
        ax.set_xlabel({"steps": "fraction of steps done", "time": "diffusion time, 1 − t/T"}[self.over])
        ax.set_ylabel("λ")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
        return ax

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain data for a JSON record: its family under `"schedule"`, and its parameters."""
        return {"schedule": type(self).__name__} | dataclasses.asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Schedule:
        """The schedule that `to_dict` (possibly through JSON) wrote. Raises `ValueError` for anything else."""
        parameters = dict(record)
        name = parameters.pop("schedule", None)
        family = Schedule.families.get(name) if isinstance(name, str) else None
        if family is None:
            raise ValueError(f"no schedule is called {name!r}; there are {', '.join(sorted(Schedule.families))}.")
        try:
            return family(**parameters)
        except TypeError as error:
            raise ValueError(f"{name} does not take the parameters {sorted(parameters)}: {error}.") from None


@dataclass(frozen=True, repr=False)
class Constant(Schedule):
    """The same λ from noise to image, as in DeRaDiff. Negative values move away from the anchor."""

    lam: Number

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read("lam")

    def __str__(self) -> str:
        return f"λ = {self.lam:g}"

    def _value(self, s: float) -> float:
        return self.lam


@dataclass(frozen=True, repr=False)
class Power(Schedule):
    """`λ(s) = lam · s**p`, from `γ = 1 - ((T - t)/T)**p` (AIG, appendix A.7.3).

    The paper uses p = 1, 1.25, 1.5, 2, 3, 4, 5 and p = 2 for its qualitative study. A larger p keeps the reference in
    charge for longer. `p` must be positive.
    """

    p: Number
    lam: Number = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read("p", "lam")
        if self.p <= 0:
            raise ValueError(f"Power's p must be positive (the paper uses 1 to 5), got {self.p}.")

    def __str__(self) -> str:
        return f"power, p = {self.p:g}{_reaching(self.lam)}"

    def _value(self, s: float) -> float:
        return self.lam * s**self.p


@dataclass(frozen=True, repr=False)
class Step(Schedule):
    """λ = 0 while `t/T > p`, `lam` from `t/T = p` on, from `γ = H(t/T - p)` with `H(0) = 0` (AIG, appendix A.7.3).

    `p` in [0, 1] is the remaining fraction of the run that the anchor gets: 1 is the anchor throughout, and at 0 the
    anchor only enters at s = 1, which no sampling step over steps reaches.
    """

    p: Number
    lam: Number = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read("p", "lam")
        if not 0 <= self.p <= 1:
            raise ValueError(f"Step's p is a fraction of the run, 0 to 1, got {self.p}.")

    def __str__(self) -> str:
        return f"step, p = {self.p:g}{_reaching(self.lam)}"

    def _value(self, s: float) -> float:
        return self.lam if s >= 1 - self.p - ROUNDING else 0.0


@dataclass(frozen=True, repr=False)
class Sigmoid(Schedule):
    """`λ = lam · (1 - γ)` with `γ ∝ σ(κ (t/T - 1/2))`, made to run from exactly 0 to exactly 1 (AIG, appendix A.7.3).

    The paper writes `σ(κ (t - T/2))`, so its κ is ours divided by T, and its ends are only near 0 and 1; here
    `γ = (σ(κ (t/T - 1/2)) - σ(-κ/2)) / (σ(κ/2) - σ(-κ/2))`. `kappa` must be positive: small is almost the straight
    line of `Power(1)`, large almost `Step(0.5)`.
    """

    kappa: Number
    lam: Number = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read("kappa", "lam")
        if self.kappa < 1e-6:
            raise ValueError(f"Sigmoid's kappa must be positive, 1e-6 at least, got {self.kappa}.")

    def __str__(self) -> str:
        return f"sigmoid, κ = {self.kappa:g}{_reaching(self.lam)}"

    def _value(self, s: float) -> float:
        # σ(x) = (1 + tanh(x/2))/2 turns the normalised sigmoid into a quotient of two tanh, exact at both ends.
        return self.lam * (1 + math.tanh(self.kappa * (s - 0.5) / 2) / math.tanh(self.kappa / 4)) / 2


@dataclass(frozen=True, repr=False)
class Spline(Schedule):
    """A smooth curve through `points` `(s, λ)`, shape-preserving (SciPy's PCHIP; AIG, conclusion).

    At least two points, in any order, with distinct s in [0, 1]. The curve is monotone between neighbouring points and
    never leaves the interval of their two values, so points that rise give a λ that rises, as AIG's do; points that
    rise and fall are legal too. Before the first point and after the last one λ stays at that point's value.
    """

    points: Sequence[Sequence[Number]]

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            pairs = [(s, lam) for s, lam in self.points]
        except (TypeError, ValueError):
            raise ValueError(f"Spline's points are pairs (s, λ), got {self.points!r}.") from None
        pairs = [(finite(s, "a point's s"), finite(lam, "a point's λ")) for s, lam in pairs]
        object.__setattr__(self, "points", tuple(sorted(pairs)))
        places = [s for s, _ in self.points]
        if len(places) < 2:
            raise ValueError(f"Spline needs at least two points (s, λ), got {len(places)}.")
        if places[0] < 0 or places[-1] > 1:
            raise ValueError(f"Spline's points need s between 0 (noise) and 1 (image), got {places}.")
        if len(set(places)) < len(places):
            raise ValueError(f"Spline's points need distinct s, got {places}.")

    def __str__(self) -> str:
        return f"spline through {len(self.points)} points"

    def scaled(self, factor: Number) -> Spline:
        """The same curve with every λ multiplied by `factor`."""
        return dataclasses.replace(self, points=[(s, factor * lam) for s, lam in self.points])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw λ against progress, and the points, on `ax`, a new figure's when there is none, and return it."""
        ax = super().plot(ax)
        ax.plot(*zip(*self.points, strict=True), "o", color=ax.lines[-1].get_color())
        return ax

    def _value(self, s: float) -> float:
        first, last = self.points[0][0], self.points[-1][0]
        return float(_pchip(self)(min(max(s, first), last)))


@dataclass(frozen=True, repr=False)
class Drawn(Schedule):
    """λ = 1 at some steps and 0 at the others, by a number drawn at every step: 1 where `low <= u(s) < high`.

    u is uniform on [0, 1), from `seed` and the progress alone. Anchors whose intervals are disjoint, drawn with one
    seed, take turns at random: Diffusion Blend's DB-MPA-LS (Cheng et al. 2025, arXiv 2505.18547), which evaluates a
    single model in every step and approximates the mixture by it. See `taking_turns`.
    """

    low: Number
    high: Number
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read("low", "high")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"Drawn's interval lies in [0, 1], got {self.low} to {self.high}.")

    def __str__(self) -> str:
        return f"drawn, p = {self.high - self.low:g}"

    def scaled(self, factor: Number) -> Schedule:
        """Only by 1: a step's model is the anchor itself or another. Raises `ValueError` for another factor."""
        if factor != 1:
            raise ValueError(f"a model that is drawn has λ = 1, and cannot be scaled by {factor}.")
        return self

    def _value(self, s: float) -> float:
        return float(self.low <= random.Random(f"{self.seed} {s:.9f}").random() < self.high)


def taking_turns(lams: Mapping[str, Number], seed: int) -> dict[str, Schedule]:
    """For each anchor the steps that are its own, a share λ of all on average; those of none are the reference's.

    Raises `ValueError` for negative λ, and for those whose sum is above 1: they are probabilities.
    """
    ends = list(accumulate(lams.values(), initial=0.0))
    if min(lams.values(), default=0) < 0 or ends[-1] > 1 + ROUNDING:
        raise ValueError(f"anchors take turns with probabilities, 0 or more and 1 in sum at most; got {dict(lams)}.")
    ends = [1.0 if end > 1 - ROUNDING else end for end in ends]
    return {name: Drawn(low, high, seed) for name, (low, high) in zip(lams, pairwise(ends), strict=True)}


@lru_cache(maxsize=64)
def _pchip(spline: Spline) -> Any:
    from scipy.interpolate import PchipInterpolator

    places, values = zip(*spline.points, strict=True)
    return PchipInterpolator(places, values)


def _reaching(lam: float) -> str:
    return "" if lam == 1 else f", up to λ = {lam:g}"
