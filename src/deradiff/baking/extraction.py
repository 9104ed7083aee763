"""The mixture at λ, or a whole anchor, as one LoRA: singular value decompositions of what λ changes of the weights.

How far its images are from the mixture's is measured; where an error is asked for, it decides the ranks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.lams import Lams
from deradiff.algorithm.schedules import Progress, finite
from deradiff.anchors import Anchor
from deradiff.baking import outputs
from deradiff.baking.dialects import Dialect, require_dialect, wearing_lora, write_lora
from deradiff.baking.drawing import Sampler
from deradiff.baking.judging import compared
from deradiff.baking.low_rank import Factors, ModelChange, change_of
from deradiff.baking.methods import BakingJob
from deradiff.baking.weights import Blend, Opened, open_anchor
from deradiff.sampling.dial import Dial
from deradiff.sampling.realignment import realign

PROBES = 8
"""How often the share that is left out is halved, on a logarithmic scale, in looking for the fewest numbers."""

LEAST, MOST = 1e-6, 0.9
"""Between which the share of the change's squared norm lies that an error leaves out."""


@dataclass(frozen=True)
class AsLora:
    """What a LoRA is to be like.

    Args:
        rank: of every layer, or
        error: of images, as `Judgement` measures it, between 0 and 1: each layer then has the rank that it is worth, in
            as few numbers as keep the error, with its standard error, below.
        dialect: whose names the file has: "diffusers", "kohya" or "peft" (see `dialects`).

    Raises `ValueError` unless one of rank and error is given, and for numbers out of range.
    """

    rank: int | None = None
    error: float | None = None
    dialect: Dialect = "diffusers"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.error is None):
            said = (
                "neither its rank nor its error" if self.rank is None else f"rank {self.rank} and error {self.error:g}"
            )
            raise ValueError(f"a LoRA with {said} named: name one of the two, and the other follows")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"a LoRA of rank {self.rank} has no weights: name 1 or more")
        if self.error is not None and not 0 < finite(self.error, "the error") < 1:
            raise ValueError(
                f"an error of {self.error:g} is no share of what λ changes: name one between 0 and 1, 0.02 for 2%"
            )
        if self.dialect not in get_args(Dialect):
            raise ValueError(f"dialect must be one of {', '.join(get_args(Dialect))}; got {self.dialect!r}")


@dataclass(frozen=True)
class ExactImages:
    """Final latents of the mixture and of the reference, from the same noise, which candidates are compared with."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    reference: Float[Tensor, "image *latent"]
    realigned: Float[Tensor, "image *latent"]

    @classmethod
    def drawn(
        cls,
        pipe: Any,
        realigned: Callable[[], AbstractContextManager[Dial]],
        lam: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampler: Sampler,
    ) -> "ExactImages":
        """Sample both."""
        with realigned() as dial:
            dial.lam = {name: 0.0 for name in dial.anchors}
            reference = sampler.latents(pipe, prompts, seeds)
            dial.lam = lam
            return cls(prompts, seeds, reference, sampler.latents(pipe, prompts, seeds))

    def error_of(self, pipe: Any, sampler: Sampler) -> Estimate:
        """Of what `pipe` is now, in units of what λ changes (see `Judgement`)."""
        own = sampler.latents(pipe, self.prompts, self.seeds)
        return compared("", self.reference, self.realigned, own).error


@dataclass(frozen=True)
class Extraction:
    """The factors of a LoRA, the changes that they do not carry, and what is to be said of them."""

    factors: Mapping[str, Factors]
    rest: Mapping[str, Tensor]
    said: Mapping[str, Any]


def extracted(job: BakingJob, settings: AsLora, prompts: Sequence[str], images: int, sampler: Sampler) -> Extraction:
    """The LoRA that `settings` ask for. `prompts` calibrate an error, with `images` from their own noise.

    Anchors that are plain LoRAs are joined instead of decomposed where the rank allows it: exactly.

    Raises `ValueError` where no rank reaches the error.
    """
    lams = lams_of(job.lams)
    with job.anchors(open_anchor) as anchors:
        exact = _joined(job, anchors, lams, settings)
        if exact is not None and settings.rank is not None:
            return exact
        blend = Blend(job.reference, [(anchor, lams[anchor.name]) for anchor in anchors])
        changes: list[ModelChange] = []
        for number, known in enumerate(change_of(job.reference, blend.names, blend.difference, settings.rank), 1):
            changes[:] = [known]
            job.report("decomposing", number, len(blend.names), "")
    (change,) = changes
    if not change.layers:
        raise ValueError("λ changes nothing that a LoRA could carry: its file would be empty")
    rest = change.rest if settings.dialect == "kohya" else {}
    if settings.rank is not None:
        return Extraction(change.of_rank(settings.rank), rest, _said(change, rest))
    calibration = ExactImages.drawn(
        job.pipe,
        lambda: realign(job.pipe, dict(job.sources), job.lams.raw, **job.where),
        job.lams.raw,
        [prompts[i % len(prompts)] for i in range(images)],
        range(job.seed + images, job.seed + 2 * images),
        sampler,
    )
    factors, tried = _smallest(job, change, rest, settings, calibration, sampler)
    return Extraction(factors, rest, _said(change, rest) | {"tried": tried})


def require_extractable(lams: Lams, settings: AsLora, pipe: Any, trained: bool, images: int, prompts: int) -> None:
    """Raise `ValueError` for what one LoRA cannot have, and for want of images to measure an error by."""
    require_dialect(settings.dialect, pipe)
    if not lams.is_constant:
        raise ValueError(
            "a LoRA has one strength at every noise level, and this λ changes along the run: name one number, or leave "
            "out the form and take method='distill'"
        )
    if settings.error is None:
        return
    if trained:
        raise ValueError(f"an error of {settings.error:g} decides the ranks before any training: name a rank to train")
    if not images or prompts < 2:
        raise ValueError(
            f"an error of {settings.error:g} is measured by images, and {images} of {prompts} prompts are asked for: "
            "name 1 image or more, and 2 prompts, of which some look for the ranks and others measure the result"
        )


def lams_of(lams: Lams) -> dict[str, float]:
    """λ of every anchor, where it is constant."""
    return dict(zip(lams.anchors, lams.at(Progress(0.0, 0.0), 1)[:, 0].tolist(), strict=True))


def _joined(
    job: BakingJob, anchors: Sequence[Opened], lams: Mapping[str, float], settings: AsLora
) -> Extraction | None:
    """Anchors that are plain LoRAs, summed at λ, where they are and `rank` is not below the sum's."""
    adapters = {
        anchor.adapter: lams[anchor.name] for anchor in anchors if isinstance(anchor, Anchor) and anchor.adapter
    }
    if len(adapters) < len(anchors) or not outputs.can_be_joined(job.reference, list(adapters)):
        return None
    state = outputs.joined_loras([(job.reference, adapter, lam) for adapter, lam in adapters.items()])
    down_end, up_end = ".lora_A.weight", ".lora_B.weight"
    paths = [name.removesuffix(down_end) for name in state if name.endswith(down_end)]
    factors = {path: (state[path + down_end], state[path + up_end]) for path in paths}
    own = max(len(down) for down, _ in factors.values())
    if settings.rank is not None and settings.rank < own:
        return None
    said = {"exact": True, "rank_of_anchors": own, "left_out": 0, "share_left_out": 0.0, "carried": 0}
    return Extraction(factors, {}, said)


