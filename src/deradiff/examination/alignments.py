"""How an anchor came about, as far as its record or the user tells."""

from __future__ import annotations

import math

from deradiff.algorithm.characters import STEPWISE_METHODS
from deradiff.sweep.alignment_records import Alignment, alignment_of


def origin_of(anchor: str, method: str | None, beta: float | None, reward: str | None) -> Alignment:
    """What the user says of the anchor, completed by its `alignment.json`, or by what is known of one that ships.

    Raises `ValueError` for a β that is not positive, one that contradicts the record, and a method that does.
    """
    if beta is not None and not 0 < beta < math.inf:
        raise ValueError(f"anchor_beta = {beta}: the strength that the anchor was aligned at must be positive")
    known = alignment_of(anchor)
    if None not in (method, known.method) and method != known.method:
        raise ValueError(f"{anchor} was aligned by {known.method}, as its record says, not by {method}: leave that out")
    method = method or known.method
    # Elsewhere the strength is in other units than Diffusion-DPO's.
    recorded = known.beta if known.method in STEPWISE_METHODS else None
    if beta is not None and recorded is not None and not math.isclose(beta, recorded):
        raise ValueError(f"{anchor} was aligned at β = {recorded:g}, as its record says, not at {beta:g}")
    return Alignment(method, recorded if beta is None else beta, reward or known.reward)
