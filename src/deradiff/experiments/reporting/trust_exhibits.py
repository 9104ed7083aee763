"""How far each anchor can be trusted at each λ, in a line of words; and what kind of anchor it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deradiff.algorithm.characters import MEANINGS
from deradiff.algorithm.verdict import TRUSTED, Verdict
from deradiff.experiments.reporting.exhibits import Exhibit, table
from deradiff.experiments.results import Results
from deradiff.files.records import slug

SECTION = "How far to trust each λ"


def exhibits(results: Results) -> Iterator[Exhibit]:
    """A table of every prompt set that has realigned images with weights, and one of the anchors."""
    made = [trust(results, prompts) for prompts in results.plan.prompts]
    yield from (exhibit for exhibit in made if exhibit is not None)
    if any(made) and results.characters:
        yield anchors(results)


def trust(results: Results, prompts: str) -> Exhibit | None:
    """A line for every anchor and λ, but 0 and 1; None where no image has a weight and a score."""
    lines: dict[tuple[str, float], dict[str, Any]] = {}
    for arm in results.of_method("realign"):
        if arm.particles or arm.lam in (None, 0.0, 1.0) or prompts not in results.plan.sets(arm.prompts):
            continue
        verdicts = [results.verdict(arm, prompts, score) for score in results.plan.scores]
        known = [verdict for verdict in verdicts if verdict is not None]
        if known:
            [(anchor, lam)] = arm.anchors
            lines.setdefault((anchor, lam), _line(results, anchor, lam, known))
    if not lines:
        return None
    places = list(results.plan.models)
    rows = [lines[key] for key in sorted(lines, key=lambda key: (places.index(key[0]), key[1]))]
    caption = (
        "How far the mean score of each anchor's images is off from that of the model retrained at β/λ, as a share of "
        "its shift from the reference, in words: as the images' weights tell it, without a retrained model. Trust: by "
        f"{TRUSTED:.0%} at most. Effective: the share of the images that weighted means rest on. λ = 0 and 1 are one "
        "model alone, and exact."
    )
    if not {anchor for anchor, _ in lines} <= results.characters.keys():
        caption += (
            " Of an anchor that was not examined the weighted mean is right on a condition: deradiff examine finds out "
            "what kind of anchor it is, and the plan names the file that it writes as the model's character."
        )
    if substitute := results.plan.prompts[prompts].substitute_for:
        caption += f" The prompts, {prompts}, are a substitute for {substitute}."
    return Exhibit(f"trust-{slug(prompts)}", SECTION, f"How far to trust it: prompts {prompts}", caption, *table(rows))


def _line(results: Results, anchor: str, lam: float, verdicts: list[Verdict]) -> dict[str, Any]:
    """A row of the table; the verdicts of several scores are one sentence where they say the same."""
    beta, character = results.plan.models[anchor].beta, results.characters.get(anchor)
    stands = beta is not None and lam > 0 and (character is None or character.character.kind != "neither")
    compared = verdicts[0].comparison
    return {
        "anchor": anchor,
        "λ": lam,
        "β/λ": beta / lam if beta is not None and stands else None,
        "images": compared.images,
        "effective, %": 100 * compared.evenness,
        "in words": "; ".join(dict.fromkeys(verdict.words for verdict in verdicts)),
    }


def anchors(results: Results) -> Exhibit:
    """What kind of anchor each is that was examined, and what showed it."""
    rows = [
        {
            "anchor": name,
            "kind": MEANINGS[known.character.kind],
            "examined with": f"{known.examined.scheduler}, {known.examined.steps} steps, guidance "
            + ("its own" if known.examined.guidance_scale is None else f"{known.examined.guidance_scale:g}"),
            "what showed it": known.character.why,
        }
        for name, known in results.characters.items()
    ]
    caption = (
        "What kind of anchor each is, as deradiff examine found it from samples and preference pairs. It decides "
        "what a weight means, and the words above go by it."
    )
    return Exhibit("trust-anchors", SECTION, "What kind of anchor each is", caption, *table(rows))
