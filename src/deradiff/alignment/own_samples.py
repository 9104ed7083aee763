"""A model's own samples with their rewards: what reward-weighted denoising trains on."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from deradiff.alignment.base import Base
from deradiff.alignment.data_order import passes, row_generators
from deradiff.alignment.rwr import ReferenceSamples
from deradiff.alignment.sampling import SamplerSettings, decode, sample, told
from deradiff.alignment.scoring import scored
from deradiff.alignment.training import Report
from deradiff.files.folders import begin_or_resume
from deradiff.files.locks import taken
from deradiff.files.tensors import joined
from deradiff.files.tensors import rows as rows_of
from deradiff.files.writing import atomic_file
from deradiff.rewards import Reward

WHAT, CURE = "file of drawn samples", "delete it, and they are drawn again"


@dataclass(frozen=True)
class OwnSamples:
    """Samples, several of every prompt, with their rewards; `fingerprint` tells them from others."""

    samples: ReferenceSamples
    rewards: Float[Tensor, " sample"]
    per_prompt: int
    fingerprint: dict[str, Any]

    def conditions(self) -> Tensor:
        """The number of each sample's prompt."""
        return torch.arange(len(self.rewards)) // self.per_prompt


@torch.no_grad()
def draw_samples(
    folder: Path,
    base: Base,
    name: str,
    prompts: Sequence[str],
    per_prompt: int,
    reward: Reward,
    sampling: SamplerSettings,
    *,
    seed: int,
    chunk: int = 32,
    report: Report = lambda *_: None,
) -> OwnSamples:
    """Fill `folder` with `per_prompt` samples of each of `prompts`, or finish what an interrupted call began there.

    `name` is the base's. A sample does not depend on which are drawn beside it. Raises `ValueError` for no prompts, a
    folder begun with other settings, a file in it that is damaged, and a reward that is not finite.
    """
    if not prompts or per_prompt < 2:
        raise ValueError(
            f"{len(prompts)} prompts, {per_prompt} samples of each: weights compare the samples of a prompt, so draw 2 "
            "or more"
        )
    settings = {
        "base": name,
        "prompts": list(prompts),
        "per_prompt": per_prompt,
        "reward": reward.name,
        **_described(sampling),
        "seed": seed,
        "precision": str(base.denoiser.dtype),
    }
    begin_or_resume(folder, settings, "set of drawn samples")
    count, parts = len(prompts) * per_prompt, {}
    texts = [prompt for prompt in prompts for _ in range(per_prompt)]
    shape = sampling.noise(base, row_generators(seed, range(1))).shape[1:]
    paths = {rows: folder / f"samples-{rows.start:07d}.safetensors" for rows in passes(count, chunk)}
    complete = all(path.exists() for path in paths.values())
    with nullcontext() if complete else taken(folder, "a set of drawn samples"):
        for rows, path in paths.items():
            if not path.exists():
                drawn = _drawn(base, texts[rows.start : rows.stop], reward, sampling, seed, rows)
                with atomic_file(path) as temporary:
                    save_file(drawn, temporary)
            parts[path] = rows_of(path, {"latents": shape, "rewards": ()}, len(rows), WHAT, CURE)
            report(rows.stop, count, f"samples scored by {reward.name}")
    fingerprint = json.loads(json.dumps({"kind": "own samples", "samples": count, **settings}))
    drawn = joined(parts, WHAT, CURE)
    return OwnSamples(ReferenceSamples(drawn["latents"], texts), drawn["rewards"], per_prompt, fingerprint)


def _described(sampling: SamplerSettings) -> dict[str, Any]:
    """`sampling` as plain data; full noise is not said, as it was not by version 0.1."""
    settings = asdict(sampling)
    if settings["eta"] == 1:
        del settings["eta"]
    return settings


def _drawn(
    base: Base, texts: list[str], reward: Reward, sampling: SamplerSettings, seed: int, rows: range
) -> dict[str, Tensor]:
    generators = row_generators(seed, rows, "own sample")
    prompted, unprompted = told(base, texts, sampling)
    noise = sampling.noise(base, generators)
    latents = sample(base, base.denoiser, prompted, unprompted, noise, sampling, keep=0, generators=generators).latents
    rewards = scored(reward, decode(base, latents), texts)
    return {"latents": latents.float().cpu().contiguous(), "rewards": rewards.float().cpu()}
