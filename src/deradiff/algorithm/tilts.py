"""Is an anchor its reference tilted by a reward? A test from samples at λ = 0, 1 and between, of no retrained model.

If it is, `p_1 ∝ p_0 exp(r/β)`, the weighted samples at λ follow `p_0 exp(λ r/β)` (`path_weights`), and two things are
true of them, prompt by prompt. Since `d E_λ[r]/dλ = Var_λ(r)/β`, the weighted mean of the reward goes from the
reference's to the anchor's as the integral of its variance does, whatever β is. And the log ratio of the paths rises by
the same `1/β` nats per point of the reward at every λ.

Identities that hold for any two chains tell nothing here: `d E_Q[f]/dλ = Cov_Q(f, L)` of the log path ratio L, and with
it Crooks' relation and thermodynamic integration over λ, are true of the *path* measures `P_0 exp(λ L)` whatever the
anchor is. A check of them proves the code. That L is a function of the image alone, the reward, makes an anchor a tilt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.estimates import Estimate, effective_sample_size

Answer = Literal["yes", "no", "open"]
"""What a test says: "open" where the noise is too large, or the samples cannot tell."""

CLOSE = 0.15
"""A weighted mean so near to a tilt's, as a share of the shift and two standard errors included, is a tilt's."""

APART = 0.1
"""Farther than this by two standard errors, it is no tilt's."""

UNEQUAL = 3.0
"""Slopes at two λ that differ by this factor, or in sign, and by three standard errors are no tilt's."""

EFFECTIVE = 0.15
"""The least share of effective images at which a weighted mean takes part in the test."""


@dataclass(frozen=True)
class AtLam:
    """What the samples at one λ say; means are shares of the shift from reference to anchor."""

    lam: float
    plain: Estimate
    weighted: Estimate
    expected: float
    """The weighted mean of a tilt."""
    misfit: Estimate
    """`weighted - expected`."""
    slope: Estimate | None
    """Nats of the log path ratio per point of the reward, within prompts; None where paths have no densities."""
    effective: float
    """The share of effective images."""


@dataclass(frozen=True)
class TiltTest:
    """The answer, why, and the numbers behind it."""

    answer: Answer
    why: str
    shift: Estimate
    """Of the mean reward from reference to anchor, in points."""
    tilt: Estimate
    """1/β, the nats per point that lead from the one to the other: the shift by the mean variance."""
    at: tuple[AtLam, ...]


def tilt_test(
    lams: Sequence[float],
    scores: Float[Tensor, "lam prompt image"],
    log_weights: Float[Tensor, "lam prompt image"],
    log_ratios: Float[Tensor, "lam prompt image"] | None = None,
) -> TiltTest:
    """Test whether the anchor is the reference tilted by the reward that `scores` are of.

    Standard errors are over prompts, by the jackknife.

    Args:
        lams: in ascending order, from 0 to 1.
        scores: the reward of every image.
        log_weights: log W of every image (`ImportanceWeights.log_weights`); 0 at λ = 0 and 1.
        log_ratios: the anchor's log path ratio of every image, of a memoryless sampler; None for others.

    Raises:
        ValueError: λ do not go from 0 to 1 with one between; fewer than three prompts or eight images of each; a score
            that is not finite, or a reward that does not vary within any prompt.
    """
    prompts, images = scores.shape[1:]
    _require_usable(lams, scores, log_weights)
    r, w = scores.double().cpu(), torch.softmax(log_weights.double().cpu(), 2)
    means = torch.stack([r.mean(2), (w * r).sum(2)])
    variances = (w * (r - means[1, ..., None]).square()).sum(2) / (1 - w.square().sum(2)).clamp(min=1e-9)
    slopes = None
    if log_ratios is not None:
        away, ratio = r - r.mean(2, keepdim=True), log_ratios.double().cpu()
        slopes = torch.stack([(away * (ratio - ratio.mean(2, keepdim=True))).sum(2), away.square().sum(2)])
    steps = torch.tensor(lams, dtype=torch.float64).diff()

    def told(kept: Tensor) -> dict[str, Tensor]:
        """All estimates from these prompts, which weigh alike."""
        plain, weighted = means[:, :, kept].mean(2)
        shift = plain[-1] - plain[0]
        v = variances[:, kept].mean(1)
        area = torch.cat([torch.zeros(1, dtype=torch.float64), ((v[1:] + v[:-1]) / 2 * steps).cumsum(0)])
        expected = area / area[-1]
        known = {"shift": shift, "tilt": shift / area[-1], "expected": expected}
        known |= {"plain": (plain - plain[0]) / shift, "weighted": (weighted - plain[0]) / shift}
        known["misfit"] = known["weighted"] - expected
        if slopes is not None:
            known["slope"] = slopes[0][:, kept].sum(1) / slopes[1][:, kept].sum(1)
        return known

    whole = told(torch.arange(prompts))
    left_out = [told(torch.tensor([p for p in range(prompts) if p != out])) for out in range(prompts)]

    def estimate(name: str, place: int | None = None) -> Estimate:
        parts = torch.stack([part[name] if place is None else part[name][place] for part in left_out])
        error = ((prompts - 1) / prompts * (parts - parts.mean()).square().sum()).sqrt()
        value = whole[name] if place is None else whole[name][place]
        return Estimate(float(value), float(error))

    effective = effective_sample_size(log_weights.cpu()).mean(1) / images
    at = tuple(
        AtLam(
            lam,
            estimate("plain", k),
            estimate("weighted", k),
            float(whole["expected"][k]),
            estimate("misfit", k),
            None if slopes is None else estimate("slope", k),
            float(effective[k]),
        )
        for k, lam in enumerate(lams)
    )
    shift = estimate("shift")
    answer, why = _answer(shift, at)
    return TiltTest(answer, why, shift, estimate("tilt"), at)


