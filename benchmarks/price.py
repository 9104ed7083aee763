"""The price of realignment, and what it buys: python benchmarks/price.py PART ...

`errors`: on the digits, how far each mode's final latents are from the exact ones, relative to λ's own effect, and how
many evaluations a step it takes; prompts and seeds that nothing was tuned on.

`guided`: where guidance evaluates with and without the prompt, whether both need the anchor at the same steps.

`times`: on the digits, seconds of each mode beside plain sampling at the same batch, measured in turn in one process.

`flow-errors`, `flow-times`: the same for the flow digits, a transformer, at 28 steps of Euler's method.

`sweep`: 11 λ of 16 prompts, an image at a time by two forward passes a step in the plainest way, against this library.

`sd15`: times beside plain sampling for a UNet of Stable Diffusion 1.5's shape with random weights, on this CPU; and the
weights in memory.

`bookkeeping`: what the dial itself takes at every step, in processor time.

`accelerator`: the same for SD 1.5's, SDXL's and SD3's shapes in bfloat16 on a GPU, with and without torch.compile.

Each part writes its numbers into benchmarks/price.json; `show` prints tables of what is there. `times`, `flow-times`,
`sweep` and `sd15` need an idle machine.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import UNet2DConditionModel
from price_shapes import accelerator, bookkeeping, shaped
from price_tables import show
from realignment import interleaved
from recording import keep_parts
from rich.console import Console

import deradiff
from deradiff import rewards
from deradiff.algorithm.estimates import mean
from deradiff.sampling.dial import Dial
from deradiff.sampling.full_steps import errors as errors_of
from deradiff.sampling.reuse import Reuse
from deradiff.sweep.pipelines import scheduler_like
from deradiff.worlds import digits, digits_flow
from deradiff.worlds.digits.captions import sample_prompts

LAMS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Priced:
    """A shipped world as its price is measured. Samplers are a scheduler, steps and the guidance scale."""

    load: Callable[[], Any]
    anchors: Mapping[str, Path]
    samplers: Sequence[tuple[str, int, float]]
    prompts: int = 32

    def pipeline(self, scheduler: str) -> Any:
        """Its reference."""
        pipe = self.load()
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = scheduler_like(pipe.scheduler, scheduler)
        return pipe


DIGITS = Priced(
    digits.load_pipeline,
    {"full weights": digits.anchor_path(250), "LoRA": digits.lora_path()},
    [("ddim", 50, 1.0), ("ddim", 25, 1.0), ("euler-a", 50, 1.0), ("euler-a", 25, 1.0), ("ddim", 50, 1.5)],
)
FLOW = Priced(
    digits_flow.load_pipeline,
    {"full weights": digits_flow.anchor_path(100), "LoRA": digits_flow.lora_path()},
    [("flow-euler", 28, 1.0), ("flow-euler", 28, digits_flow.GUIDANCE)],
    prompts=16,
)
ANCHORS = DIGITS.anchors
MODES: Mapping[str, Reuse | None] = {
    "exact": None,
    "tolerance 0.05": Reuse(tolerance=0.05),
    "tolerance 0.15": Reuse(tolerance=0.15),
    "tolerance 0.05, weights carry": Reuse(tolerance=0.05, carrier="interpolate"),
    "tolerance 0.15, weights carry": Reuse(tolerance=0.15, carrier="interpolate"),
    "every 4th": Reuse(every=4, carrier="reference"),
    "every 4th, held": Reuse(every=4, carrier="reference", slope=0.0),
}
SEEDS, BATCH = 2, 16
PROMPT = "a red seven on white paper"
SWEEP = [i / 10 for i in range(11)]


def digits_pipeline(scheduler: str) -> Any:
    return DIGITS.pipeline(scheduler)


# -- errors -----------------------------------------------------------------------------------------------------------


def errors(world: Priced) -> list[dict[str, Any]]:
    """One row for each anchor, sampler, λ and mode."""
    prompts = [prompt for prompt in sample_prompts(world.prompts, 4242) for _ in range(SEEDS)]
    found = []
    for scheduler, steps, guidance in world.samplers:
        for name, anchor in world.anchors.items():
            pipe = world.pipeline(scheduler)
            with deradiff.realign(pipe, anchor, 0.0) as dial:
                found += list(_errors(pipe, dial, prompts, steps, guidance, {"anchor": name, "scheduler": scheduler}))
    return found


def _errors(
    pipe: Any, dial: Dial, prompts: Sequence[str], steps: int, guidance: float, about: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    score = rewards.load("digits", device="cpu")

    def drawn(lam: float, reuse: Reuse | None) -> tuple[torch.Tensor, torch.Tensor]:
        dial.lam, dial.reuse = lam, reuse
        generators = [torch.Generator().manual_seed(9000 + i) for i in range(len(prompts))]
        latents = pipe(
            prompt=list(prompts),
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images
        with torch.no_grad():
            pixels = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
            return latents, score(pixels, list(prompts)).double()

    reference, its_scores = drawn(0.0, None)
    for lam in LAMS if guidance == 1 else (0.5,):
        exact, scores = drawn(lam, None)
        gain = mean(scores - its_scores)
        for mode, reuse in MODES.items():
            latents, own = drawn(lam, reuse)
            off = errors_of(latents, exact, reference)
            shift = mean(own - scores)
            told = dial.reused
            row = about | {"steps": steps, "guidance_scale": guidance, "lam": lam, "mode": mode} | off._asdict()
            row["evaluations"] = told.evaluations / told.predictions if told else 2.0
            row["estimated"] = told.error if told else 0.0
            row["reward"] = {"error": shift.value / gain.value, "standard_error": shift.error / abs(gain.value)}
            print(row, flush=True)
            yield row


# -- guidance ---------------------------------------------------------------------------------------------------------

BRANCHES: Mapping[str, tuple[int | None, int | None]] = {
    # every how many steps the difference is computed with the prompt, and without; None: the other's, or 0 for none
    "both at every step": (1, 1),
    "no correction without the prompt": (1, 0),
    "the prompt's difference for both": (1, None),
    "with at every step, without at every 4th": (1, 4),
    "both at every 4th": (4, 4),
    "with at every 3rd, without at every 6th": (3, 6),
    "with at every 3rd, without at every 12th": (3, 12),
    "both at every 6th": (6, 6),
    "with at every 4th, without at every 12th": (4, 12),
}


def guided() -> list[dict[str, Any]]:
    """Is the correction of the unconditional branch worth computing at all steps? 50 steps of the digits, λ = ½.

    The reference carries; differences go on along the line through their last two.
    """
    prompts = [prompt for prompt in sample_prompts(DIGITS.prompts, 4242) for _ in range(SEEDS)]
    pipe, anchor = digits_pipeline("ddim"), UNet2DConditionModel.from_pretrained(ANCHORS["full weights"])
    with torch.no_grad():
        embeds, empty = pipe.encode_prompt(prompts, pipe.device, 1, True, [""] * len(prompts))[:2]
    found = []
    for scale in (1.5, 3.0, 7.5):
        exact = _branches(pipe, anchor, embeds, empty, scale, 1, 1)
        reference = _branches(pipe, anchor, embeds, empty, scale, 0, 0)
        for name, (with_prompt, without) in BRANCHES.items():
            off = errors_of(_branches(pipe, anchor, embeds, empty, scale, with_prompt, without), exact, reference)
            cost = 1 + sum(1 / every for every in (with_prompt, without) if every) / 2
            found.append({"guidance_scale": scale, "computed": name, "evaluations": cost} | off._asdict())
            print(found[-1], flush=True)
    return found


@torch.no_grad()
def _branches(
    pipe: Any, anchor: Any, embeds: torch.Tensor, empty: torch.Tensor, scale: float, with_prompt: Any, without: Any
) -> torch.Tensor:
    """Latents at λ = ½, each branch's difference computed at its own steps."""
    generator = torch.Generator().manual_seed(77)
    pipe.scheduler.set_timesteps(50)
    unet = pipe.unet
    x = torch.randn(len(embeds), unet.config.in_channels, *[unet.config.sample_size] * 2, generator=generator)
    kept: dict[str, list[tuple[int, torch.Tensor]]] = {"with": [], "without": []}

    def difference(branch: str, i: int, every: int, text: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        if not every:
            return torch.zeros_like(own)
        if i % every == 0:
            kept[branch] = [(i, anchor(x, t, text).sample - own), *kept[branch][:1]]
        at, last = kept[branch][0]
        if len(kept[branch]) == 1:
            return last
        before, previous = kept[branch][1]
        return last + (i - at) / (at - before) * (last - previous)

    for i, t in enumerate(pipe.scheduler.timesteps):
        conditional, unconditional = unet(x, t, embeds).sample, unet(x, t, empty).sample
        change = difference("with", i, with_prompt, embeds, conditional)
        other = change if without is None else difference("without", i, without, empty, unconditional)
        conditional, unconditional = conditional + change / 2, unconditional + other / 2
        x = pipe.scheduler.step(unconditional + scale * (conditional - unconditional), t, x).prev_sample
    return x


# -- times ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def two_forwards(pipe: Any, anchor: Any, lam: float, prompt: str, images: int, steps: int, seed: int = 0) -> Any:
    """Realignment as a script without a library writes it: both models at every step, one after the other."""
    generator = torch.Generator(pipe.device).manual_seed(seed)
    embeds = pipe.encode_prompt(prompt, pipe.device, images, False)[0]
    pipe.scheduler.set_timesteps(steps)
    unet = pipe.unet
    shape = images, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size
    x = torch.randn(shape, generator=generator, device=pipe.device, dtype=unet.dtype) * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps:
        scaled = pipe.scheduler.scale_model_input(x, t)
        reference = unet(scaled, t, encoder_hidden_states=embeds).sample
        aligned = anchor(scaled, t, encoder_hidden_states=embeds).sample
        x = pipe.scheduler.step((1 - lam) * reference + lam * aligned, t, x, generator=generator).prev_sample
    return x


def plain(pipe: Any, images: int, steps: int, prompt: str = PROMPT) -> Callable[[], Any]:
    return lambda: (
        pipe(
            prompt,
            num_images_per_prompt=images,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    )


def times(world: Priced, rounds: int) -> list[dict[str, Any]]:
    """Ratios to plain sampling, a batch of 16, by the first scheduler, with as many steps as it is priced at."""
    found = []
    scheduler = world.samplers[0][0]
    for steps in dict.fromkeys(steps for name, steps, _ in world.samplers if name == scheduler):
        for name, anchor in world.anchors.items():
            runs: dict[str, Callable[[], object]] = {"plain": plain(world.pipeline(scheduler), BATCH, steps)}
            for mode, reuse in MODES.items():
                if reuse is None or reuse.tolerance is not None:
                    pipe = world.pipeline(scheduler)
                    deradiff.realign(pipe, anchor, 0.5, reuse=reuse)
                    runs[mode] = plain(pipe, BATCH, steps)
            if world is DIGITS:
                runs |= other_ways(name, anchor, steps)
            measured = interleaved(runs, rounds)
            found += [{"anchor": name, "steps": steps, "mode": mode} | _ratios(measured, mode) for mode in runs]
            print(*found[-len(runs) :], sep="\n", flush=True)
    return found


def other_ways(name: str, anchor: Path, steps: int) -> dict[str, Callable[[], object]]:
    """The digits' mixture as a script takes it, or with a LoRA apart from its reference."""
    if name == "full weights":
        script, other = digits_pipeline("ddim"), UNet2DConditionModel.from_pretrained(anchor)
        return {"two forwards, plainly": partial(two_forwards, script, other, 0.5, PROMPT, BATCH, steps)}
    runs: dict[str, Callable[[], object]] = {}
    for mode, source in (("exact, two passes", anchor), ("exact, merged into a copy", merged(anchor))):
        pipe = digits_pipeline("ddim")
        deradiff.realign(pipe, source, 0.5, batched=False)
        runs[mode] = plain(pipe, BATCH, steps)
    return runs


def merged(adapter: Path) -> Any:
    """The digits' UNet with a LoRA fused into its weights: another model of full weights."""
    unet = digits_pipeline("ddim").unet
    unet.load_lora_adapter(adapter, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    unet.fuse_lora()
    unet.unload_lora()
    return unet


def _ratios(measured: Sequence[dict[str, float]], mode: str) -> dict[str, float]:
    low, middle, high = statistics.quantiles([seconds[mode] / seconds["plain"] for seconds in measured], n=4)
    return {"ratio": middle, "low": low, "high": high, "seconds": statistics.median(one[mode] for one in measured)}


# -- a sweep ----------------------------------------------------------------------------------------------------------


def sweep(rounds: int) -> dict[str, Any]:
    """Seconds per image of 11 λ x 16 prompts, 25 steps; the plain script draws them one by one."""
    prompts = sample_prompts(16, 99)
    other = UNet2DConditionModel.from_pretrained(ANCHORS["full weights"])
    script, ours = digits_pipeline("ddim"), digits_pipeline("ddim")
    dial = deradiff.realign(ours, ANCHORS["full weights"])

    def one_by_one() -> torch.Tensor:
        return torch.cat(
            [two_forwards(script, other, lam, p, 1, 25, i) for i, p in enumerate(prompts) for lam in SWEEP]
        )

    def batched(reuse: Reuse | None) -> torch.Tensor:
        parts = []
        dial.reuse = reuse
        for start in range(0, len(prompts), 4):
            some = prompts[start : start + 4]
            dial.lam = SWEEP * len(some)
            generators = [torch.Generator().manual_seed(start + i) for i in range(len(some)) for _ in SWEEP]
            parts.append(
                ours(
                    prompt=[prompt for prompt in some for _ in SWEEP],
                    generator=generators,
                    guidance_scale=1.0,
                    num_inference_steps=25,
                    output_type="latent",
                ).images
            )
        return torch.cat(parts)

    runs = {
        "plain": one_by_one,
        "exact": lambda: batched(None),
        "tolerance 0.05": lambda: batched(Reuse(tolerance=0.05)),
    }
    measured = interleaved(runs, rounds)
    found: dict[str, Any] = {
        mode: statistics.median(seconds["plain"] / seconds[mode] for seconds in measured) for mode in list(runs)[1:]
    }
    expected, exact = one_by_one(), batched(None)
    found["largest difference of the exact images' latents"] = float((exact - expected).abs().max())
    found["seconds per image"] = {
        mode: statistics.median(seconds[mode] for seconds in measured) / len(expected) for mode in runs
    }
    reference = expected.view(len(prompts), len(SWEEP), -1)[:, :1].expand(-1, len(SWEEP), -1).flatten(0, 1)
    inner = torch.tensor([0 < lam < 1 for _ in prompts for lam in SWEEP])
    near = batched(Reuse(tolerance=0.05)).flatten(1)
    found["errors at tolerance 0.05"] = errors_of(near[inner], exact.flatten(1)[inner], reference[inner])._asdict()
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "parts",
        nargs="+",
        choices=(
            *("errors", "guided", "times", "flow-errors", "flow-times"),
            *("sweep", "sd15", "bookkeeping", "accelerator", "show"),
        ),
    )
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen, console = options.parse_args(), Console(width=160)
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    measures: Mapping[str, Callable[[], Any]] = {
        "errors": lambda: errors(DIGITS),
        "guided": guided,
        "times": lambda: times(DIGITS, chosen.rounds),
        "flow-errors": lambda: errors(FLOW),
        "flow-times": lambda: times(FLOW, chosen.rounds),
        "sweep": lambda: sweep(max(2, chosen.rounds // 2)),
        "sd15": lambda: shaped("SD 1.5", 8, 25, 1, max(2, chosen.rounds // 2 + 1), "cpu", compiled=None),
        "bookkeeping": lambda: bookkeeping(2 * chosen.rounds),
        "accelerator": lambda: accelerator(chosen.rounds),
    }
    asked = ((part, measures[part]()) for part in chosen.parts if part in measures)
    found = keep_parts(asked, chosen.json)
    show(console, found)


if __name__ == "__main__":
    main()
