"""What mixing costs in ComfyUI, over the two evaluations that it needs: benchmarks/comfyui.json.

    COMFYUI=path python benchmarks/comfyui.py

Two SD1.5-shaped random models in a checkout of ComfyUI on the CPU, with its own KSampler: a run of either and a
realigned one at λ = ½ by turns. "overhead" is the realigned run's processor time over the sum of both, less one, from
the fastest of twenty turns each. "lora" is the same of a LoRA that is switched, against the model and one with the LoRA
merged.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import keep_parts

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from comfyui_models import UNET, Drawing, draw, model
from deradiff.algorithm.schedules import Constant
from deradiff.integrations.comfyui.lora_files import with_lora_weights
from deradiff.integrations.comfyui.realigned_model import realigned
from deradiff.integrations.comfyui.runs import DialSettings

OUT = Path(__file__).with_suffix(".json")
TURNS = 20
WIDE = {"model_channels": 192, "num_heads": 4}
DRAWING = Drawing("sd15", steps=4)
HALF = DialSettings((Constant(0.5),))


def checkpoints() -> dict[str, Any]:
    reference, aligned = model("sd15", 1, WIDE), model("sd15", 2, WIDE)
    return compared(reference, aligned, realigned(reference, aligned, HALF))


def lora() -> dict[str, Any]:
    reference = model("sd15", 1, WIDE)
    weights = {}
    for name, weight in reference.model.diffusion_model.named_parameters():
        if name.endswith(".weight") and weight.ndim == 2 and "attn" in name:
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            weights[f"{key}.lora_up.weight"] = torch.randn(len(weight), 8)
            weights[f"{key}.lora_down.weight"] = 0.1 * torch.randn(8, weight.shape[1])
    aligned = with_lora_weights(reference, weights, 1.0, "lora")
    apart = with_lora_weights(model("sd15", 1, WIDE), weights, 1.0, "lora")
    return compared(reference, apart, realigned(reference, aligned, HALF))


def compared(reference: Any, aligned: Any, mixed: Any) -> dict[str, Any]:
    for each in (reference, aligned, mixed):
        draw(each, DRAWING)
    turns = [[timed(each) for each in (reference, mixed, aligned)] for _ in range(TURNS)]
    first, both, second = (min(times) for times in zip(*turns, strict=True))
    return {
        "overhead": round(both / (first + second) - 1, 4),
        "seconds": {"reference": round(first, 4), "realigned": round(both, 4), "aligned": round(second, 4)},
        "network": UNET | WIDE,
    }


def timed(drawn: Any) -> float:
    begun = time.process_time()
    draw(drawn, DRAWING)
    return time.process_time() - begun


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"checkpoints": checkpoints, "lora": lora}

if __name__ == "__main__":
    keep_parts(((name, part()) for name, part in PARTS.items()), OUT)
