"""What every method of alignment makes of the digits: python benchmarks/methods.py --out FOLDER.

Each is run as `deradiff align digits --method ...` runs it, with the presets' settings. Its LoRA is then measured on
the same prompts from the same noise, all of which leave the ink's colour open: the mean reward that it was aligned to,
how many digits can be read, the variety among the pictures of one prompt, and the path KL to the reference. An
interrupted run goes on where it was. The table goes to benchmarks/methods.json.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from rich.console import Console
from rich.table import Table

import deradiff
from deradiff.algorithm.estimates import Estimate, mean
from deradiff.alignment.presets import usual
from deradiff.alignment.runs import align_all
from deradiff.cli import terminal
from deradiff.files.writing import write_json
from deradiff.sweep.jobs import reproducible
from deradiff.worlds import digits
from deradiff.worlds.digits import captions, quality
from deradiff.worlds.digits.rewards import DigitsReward
from studies.digits.truth import Plan, prompts

STRENGTHS: dict[str, list[float]] = {
    "dpo": [250.0],
    "mapo": [0.1],
    # The range of Annealed Importance Guidance: from the hacked model to the base.
    "draft": [0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0],
    "alignprop": [2.0],
    "refl": [3000.0],
    "rwr": [0.5],
    "ddpo": [0.0],
}
LONGER = ("draft", 0.1, 250)
"""A strength that has not converged after its preset's steps, and how many it is given besides."""

PROMPTS, IMAGES, STEPS, SEED = 60, 16, 25, 17


def measured(anchor: Path | None) -> dict[str, Any]:
    """The reference, or it with a LoRA, by DDIM at guidance 1."""
    texts = prompts(Plan(prompts=PROMPTS))
    pipe = digits.load_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    if anchor is not None:
        deradiff.realign(pipe, anchor, lam=1.0)
    asked = [text for text in texts for _ in range(IMAGES)]
    images = quality.draw(pipe, asked, SEED, STEPS, guidance_scale=1.0)
    rewards = DigitsReward()(images, asked).view(PROMPTS, IMAGES)
    seen = quality.read(images).digits == torch.tensor([captions.parse(text).digit for text in asked])
    # The variance among the pictures of one prompt, summed over colours and pixels.
    variety = images.view(PROMPTS, IMAGES, -1).var(1).sum(1)
    numbers = {"reward": rewards.mean(1), "legible": seen.float().view(PROMPTS, IMAGES).mean(1), "variety": variety}
    return {name: {**asdict(mean(values)), "by_prompt": values.tolist()} for name, values in numbers.items()}


def row_of(anchor: Path) -> dict[str, Any]:
    """What is measured of an anchor, and how far it says that it went."""
    return measured(anchor) | {"path_kl": json.loads((anchor / "alignment.json").read_text())["path_kl"]}


def difference(one: dict[str, Any], other: dict[str, Any]) -> Estimate:
    """`one` less `other`, prompt by prompt."""
    return mean(torch.tensor(one["by_prompt"]) - torch.tensor(other["by_prompt"]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("methods"), help="folder of the anchors")
    options.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen, console = options.parse_args(), Console()
    terminal.pass_on_warnings()
    rows: dict[str, dict[str, Any]] = {}
    with reproducible(1):
        rows["reference"] = measured(None)
        for method, strengths in STRENGTHS.items():
            for strength in strengths:
                with terminal.stages(console) as report:
                    made = align_all(usual("digits", method), [strength], chosen.out / method, report, cpu=True)
                (anchor,) = made
                rows[f"{method} {strength:g}"] = row_of(anchor)
        method, strength, steps = LONGER
        preset = usual("digits", method)
        longer = replace(preset, plan=replace(preset.plan, steps=steps))
        with terminal.stages(console) as report:
            (anchor,) = align_all(longer, [strength], chosen.out / f"{method}-{steps}-steps", report, cpu=True)
        rows[f"{method} {strength:g}, {steps} steps"] = row_of(anchor)
    show(console, rows)
    claim = {name: asdict(difference(rows["draft 0"][name], rows["draft 50"][name])) for name in ("reward", "variety")}
    console.print(
        f"DRaFT-1 without KL less λ_KL = 50: reward {_plain(claim['reward'])}, variety {_plain(claim['variety'])}"
    )
    for row in rows.values():
        for name in ("reward", "legible", "variety"):
            del row[name]["by_prompt"]
    settings = {"prompts": PROMPTS, "images": IMAGES, "steps": STEPS, "seed": SEED}
    write_json(chosen.json, {"settings": settings, "rows": rows, "draft 0 less draft 50": claim})


def show(console: Console, rows: dict[str, dict[str, Any]]) -> None:
    table = Table("method", "reward", "legible", "variety", "path KL")
    for name, row in rows.items():
        away = _plain(row["path_kl"]) if "path_kl" in row else "0"
        table.add_row(name, *(_plain(row[key]) for key in ("reward", "legible", "variety")), away)
    console.print(table)


def _plain(found: dict[str, float]) -> str:
    return f"{found['value']:.3g} ± {found['error']:.2g}"


if __name__ == "__main__":
    main()
