"""How an anchor came about, as far as its record or the user tells."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

from deradiff.algorithm.characters import STEPWISE_METHODS
from deradiff.files.reading import Record, read
from deradiff.worlds import find_anchor


@dataclass(frozen=True)
class Origin:
    """The method an anchor was aligned by, its β if it has one, and the reward; None for what is not known."""

    method: str | None = None
    beta: float | None = None
    reward: str | None = None


class _Settings(Record):
    method: str
    reward: str | None = None


class _MadeOf(Record):
    beta: float
    settings: _Settings


class _Aligned(Record):
    made_of: _MadeOf


def origin_of(anchor: str, method: str | None, beta: float | None, reward: str | None) -> Origin:
    """What the user says of the anchor, completed by its `alignment.json`, or by what is known of one that ships.

    Raises `ValueError` for a β that is not positive, one that contradicts the record, and a method that does.
    """
    if beta is not None and not 0 < beta < math.inf:
        raise ValueError(f"anchor_beta = {beta}: the strength that the anchor was aligned at must be positive")
    known = _recorded(anchor)
    if None not in (method, known.method) and method != known.method:
        raise ValueError(f"{anchor} was aligned by {known.method}, as its record says, not by {method}: leave that out")
    method = method or known.method
    # Elsewhere the strength is in other units than Diffusion-DPO's.
    recorded = known.beta if known.method in STEPWISE_METHODS else None
    if beta is not None and recorded is not None and not math.isclose(beta, recorded):
        raise ValueError(f"{anchor} was aligned at β = {recorded:g}, as its record says, not at {beta:g}")
    return Origin(method, recorded if beta is None else beta, reward or known.reward)


def _recorded(anchor: str) -> Origin:
    if shipped := find_anchor(anchor):
        return Origin(shipped.method, shipped.beta, shipped.reward)
    try:
        made_of = read(_Aligned, Path(anchor) / "alignment.json", "record of an alignment", "name what it says").made_of
    except (FileNotFoundError, NotADirectoryError):
        return Origin()
    except (OSError, ValueError) as error:
        warnings.warn(str(error), stacklevel=2)
        return Origin()
    return Origin(made_of.settings.method, made_of.beta, made_of.settings.reward)