def _said(change: ModelChange, rest: Mapping[str, Tensor]) -> dict[str, Any]:
    left_out = [name for name in change.rest if name not in rest]
    return {
        "exact": False,
        "left_out": len(left_out),
        "share_left_out": change.share_of_rest if left_out else 0.0,
        "carried": len(rest),
    }


def _smallest(
    job: BakingJob,
    change: ModelChange,
    rest: Mapping[str, Tensor],
    settings: AsLora,
    calibration: ExactImages,
    sampler: Sampler,
) -> tuple[dict[str, Factors], list[dict[str, float]]]:
    """Factors in few numbers whose images keep the error, and what was tried: bisection over the share left out.

    Raises `ValueError` where the whole change does not.
    """
    limit, tried = settings.error, []
    assert limit is not None

    def error_of(factors: Mapping[str, Factors], left_out: float) -> Estimate:
        with TemporaryDirectory() as folder:
            write_lora(job.pipe, Path(folder), factors, rest, settings.dialect, {})
            with wearing_lora(job.pipe, Path(folder), settings.dialect):
                error = calibration.error_of(job.pipe, sampler)
        tried.append({"left_out": left_out, "error": error.value, "standard_error": error.error})
        job.report("looking for ranks", len(tried), PROBES + 1, f"error {error.value:.2%}")
        return error

    def holds(error: Estimate) -> bool:
        spread = error.error if math.isfinite(error.error) else 0.0
        return error.value + spread <= limit

    best = change.of_share(1.0)
    whole = error_of(best, 0.0)
    if not holds(whole):
        lost = sum(name not in rest for name in change.rest)
        raise ValueError(
            f"no rank brings the error to {limit:g}: with all that factors can carry it is {whole.value:.2%} ± "
            f"{whole.error:.2%}. Weights scaled by λ are the mixture to first order only"
            + (
                f", and {lost} norms and biases ({change.share_of_rest:.2%} of the change's squared norm) are left out"
                if lost
                else ""
            )
            + ". Allow a larger error, train a LoRA of a given rank (method='distill')"
            + ("" if settings.dialect == "kohya" else ", or take the dialect 'kohya', which has names for them")
        )
    low, high = math.log(LEAST), math.log(MOST)
    for _ in range(PROBES):
        middle = (low + high) / 2
        factors = change.of_share(1 - math.exp(middle))
        if holds(error_of(factors, math.exp(middle))):
            low, best = middle, factors
        else:
            high = middle
    return best, tried


def sentences(said: Mapping[str, Any]) -> list[str]:
    """What is to be said of a LoRA besides its error."""
    low, middle, high = said["ranks"]
    ranks = f"rank {high}" if low == high else f"ranks {low} to {high}, the middle one {middle}"
    lines = [
        f"a LoRA on {said['layers']} layers, {ranks}: {said['numbers']:,} numbers, {said['share_of_model']:.1%} of the "
        "model's"
    ]
    if said["exact"]:
        lines.append(f"made of LoRAs of rank {said['rank_of_anchors']} in all, it is their sum at λ, exactly")
    if said["left_out"]:
        lines.append(
            f"{said['left_out']} norms and biases are left out, which hold {said['share_left_out']:.2%} of the "
            "squared norm of the change"
        )
    if said["carried"]:
        lines.append(f"{said['carried']} changes of norms and biases are in the file beside the factors")
    return lines


def ranks_in(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """Layers, numbers, and the least, middle and largest rank."""
    ranks = sorted(len(down) for down, _ in factors.values())
    return {
        "layers": len(ranks),
        "numbers": sum(down.numel() + up.numel() for down, up in factors.values()),
        "ranks": [ranks[0], ranks[len(ranks) // 2], ranks[-1]],
    }
