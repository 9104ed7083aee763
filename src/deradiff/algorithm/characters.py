"""What kind of anchor is it? It decides what a weight means, and with it what a verdict may say.

- A *tilt*, `p_1 ∝ p_0 exp(r/β)`, the optimum of alignment: weighted samples at λ follow the model aligned at β/λ
  (`tilts`).
- *Stepwise*, as Diffusion-DPO while its square term is small: `ε_θ - ε_ref ∝ 1/β` at every step. Mixing predictions is
  retraining there, plain samples are the estimate, and weights mislead (`pair_terms`).
- *Neither*: hacked, saturated, stopped early. λ says how much of the anchor, and no more.
- *Unknown*, where samples and pairs do not tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deradiff.algorithm.pair_terms import LAMS, PairTest
from deradiff.algorithm.tilts import TiltTest

CharacterKind = Literal["tilt", "stepwise", "neither", "unknown"]

STEPWISE_METHODS = ("dpo",)
"""The methods of alignment whose loss sees β and the distance from the reference as Diffusion-DPO's does."""


@dataclass(frozen=True)
class Character:
    """An anchor's kind, and why."""

    kind: CharacterKind
    why: str

    @property
    def words(self) -> str:
        """The kind and what follows from it, in one line."""
        return f"{MEANINGS[self.kind]}: {self.why}"


MEANINGS: dict[CharacterKind, str] = {
    "tilt": "a tilt: the weighted mean is the retrained model's",
    "stepwise": "stepwise: mixing predictions is retraining, plain samples are the estimate",
    "neither": "neither a tilt nor stepwise: λ says how much of the anchor, and no more",
    "unknown": "of no known kind: the samples do not tell what weights mean",
}


def character_of(tilt: TiltTest | None, pairs: PairTest | None, aligned_by: str | None = None) -> Character:
    """The kind of an anchor, from the tests that could be made and the method it was aligned by, where that is known.

    Stepwise goes before tilt: weak anchors of Diffusion-DPO pass both, and there the two say nearly the same.
    """
    pair_loss = aligned_by in (None, *STEPWISE_METHODS)
    if pairs is not None and pair_loss and pairs.answer == "yes":
        return Character("stepwise", pairs.why)
    if tilt is not None and tilt.answer == "yes":
        return Character("tilt", tilt.why)
    whys = [test.why for test in (tilt, pairs if pair_loss else None) if test is not None]
    if aligned_by is not None and not pair_loss:
        whys.append(f"and {aligned_by} is not stepwise")
    no_tilt = tilt is not None and tilt.answer == "no"
    not_stepwise = (pairs is not None and pairs.answer == "no") or not pair_loss
    why = "; ".join(whys) or "nothing was tested"
    return Character("neither" if no_tilt and not_stepwise else "unknown", why)


def covers(lam: float) -> bool:
    """Whether a stepwise anchor was tested at this λ, strictly between 0 and 1."""
    return min(LAMS) <= lam < 1
