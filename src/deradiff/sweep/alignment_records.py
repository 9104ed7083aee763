"""How an anchor came about, as far as its record tells: what ships, or a folder that `deradiff align` wrote."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

from deradiff.files.reading import Record, read
from deradiff.worlds import find_anchor

NO_KL = ("mapo",)
"""Methods of `deradiff align` whose strength weighs something else than a divergence from the reference."""


@dataclass(frozen=True)
class Alignment:
    """The method that an anchor was aligned by, its β if it has one, and the reward; None for what is not known."""

    method: str | None = None
    beta: float | None = None
    reward: str | None = None


class _AlignedBy(Record):
    method: str | None = None
    reward: str | None = None


class _MadeOf(Record):
    beta: float
    settings: _AlignedBy = _AlignedBy()


class _Aligned(Record):
    made_of: _MadeOf


def alignment_of(source: str) -> Alignment:
    """What is known of an anchor: one that ships, or a folder with an `alignment.json`; of others nothing.

    It has no β where the method has no KL term (`NO_KL`) or the term had a strength of 0: λ is then how much of the
    anchor is taken. A record that is there and cannot be read costs a warning. Raises `ValueError` for an anchor that a
    world does not have.
    """
    if anchor := find_anchor(source):
        return Alignment(anchor.method, anchor.beta, anchor.reward)
    file = Path(source) / "alignment.json"
    try:
        made_of = read(_Aligned, file, "record of an alignment", "so its β is not known").made_of
    except (FileNotFoundError, NotADirectoryError):
        return Alignment()
    except (OSError, ValueError) as error:
        warnings.warn(str(error), stacklevel=2)
        return Alignment()
    method = made_of.settings.method
    regularised = math.isfinite(made_of.beta) and made_of.beta > 0 and method not in NO_KL
    return Alignment(method, made_of.beta if regularised else None, made_of.settings.reward)


def known_beta(source: str) -> float | None:
    """The β that an anchor was aligned at, None where it has none or nobody knows (`alignment_of`)."""
    return alignment_of(source).beta
