"""How far the images of one λ can be trusted, in words and in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from deradiff.algorithm.characters import Character
from deradiff.algorithm.path_weights import joined
from deradiff.algorithm.verdict import verdict
from deradiff.sampling.reuse import Reused
from deradiff.sweep.batches import Diagnostics
from deradiff.sweep.description import Drawing


def judged(images: Sequence[tuple[Drawing, Diagnostics]], character: Character | None = None) -> dict[str, Any]:
    """How far one column can be trusted, as a record: the verdict in words, and the numbers behind it.

    `character` is the anchor's, where it was examined.

    Images that a safety checker blacked out are counted: their paths count in the verdict, their pictures are none.
    """
    judgement = _judged([drawing for drawing, _ in images], [diagnostics for _, diagnostics in images], character)
    hidden = sum(diagnostics.blacked_out for _, diagnostics in images)
    if not hidden:
        return judgement
    words = f"{judgement['words']}; {hidden} of {len(images)} images blacked out by the pipeline's safety checker"
    return judgement | {"words": words, "blacked_out": hidden}


def _judged(drawings: Sequence[Drawing], known: Sequence[Diagnostics], character: Character | None) -> dict[str, Any]:
    runs = [diagnostics.run for diagnostics in known if diagnostics.run is not None]
    if len(runs) == len(known):
        prompts = list(dict.fromkeys(drawing.prompt for drawing in drawings))
        groups = torch.tensor([prompts.index(drawing.prompt) for drawing in drawings])
        weighed = verdict(joined(runs), groups=groups, character=character).record()
        return weighed | _approximate([diagnostics.reused for diagnostics in known if diagnostics.reused is not None])
    swarms = [diagnostics.particles for diagnostics in known if diagnostics.particles is not None]
    if not swarms:
        return {"kind": "approximate", "words": "interpolated weights: an approximation without a verdict"}
    collapsed = [swarm for swarm in swarms if bool(swarm.collapsed.any())]
    effective = sum(float(swarm.effective) for swarm in swarms) / len(swarms)
    count = drawings[0].particles
    words = f"{effective:.3g} of {count} particles effective on average; {swarms[0].resampled_by}"
    if swarms[0].why_inexact:
        words += f". No exact target: {swarms[0].why_inexact}"
    if collapsed:
        words = f"collapsed for {len(collapsed)} of {len(swarms)} images, of which the first: {collapsed[0].words}"
    return {
        "kind": "collapsed" if collapsed else "particles",
        "words": words,
        "images": len(swarms),
        "particles": count,
        "collapsed": len(collapsed),
        "effective": effective,
    }


def _approximate(runs: Sequence[Reused]) -> dict[str, Any]:
    """What carrying predictions over came to for one column, in words and numbers: the mean image's error."""
    if not runs or not any(run.error for run in runs):
        return {}
    together = replace(runs[0], errors=tuple(run.error for run in runs))
    return {"kind": "approximate", "words": together.words, "reuse": together.record()}
