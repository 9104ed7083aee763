"""LoRAs for the tiny pipelines, as the tensors of a file, and the same added to the weights by hand."""

from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tiny import denoiser, denoiser_name
from tiny_parts import noise


def lora_weights(pipe: DiffusionPipeline, seed: int = 0, strength: float = 0.3) -> dict[str, Tensor]:
    """A random LoRA of rank 2 on the attention layers, in diffusers' layout."""
    module, name, weights = denoiser(pipe), denoiser_name(pipe), {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and path.split(".")[-1] in ("to_q", "to_k", "to_v"):
            down, up = noise(2, layer.in_features, seed=seed), noise(layer.out_features, 2, seed=seed + 1)
            weights[f"{name}.{path}.lora_A.weight"] = strength * down
            weights[f"{name}.{path}.lora_B.weight"] = strength * up
            seed += 2
    return weights


def fused(pipe: DiffusionPipeline, weights: dict[str, Tensor], scale: float = 1.0) -> DiffusionPipeline:
    """The pipeline with that LoRA added to its weights by hand."""
    module, name = denoiser(pipe), denoiser_name(pipe)
    for key, down in weights.items():
        if key.endswith("lora_A.weight"):
            up = weights[key.replace("lora_A", "lora_B")]
            layer: Any = module.get_submodule(key.removeprefix(f"{name}.").removesuffix(".lora_A.weight"))
            layer.weight.data += scale * up @ down
    return pipe
