"""Does a calibrated λ come nearer to the retrained model than β/λ does? On the shipped anchors, and on cells.

A cell of `learned` holds Algorithm 1's mean reward at λ = 0, ¼, ½, ¾, 1 and 2 of an anchor, and the digits' experiment
that of the shipped anchors, all from the same noise. A monotone cubic through those tells it at any constant λ in
between, so that a calibrated λ is judged without drawing. The shipped anchors, of another reward, other captions and
other trainings, are what thresholds may be chosen on; the cells judge.
"""

from __future__ import annotations

import csv
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
from deradiff.files.models import reading_model
from deradiff.files.reading import read
from deradiff.files.writing import write_json
from deradiff.sweep.jobs import Report, reproducible
from deradiff.worlds.digits import anchor_path, captions
from deradiff.worlds.digits.rewards import DigitsReward
from studies.digits import learned, learned_models, models
from studies.digits.anchors import Pairs
from studies.digits.calibration import TimedTerms, calibrate, timed_terms
from studies.digits.learned import Plan
from studies.digits.learned_models import STRENGTHS, Cell, folder_of, merged
from studies.digits.truth_models import TruthSettings, draw_scored

DRAWS = 16
"""Timesteps and noises of every pair of a cell."""

SHIPPED_ANCHORS = (30.0, 100.0, 250.0, 500.0)
SHIPPED_PAIRS, SHIPPED_DRAWS = 250, 12

DATA = Path(__file__).parents[2] / "docs" / "data"
EXPERIMENT = DATA / "digits-experiment"

Case = dict[str, Any]


def search(unets: Mapping[float, Any], pairs: Pairs, seed: int, draws: int = DRAWS) -> dict[float, TimedTerms]:
    """What the line search needs of every anchor: inner products on `pairs`."""
    pipe = learned_models.reference()
    latents, base = pairs.ordered(), Base(pipe)
    with torch.no_grad():
        embedded = torch.cat([pipe.text_encoder(part).last_hidden_state for part in pairs.tokens.split(256)])
    return timed_terms(base, pipe.unet, unets, latents, embedded, draws, seed)


