"""Optimising the noise beside turning the dial, on the digits: python benchmarks/noise_optimization.py.

The same prompts, the same initial noise, and the reward that the shipped anchors were aligned to. For every way of
raising it: the mean gain over plain sampling from the same noise with as many steps, its standard error over prompts,
the share of digits that can still be read, and what an image cost, in evaluations of a denoiser (exact), in their
floating-point operations and in seconds (of this machine). Aligning the anchor is not in realignment's cost; noise
optimisation needs no anchor.

There is no one-step model of the digits. The rows with one step sample the reference itself, in one step from t = 999:
its guess at the whole picture, smoother than a sample. They show what ReNO does and costs on that, not on a distilled
model. The table goes to benchmarks/noise_optimization.json.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import DDIMScheduler, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import deradiff
from deradiff.algorithm.estimates import Estimate, mean
from deradiff.alignment.base import Base
from deradiff.alignment.noise_optimization import Cost, counted, initial_noise, optimize_noise
from deradiff.alignment.sampling import SamplerSettings, conditions
from deradiff.files.records import versions
from deradiff.files.writing import write_json
from deradiff.worlds import digits
from deradiff.worlds.digits import captions, quality
from deradiff.worlds.digits.rewards import DigitsReward

STEPS, GUIDANCE, SEED = 25, 1.0, 0
PER_PASS = 25
ITERATIONS = (10, 50)
LEARNING_RATE = 5.0 / 8
"""ReNO's 5 is for noise of norm 128; the digits' has norm 16."""
NORM_WEIGHT = 1.0
"""ReNO's 0.01 belongs to its sum of rewards. Beside this one it lets the norm grow to 20, where no noise ever lies."""
ANCHOR_BETA = 250.0
LAMS = (0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Row:
    """One way of raising the reward: all numbers are per image."""

    method: str
    start: Estimate
    """The reward of plain sampling with the same steps, from the same noise."""
    reached: Estimate
    gain: Estimate
    legible: Estimate
    noise_norm: Estimate
    """Of standard normal noise: 16 ± 0.7, standard deviation."""
    cost: Cost
    gigaflops: float
    """Of the denoiser alone, from its evaluations forward and backward."""


def operations(base: Base) -> tuple[float, float]:
    """Gigaflops of one evaluation of the denoiser, and of propagating a gradient back to its input."""
    told = conditions(base, ["a seven"])
    noise, time_ = (
        initial_noise(base, SamplerSettings("ddim", STEPS, GUIDANCE), 1, SEED).requires_grad_(True),
        torch.tensor([500]),
    )
    base.denoiser.requires_grad_(False)
    with FlopCounterMode(display=False) as forward:
        predicted = base.call.predict(base.denoiser, noise, time_, told)
    with FlopCounterMode(display=False) as backward:
        predicted.sum().backward()
    return forward.get_total_flops() / 1e9, backward.get_total_flops() / 1e9


def optimized(base: Base, prompts: list[str], noise: Tensor, steps: int, iterations: int) -> Row:
    base.pipe.scheduler = scheduler(base, steps)
    found = optimize_noise(
        base,
        prompts,
        DigitsReward(),
        SamplerSettings("ddim", steps, GUIDANCE),
        iterations=iterations,
        learning_rate=LEARNING_RATE,
        norm_weight=NORM_WEIGHT,
        noise=noise,
        per_pass=PER_PASS,
        report=progress,
    )
    name = f"noise, {counting(steps)}, {iterations} iterations"
    return row(base, name, prompts, found.scores[0], found.images, found.noise, found.cost)


def sampled(base: Base, prompts: list[str], noise: Tensor, steps: int = STEPS, lam: float | None = None) -> Row:
    """The reference alone, or realigned by Algorithm 1 at λ."""
    pipe = digits.load_pipeline()
    pipe.scheduler = scheduler(base, steps)
    start = drawn(pipe, prompts, noise, steps)
    models = [pipe.unet]
    if lam is not None:
        models.append(UNet2DConditionModel.from_pretrained(digits.anchor_path(ANCHOR_BETA)))
        deradiff.realign(pipe, models[1], lam)
    began = time.perf_counter()
    with counted(*models) as evaluations:
        images = drawn(pipe, prompts, noise, steps)
    seconds = time.perf_counter() - began
    cost = Cost(evaluations.forward / len(prompts), evaluations.backward / len(prompts), seconds / len(prompts))
    name = f"reference, {counting(steps)}" if lam is None else f"realigned, λ = {lam:g}"
    return row(base, name, prompts, DigitsReward()(start, prompts), images, noise, cost)


@torch.no_grad()
def drawn(pipe: Any, prompts: list[str], noise: Tensor, steps: int) -> Tensor:
    images = [
        pipe(
            prompts[i : i + PER_PASS],
            latents=noise[i : i + PER_PASS],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            output_type="pt",
        ).images
        for i in range(0, len(prompts), PER_PASS)
    ]
    return torch.cat(images)


def scheduler(base: Base, steps: int) -> DDIMScheduler:
    """One step has to begin at the noise, which the digits' own spacing would leave out."""
    spacing = "trailing" if steps == 1 else "leading"
    return DDIMScheduler.from_config(base.pipe.scheduler.config, timestep_spacing=spacing)


def counting(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def row(base: Base, method: str, prompts: list[str], start: Tensor, images: Tensor, noise: Tensor, cost: Cost) -> Row:
    reached, (forward, backward) = DigitsReward()(images, prompts), operations(base)
    legible, norms = quality.score(images, prompts).legible, noise.flatten(1).norm(dim=1)
    gigaflops = cost.forward * forward + cost.backward * backward
    return Row(method, mean(start), mean(reached), mean(reached - start), legible, mean(norms), cost, gigaflops)


def progress(done: int, planned: int, line: str) -> None:
    if done == planned:
        print(line, flush=True)


def show(rows: list[Row]) -> None:
    table = Table("method", "start", "gain", "legible", "norm", "forward", "backward", "GFLOP", "seconds")
    for each in rows:
        cost = each.cost
        table.add_row(
            each.method,
            f"{each.start.value:.2f}",
            str(each.gain),
            str(each.legible),
            f"{each.noise_norm.value:.1f}",
            f"{cost.forward:g}",
            f"{cost.backward:g}",
            f"{each.gigaflops:.3g}",
            f"{cost.seconds:.2g}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="how many prompts, at least 2 (default: 100)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("noise_optimization.json"))
    options = parser.parse_args()
    if options.prompts < 2:
        parser.error("a standard error needs at least two prompts")
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    base = Base(digits.load_pipeline())
    prompts = captions.sample_prompts(options.prompts, SEED + 100)
    noise = initial_noise(base, SamplerSettings("ddim", STEPS, GUIDANCE), len(prompts), SEED)
    rows = [sampled(base, prompts, noise, steps) for steps in (STEPS, 1)]
    rows += [sampled(base, prompts, noise, lam=lam) for lam in LAMS]
    rows += [optimized(base, prompts, noise, steps, iterations) for steps in (1, STEPS) for iterations in ITERATIONS]
    show(rows)
    settings = {
        "prompts": options.prompts,
        "reward": DigitsReward.name,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "anchor_beta": ANCHOR_BETA,
        "learning_rate": LEARNING_RATE,
        "norm_weight": NORM_WEIGHT,
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_json(options.out, settings | {"rows": [asdict(each) for each in rows]})
    print(options.out)


if __name__ == "__main__":
    main()
