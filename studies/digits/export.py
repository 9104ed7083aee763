"""The last stage of the digits build: what ships, in what precision, and the numbers that describe it."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from deradiff.algorithm.estimates import mean
from deradiff.alignment.base import Base
from deradiff.alignment.checkpoints import CurveRecord
from deradiff.alignment.training import Report as Progress
from deradiff.files.inventory import require_whole
from deradiff.files.reading import read
from deradiff.files.writing import atomic_folder
from deradiff.sampling.realignment import realign
from deradiff.worlds.digits import GUIDANCE, quality
from deradiff.worlds.digits.captions import sample_prompts, words
from deradiff.worlds.digits.rewards import DigitsReward
from studies.digits.models import byte_pairs, tokenizer
from studies.digits.settings import Settings

ANEW = "delete it and the model beside it, and build again"

WEIGHTS = "diffusion_pytorch_model.safetensors"


def export(folder: Path, settings: Settings, report: Progress) -> Path:
    """Gather `folder/files` from a finished build: pipeline, anchors, LoRA, `curves.json` and `build.json`."""
    return gathered(folder, lambda files: _gather(folder, files, settings, report))


def gathered(folder: Path, gather: Callable[[Path], None]) -> Path:
    """`folder/files`, which `gather` fills unless it is there."""
    path = folder / "files"
    if path.exists():
        require_whole(path, None, "export", "delete that folder, and it is exported again")
        return path
    with atomic_folder(path) as files:
        gather(files)
    return path


def _gather(folder: Path, files: Path, settings: Settings, report: Progress) -> None:
    names = [*(f"anchors/beta-{beta:g}" for beta in settings.betas), f"lora-beta-{settings.lora_beta:g}"]
    for name in ("reference", *names):
        shutil.copytree(folder / name, files / name)
    write_slow_tokenizer(files / "reference" / "tokenizer")
    forget_paths(files)
    weakest, samples = max(settings.betas), settings.measured_samples
    weights = load_file(files / "anchors" / f"beta-{weakest:g}" / WEIGHTS)
    write_records(
        files,
        curves(folder),
        {
            "settings": asdict(settings),
            "stored precision": stored_precision(_load(files), weights, weakest),
            "quality": asdict(quality.measure(_load(files), samples=samples)),
            "anchors": describe(_load(files), {Path(n).name: files / n for n in names}, samples // 2, report),
        },
    )


def write_records(files: Path, curves: dict[str, Any], record: dict[str, Any]) -> None:
    """`curves.json` and `build.json`."""
    (files / "curves.json").write_text(json.dumps(curves, indent=1))
    (files / "build.json").write_text(json.dumps(record | {"versions": _versions()}, indent=1))


def curves(folder: Path) -> dict[str, Any]:
    """The loss curves of a build by what was trained. Raises `ValueError` for one that is damaged."""
    return {
        file.name.removesuffix("-curve.json"): read(CurveRecord, file, "loss curve", ANEW).model_dump()
        for file in sorted(folder.glob("*-curve.json"))
    }


def _load(files: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(files / "reference", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def forget_paths(files: Path) -> None:
    """Remove from the configurations where each part was loaded from: the build folder is nobody's business."""
    for path in sorted(files.rglob("*.json")):
        content = read(Any, path, "configuration", ANEW)
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "scikit-learn", "numpy")}


def write_slow_tokenizer(folder: Path) -> None:
    """`vocab.json` and `merges.txt`, which transformers 4 wants beside the `tokenizer.json` of transformers 5."""
    vocabulary = dict(sorted(tokenizer().get_vocab().items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    merges = "".join(f"{first} {second}\n" for first, second in byte_pairs(words()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)


@torch.no_grad()
def stored_precision(pipe: DiffusionPipeline, anchor: Mapping[str, Tensor], weakest_beta: float) -> dict[str, Any]:
    """What storing in float32, float16 or bfloat16 costs the weakest anchor's *difference* from the reference.

    Relative errors: of the difference of the weights, and of the difference of the predictions (root mean square over
    256 noised latents). Both models are rounded, as both would be stored. `anchor` are its weights by their names.
    """
    base = Base(pipe)
    reference = {name: weight.clone() for name, weight in base.denoiser.state_dict().items() if name in anchor}
    generator = torch.Generator().manual_seed(0)
    told = base.call.encode_prompts(sample_prompts(256, seed=1))
    noisy = torch.randn(256, 4, 8, 8, generator=generator)
    timesteps = torch.cat([base.noising.drawn(generator) for _ in noisy])

    def difference(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
        rounded = [{k: v.to(dtype).float() for k, v in weights.items()} for weights in (reference, anchor)]
        weights = {k: rounded[1][k] - rounded[0][k] for k in reference}
        return weights, predict(rounded[1]) - predict(rounded[0])

    def predict(weights: dict[str, Tensor]) -> Float[Tensor, "batch 4 8 8"]:
        base.denoiser.load_state_dict(weights, strict=False)
        return base.call.predict(base.denoiser, noisy, timesteps, told)

    exact_weights, exact_predictions = difference(torch.float64)
    norm = torch.stack([d.square().sum() for d in exact_weights.values()]).sum().sqrt()
    size = torch.stack([w.square().sum() for w in reference.values()]).sum().sqrt()
    found: dict[str, Any] = {
        "weakest anchor": weakest_beta,
        "relative size of its difference": (norm / size).item(),
    }
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weights, predictions = difference(dtype)
        error = torch.stack([(weights[k] - exact_weights[k]).square().sum() for k in weights]).sum().sqrt()
        found[str(dtype).removeprefix("torch.")] = {
            "error of the difference of weights": (error / norm).item(),
            "error of the difference of predictions": (
                (predictions - exact_predictions).norm() / exact_predictions.norm()
            ).item(),
        }
    return found


def describe(
    pipe: DiffusionPipeline,
    anchors: Mapping[str, Path],
    samples: int,
    report: Progress,
    guidance_scale: float = GUIDANCE,
) -> list[dict[str, Any]]:
    """Reward and legibility of the reference and of each anchor (λ = 1), from the same prompts and the same noise."""
    reward, rows, prompts = DigitsReward(), [], sample_prompts(samples, seed=200)
    for number, (name, path) in enumerate({"reference": None, **anchors}.items()):
        with realign(pipe, path, 1.0) if path else nullcontext():
            images = quality.draw(pipe, prompts, seed=201, guidance_scale=guidance_scale)
        row = {"reward": mean(reward(images, prompts)), **vars(quality.score(images, prompts))}
        rows.append({"model": name, "samples": samples, **{key: asdict(value) for key, value in row.items()}})
        report(number + 1, len(anchors) + 1, f"{name}: reward {row['reward']}, legible {row['legible']}")
    return rows
