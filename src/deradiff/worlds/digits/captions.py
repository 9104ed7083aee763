"""Captions of the digits: several wordings that name the digit and the colours, or leave a colour open.

A colour that a caption leaves open varies in the pictures that carry it, so a reward can choose between modes there.
The empty caption stands for "anything" and is what classifier-free guidance steers away from.
"""

import re
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from deradiff.worlds.digits.data import INKS, PAPERS

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

WORDINGS: dict[tuple[bool, bool], tuple[str, ...]] = {
    (True, True): (
        "a {ink} {digit} on {paper} paper",
        "the digit {digit} in {ink} ink on {paper} paper",
        "{paper} paper with a handwritten {ink} {digit}",
    ),
    (True, False): ("a {ink} {digit}", "the digit {digit} in {ink} ink", "a handwritten {ink} {digit}"),
    (False, True): ("a {digit} on {paper} paper", "the digit {digit} on {paper} paper", "{paper} paper with a {digit}"),
    (False, False): ("a {digit}", "the digit {digit}", "a handwritten {digit}"),
}
"""Wordings by (ink named, paper named)."""


class Parts(NamedTuple):
    """What a caption says: the digit 0 to 9, and the names of the colours it does not leave open."""

    digit: int
    ink: str | None = None
    paper: str | None = None


def caption(parts: Parts, wording: int = 0) -> str:
    """`parts` in words; `wording` picks one of the three ways of saying it."""
    template = WORDINGS[parts.ink is not None, parts.paper is not None][wording]
    return template.format(digit=DIGITS[parts.digit], ink=parts.ink, paper=parts.paper)


@cache
def _patterns() -> list[re.Pattern[str]]:
    groups = {"digit": "|".join(DIGITS), "ink": "|".join(INKS), "paper": "|".join(PAPERS)}
    groups = {name: f"(?P<{name}>{words})" for name, words in groups.items()}
    return [re.compile(template.format(**groups)) for templates in WORDINGS.values() for template in templates]


def parse(text: str) -> Parts:
    """The inverse of `caption`, in any case and spacing. Raises `ValueError` for a caption in no known wording."""
    plain = " ".join(text.lower().split())
    for pattern in _patterns():
        if match := pattern.fullmatch(plain):
            named = match.groupdict()
            return Parts(DIGITS.index(named["digit"]), named.get("ink"), named.get("paper"))
    raise ValueError(
        f"{text!r} is not a caption of the digits: try {caption(Parts(7, 'blue', 'yellow'))!r} "
        f"(digits {', '.join(DIGITS)}; inks {', '.join(INKS)}; papers {', '.join(PAPERS)})"
    )


def words() -> list[str]:
    """Every word that a caption can hold, sorted."""
    plain = {word for templates in WORDINGS.values() for t in templates for word in t.split() if "{" not in word}
    return sorted({*plain, *DIGITS, *INKS, *PAPERS})


def describe(
    digits: Int[Tensor, " batch"],
    inks: Int[Tensor, " batch"],
    papers: Int[Tensor, " batch"],
    generator: torch.Generator,
) -> list[str]:
    """A caption for each picture: each colour named with probability 2/3, the wording drawn uniformly."""
    count = len(digits)
    named = torch.rand(count, 2, generator=generator) < 2 / 3
    wordings = torch.randint(3, (count,), generator=generator).tolist()
    ink_names, paper_names = list(INKS), list(PAPERS)
    return [
        caption(
            Parts(
                int(digits[i]),
                ink_names[int(inks[i])] if named[i, 0] else None,
                paper_names[int(papers[i])] if named[i, 1] else None,
            ),
            wordings[i],
        )
        for i in range(count)
    ]


def sample_prompts(count: int, seed: int) -> list[str]:
    """Prompts to measure with: digits in equal numbers, colours uniform and left open one time in three."""
    generator = torch.Generator().manual_seed(seed)
    inks = torch.randint(len(INKS), (count,), generator=generator)
    papers = torch.randint(len(PAPERS), (count,), generator=generator)
    return describe(torch.arange(count) % 10, inks, papers, generator)
