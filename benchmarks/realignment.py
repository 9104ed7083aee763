"""What realignment costs, as ratios of times measured side by side: `make bench`, or python benchmarks/realignment.py.

Every round times each variant three times, in an order that changes all the time, and keeps its fastest (other work on
the machine only ever adds time); a ratio is taken within its round. Printed are medians over the rounds and their
quartiles, next to the goals; the same goes to benchmarks/results.json. Seconds mean little on another machine, ratios
should hold.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import nn

import deradiff
from deradiff.files.records import versions
from deradiff.files.writing import write_json
from deradiff.sampling.dial import dial_of
from deradiff.worlds import digits

BATCH, STEPS = 16, 25
REPEATS = 3
SWEEP = [i / 10 for i in range(11)]
PROMPT = "a red seven on white paper"
ANCHOR_BETA = digits.BETAS[2]

# The UNet of Stable Diffusion 1.5, for the weights in memory: beside one as small as the digits' a LoRA is not small.
SD15_UNET: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
LORA_RANK = 32


class Figure(NamedTuple):
    """One line of the report: a ratio or a time in seconds, its quartiles, and the bound it should keep."""

    what: str
    median: float
    quartiles: tuple[float, float]
    goal: str
    met: bool


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    """Seconds of every variant in every round, after one round that is not counted."""
    chance, measured = random.Random(0), []
    for round_ in range(rounds + 1):
        seconds = dict.fromkeys(variants, float("inf"))
        for name in chance.sample(list(variants) * REPEATS, k=REPEATS * len(variants)):
            start = time.perf_counter()
            variants[name]()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
        if round_:
            measured.append(seconds)
    return measured


def at_most(what: str, values: list[float], bound: float) -> Figure:
    low, median, high = statistics.quantiles(values, n=4)
    return Figure(what, median, (low, high), f"≤ {bound:g}", median <= bound)


def at_least(what: str, values: list[float], bound: float) -> Figure:
    low, median, high = statistics.quantiles(values, n=4)
    return Figure(what, median, (low, high), f"≥ {bound:g}", median >= bound)


def run(pipe: StableDiffusionPipeline, images: int = BATCH) -> Callable[[], object]:
    return lambda: pipe(
        PROMPT,
        num_images_per_prompt=images,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )


def quiet_pipeline() -> StableDiffusionPipeline:
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def realigned(anchor: Path, lam: Any, **options: Any) -> StableDiffusionPipeline:
    pipe = quiet_pipeline()
    deradiff.realign(pipe, anchor, lam, **options)
    return pipe


def sampling_costs(rounds: int) -> list[Figure]:
    """A full-weight anchor beside plain sampling, at the same batch."""
    anchor = digits.anchor_path(ANCHOR_BETA)
    measured = interleaved(
        {
            "plain": run(quiet_pipeline()),
            "half": run(realigned(anchor, 0.5)),
            "zero": run(realigned(anchor, 0.0)),
            "one": run(realigned(anchor, 1.0)),
        },
        rounds,
    )
    ratios = {name: [seconds[name] / seconds["plain"] for seconds in measured] for name in ("half", "zero", "one")}
    return [
        at_most("full-weight anchor, λ = ½, against plain sampling: time", ratios["half"], 2.05),
        at_most("λ exactly 0, against plain sampling: time", ratios["zero"], 1.02),
        at_most("λ exactly 1, against plain sampling: time", ratios["one"], 1.02),
    ]


class Silent:
    """Path weights that write nothing down."""

    noisy = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def bookkeeping(rounds: int) -> list[Figure]:
    """What weights and particles add to a realigned run of a sampler with noise, which writes down the most."""
    anchor = digits.anchor_path(ANCHOR_BETA)

    def stochastic() -> StableDiffusionPipeline:
        pipe = realigned(anchor, 0.5)
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        return pipe

    plain, weighted, particles = stochastic(), stochastic(), stochastic()
    dial = dial_of(plain)
    assert dial is not None
    begin = dial._runs.begin

    def begin_silently(*args: Any, **kwargs: Any) -> Any:
        run = begin(*args, **kwargs)
        run.path_weights = Silent()  # type: ignore[assignment]
        return run

    dial._runs.begin = begin_silently  # type: ignore[method-assign]
    call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    measured = interleaved(
        {
            "plain": run(plain),
            "weighted": run(weighted),
            "particles": lambda: deradiff.sample_particles(
                particles, PROMPT, BATCH, generator=torch.Generator().manual_seed(0), **call
            ),
        },
        rounds,
    )
    weights = [seconds["weighted"] / seconds["plain"] for seconds in measured]
    swarm = [seconds["particles"] / seconds["plain"] for seconds in measured]
    return [
        at_most(f"weights of {BATCH} images (DDPM), against the same run without: time", weights, 1.01),
        at_most(f"{BATCH} particles (DDPM), against {BATCH} realigned images without weights: time", swarm, 1.03),
    ]


def lora_time(rounds: int) -> Figure:
    """Both predictions in one mixed batch, beside one pass per model."""
    lora = digits.lora_path()
    measured = interleaved(
        {
            "batched": run(realigned(lora, 0.5, batched=True)),
            "two passes": run(realigned(lora, 0.5, batched=False)),
        },
        rounds,
    )
    ratios = [seconds["batched"] / seconds["two passes"] for seconds in measured]
    return at_most("LoRA anchor, one batched pass against two passes: time", ratios, 1.0)


def sweep_speed(rounds: int) -> Figure:
    """One prompt at eleven λ: one call with λ per image, beside a call per λ."""
    pipe = quiet_pipeline()
    dial = deradiff.realign(pipe, digits.anchor_path(ANCHOR_BETA))
    sample, sample_all = run(pipe, 1), run(pipe, len(SWEEP))

    def one_call() -> None:
        dial.lam = SWEEP
        sample_all()

    def eleven_calls() -> None:
        for lam in SWEEP:
            dial.lam = lam
            sample()

    measured = interleaved({"one call": one_call, "eleven calls": eleven_calls}, rounds)
    ratios = [seconds["eleven calls"] / seconds["one call"] for seconds in measured]
    return at_least("11 λ of one prompt, 11 calls against one batched call: time", ratios, 1.5)


def weights_in_memory(module: nn.Module, *others: nn.Module) -> int:
    """Bytes of all parameters and buffers, memory that several of them share counted once."""
    storages = {}
    for tensor in (t for m in (module, *others) for t in (*m.parameters(), *m.buffers())):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def lora_memory() -> Figure:
    """The weights of Stable Diffusion 1.5's UNet with and without a LoRA anchor on every attention projection.

    The rest of a pipeline is the same on both sides and would only bring the ratio nearer to one.
    """

    def blank_unet() -> UNet2DConditionModel:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**SD15_UNET)
        return unet.to_empty(device="cpu")  # nothing is evaluated here, so the weights need no values

    pipe = quiet_pipeline()
    pipe.unet = blank_unet()
    plain = weights_in_memory(pipe.unet)
    with tempfile.TemporaryDirectory() as folder:
        other = blank_unet()
        other.add_adapter(
            LoraConfig(r=LORA_RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        )
        other.save_lora_adapter(folder)
        del other
        with deradiff.realign(pipe, folder):
            ratio = weights_in_memory(pipe.unet) / plain
    what = f"LoRA anchor (rank {LORA_RANK}) on SD 1.5's UNet, against the UNet alone: weights in memory"
    return Figure(what, ratio, (ratio, ratio), "≤ 1.05", ratio <= 1.05)


def start_up(rounds: int) -> list[Figure]:
    """Seconds of `import deradiff`, within Python, and of `deradiff --help`, the whole process."""
    timed = "import time; start = time.perf_counter(); import deradiff; print(time.perf_counter() - start)"
    script = str(Path(sys.executable).with_name("deradiff"))
    imports, helps = [], []
    for _ in range(rounds):
        imports.append(float(subprocess.run([sys.executable, "-c", timed], capture_output=True, check=True).stdout))
        start = time.perf_counter()
        subprocess.run([script, "--help"], capture_output=True, check=True)
        helps.append(time.perf_counter() - start)
    return [at_most("import deradiff: seconds", imports, 0.3), at_most("deradiff --help: seconds", helps, 1.0)]


def report(figures: list[Figure]) -> None:
    table = Table(caption="Median of the rounds and quartiles.")
    for heading in ("", "median", "quartiles", "goal", ""):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for figure in figures:
        quartiles = "{:.3g} to {:.3g}".format(*figure.quartiles)
        met = "[green]met[/]" if figure.met else "[red]missed[/]"
        table.add_row(figure.what, f"{figure.median:.3g}", quartiles, figure.goal, met)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds per comparison, at least 2 (default: 15)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("quartiles need at least two rounds")
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    figures = [
        *sampling_costs(options.rounds),
        *bookkeeping(options.rounds),
        lora_memory(),
        lora_time(options.rounds),
        sweep_speed(options.rounds),
        *start_up(options.rounds),
    ]
    report(figures)
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "architecture": platform.machine()}
    conditions = {
        "rounds": options.rounds,
        "repeats": REPEATS,
        "batch": BATCH,
        "steps": STEPS,
        "machine": machine,
        "versions": versions(),
    }
    write_json(options.out, conditions | {"figures": [figure._asdict() for figure in figures]})
    print(json.dumps(conditions))
    print(options.out)


if __name__ == "__main__":
    main()
