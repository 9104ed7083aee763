"""The last stage of the digits build: what ships, in what precision, and the numbers that describe it."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from deradiff.algorithm.estimates import mean
from deradiff.alignment.checkpoints import CurveRecord
from deradiff.alignment.training import Report as Progress
from deradiff.files.inventory import require_whole
from deradiff.files.reading import read
from deradiff.files.writing import atomic_folder
from deradiff.worlds.digits import quality
from deradiff.worlds.digits.captions import sample_prompts, words
from deradiff.worlds.digits.rewards import DigitsReward
from studies.digits.models import byte_pairs, token_ids, tokenizer
from studies.digits.settings import Settings

ANEW = "delete it and the model beside it, and build again"

WEIGHTS = "diffusion_pytorch_model.safetensors"


def export(folder: Path, settings: Settings, report: Progress) -> Path:
    """Gather `folder/files` from a finished build: pipeline, anchors, LoRA, `curves.json` and `build.json`."""
    path = folder / "files"
    if path.exists():
        require_whole(path, None, "export", "delete that folder, and it is exported again")
        return path
    with atomic_folder(path) as files:
        _gather(folder, files, settings, report)
    return path


def _gather(folder: Path, files: Path, settings: Settings, report: Progress) -> None:
    betas, lora_beta, samples = settings.betas, settings.lora_beta, settings.measured_samples
    shutil.copytree(folder / "reference", files / "reference")
    _write_slow_tokenizer(files / "reference" / "tokenizer")
    for beta in betas:
        shutil.copytree(folder / "anchors" / f"beta-{beta:g}", files / "anchors" / f"beta-{beta:g}")
    shutil.copytree(folder / f"lora-beta-{lora_beta:g}", files / f"lora-beta-{lora_beta:g}")

    _forget_paths(files)

    (files / "curves.json").write_text(json.dumps(curves(folder), indent=1))
    record = {
        "settings": asdict(settings),
        "versions": _versions(),
        "stored precision": stored_precision(files, max(betas)),
        "quality": asdict(quality.measure(_load(files), samples=samples)),
        "anchors": describe(files, betas, lora_beta, samples // 2, report),
    }
    (files / "build.json").write_text(json.dumps(record, indent=1))


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


def _forget_paths(files: Path) -> None:
    """Remove from the configurations where each part was loaded from: the build folder is nobody's business."""
    for path in sorted(files.rglob("*.json")):
        content = read(Any, path, "configuration", ANEW)
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "scikit-learn", "numpy")}


def _write_slow_tokenizer(folder: Path) -> None:
    """`vocab.json` and `merges.txt`, which transformers 4 wants beside the `tokenizer.json` of transformers 5."""
    vocabulary = dict(sorted(tokenizer().get_vocab().items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    merges = "".join(f"{first} {second}\n" for first, second in byte_pairs(words()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)


def stored_precision(files: Path, weakest_beta: float) -> dict[str, Any]:
    """What storing in float32, float16 or bfloat16 costs the weakest anchor's *difference* from the reference.

    Relative errors: of the difference of the weights, and of the difference of the predictions (root mean square over
    256 noised latents). Both models are rounded, as both would be stored.
    """
    reference = load_file(files / "reference" / "unet" / WEIGHTS)
    anchor = load_file(files / "anchors" / f"beta-{weakest_beta:g}" / WEIGHTS)
    pipe = _load(files)
    generator = torch.Generator().manual_seed(0)
    text = pipe.text_encoder(token_ids(sample_prompts(256, seed=1))).last_hidden_state.detach()
    noisy = torch.randn(256, 4, 8, 8, generator=generator)
    timesteps = torch.randint(1000, (256,), generator=generator)

    def difference(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
        rounded = [{k: v.to(dtype).float() for k, v in weights.items()} for weights in (reference, anchor)]
        weights = {k: rounded[1][k] - rounded[0][k] for k in reference}
        return weights, predict(rounded[1]) - predict(rounded[0])

    @torch.no_grad()
    def predict(weights: dict[str, Tensor]) -> Float[Tensor, "batch 4 8 8"]:
        pipe.unet.load_state_dict(weights)
        return pipe.unet(noisy, timesteps, text).sample

    exact_weights, exact_predictions = difference(torch.float64)
    norm = torch.stack([d.square().sum() for d in exact_weights.values()]).sum().sqrt()
    size = torch.stack([w.square().sum() for w in reference.values()]).sum().sqrt()
    found: dict[str, Any] = {
        "stored as": str(reference["conv_in.weight"].dtype).removeprefix("torch."),
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
    files: Path, betas: tuple[float, ...], lora_beta: float, samples: int, report: Progress
) -> list[dict[str, Any]]:
    """Reward and legibility of the reference and of each anchor (λ = 1), from the same prompts and the same noise."""
    pipe, reward = _load(files), DigitsReward()
    prompts = sample_prompts(samples, seed=200)
    names = ["reference", *(f"beta-{beta:g}" for beta in betas), f"lora-beta-{lora_beta:g}"]
    rows = []
    for number, name in enumerate(names):
        if name.startswith("beta"):
            pipe.unet = UNet2DConditionModel.from_pretrained(files / "anchors" / name)
        elif name.startswith("lora"):
            pipe = _load(files)
            pipe.load_lora_weights(files / name, local_files_only=True)
        images = quality.draw(pipe, prompts, seed=201)
        row = {"reward": mean(reward(images, prompts)), **vars(quality.score(images, prompts))}
        rows.append({"model": name, "samples": samples, **{key: asdict(value) for key, value in row.items()}})
        report(number + 1, len(names), f"{name}: reward {row['reward']}, legible {row['legible']}")
    return rows