def _require_usable(lams: Sequence[float], scores: Tensor, log_weights: Tensor) -> None:
    """Raise `ValueError` for what `tilt_test` cannot use."""
    if list(lams) != sorted(set(lams)) or len(lams) < 3 or (lams[0], lams[-1]) != (0.0, 1.0):
        raise ValueError(f"λ must rise from 0 to 1 with one between them at least, got {list(lams)}")
    prompts, images = scores.shape[1:]
    if prompts < 3 or images < 8:
        raise ValueError(
            f"{images} images of each of {prompts} prompts: the test needs 8 of 3 at least, for standard errors"
        )
    if not bool(torch.isfinite(scores).all() and torch.isfinite(log_weights).all()):
        raise ValueError("a score or weight is not finite: there is nothing to compare")
    r = scores.double().cpu()
    if not float(r.var(2).sum()) > 1e-12 * float(r.square().mean()):
        raise ValueError(
            f"the reward is constant, {float(r.mean()):.4g} for every image of a prompt, and tilts nothing: name the "
            "one that the anchor was aligned with"
        )


def _answer(shift: Estimate, at: Sequence[AtLam]) -> tuple[Answer, str]:
    if not abs(shift.value) > 3 * shift.error:
        return "open", f"the anchor hardly moves this reward ({shift} points), so it tells nothing: name another"
    between = [one for one in at[1:-1] if one.effective >= EFFECTIVE]
    words = ""
    if between:
        worst = max(between, key=lambda one: abs(one.misfit.value) - 2 * one.misfit.error)
        words = (
            f"at λ = {worst.lam:g} weights give {worst.weighted.value:.0%} of the shift, where a tilt has "
            f"{worst.expected:.0%} (± {worst.misfit.error:.0%})"
        )
        if abs(worst.misfit.value) - 2 * worst.misfit.error > APART:
            return "no", words
    if (unequal := _unequal(at)) is not None:
        return "no", unequal
    if uneven := [one.lam for one in at[1:-1] if one not in between]:
        return "open", f"the weights are too uneven to tell at λ = {', '.join(format(lam, 'g') for lam in uneven)}"
    if all(abs(one.misfit.value) + 2 * one.misfit.error <= CLOSE for one in between):
        return "yes", f"weighted means go from reference to anchor as a tilt's do; {words}"
    return "open", f"too noisy to tell: {words}"


def _unequal(at: Sequence[AtLam]) -> str | None:
    """Two λ whose slopes are no tilt's, in words."""
    known = [(one.lam, one.slope) for one in at if one.slope is not None]
    if not known:
        return None
    (low_lam, low), (high_lam, high) = (pick(known, key=lambda one: one[1].value) for pick in (min, max))
    apart = math.hypot(low.error, high.error)
    if high.value - low.value > 3 * apart and high.value > UNEQUAL * low.value:
        return (
            f"the log ratio of the paths rises by {high} nats per point of the reward at λ = {high_lam:g} and by {low} "
            f"at λ = {low_lam:g}, where a tilt has one slope"
        )
    return None


def record(test: TiltTest) -> dict[str, Any]:
    """The test as JSON; estimates as `[value, error]`."""

    def pair(x: Estimate | None) -> list[float | None] | None:
        return None if x is None else [finite(x.value), finite(x.error)]

    def finite(x: float) -> float | None:  # JSON has no NaN
        return x if math.isfinite(x) else None

    rows = [
        {name: getattr(one, name) for name in ("lam", "expected", "effective")}
        | {name: pair(getattr(one, name)) for name in ("plain", "weighted", "misfit", "slope")}
        for one in test.at
    ]
    return {"answer": test.answer, "why": test.why, "shift": pair(test.shift), "tilt": pair(test.tilt), "at": rows}
