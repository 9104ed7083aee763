"""What the tiny pipelines of the families share: arguments of a call, and parts of a model."""

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)

from tiny_parts import noise

Built = tuple[DiffusionPipeline, dict[str, Any]]

WIDTH = 16
"""Of prompt embeddings, which have 5 tokens."""

STEPS = 3
LATENT: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent"}
PROMPT = {"prompt_embeds": noise(2, 5, WIDTH, seed=1)}
PROMPTS = PROMPT | {"negative_prompt_embeds": noise(2, 5, WIDTH, seed=2)}
MASKS = {f"{side}prompt_attention_mask": torch.ones(2, 5, dtype=torch.bool) for side in ("", "negative_")}
TEXT = ("text_encoder", "tokenizer")


def size(pixels: int) -> dict[str, int]:
    return {"height": pixels, "width": pixels}


def absent(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | config))


def attention(heads: int = 2, width: int = 8) -> dict[str, int]:
    return {"num_attention_heads": heads, "attention_head_dim": width}
