"""The card beside a baked model: what it is, how to load it, how near it comes, what it was made from."""

from collections.abc import Mapping, Sequence
from typing import Any

from deradiff.baking.extraction import sentences
from deradiff.baking.judging import Form, Judgement
from deradiff.worlds import find


def card(made_of: Mapping[str, Any], form: Form, judged: Sequence[Judgement], how: Mapping[str, Any]) -> str:
    """A model card in Markdown. `made_of` is what `baking.json` holds under that name, `how` how images were drawn."""
    base, anchors = made_of["reference"], made_of["anchors"]
    lines = [
        "---",
        f"base_model: {base['name']}",
        "library_name: diffusers",
        f"tags: [deradiff, {'lora' if form == 'lora' else 'text-to-image'}]",
        "---",
        "",
        f"# {base['name']}, realigned at {made_of['words']}, in one {'LoRA' if form == 'lora' else 'checkpoint'}",
        "",
        _method(made_of),
        "",
        "```python",
        *_usage(made_of, form),
        "```",
        "",
        *_calling(made_of),
        "## How near it comes",
        "",
        *(_judged(judged, how) or ["Not measured."]),
        "",
        "## What it was made from",
        "",
        "| | | SHA-256 |",
        "|---|---|---|",
        f"| reference | `{base['name']}`, a {base['class']} | `{base['sha256']}` (of its tensors) |",
        *(f"| {name} | `{anchor['source']}` | {_digests(anchor['sha256'])} |" for name, anchor in anchors.items()),
        "",
        f"By {', '.join(f'{name} {version}' for name, version in made_of['versions'].items())}. The licence is the "
        "reference's; the anchors' terms apply as well.",
        "",
    ]
    return "\n".join(lines)


def _digests(digests: Mapping[str, str]) -> str:
    return ", ".join(f"`{digest}` ({of})" for of, digest in digests.items())


def _method(made_of: Mapping[str, Any]) -> str:
    if lora := made_of.get("lora"):
        done = "trained further to predict what the mixture predicts" if made_of["method"] == "distill" else "as it is"
        lines = [f"{line[0].upper()}{line[1:]}." for line in sentences(lora)]
        return (
            "What λ changes of the weights as products of low rank, by singular value decomposition of every layer, "
            f"{done}. Strength 1 is λ. {' '.join(lines)}"
        )
    if made_of["method"] == "interpolate":
        return (
            "Interpolated weights, `(1 - Σλ) θ_0 + Σ λ θ`: to first order in the difference of the weights, the model "
            "whose predictions are the mixture."
        )
    settings = made_of["distillation"]
    trained = f"a LoRA of rank {settings['lora_rank']}" if settings["lora_rank"] else "all weights"
    return (
        f"Distilled: from interpolated weights, {trained} trained for {settings['steps']} steps of {settings['batch']} "
        "to predict what the mixture predicts, at noised latents of the realigned model's own samples."
    )


def _usage(made_of: Mapping[str, Any], form: Form) -> list[str]:
    kind, base = made_of["pipeline"], made_of["reference"]["name"]
    absent = "".join(f", {name}=None" for name in made_of.get("left_out", ()))
    if form == "pipeline":
        return [f"from diffusers import {kind}", "", f'pipe = {kind}.from_pretrained("this folder"{absent})']
    loading = 'pipe.load_lora_weights("this folder")'
    dialect = (made_of.get("lora") or {}).get("dialect")
    if dialect == "peft":
        loading = f'PeftModel.from_pretrained(pipe.{made_of["component"]}, "this folder")  # from peft'
    first = []
    if dialect == "kohya":  # diffusers refuses changes of norms and biases in these names
        first, loading = ["import deradiff"], 'deradiff.realign(pipe, "this folder")  # or the LoRA loader of ComfyUI'
    if world := find(base):
        return [
            *first,
            f"from deradiff.worlds import {world.module}",
            "",
            f"pipe = {world.module}.load_pipeline()",
            loading,
        ]
    return [*first, f"from diffusers import {kind}", "", f'pipe = {kind}.from_pretrained("{base}"{absent})', loading]


def _calling(made_of: Mapping[str, Any]) -> list[str]:
    settings = made_of.get("distillation") or {}
    if settings.get("span"):
        low, high = settings["span"]
        return [
            f"**λ is told in the place of the guidance scale**: `pipe(prompt, guidance_scale=1 + λ)`, for λ from "
            f"{low:g} to {high:g}. Guidance of {made_of['guidance_scale']:g} is part of the model; negative prompts do "
            "nothing.",
            "",
        ]
    if settings.get("fold_guidance"):
        return [
            f"**Guidance of {made_of['guidance_scale']:g} is part of the model**: call it with `guidance_scale=1`, "
            "which evaluates it once per step. Negative prompts do nothing.",
            "",
        ]
    return []


def _judged(judged: Sequence[Judgement], how: Mapping[str, Any]) -> list[str]:
    if not judged:
        return []
    scale = "" if how["guidance_scale"] is None else f", guidance {how['guidance_scale']:g}"
    drawn = f"{how['scheduler']}, {how['steps']} steps{scale}"
    return [
        f"Over final latents from the same noise, for held-out prompts ({drawn}):",
        "",
        *(f"- {judgement.words}" for judgement in judged),
        "",
        "![reference, realigned, baked](sheet.png)",
    ]