def case(
    of: TimedTerms, anchor: float, target: float, curve: Mapping[float, float], retrained: Sequence[float]
) -> Case:
    """A λ by β/λ and by calibration, and the errors of Algorithm 1 there, as shares of the retrained model's shift.

    `curve` is Algorithm 1's mean reward by λ, with 0 and 1; `retrained` the model's and the standard
    error of the difference at β/λ.
    """
    lams = sorted(curve)
    reward = PchipInterpolator(lams, [curve[lam] for lam in lams])
    found = calibrate(of, anchor, target)
    quarters = [calibrate(of.within(low, low + 250), anchor, target) for low in (0, 250, 500, 750)]
    shift = retrained[0] - curve[0.0]

    def error(lam: float) -> float:
        return float((reward(np.clip(lam, lams[0], lams[-1])) - retrained[0]) / abs(shift))

    return {
        "anchor": anchor,
        "target": target,
        **found.record(),
        "shift": shift,
        "standard error of the difference": retrained[1],
        "error at β/λ": error(found.plain),
        "error at the search's": error(found.search),
        "error at the quotient": error(found.ratio),
        "error calibrated": error(found.lam),
        "by quarters of the timesteps": [[quarter.ratio, quarter.error] for quarter in quarters],
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
            retrained = [means[str(anchor / c["lam"])], c["algorithm 1"][1]]
            made.append(case(found[anchor], anchor, anchor / c["lam"], curve, retrained) | {"lam of": c["lam"]})
    return made


# -- the anchors that ship --------------------------------------------------------------------------------------------


def shipped(report: Report) -> list[Case]:
    """Every weaker shipped anchor as the target of each of the four strongest, by the rewards of the experiment.

    That drew every anchor at the λ of all targets, at guidance 1.5 (`docs/tasks/digits-experiment.md`).
    """
    unets = {}
    for beta in SHIPPED_ANCHORS:
        with reading_model(anchor_path(beta)):
            unet = UNet2DConditionModel.from_pretrained(anchor_path(beta))
        unets[beta] = unet.to(memory_format=torch.channels_last)
    report("line search", 0, 1, "drawing pairs")
    found = search(unets, _shipped_pairs(), 8100, SHIPPED_DRAWS)
    report("line search", 1, 1, "done")
    drawn = list(csv.DictReader((EXPERIMENT / "agreement-heat-diffusion-dpo-digits-digits.csv").open(encoding="utf-8")))
    arms = list(csv.DictReader((EXPERIMENT / "equal-cost-digits.csv").open(encoding="utf-8")))
    reference = next(float(row["mean score"]) for row in arms if row["arm"] == "reference")
    made = []
    for anchor in SHIPPED_ANCHORS:
        its = [row for row in drawn if float(row["anchor_beta"]) == anchor]
        curve = {0.0: reference} | {float(row["lambda"]): float(row["approximated"]) for row in its}
        for row in sorted(its, key=lambda row: float(row["lambda"]), reverse=True):
            if float(row["lambda"]) < 1:
                retrained = [float(row["retrained"]), float(row["standard_error"])]
                made.append(case(found[anchor], anchor, float(row["target_beta"]), curve, retrained))
    return made


def _shipped_pairs() -> Pairs:
    """Pairs as the shipped anchors were trained on, of other prompts and noise."""
    prompts = captions.sample_prompts(SHIPPED_PAIRS, 8200)
    texts = [prompt for prompt in prompts for _ in range(2)]
    generator = torch.Generator().manual_seed(8300)
    latents, scores = draw_scored(learned_models.reference(), texts, TruthSettings(sampling_steps=12), generator)
    rewards = scores[DigitsReward().name].view(-1, 2)
    wins = bradley_terry(rewards[:, 0], rewards[:, 1], 0.25, generator)
    return Pairs(latents.view(-1, 2, 4, 8, 8), models.token_ids(prompts), rewards, wins)


# -- reward-weighted anchors ------------------------------------------------------------------------------------------


def matched() -> list[Case]:
    """The analogue for weighted anchors, from the numbers of `python -m studies.digits truth` that are committed.

    λ is chosen so that Algorithm 1 moves the reward by the share of its anchor's shift that the weights demand: that of
    `E[r exp(λ r/β)] / E[exp(λ r/β)] - E[r]` at λ to that at 1, from the reference's samples. What Algorithm 1 then
    gives is that share of the anchor's own shift, so nothing needs to be drawn to know its error.
    """
    told = read(dict[str, Any], DATA / "digits-truth.json", "numbers of the study", "restore it")
    made = []
    for record in told["cases"]:
        of, arms = record["case"], record["arms"]
        if of["family"] != "weighted" or len(of["target"]) > 1:
            continue
        ((reward, lam),) = of["target"].items()
        moved = {name: arm[reward]["value"] - arms["reference"][reward]["value"] for name, arm in arms.items()}
        demanded = [told["training"][f"weighted/{reward}-{at:g}"]["mean_rewards"][reward] for at in (lam, 1.0)]
        some, whole = (means["tilted"]["value"] - means["reference"]["value"] for means in demanded)
        shift, reached = record["errors"][reward]["shift"], some / whole * moved[f"anchor {reward}"]
        gap = record["errors"][reward]["gaps"]["algorithm 1"]
        made.append(
            {
                "reward": reward,
                "lam": lam,
                "guidance": of["guidance_scale"],
                "share": some / whole,
                "error at β/λ": [gap["value"] / abs(shift["value"]), gap["error"] / abs(shift["value"])],
                "error matched": [reached / moved["retrained"] - 1, shift["error"] / abs(shift["value"])],
            }
        )
    return made


def matched_table() -> str:
    """In Markdown: every weighted target that is committed, with the errors at λ and at the λ that matches."""
    lines = [
        "| reward | λ | guidance | share demanded | Algorithm 1 at λ | where it has that share |",
        "|" + "---|" * 6,
    ]
    for c in matched():
        errors = [
            f"{100 * value:+.0f} ± {100 * error:.0f}%" for value, error in (c["error at β/λ"], c["error matched"])
        ]
        lines.append(f"| {c['reward']} | {c['lam']:g} | {c['guidance']:g} | {c['share']:.0%} | {' | '.join(errors)} |")
    return "\n".join(lines) + "\n"


# -- running and telling ----------------------------------------------------------------------------------------------


def run(out: Path, plan: Plan, report: Report) -> Path:
    """Calibrate the shipped anchors, and all cells of Diffusion-DPO that the study in `out` has, into one file."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "calibration.json"
    told = read(dict[str, Any], file, "table of calibrations", "delete it") if file.exists() else {}
    with reproducible(1):
        if "shipped" not in told:
            told["shipped"] = shipped(report)
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
    return f"{table(told)}\n{verdicts(told)}\n{matched_table()}"
