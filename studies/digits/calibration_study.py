"""Does a calibrated λ come nearer to the retrained model than β/λ does? On the shipped anchors, and on cells.

A cell of `learned` holds Algorithm 1's mean reward at λ = 0, ¼, ½, ¾, 1 and 2 of an anchor, from the same noise. A
monotone cubic through those tells it at any constant λ in between, so that a calibrated λ is judged without drawing.
The shipped anchors, of another reward, other captions and other trainings, are what `calibration.CLEAR` was chosen on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from scipy.interpolate import PchipInterpolator

from deradiff.alignment.base import Base
from deradiff.alignment.objectives import bradley_terry
from deradiff.files.reading import read
from deradiff.files.writing import write_json
from deradiff.sweep.jobs import Report, reproducible
from deradiff.worlds.digits import anchor_path, captions
from deradiff.worlds.digits.rewards import DigitsReward
from studies.digits import learned, learned_models, models
from studies.digits.anchors import Pairs
from studies.digits.calibration import Margins, calibrate, margins
from studies.digits.learned import Plan, contrast
from studies.digits.learned_models import STRENGTHS, Cell, folder_of, merged
from studies.digits.truth_models import TruthSettings, draw_scored

DRAWS = 16
"""Timesteps and noises of every pair."""

SHIPPED_PAIRS = 500
SHIPPED_ANCHORS = (30.0, 100.0, 250.0, 500.0, 1000.0, 2000.0)
SHIPPED_LAMS = {30.0: (0.06, 0.12, 0.3, 0.6), 100.0: (0.1, 0.2, 0.4, 0.7), 250.0: (0.25, 0.5)}
"""Where Algorithm 1 is drawn from the three strongest anchors; between these a monotone cubic tells."""

Case = dict[str, Any]


def search(unets: Mapping[float, Any], pairs: Pairs, seed: int) -> dict[float, Margins]:
    """What the line search needs of every anchor: inner products on `pairs`."""
    pipe = learned_models.reference()
    latents, base = pairs.ordered(), Base(pipe)
    with torch.no_grad():
        embedded = torch.cat([pipe.text_encoder(part).last_hidden_state for part in pairs.tokens.split(256)])
    return margins(base, pipe.unet, unets, latents, embedded, DRAWS, seed)


def case(of: Margins, anchor: float, target: float, curve: Mapping[float, float], retrained: Sequence[float]) -> Case:
    """A λ by β/λ and by calibration, and the errors of Algorithm 1 there, as shares of the retrained model's shift.

    `curve` is Algorithm 1's mean reward by λ, with 0 and 1; `retrained` the model's and its standard error.
    """
    lams = sorted(curve)
    reward = PchipInterpolator(lams, [curve[lam] for lam in lams])
    found = calibrate(of, anchor, target)
    shift = retrained[0] - curve[0.0]

    def error(lam: float) -> float:
        return float((reward(np.clip(lam, lams[0], lams[-1])) - retrained[0]) / abs(shift))

    return {
        "anchor": anchor,
        "target": target,
        **found.record(),
        "shift": shift,
        "shift error": retrained[1],
        "error at β/λ": error(found.plain),
        "error at the search's": error(found.search),
        "error at the quotient": error(found.ratio),
        "error calibrated": error(found.lam),
    }


# -- cells ------------------------------------------------------------------------------------------------------------


def of_cell(models_folder: Path, cell: Cell, record: Mapping[str, Any], plan: Plan) -> list[Case]:
    """Every λ below 1 of a cell of Diffusion-DPO, calibrated on the pairs that it never trained on."""
    pool = learned_models.load_pool(models_folder, plan.trainings)
    pairs, count = learned_models.pairs_of(pool, cell, plan.trainings), plan.trainings.held_out_pairs
    held_out = Pairs(*(rows[-count:] for rows in (pairs.latents, pairs.tokens, pairs.rewards, pairs.first_wins)))
    anchors = STRENGTHS[cell.family][cell.reward]
    found = search({a: merged(folder_of(models_folder, cell, a)) for a in anchors}, held_out, 8000 + cell.seed)
    made = []
    for anchor in anchors:
        its = [c for c in record["cases"] if c["anchor"] == anchor]
        means = {name: values[0] for name, values in record["means"].items()}
        curve = {0.0: means["reference"], 1.0: means[str(anchor)]}
        curve |= {c["lam"]: means[str(anchor / c["lam"])] + c["algorithm 1"][0] for c in its}
        for c in its:
            retrained = [means[str(anchor / c["lam"])], c["shift"][1]]
            made.append(case(found[anchor], anchor, anchor / c["lam"], curve, retrained) | {"lam of": c["lam"]})
    return made


# -- the anchors that ship --------------------------------------------------------------------------------------------


def shipped(plan: Plan, report: Report) -> list[Case]:
    """Every weaker shipped anchor as the target of each of the three strongest."""
    unets = {beta: UNet2DConditionModel.from_pretrained(anchor_path(beta)) for beta in SHIPPED_ANCHORS}
    for unet in unets.values():
        unet.to(memory_format=torch.channels_last)
    reward, groups = DigitsReward(), torch.arange(10).repeat_interleave(plan.images)
    start, drawn = learned_models.reference().unet, {}
    for number, (name, unet) in enumerate({0.0: start, **unets}.items()):
        images, _ = learned.draw(learned.pipeline(unet), plan)
        drawn[name] = reward(images, [""] * len(images))
        report("shipped anchors as they are", number + 1, len(unets) + 1, f"{name:g}")
    found = search({beta: unets[beta] for beta in SHIPPED_LAMS}, _shipped_pairs(), 8100)
    report("line search", 1, 1, "done")
    made = []
    for number, (anchor, lams) in enumerate(SHIPPED_LAMS.items()):
        curve = {0.0: float(drawn[0.0].mean()), 1.0: float(drawn[anchor].mean())}
        for lam in lams:
            curve[lam] = float(learned.realigned(start, unets[anchor], lam, plan, reward)[0].mean())
        for target in SHIPPED_ANCHORS:
            if target > anchor:
                shift = contrast(drawn[target], None, drawn[0.0], None, groups)
                made.append(case(found[anchor], anchor, target, curve, [float(drawn[target].mean()), shift.error]))
        report("realigning shipped anchors", number + 1, len(SHIPPED_LAMS), f"{anchor:g}")
    return made


def _shipped_pairs() -> Pairs:
    """Pairs as the shipped anchors were trained on, of other prompts and noise."""
    prompts = captions.sample_prompts(SHIPPED_PAIRS, 8200)
    texts = [prompt for prompt in prompts for _ in range(2)]
    generator = torch.Generator().manual_seed(8300)
    latents, scores = draw_scored(learned_models.reference(), texts, TruthSettings(sampling_steps=20), generator)
    rewards = scores[DigitsReward().name].view(-1, 2)
    wins = bradley_terry(rewards[:, 0], rewards[:, 1], 0.25, generator)
    return Pairs(latents.view(-1, 2, 4, 8, 8), models.token_ids(prompts), rewards, wins)


# -- running and telling ----------------------------------------------------------------------------------------------


def run(out: Path, plan: Plan, report: Report, shipped_images: int = 16) -> Path:
    """Calibrate the shipped anchors, and all cells of Diffusion-DPO that the study in `out` has, into one file."""
    file = out / "calibration.json"
    told = read(dict[str, Any], file, "table of calibrations", "delete it") if file.exists() else {}
    with reproducible(1):
        if "shipped" not in told:
            told["shipped"] = shipped(Plan(images=shipped_images, batch=plan.batch), report)
            write_json(file, told)
        found = learned.load(out / "cells")
        for cell in learned.cells("dpo"):
            if cell.name in found and cell.name not in told:
                told[cell.name] = of_cell(out / "models", cell, found[cell.name], plan)
                write_json(file, told)
                report("calibrating cells", len(told) - 1, len(found), cell.name)
    return file


def table(told: Mapping[str, Sequence[Case]]) -> str:
    """In Markdown: every λ and its calibrated one, with the errors of Algorithm 1 at both."""
    heading = "| models | β → target | λ = β/β' | line search | quotient | taken | error at β/λ | quotient | taken |"
    lines = [heading, "|" + "---|" * 9]
    for name, cases in told.items():
        for c in cases:
            spread = 100 * c["log error"]
            lines.append(
                f"| {name} | {c['anchor']:g} → {c['target']:g} | {c['plain']:.3g} | {c['search']:.3g} "
                f"| {c['ratio']:.3g} ± {spread:.0f}% | {c['lam']:.3g} | {100 * c['error at β/λ']:+.0f}% "
                f"| {100 * c['error at the quotient']:+.0f}% | {100 * c['error calibrated']:+.0f}% |"
            )
    return "\n".join(lines) + "\n"


def verdicts(told: Mapping[str, Sequence[Case]]) -> str:
    """In words: the two figures that decide whether calibration is worth having, tuned and judged."""
    lines = []
    for half, names in (("tuned", ["shipped"]), ("judged", [name for name in told if name != "shipped"])):
        every = [c for name in names for c in told.get(name, ())]
        low = [c for c in every if c["plain"] < 0.5]
        high = [c for c in every if 0.5 <= c["plain"] <= 1]
        if low:
            before, after = (median(abs(c[key]) for c in low) for key in ("error at β/λ", "error calibrated"))
            lines.append(
                f"{half}: median error over {len(low)} cases with λ < ½: {before:.1%}, calibrated {after:.1%}."
            )
        if high:
            worse = max(abs(c["error calibrated"]) - abs(c["error at β/λ"]) for c in high)
            lines.append(
                f"{half}: the worst change over {len(high)} cases with λ in [½, 1]: {100 * worse:+.1f} points."
            )
    return "\n".join(lines) + "\n"


def report_of(file: Path) -> str:
    """The tables of a file that `run` wrote."""
    told = read(dict[str, list[dict[str, Any]]], file, "table of calibrations", "run `calibration` again")
    return f"{table(told)}\n{verdicts(told)}"
