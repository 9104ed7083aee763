"""What aligning costs, as ratios measured side by side: `make bench-align`, or python benchmarks/alignment.py.

Diffusion-DPO of a LoRA needs the reference's predictions as well. They come from the same weights with the adapter off;
here that is compared with holding a second model for them. And reading latents from a cache with encoding pictures
again. Rounds, medians and quartiles as in realignment.py; the
result goes to benchmarks/alignment.json.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging
from diffusers import UNet2DConditionModel
from PIL import Image
from realignment import LORA_RANK, REPEATS, SD15_UNET, Figure, at_least, interleaved, report, weights_in_memory
from torch import nn

from deradiff.alignment.base import Base, Policy
from deradiff.alignment.dpo import train_dpo
from deradiff.alignment.image_transforms import pair_pixels
from deradiff.alignment.latent_cache import CachedBatch, write_cache
from deradiff.alignment.lora_targets import LORA_TARGETS, WIDER_TARGETS
from deradiff.alignment.pairs import PairFolder
from deradiff.alignment.training import BatchPart, TrainingPlan, TrainingRun
from deradiff.files.records import versions
from deradiff.files.writing import write_json
from deradiff.worlds import digits

BATCH, STEPS, RANK, CACHED = 32, 6, 16, 64
QUIET = TrainingPlan(steps=STEPS, learning_rate=1e-4, warmup=1, average=0.0, evaluate_every=STEPS)


class RandomPairs:
    """Latents of nothing in particular: the time does not depend on what is trained."""

    def __init__(self, base: Base, count: int) -> None:
        self.latents = torch.randn(count, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        self.training: int | None = count - 1
        self.held_out = 1
        self.prompts, self.empty = base.call.encode_prompts(["a seven"]), base.call.encode_prompts([""])

    def batch(self, part: BatchPart, size: int) -> CachedBatch:
        """Always the same ones."""
        return self.take(range(size))

    def held_out_batch(self, places: range) -> CachedBatch:
        """The same again."""
        return self.take(places)

    def state_dict(self) -> dict[str, object]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """No state."""

    def take(self, rows: Sequence[int]) -> CachedBatch:
        """The given rows."""
        told = {name: prompts.expand(len(rows), -1, -1) for name, prompts in self.prompts.items()}
        return CachedBatch(self.latents[rows], torch.zeros(len(rows), 2, 6), told, [""] * len(rows))

    def empty_prompt(self) -> dict[str, torch.Tensor]:
        return self.empty


class WithSecondModel(Policy):
    """The same LoRA, with another copy of the weights as its reference."""

    def __init__(self, base: Base, other: nn.Module) -> None:
        super().__init__(base, RANK, WIDER_TARGETS)
        self.other = other.requires_grad_(False)

    @contextmanager
    def reference(self, prepared: nn.Module) -> Iterator[nn.Module]:
        with torch.no_grad():
            yield self.other


def training(second: bool, folder: Path) -> Callable[[], object]:
    base = Base(digits.load_pipeline())
    pairs = RandomPairs(base, BATCH + 1)
    policy = WithSecondModel(base, digits.load_pipeline().unet) if second else Policy(base, RANK, WIDER_TARGETS)
    return lambda: train_dpo(
        base,
        policy,
        pairs,
        500.0,
        QUIET,
        batch=BATCH,
        dropout=0.1,
        run=TrainingRun(
            seed=0,
            checkpoint=folder / "none",
            report=lambda *_: None,
        ),
    )


def steps_per_second(rounds: int) -> Figure:
    """Training steps per second of the toggled adapter, beside those with a second model."""
    with tempfile.TemporaryDirectory() as folder:
        measured = interleaved(
            {"toggled": training(False, Path(folder)), "second": training(True, Path(folder))}, rounds
        )
    ratios = [seconds["second"] / seconds["toggled"] for seconds in measured]
    return at_least("LoRA Diffusion-DPO, adapter toggled against a second model: steps per second", ratios, 0.95)


def cache_speed(rounds: int) -> Figure:
    """A batch of pairs from pictures on disk, decoded and encoded, beside the same batch from a cache of latents."""
    pipe = digits.load_pipeline()
    base, told = Base(pipe), [f"a {i}" for i in range(CACHED)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pairs"
        folder.mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (2 * CACHED, 32, 32, 3), np.uint8)
        for i, pixels in enumerate(noise):
            Image.fromarray(pixels).save(folder / f"{i}.png")
        rows = [{"prompt": text, "winner": f"{2 * i}.png", "loser": f"{2 * i + 1}.png"} for i, text in enumerate(told)]
        (folder / "pairs.json").write_text(json.dumps(rows))
        pairs = PairFolder(folder)
        cache = write_cache(
            Path(name) / "cache", pairs, base.encode_images, base.call.encode_prompts, base="digits", resolution=32
        )

        def encoded() -> None:
            read = [pairs.open(step.row) for step in pairs.in_order(None)]
            base.encode_images(torch.cat([pair_pixels(pair, 32).pixels for pair in read]))
            base.call.encode_prompts([pair.prompt for pair in read])

        measured = interleaved({"encoded": encoded, "cached": lambda: cache.take(range(CACHED))}, rounds)
    ratios = [seconds["encoded"] / seconds["cached"] for seconds in measured]
    return at_least(f"{CACHED} pairs of the digits: encoding them against reading them from the cache", ratios, 1.0)


def memory() -> Figure:
    """Weights of Stable Diffusion 1.5's UNet with a LoRA, against the same and a second UNet."""

    def blank() -> UNet2DConditionModel:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**SD15_UNET)
        return unet.to_empty(device="cpu")  # nothing is evaluated here, so the weights need no values

    pipe = digits.load_pipeline()
    pipe.unet = blank()
    policy = Policy(Base(pipe), LORA_RANK, LORA_TARGETS)
    one = weights_in_memory(policy.model)
    ratio = one / (one + weights_in_memory(blank()))
    what = f"LoRA (rank {LORA_RANK}) on SD 1.5's UNet, adapter toggled against a second UNet: weights in memory"
    return Figure(what, ratio, (ratio, ratio), "≤ 0.6", ratio <= 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds, at least 2 (default: 15)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("alignment.json"))
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("quartiles need at least two rounds")
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    figures = [steps_per_second(options.rounds), memory(), cache_speed(options.rounds)]
    report(figures)
    conditions = {
        "rounds": options.rounds,
        "repeats": REPEATS,
        "batch": BATCH,
        "steps": STEPS,
        "rank": RANK,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_json(options.out, conditions | {"figures": [figure._asdict() for figure in figures]})
    print(options.out)


if __name__ == "__main__":
    main()
