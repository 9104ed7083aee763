"""Weights under classifier-free guidance: of the conditional and of the unconditional predictions apart.

With guidance w a sampler follows `w s_c + (1-w) s_u`, s a score with and one without the prompt. The target is the
retrained model *sampled with the same guidance*. Where `s*` is its score and `s` the mixture's, which differ by a
gradient each (`s*_c - s_c = ∇h_c`, likewise u), Girsanov's theorem for the guided paths at full noise gives

    log W = w log W_c + (1-w) log W_u - ½ w(w-1) ∫ (||s*_c - s*_u||² - ||s_c - s_u||²) g² dt

exactly, with the `log W_c` and `log W_u` of `path_weights` made of one part's predictions along the guided run. The
first two terms are known. The integral asks for the retrained model's own guidance: to first order in h it is
`w(w-1) ∫ (s_c - s_u)·∇(h_c - h_u) g² dt`. How large that can be is known, by Cauchy and Schwarz and
`E ∫ ||∇h||² g² dt = Var log W` (the same theorem at w = 1): see `left_out`. Summing squares of *guided*
differences instead takes the retrained model's `||s*_c - s*_u||²` for the average over the models that are mixed.
`studies.closed_forms.guidance` measures all of this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deradiff.algorithm.estimates import covariance

STRAIGHT = 1e-3
"""The share of what guidance added, in squares, up to which one scale explains it; rounding leaves less."""


@dataclass(frozen=True)
class GuidedWeights:
    """The weights of a run whose guidance is `u + scale (c - u)` throughout.

    Attributes:
        scale: the guidance scale w, found from the predictions.
        conditional: log W_c of every image.
        unconditional: log W_u, of an empty or a negative prompt.
        strength: `∫ ||ε_c - ε_u||² d log SNR` of the mixture, how much the prompt changed along each path.
    """

    scale: float
    conditional: Float[Tensor, " batch"]
    unconditional: Float[Tensor, " batch"]
    strength: Float[Tensor, " batch"]

    @property
    def combined(self) -> Float[Tensor, " batch"]:
        """`w log W_c + (1-w) log W_u`."""
        return self.scale * self.conditional + (1 - self.scale) * self.unconditional

    def rows(self, index: Int[Tensor, " rows"] | slice) -> GuidedWeights:
        """These images alone."""
        return replace(
            self,
            conditional=self.conditional[index],
            unconditional=self.unconditional[index],
            strength=self.strength[index],
        )


def joined_guidance(runs: list[GuidedWeights | None]) -> GuidedWeights | None:
    """Several runs as one; None where one of them is unknown, or their scales differ by more than a thousandth."""
    known = [run for run in runs if run is not None]
    if len(known) < len(runs) or not runs or any(abs(run.scale / known[0].scale - 1) > 1e-3 for run in known):
        return None
    return GuidedWeights(
        known[0].scale,
        torch.cat([run.conditional for run in known]),
        torch.cat([run.unconditional for run in known]),
        torch.cat([run.strength for run in known]),
    )


def left_out(guidance: GuidedWeights, groups: Int[Tensor, " image"] | None = None) -> float:
    """How much `guidance.combined` may leave out, as a standard deviation of log W within prompts.

    `|w(w-1)| √(E ∫ ||ε_c - ε_u||² d log SNR · Var(log W_c - log W_u))`. A mean is off by at most
    so many of its score's standard deviations, to first order.
    """
    apart = guidance.conditional - guidance.unconditional
    strength = float(guidance.strength.mean()) * covariance(apart, apart, groups)
    return abs(guidance.scale * (guidance.scale - 1)) * strength**0.5


class GuidanceFit:
    """Finds the scale w of `guided = ±(first + w (second - first))` from all steps of a run, and whether there is one.

    Pipelines differ in which part is first, and some turn the sign. Guidance that rescales, comes and goes along the
    run, has a third part or otherwise is not this line leaves a remainder.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._apart: Tensor | float = 0.0
        self._along: dict[int, Tensor | float] = {1: 0.0, -1: 0.0}
        self._added: dict[int, Tensor | float] = {1: 0.0, -1: 0.0}

    def add(
        self, unguided: Float[Tensor, "model part batch *latent"], guided: Float[Tensor, "model batch *latent"]
    ) -> None:
        """The predictions of a step, before and after the pipeline combined the two parts, in single precision."""
        first, second = unguided.detach().unbind(1)
        apart = second - first
        self.steps += 1
        self._apart = self._apart + apart.square().sum()
        for sign in self._along:
            added = sign * guided.detach() - first
            self._along[sign] = self._along[sign] + (added * apart).sum()
            self._added[sign] = self._added[sign] + added.square().sum()

    @property
    def scale(self) -> float | None:
        """The w of the second part, None where no one scale explains what guidance did."""
        apart = float(self._apart)
        for sign in self._along if apart else ():
            along, added = float(self._along[sign]), float(self._added[sign])
            if added and 1 - along**2 / (apart * added) <= STRAIGHT:
                return along / apart
        return None

    def weights(
        self, first: Float[Tensor, " batch"], second: Float[Tensor, " batch"], strength: Float[Tensor, " batch"]
    ) -> GuidedWeights | None:
        """The parts' weights, told apart by their shares: the conditional one has the greater."""
        scale = self.scale
        if scale is None:
            return None
        if scale < 0.5:
            scale, first, second = 1 - scale, second, first
        return GuidedWeights(scale, second, first, strength)
