"""Writes docs/tasks/pipelines.md from docs/data/pipelines.json, which `python tests/conformance` has made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
DATA, PAGE = DOCS / "data" / "pipelines.json", DOCS / "tasks" / "pipelines.md"

COLUMNS = {
    "λ": ("reference", "anchor", "half", "remove", "progress"),
    "λ per image": ("per_image", "sweep"),
    "micro-batches": ("micro_batch",),
    "LoRA": ("lora",),
}
"""What the columns of the table say, and the checks that this takes."""

_WORST_FIRST = ("wrong", "crashes", "refused", "passes", "not tried")
_SIGNS = {"wrong": "**wrong**", "crashes": "**crash**", "refused": "refused", "passes": "✓", "not tried": "–"}

HEAD = """# Which pipelines

{passes} of the {count} pipeline classes of diffusers that are built here can be realigned; {refused} are refused in
words. Its own tests build {theirs} of them, and cases of our own (`tests/conformance/own_cases`), mostly out of parts
of these tests, the other {own}. This page is drawn from [pipelines.json](../data/pipelines.json), the results of

    python tests/conformance CHECKOUT

with {versions} and the tests
in a checkout of diffusers of {checkout}. Each of these builds a pipeline of tiny random models. It is realigned with
a perturbed copy of its own denoiser and compared with the untouched pipelines, and with oracles that share no code with
deradiff (`tests/conformance/README.md`). The weights are random: the table says that Algorithm 1 is carried out to the
letter, not how good its images are. Where not bit for bit, the same means 1e-4 of the anchor's own effect, or ten times
what the last bits of the weights make in that pipeline, if that is more. Your own models are checked in a minute by

    deradiff doctor PIPELINE --anchor ANCHOR

In the table a ✓ means:

- **λ**: λ = 0 is the untouched pipeline and λ = 1 the anchor's, both bit for bit; λ = ½ is what the oracle makes of
  both models; the dial follows the scheduler's steps; `dial.remove()` leaves the pipeline as it was.
- **λ per image**: a batch with a λ for each image gives every image what it is at its own λ.
- **micro-batches**: `dial.micro_batch = 1` changes nothing.
- **LoRA**: a LoRA file that the plain pipeline writes and loads is the anchor, in one batch with the reference or not.

"–" was not tried: the plain pipeline cannot do it either (draw two images in one call, load a LoRA), or it takes long.

"""


def page(record: dict[str, Any]) -> str:
    """The page, in Markdown, of what a run of tests/conformance wrote."""
    pipelines, counts = record["pipelines"], record["counts"]
    own = sum(all(test.startswith("own.") for test in pipeline["tests"]) for pipeline in pipelines.values())
    versions = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in record["versions"].items())
    lines = [
        HEAD.format(
            passes=counts["passes"],
            count=len(pipelines),
            refused=counts["refused"],
            theirs=len(pipelines) - own,
            own=own,
            versions=versions,
            checkout=record["checkout"],
        ),
        f"| pipeline | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
        *(f"| {_named(name)} | {' | '.join(_signs(pipeline))} |" for name, pipeline in pipelines.items()),
        "",
    ]
    partly = [*_refused_parts(pipelines)]
    refused = [*_reasons(pipelines, "refused")]
    untried = [*_reasons(pipelines, "not tried")]
    if partly:
        lines += ["## Refused in part", "", *partly, ""]
    if refused:
        lines += ["## Refused", "", *refused, ""]
    if untried:
        lines += ["## Not tried", "", "The plain pipeline could not be run here, or took too long.", "", *untried, ""]
    if left_out := record["left out"]:
        lines += ["## Left out", "", *(f"- {_named(name)}: {why}." for name, why in left_out.items()), ""]
    return "\n".join(lines)


def _named(pipeline: str) -> str:
    """A pipeline's class; some tests put a class of their own around it to leave the safety checker out."""
    return f"`{pipeline.removesuffix('Wrapper')}`"


def _signs(pipeline: dict[str, Any]) -> Iterator[str]:
    for checks in COLUMNS.values():
        outcomes = [pipeline["checks"][check][0] for check in checks if check in pipeline["checks"]]
        if pipeline["verdict"] in ("refused", "not tried"):
            outcomes.append(pipeline["verdict"])
        yield _SIGNS[min(outcomes or ["not tried"], key=_WORST_FIRST.index)]


def _reasons(pipelines: dict[str, Any], verdict: str) -> Iterator[str]:
    for name, pipeline in pipelines.items():
        if pipeline["verdict"] == verdict:
            reason = pipeline["reasons"][0] if pipeline["reasons"] else ""
            yield f"- {_named(name)}: {_escaped(reason)}"


def _refused_parts(pipelines: dict[str, Any]) -> Iterator[str]:
    """What a pipeline that can be realigned refuses all the same; those that refuse one thing alike in one line."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, pipeline in pipelines.items():
        for column, checks in COLUMNS.items() if pipeline["verdict"] == "passes" else ():
            for check in checks:
                if pipeline["checks"].get(check, [""])[0] == "refused":
                    reason = next(r for r in pipeline["reasons"] if r.startswith(f"{check}: "))
                    reason = reason.partition(", in deradiff/")[0]
                    if check == "micro_batch":
                        reason = (
                            "it is not known where the batch is in every argument of their denoisers, or attention "
                            "takes it apart itself"
                        )
                    alike.setdefault((column, reason), []).append(_named(name))
    for (column, reason), names in alike.items():
        told = names[0] if len(names) == 1 else f"{len(names)} pipelines, see the table"
        yield f"- **{column}** ({told}): {_escaped(reason)}"


def _escaped(reason: str) -> str:
    """A message as text, without the place in the code: what stands in brackets, or between stars, is no markup."""
    reason = reason.partition(", in deradiff/")[0].partition(", in conformance/")[0]
    return reason.replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*").replace("_", "\\_")


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(DATA.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PAGE)
