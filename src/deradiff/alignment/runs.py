"""One alignment, from base and data to an anchor on disk that `deradiff.realign` loads, with a card beside it."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from deradiff.alignment import folders
from deradiff.alignment.base import Base, Policy
from deradiff.alignment.dpo import train_dpo
from deradiff.alignment.latent_cache import LatentCache, OrderedPairs, write_cache
from deradiff.alignment.loop import Curve
from deradiff.alignment.presets import Preset
from deradiff.jobs import Report
from deradiff.records import versions, write_json


def cached_pairs(
    folder: Path, pipe: DiffusionPipeline, pairs: OrderedPairs, settings: Preset, limit: int | None, report: Report
) -> LatentCache:
    """The latents and prompt embeddings of `pairs`, made in `folder` if they are not there, with held-out rows."""
    base = Base(pipe)
    planned = limit or (len(pairs) if hasattr(pairs, "__len__") else 0)  # type: ignore[arg-type]
    write_cache(
        folder, pairs, base.encode_images, base.encode_prompts, base=settings.base, resolution=settings.resolution,
        limit=limit, shard=256, report=lambda done, line: report("encoding pairs", done, max(planned, done), line),
    )  # fmt: skip
    return LatentCache(folder, held_out=settings.held_out)


def align(
    pipe: DiffusionPipeline,
    cache: LatentCache,
    beta: float,
    settings: Preset,
    out: Path,
    report: Report,
    *,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> Path:
    """Align `pipe` at `beta` by Diffusion-DPO into `out/beta-<β>`, and return that folder.

    What is there already is kept; an interrupted alignment goes on at its checkpoint. With `settings.lora_rank` the
    folder holds a LoRA, otherwise a UNet. The pipeline is given back as it was. Raises `ValueError` if the folder holds
    an alignment with other settings (see also `dpo.train_dpo` and `loop.train`).
    """
    name = f"beta-{beta:g}"
    path, checkpoint = out / name, out / f"{name}-checkpoint"
    made_of = _identity(beta, settings, cache, seed)
    if path.exists():
        found = json.loads((path / "alignment.json").read_text(encoding="utf-8"))["made_of"]
        if found != made_of:
            raise ValueError(f"{path} holds an alignment with other settings: name another folder, or delete it")
        return path
    base = Base(pipe)
    policy = Policy(base, settings.lora_rank, settings.lora_targets, seed)
    try:
        curve = train_dpo(
            base, policy, cache, beta, settings.plan_at(beta), batch=settings.batch,
            dropout=settings.prompt_dropout, seed=seed, checkpoint=checkpoint,
            report=partial(report, f"β = {beta:g}"), accelerator=accelerator, identity=json.dumps(made_of),
        )  # fmt: skip
        if accelerator is None or accelerator.is_main_process:
            _save(path, pipe, policy, made_of, curve)
            folders.discard(checkpoint)
    finally:
        if policy.is_lora:
            base.denoiser.delete_adapters(base.denoiser.active_adapters())
    return path


def _identity(beta: float, settings: Preset, cache: LatentCache, seed: int) -> dict[str, Any]:
    """What decides the weights, as plain data."""
    decisive = {
        key: value
        for key, value in asdict(settings).items()
        if key not in ("source", "betas", "notes", "sampling", "precision", "vae")
    }
    made_of = {"beta": beta, "seed": seed, "settings": decisive, "data": cache.fingerprint}
    return json.loads(json.dumps(made_of))


def _save(path: Path, pipe: Any, policy: Policy, made_of: dict[str, Any], curve: Curve) -> None:
    from peft.utils import get_peft_model_state_dict

    fresh = path.with_name(path.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    if policy.is_lora:
        layers = {key: value.contiguous() for key, value in get_peft_model_state_dict(policy.model).items()}
        pipe.save_lora_weights(fresh, unet_lora_layers=layers, safe_serialization=True)
    else:
        policy.model.save_pretrained(fresh)
    write_json(fresh / "alignment.json", {"made_of": made_of, "curve": asdict(curve), "versions": versions()})
    (fresh / "README.md").write_text(card(made_of, curve), encoding="utf-8")
    fresh.replace(path)


def card(made_of: dict[str, Any], curve: Curve) -> str:
    """A model card in Markdown: base, method, β and its convention, data, training, how to use it."""
    settings, data, beta = made_of["settings"], made_of["data"], made_of["beta"]
    plan, rank = settings["plan"], settings["lora_rank"]
    peak = settings["rate_times_beta"] / beta if settings["rate_times_beta"] else plan["learning_rate"]
    table = {
        "data": f"{data['pairs']} preference pairs, {settings['held_out']} held out",
        "source of the data": f"`{json.dumps(data['source'], ensure_ascii=False)}`",
        "resolution": f"{settings['resolution']} px",
        "steps": f"{curve.step[-1]} of {settings['batch']} pairs",
        "stopped": f"{curve.stopped}; the weights kept are those of step {curve.kept_step}",
        "optimizer": f"{plan['optimizer']}, rate {peak:g}, {plan['warmup']} steps of warm-up",
        "gradients": f"clipped to a norm of {plan['max_norm']:g}",
        "seed": made_of["seed"],
    }
    lines = [
        "---",
        f"base_model: {settings['base']}",
        "library_name: diffusers",
        f"tags: [deradiff, diffusion-dpo, {'lora' if rank else 'text-to-image'}]",
        "---",
        "",
        f"# {settings['base']}, aligned by Diffusion-DPO at β = {beta:g}",
        "",
        f"A LoRA of rank {rank}." if rank else "All weights of the UNet.",
        "",
        "β multiplies half a difference of ε-errors averaged over the elements of a latent, the convention of the",
        "method's released code.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in table.items()),
        "",
        "Held-out loss (log 2 = 0.69315 before alignment):",
        "",
        "| step | loss |",
        "|---|---|",
        *(f"| {step} | {loss:.5f} |" for step, loss in _some(curve)),
        "",
        "Read it at any strength β/λ:",
        "",
        "```python",
        "import deradiff",
        "",
        'deradiff.realign(pipe, "this folder", lam=0.5)',
        "```",
        "",
    ]
    return "\n".join(lines)


def _some(curve: Curve, rows: int = 12) -> Sequence[tuple[int, float]]:
    every = list(zip(curve.step, curve.held_out, strict=True))
    keep = torch.linspace(0, len(every) - 1, min(rows, len(every))).round().long().tolist()
    return [every[i] for i in keep]
