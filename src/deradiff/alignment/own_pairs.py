"""Preference pairs without people: two pictures by the model itself for every prompt, compared by a reward.

What is written is an ordinary folder of pairs (see `alignment.pairs`): pictures to look at, and a list.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from deradiff import pictures
from deradiff.alignment.base import Base
from deradiff.alignment.loop import Report
from deradiff.alignment.objectives import bradley_terry
from deradiff.alignment.sampling import decode
from deradiff.alignment.scoring import scored
from deradiff.files.folders import claim
from deradiff.files.writing import whole, write_json
from deradiff.rewards import Reward

LIST = "pairs.jsonl"


def draw_pairs(
    folder: Path,
    pipe: DiffusionPipeline,
    base: str,
    prompts: Sequence[str],
    reward: Reward,
    *,
    temperature: float,
    steps: int,
    guidance_scale: float,
    seed: int,
    chunk: int = 50,
    report: Report = lambda *_: None,
) -> Path:
    """Fill `folder` with a pair for every prompt, or finish what an interrupted call began there, and return it.

    The winner is drawn with the Bradley-Terry probability at `temperature`, in the reward's unit: 0 lets the better
    picture always win. Raises `ValueError` for no prompts, a negative temperature, a folder begun with other settings
    and a reward that is not finite.
    """
    if not prompts:
        raise ValueError("no prompts: pairs are drawn one per prompt")
    if not temperature >= 0:
        raise ValueError(f"temperature = {temperature}: it must be 0 or more, in points of the reward")
    settings = {
        "base": base, "prompts": list(prompts), "reward": reward.name, "temperature": temperature, "steps": steps,
        "guidance_scale": guidance_scale, "seed": seed, "chunk": chunk, "precision": str(pipe.unet.dtype),
    }  # fmt: skip
    claim(folder, settings, "set of drawn pairs")
    for name in ("images", "chunks"):
        (folder / name).mkdir(exist_ok=True)
    chunks = range(0, len(prompts), chunk)
    for number, start in enumerate(chunks):
        part = folder / "chunks" / f"{number:05d}.json"
        if not part.exists():
            rows = _chunk(folder, pipe, prompts[start : start + chunk], start, reward, settings, number)
            write_json(part, {"rows": rows})
        report(min(start + chunk, len(prompts)), len(prompts), f"pairs compared by {reward.name}")
    if not (folder / LIST).exists():
        listed = sorted((folder / "chunks").glob("*.json"))
        rows = [row for path in listed for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        with whole(folder / LIST) as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


@torch.no_grad()
def _chunk(
    folder: Path, pipe: Any, prompts: Sequence[str], start: int, reward: Reward, settings: dict[str, Any], number: int
) -> list[dict[str, str]]:
    texts = [prompt for prompt in prompts for _ in range(2)]
    generator = torch.Generator().manual_seed((settings["seed"] << 32) + number)
    sampled = pictures.draw(
        pipe, prompt=texts, num_inference_steps=settings["steps"], guidance_scale=settings["guidance_scale"],
        generator=generator, output_type="latent",
    )  # fmt: skip
    latents = sampled.require_finite([f"an image of {text!r}" for text in texts]).images
    drawn = decode(Base(pipe), latents)
    files = []
    for i, image in enumerate(pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(drawn))):
        name = f"images/{start + i // 2:06d}-{'ab'[i % 2]}.png"
        with whole(folder / name) as temporary:
            image.save(temporary, format="PNG")
        files.append(name)
    scores = scored(reward, drawn, texts).float().cpu().view(-1, 2)
    wins = _wins(scores, settings["temperature"], generator)
    return [
        {"prompt": prompt, "winner": files[2 * i + int(not first)], "loser": files[2 * i + int(first)]}
        for i, (prompt, first) in enumerate(zip(prompts, wins, strict=True))
    ]


def _wins(scores: Float[Tensor, "pair 2"], temperature: float, generator: torch.Generator) -> list[bool]:
    if temperature == 0:
        return (scores[:, 0] >= scores[:, 1]).tolist()
    return bradley_terry(scores[:, 0], scores[:, 1], temperature, generator).tolist()
