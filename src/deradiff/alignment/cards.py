"""The card beside an anchor: base, method, strength and its convention, data, training, how to use it."""

import json
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from deradiff.alignment.methods import TrainingMethod
from deradiff.alignment.training import LossCurve
from deradiff.sweep.alignment_records import NO_KL


def card(method: TrainingMethod, made_of: dict[str, Any], curve: LossCurve, away: dict[str, Any]) -> str:
    """A model card in Markdown of what `runs.align` made; `away` is its divergence, as `runs.divergence` gives it."""
    settings, data, beta = made_of["settings"], made_of["data"], made_of["beta"]
    plan, rank = settings["plan"], settings["lora_rank"]
    peak = settings["rate_times_beta"] / beta if settings["rate_times_beta"] else plan["learning_rate"]
    table = {
        "data": f"{data.get(method.unit, 'streamed')} {method.unit}, {settings['held_out']} held out",
        "source of the data": f"`{json.dumps(data.get('source', data), ensure_ascii=False)}`",
        "resolution": f"{settings['resolution']} px",
        "steps": f"{curve.step[-1]} of {settings['batch']} {method.batch}",
        "stopped": f"{curve.stopped}; the weights kept are those of step {curve.kept_step}",
        "optimizer": f"{plan['optimizer']}, rate {peak:g}, {plan['warmup']} steps of warm-up",
        **({"reward": settings["reward"]} if settings["reward"] else {}),
        **{name.replace("_", " "): value for name, value in settings["options"].items()},
        "path KL to the base": f"{away['value']:.4g} ± {away['error']:.2g} nats per picture: {away['scheduler']} at "
        f"full noise, {away['steps']} steps, guidance {away['guidance_scale']:g}, {away['prompts']} held-out prompts",
        "gradients": f"clipped to a norm of {plan['max_norm']:g}",
        "seed": made_of["seed"],
    }
    lines = [
        "---",
        f"base_model: {settings['base']}",
        "library_name: diffusers",
        f"tags: [deradiff, {method.title.lower()}, {'lora' if rank else 'text-to-image'}]",
        "---",
        "",
        f"# {settings['base']}, aligned by {method.title} {f'at {method.symbol} = {beta:g}' if beta else 'without KL'}",
        "",
        f"A LoRA of rank {rank}." if rank else "All weights of the denoiser.",
        "",
        textwrap.fill(method.strength, 120),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in table.items()),
        "",
        f"Held-out loss ({method.loss}):",
        "",
        "| step | loss |",
        "|---|---|",
        *(f"| {step} | {loss:.5f} |" for step, loss in _some(curve)),
        "",
        _reading(beta > 0 and settings["method"] not in NO_KL),
        "",
        "```python",
        "import deradiff",
        "",
        'deradiff.realign(pipe, "this folder", lam=0.5)',
        "```",
        "",
    ]
    return "\n".join(lines)


def _reading(regularised: bool) -> str:
    """What λ means for this anchor."""
    if regularised:
        return "Read it at any strength, with λ turned after training:"
    return textwrap.fill(
        "Nothing held it to its base, so λ stands for no KL strength: it is how much of the anchor is taken, from 0 "
        "(the base) to 1 (the anchor). `deradiff search --undo-hacking` looks how far λ can go:",
        120,
    )


def _some(curve: LossCurve, rows: int = 12) -> Sequence[tuple[int, float]]:
    every = list(zip(curve.step, curve.held_out, strict=True))
    keep = torch.linspace(0, len(every) - 1, min(rows, len(every))).round().long().tolist()
    return [every[i] for i in keep]
