"""The last stage of the build: what ships, in half precision, and the numbers that describe it."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors.torch import load_file, save_file

from deradiff.alignment.runs import RECORD, AlignmentRecord
from deradiff.alignment.training import Report as Progress
from deradiff.files.reading import read
from deradiff.worlds.digits import quality
from deradiff.worlds.digits_flow import GUIDANCE
from studies.digits.export import (
    ANEW,
    WEIGHTS,
    curves,
    describe,
    forget_paths,
    gathered,
    stored_precision,
    write_records,
    write_slow_tokenizer,
)
from studies.digits_flow import anchors
from studies.digits_flow.models import EqualTokensPipeline
from studies.digits_flow.reference import load
from studies.digits_flow.settings import FlowSettings


def export(folder: Path, settings: FlowSettings, report: Progress) -> Path:
    """Gather `folder/files` from a finished build: pipeline, anchors, LoRAs, `curves.json` and `build.json`."""
    return gathered(folder, lambda files: _gather(folder, files, settings, report))


def _gather(folder: Path, files: Path, settings: FlowSettings, report: Progress) -> None:
    shutil.copytree(folder / "reference", files / "reference")
    for tokenizer in ("tokenizer", "tokenizer_2"):
        write_slow_tokenizer(files / "reference" / tokenizer)
    trained = {f"anchors/beta-{beta:g}": anchors.anchor_folder(folder, beta) for beta in settings.betas}
    trained[f"lora-beta-{settings.lora_beta:g}"] = anchors.lora_folder(folder, settings)
    trained["lora-grpo"] = anchors.grpo_folder(folder)
    losses = curves(folder)
    for name, source in trained.items():
        (files / name).mkdir(parents=True)
        for file in ("config.json", WEIGHTS, LORA_WEIGHT_NAME_SAFE):
            if (source / file).exists():
                shutil.copy(source / file, files / name / file)
        losses[Path(name).name] = read(
            AlignmentRecord, source / RECORD, "record of an alignment", ANEW
        ).curve.model_dump()
    forget_paths(files)
    weakest, samples = max(settings.betas), settings.measured_samples
    exact = load_file(anchors.anchor_folder(folder, weakest) / WEIGHTS)
    precision = stored_precision(load(folder / "reference"), exact, weakest)
    for name in trained:
        for file in (files / name).glob("*.safetensors"):
            _halve(file)

    def drawing() -> EqualTokensPipeline:
        return EqualTokensPipeline.around(load(files / "reference"))

    made: dict[str, Any] = {
        "settings": asdict(settings),
        "stored precision": precision,
        "quality": asdict(quality.measure(drawing(), samples=samples, guidance_scale=GUIDANCE)),
        "anchors": describe(drawing(), {Path(n).name: files / n for n in trained}, samples // 2, report, GUIDANCE),
    }
    write_records(files, losses, made)


def _halve(file: Path) -> None:
    """Store a model's weights in half precision."""
    save_file({name: weight.to(torch.float16) for name, weight in load_file(file).items()}, file, {"format": "pt"})
