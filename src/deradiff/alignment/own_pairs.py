"""Preference pairs without people: two pictures by the model itself for every prompt, compared by a reward.

What is written is an ordinary folder of pairs (see `alignment.pairs`): pictures to look at, and a list.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from deradiff.alignment.base import Base
from deradiff.alignment.objectives import bradley_terry
from deradiff.alignment.sampling import decode
from deradiff.alignment.scoring import scored
from deradiff.alignment.training import Report
from deradiff.anchors.checks import denoiser_of
from deradiff.files.folders import begin_or_resume
from deradiff.files.inventory import Inventory, inventory, require_picture, require_whole
from deradiff.files.locks import taken
from deradiff.files.reading import Record, read
from deradiff.files.writing import atomic_file, write_json
from deradiff.rewards import Reward
from deradiff.sampling import pictures

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
        "base": base,
        "prompts": list(prompts),
        "reward": reward.name,
        "temperature": temperature,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "chunk": chunk,
        "precision": str(denoiser_of(pipe)[1].dtype),
    }
    begin_or_resume(folder, settings, "set of drawn pairs")
    parts = [_part(folder, number) for number in range(-(-len(prompts) // chunk))]
    complete = all(part.exists() for part in (folder / LIST, *parts))
    with nullcontext() if complete else taken(folder, "a set of drawn pairs"):
        _draw(folder, pipe, prompts, reward, settings, report)
    return folder


def _draw(
    folder: Path, pipe: Any, prompts: Sequence[str], reward: Reward, settings: dict[str, Any], report: Report
) -> None:
    chunk = settings["chunk"]
    for name in ("images", "chunks"):
        (folder / name).mkdir(exist_ok=True)
    chunks, base = range(0, len(prompts), chunk), Base(pipe)
    for number, start in enumerate(chunks):
        part = _part(folder, number)
        if not part.exists():
            rows = _chunk(folder, base, prompts[start : start + chunk], start, reward, settings, number)
            pictures = inventory(folder, (row[role] for row in rows for role in ("winner", "loser")))
            write_json(part, {"rows": rows, "files": pictures})
        report(min(start + chunk, len(prompts)), len(prompts), f"pairs compared by {reward.name}")
    pairs = [pair for number in range(len(chunks)) for pair in _drawn_pairs(folder, number)]
    text = "".join(json.dumps(pair.model_dump(), ensure_ascii=False) + "\n" for pair in pairs)
    # It says nothing that the chunks do not: where it is damaged, it is written again.
    if not (folder / LIST).is_file() or (folder / LIST).read_bytes() != text.encode():
        with atomic_file(folder / LIST) as temporary:
            temporary.write_text(text, encoding="utf-8")


class _Drawn(Record):
    """A pair: its prompt, and its pictures by their paths in the folder."""

    prompt: str
    winner: str
    loser: str


class _Chunk(Record):
    rows: list[_Drawn]
    files: Inventory | None = None


def _drawn_pairs(folder: Path, number: int) -> list[_Drawn]:
    """The pairs of a chunk. Raises `ValueError` unless they and their pictures are whole."""
    path, cure = _part(folder, number), f"delete {_part(folder, number)}, and its pairs are drawn again"
    chunk = read(_Chunk, path, "chunk of drawn pairs", cure)
    if chunk.files is None:  # of version 0.1
        for row in chunk.rows:
            for picture in (row.winner, row.loser):
                require_picture(folder / picture, "picture", cure)
    else:
        require_whole(folder, chunk.files, "set of drawn pairs", cure)
    return chunk.rows


def _part(folder: Path, number: int) -> Path:
    return folder / "chunks" / f"{number:05d}.json"


@torch.no_grad()
def _chunk(
    folder: Path, base: Base, prompts: Sequence[str], start: int, reward: Reward, settings: dict[str, Any], number: int
) -> list[dict[str, str]]:
    pipe = base.pipe
    texts = [prompt for prompt in prompts for _ in range(2)]
    generator = torch.Generator().manual_seed((settings["seed"] << 32) + number)
    sampled = pictures.draw(
        pipe,
        prompt=texts,
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        generator=generator,
        output_type="latent",
    )
    latents = sampled.require_finite([f"an image of {text!r}" for text in texts]).images
    drawn = decode(base, latents)
    files = []
    for i, image in enumerate(pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(drawn))):
        name = f"images/{start + i // 2:06d}-{'ab'[i % 2]}.png"
        with atomic_file(folder / name) as temporary:
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
