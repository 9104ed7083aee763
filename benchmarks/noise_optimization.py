"""Optimising the noise beside turning the dial, on the digits: python benchmarks/noise_optimization.py.

The same prompts and the same initial noise, the reward that the shipped anchors were aligned to, and for each way of
raising it: the mean gain over the reference's own sample with its standard error over prompts, how many digits can
still be read, and what an image cost, in evaluations of a denoiser (exact), in floating-point operations and in seconds
(of this machine). What the anchor cost is not in it, nor is it in the other: noise optimisation needs none.

No one-step model of the digits exists. The rows with one step sample the reference itself in one step from t = 999: its
guess at the picture's mean, blurred. They gain over that guess, and show what ReNO does to a model and what it costs,
not how good a distilled model would be. The table goes to benchmarks/noise_optimization.json.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import DDIMScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import deradiff
from deradiff.alignment.base import Base
from deradiff.alignment.noise_optimization import Cost, counted, initial_noise, optimize_noise
from deradiff.alignment.sampling import Sampling, conditions
from deradiff.records import versions, write_json
from deradiff.rewards.digits import DigitsReward
from deradiff.weights import Estimate, mean
from deradiff.worlds import digits
from deradiff.worlds.digits import captions, quality

STEPS, GUIDANCE, SEED = 25, 1.0, 0
ITERATIONS = (10, 50)
LEARNING_RATE = 5.0 / 8
"""ReNO's 5 is for noise of norm 128; the digits' has norm 16."""
NORM_WEIGHT = 0.01
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
    noise, time_ = initial_noise(base, 1, SEED).requires_grad_(True), torch.tensor([500])
    base.denoiser.requires_grad_(False)
    with FlopCounterMode(display=False) as forward:
        predicted = base.predict(base.denoiser, noise, time_, told)
    with FlopCounterMode(display=False) as backward:
        predicted.sum().backward()
    return forward.get_total_flops() / 1e9, backward.get_total_flops() / 1e9


def optimized(base: Base, prompts: list[str], noise: Tensor, steps: int, iterations: int) -> Row:
    spacing = "trailing" if steps == 1 else "leading"
    scheduler = DDIMScheduler.from_config(base.pipe.scheduler.config, timestep_spacing=spacing)
    found = optimize_noise(
        base, prompts, DigitsReward(), Sampling(scheduler, steps, GUIDANCE), iterations=iterations,
        learning_rate=LEARNING_RATE, norm_weight=NORM_WEIGHT, noise=noise, per_pass=25, report=progress,
    )  # fmt: skip
    name = f"noise optimisation, {steps} step{'s' * (steps > 1)}, {iterations} iterations"
    return row(base, name, prompts, found.scores[0], found.images, found.noise, found.cost)


def realigned(base: Base, prompts: list[str], noise: Tensor, lam: float | None) -> Row:
    """Algorithm 1 at λ, or the reference alone."""
    pipe = digits.load_pipeline()
    unets = [pipe.unet]
    if lam is not None:
        dial = deradiff.realign(pipe, digits.anchor_path(ANCHOR_BETA), lam)
        unets = [dial.reference, *dial.anchors]
    began = time.perf_counter()
    with counted(*unets) as evaluations:
        images = drawn(pipe, prompts, noise)
    seconds = time.perf_counter() - began
    cost = Cost(evaluations.forward / len(prompts), evaluations.backward / len(prompts), seconds / len(prompts))
    start = DigitsReward()(images if lam is None else drawn(digits.load_pipeline(), prompts, noise), prompts)
    name = "the reference" if lam is None else f"realignment, λ = {lam:g}"
    return row(base, name, prompts, start, images, noise, cost)


@torch.no_grad()
def drawn(pipe: Any, prompts: list[str], noise: Tensor) -> Tensor:
    return torch.cat(
        [
            pipe(
                prompts[i : i + 25], latents=noise[i : i + 25], num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                output_type="pt",
            ).images
            for i in range(0, len(prompts), 25)
        ]
    )  # fmt: skip


def row(
    base: Base, method: str, prompts: list[str], start: Tensor, images: Tensor, noise: Tensor, cost: Cost
) -> Row:  # fmt: skip
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
            each.method, f"{each.start.value:.2f}", str(each.gain), str(each.legible), f"{each.noise_norm.value:.1f}",
            f"{cost.forward:g}", f"{cost.backward:g}", f"{each.gigaflops:.3g}", f"{cost.seconds:.2g}",
        )  # fmt: skip
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
    noise = initial_noise(base, len(prompts), SEED)
    rows = [realigned(base, prompts, noise, lam) for lam in (None, *LAMS)]
    rows += [optimized(base, prompts, noise, steps, iterations) for steps in (1, STEPS) for iterations in ITERATIONS]
    show(rows)
    settings = {
        "prompts": options.prompts, "reward": DigitsReward.name, "steps": STEPS, "guidance_scale": GUIDANCE,
        "anchor_beta": ANCHOR_BETA, "learning_rate": LEARNING_RATE, "norm_weight": NORM_WEIGHT, "seed": SEED,
        "threads": torch.get_num_threads(), "versions": versions(),
    }  # fmt: skip
    write_json(options.out, settings | {"rows": [asdict(each) for each in rows]})
    print(options.out)


if __name__ == "__main__":
    main()
