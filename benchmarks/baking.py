"""What baking costs and how near it comes, on a world that ships: python benchmarks/baking.py [--world digits-flow].

λ = ½ of the anchor aligned hardest, whose weights are farthest from the reference's. For interpolated weights and for a
student: the distance of baked images from realigned ones in units of λ's own effect, over the final latents of held-out
prompts, with its standard error; what baking took, in seconds and in seconds of a processor (one thread; other work on
the machine stretches the former); and what sampling costs, in evaluations of a denoiser and as a ratio of times to the
plain pipeline's, measured side by side. The table goes to benchmarks/baking.json, that of the flow digits to
baking-digits-flow.json. The flow digits take far longer to draw and train: theirs is smaller.
"""

import argparse
import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table

import deradiff
from deradiff.anchors import denoiser_of
from deradiff.baking import Distillation, Sampler, split_prompts
from deradiff.baking.distillation import SHIPPED
from deradiff.cli import terminal
from deradiff.files.records import versions
from deradiff.files.writing import write_json
from deradiff.sweep.jobs import reproducible
from deradiff.worlds import digits, digits_flow
from deradiff.worlds.digits import captions

LAM, SEED = 0.5, 0


@dataclass(frozen=True)
class Study:
    """What is baked on a world that ships, and how it is trained, sampled and compared."""

    world: Any
    prompts: int
    images: int
    distillation: Distillation
    absent: tuple[str, ...] = ()
    """Parts that the world's pipeline does not have."""

    @property
    def beta(self) -> float:
        """Of the anchor aligned hardest."""
        return float(min(self.world.BETAS))

    @property
    def sampler(self) -> Sampler:
        return Sampler(steps=25, guidance_scale=self.world.GUIDANCE, batch_size=50)


STUDIES = {
    "digits": Study(digits, 600, 100, SHIPPED),
    "digits-flow": Study(
        digits_flow,
        200,
        32,
        replace(SHIPPED, samples=256, held_out=32, steps=500, batch=16),
        ("text_encoder_3", "tokenizer_3"),
    ),
}
LIMIT = 15 * 60 * 2
"""Seconds of a processor in 15 minutes on two cores."""


def baked(study: Study, method: Any, folder: Path, report: Any) -> dict[str, Any]:
    """One way of baking: what it took, how near it comes, what its result costs."""
    pipe, prompts = study.world.load_pipeline(), captions.sample_prompts(study.prompts, seed=1)
    if method == "interpolate":
        prompts = split_prompts(prompts, study.images, "distill")[1]  # the same are compared either way
    wall, processor = time.perf_counter(), time.process_time()
    begun: list[tuple[float, float]] = []

    def watch(stage: str, done: int, planned: int, line: str) -> None:
        if stage == "comparing" and not begun:
            begun.append((time.perf_counter() - wall, time.process_time() - processor))
        report(f"{method}: {stage}", done, planned, line)

    found = deradiff.bake(
        pipe,
        study.world.anchor_path(study.beta),
        LAM,
        folder,
        method=method,
        prompts=prompts,
        images=study.images,
        sampler=study.sampler,
        distillation=study.distillation if method == "distill" else Distillation(),
        seed=SEED,
        force=True,
        name=study.world.WORLD.name,
        report=watch,
    )
    (judged,) = found.judgements
    return {
        "method": method,
        "error": asdict(judged.error),
        "effect": asdict(judged.effect),
        "seconds": begun[0][0],
        "processor_seconds": begun[0][1],
        "sampling": sampling_cost(study, folder),
    }


def evaluations(study: Study, pipe: Any) -> int:
    """Rows that the denoiser sees for one image."""
    rows: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    hook = denoiser_of(pipe)[1].register_forward_pre_hook(count, with_kwargs=True)
    study.sampler.latents(pipe, ["a seven"], [0])
    hook.remove()
    return sum(rows)


def sampling_cost(study: Study, folder: Path, rounds: int = 9) -> dict[str, Any]:
    """Of the baked pipeline, beside the plain one: evaluations, and the median and quartiles of ratios of times.

    Times of a processor. The two take turns, and a ratio is of one round's.
    """
    made = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(study.absent))
    pipes: dict[str, Any] = {"plain": study.world.load_pipeline(), "baked": made}
    prompts, seeds, ratios = ["a red seven on white paper"] * 16, range(16), []
    for number in range(rounds + 1):
        seconds = {}
        for name in random.Random(number).sample(list(pipes), 2):
            start = time.process_time()
            study.sampler.latents(pipes[name], prompts, seeds)
            seconds[name] = time.process_time() - start
        if number:
            ratios.append(seconds["baked"] / seconds["plain"])
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "evaluations": {name: evaluations(study, pipe) for name, pipe in pipes.items()},
        "ratio": {"median": median, "quartiles": [low, high], "rounds": rounds},
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="keep the baked models in this folder, and go on where it was")
    options.add_argument("--world", choices=STUDIES, default="digits")
    options.add_argument("--json", type=Path, help="in place of the file beside this one")
    chosen, console = options.parse_args(), Console()
    study, other = STUDIES[chosen.world], "" if chosen.world == "digits" else f"-{chosen.world}"
    terminal.pass_on_warnings()
    with TemporaryDirectory() as temporary, reproducible(1), terminal.stages(console) as report:
        out = chosen.out or Path(temporary)
        rows = [baked(study, method, out / method, report) for method in ("interpolate", "distill")]
    weights, student = rows
    goals = {
        "a student's error is at most a third of the weights'": (
            student["error"]["value"] / weights["error"]["value"],
            1 / 3,
        ),
        "a student takes at most 15 minutes on two cores, in seconds of a processor": (
            student["processor_seconds"],
            LIMIT,
        ),
        "baked weights are sampled in as many evaluations as the plain model": (
            weights["sampling"]["evaluations"]["baked"] / weights["sampling"]["evaluations"]["plain"],
            1.0,
        ),
    }
    show(console, study, rows, goals)
    record = {
        "anchor_beta": study.beta,
        "lam": LAM,
        "images": study.images,
        "prompts": study.prompts,
        "sampler": asdict(study.sampler),
        "distillation": asdict(study.distillation),
        "seed": SEED,
        "threads": 1,
        "rows": rows,
        "goals": {
            name: {"value": value, "limit": limit, "met": value <= limit} for name, (value, limit) in goals.items()
        },
        "versions": versions(),
    }
    write_json(chosen.json or Path(__file__).with_name(f"baking{other}.json"), record)


def show(console: Console, study: Study, rows: list[dict[str, Any]], goals: dict[str, tuple[float, float]]) -> None:
    table = Table(title=f"{study.world.WORLD.title}, λ = {LAM:g} of the anchor at β = {study.beta:g}")
    for heading in ("method", "error", "seconds", "of a processor", "evaluations", "time of sampling"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        cost = row["sampling"]
        table.add_row(
            row["method"],
            f"{row['error']['value']:.1%} ± {row['error']['error']:.1%}",
            f"{row['seconds']:.1f}",
            f"{row['processor_seconds']:.1f}",
            f"{cost['evaluations']['baked'] / cost['evaluations']['plain']:.2f}x",
            f"{cost['ratio']['median']:.2f}x",
        )
    console.print(table)
    for name, (value, limit) in goals.items():
        console.print(f"{'met   ' if value <= limit else 'missed'}  {name}: {value:.3g}, at most {limit:.3g}")


if __name__ == "__main__":
    main()
