"""Tiny random CLIP models and their tokenizer, in memory and as folders, and pictures for them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection as Tower

SIDE, CONTEXT, START, END = 32, 12, 62, 63
PROMPTS = ["a", "b c d", "some words that are longer than the context", ""]
SIZES = [(32, 32), (40, 84), (90, 37), (15, 20)]


def words() -> dict[str, int]:
    """Every letter is a word: its place in the alphabet."""
    return {f"{chr(ord('a') + i)}</w>": i + 1 for i in range(26)}


def tokenizer(**others: Any) -> Any:
    vocabulary = {"!": 0, **words(), **{chr(ord("a") + i): 27 + i for i in range(26)}}
    vocabulary |= {"<|startoftext|>": START, "<|endoftext|>": END}
    return CLIPTokenizer(vocab=vocabulary, merges=[], **others)


def spelt(prompts: Sequence[str]) -> list[str]:
    """Letters apart, so that they are words."""
    return [" ".join(prompt.replace(" ", "")) for prompt in prompts]


def config(end: int = END, act: str = "quick_gelu") -> CLIPConfig:
    return CLIPConfig(
        projection_dim=16,
        text_config={
            "hidden_size": 24,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "vocab_size": END + 1,
            "max_position_embeddings": CONTEXT,
            "hidden_act": act,
            "bos_token_id": START,
            "eos_token_id": end,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 8,
            "image_size": SIDE,
            "hidden_act": act,
        },
    )


def model(**others: Any) -> Any:
    torch.manual_seed(1)
    made = CLIPModel(config(**others)).eval()
    for parameter in made.parameters():  # far from the initial zeros and ones, and from embeddings all alike
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


def pictures(seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def as_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float() / 255


def written(place: Path) -> Path:
    model().save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def written_predictor(place: Path) -> Path:
    """A folder like the one on the hub: the tower's config, and tower and layers in one file."""
    fields = config().vision_config.to_dict() | {"projection_dim": 16}
    described = fields | {"model_type": "aesthetics_predictor", "architectures": ["AestheticsPredictorV2Linear"]}
    (place / "config.json").write_text(json.dumps(described))
    torch.manual_seed(2)
    sizes = [16, 24, 12, 6, 4, 1]
    layers = {
        f"layers.{at}.{part}": 0.5 * torch.randn(*((after, before) if part == "weight" else (after,)))
        for at, before, after in zip([0, 2, 4, 6, 7], sizes[:-1], sizes[1:], strict=True)
        for part in ("weight", "bias")
    }
    others = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file({**Tower(CLIPVisionConfig(**fields)).state_dict(), **layers, **others}, place / "model.safetensors")
    return place
