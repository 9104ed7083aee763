"""Presets that come with the studio; what people keep themselves is in `library`."""

from __future__ import annotations

from deradiff.algorithm.schedules import Power
from deradiff.studio.scenes import scene
from deradiff.sweep.settings import Settings

SDXL, SDXL_DPO = "stabilityai/stable-diffusion-xl-base-1.0", "mhdang/dpo-sdxl-text2image-v1"


def shipped(hub: bool) -> dict[str, Settings]:
    """By name; those that load from the hub only where that is allowed."""
    digit = "a blue eight on white paper"
    quadratic = Power(2).to_dict()
    presets = {
        "Digits: an over-aligned anchor at half strength": scene("digits", ["digits:100"], digit, [0.5]),
        "Digits: annealed, p = 2": scene("digits", ["digits:100"], digit, [1.0], schedule=quadratic),
        "Digits: beyond the anchor": scene("digits", ["digits:250"], "a red seven", [1.5]),
        "Digits: a healthy and an over-aligned anchor": scene(
            "digits", ["digits:1000", "digits:100"], digit, [0.3, 0.3]
        ),
        "Flow digits: an anchor without KL at half strength": scene("digits-flow", ["digits-flow:grpo"], digit, [0.5]),
    }
    if hub:
        typhoon = "a typhoon in a teacup"
        presets["SDXL and Diffusion-DPO at half strength"] = scene(
            SDXL, [SDXL_DPO], typhoon, [0.5], scheduler="euler-a", steps=50, guidance_scale=5.0
        )
        presets["SDXL and Diffusion-DPO, annealed, p = 2"] = scene(
            SDXL, [SDXL_DPO], typhoon, [1.0], schedule=quadratic, scheduler="euler-a", steps=50, guidance_scale=5.0
        )
    return presets
