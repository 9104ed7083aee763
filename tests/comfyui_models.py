"""Tiny models of ComfyUI's own classes, random and on the CPU, in the shapes of what people draw with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comfyui_host import require_comfyui

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 4,
    "context_dim": 16,
    "num_heads": 2,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
}

MMDIT: dict[str, Any] = {
    "in_channels": 16,
    "patch_size": 2,
    "out_channels": 16,
    "depth": 1,
    "input_size": None,
    "adm_in_channels": 32,
    "num_patches": 64,
    "pos_embed_max_size": 8,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 64}},
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
}

FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 32,
    "context_in_dim": 16,
    "hidden_size": 48,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 10, 10],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}

WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "patch_size": (1, 2, 2),
    "text_len": 8,
    "in_dim": 16,
    "dim": 48,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": 16,
    "out_dim": 16,
    "num_heads": 2,
    "num_layers": 1,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}

QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "patch_size": 2,
    "num_layers": 1,
    "attention_head_dim": 24,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 10, 10),
}


class Family(NamedTuple):
    """A class of ComfyUI's supported models, a tiny network's settings, its latents' shape, its pooled text's size."""

    supported: str
    unet: dict[str, Any]
    latents: tuple[int, ...]
    pooled: int | None = None


FAMILIES = {
    "sd15": Family("SD15", UNET, (4, 8, 8)),
    "sdxl": Family(
        "SDXL", UNET | {"adm_in_channels": 2816, "num_classes": "sequential", "model_channels": 64}, (4, 8, 8), 1280
    ),
    "sd3": Family("SD3", MMDIT, (16, 8, 8), 32),
    "flux": Family("Flux", FLUX, (16, 8, 8), 32),
    "wan": Family("WAN21_T2V", WAN, (16, 3, 8, 8)),
    "qwen": Family("QwenImage", QWEN, (16, 1, 8, 8)),
}


def model(name: str, seed: int, extra: dict[str, Any] | None = None) -> Any:
    """A `ModelPatcher` around random weights."""
    require_comfyui()
    import comfy.model_patcher
    import comfy.supported_models

    family = FAMILIES[name]
    config = getattr(comfy.supported_models, family.supported)(family.unet | (extra or {}))
    config.set_inference_dtype(torch.float32, None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = config.get_model({}, "")
        for weights in (*network.diffusion_model.parameters(), *network.diffusion_model.buffers()):
            inputs = weights.shape[1:].numel() if weights.ndim > 1 else 10
            weights.data = torch.randn(weights.shape) * inputs**-0.5
    network.requires_grad_(False).eval()
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(network, cpu, cpu)


def conditioning(name: str, seed: int, extra: dict[str, Any] | None = None) -> list[Any]:
    """What a text encoder of the family's would make of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    family = FAMILIES[name]
    more: dict[str, Any] = dict(extra or {})
    if family.pooled is not None:
        more["pooled_output"] = torch.randn(1, family.pooled, generator=generator)
    return [[torch.randn(1, 8, 16, generator=generator), more]]


def noise(name: str, batch: int = 1, seed: int = 5) -> Tensor:
    return torch.randn(batch, *FAMILIES[name].latents, generator=torch.Generator().manual_seed(seed))


class Drawing(NamedTuple):
    """Settings of one run with the host's own guider."""

    family: str
    sampler: str = "euler"
    steps: int = 4
    cfg: float = 5.0
    batch: int = 1
    denoise: float = 1.0
    scheduler: str = "normal"
    latent: Tensor | None = None
    mask: Tensor | None = None
    extra: dict[str, Any] | None = None
    callback: Callable[..., Any] | None = None


def draw(model: Any, drawing: Drawing) -> Tensor:
    """Latents, as KSampler draws them."""
    import comfy.sample

    shape = noise(drawing.family, drawing.batch)
    latent = torch.zeros_like(shape) if drawing.latent is None else drawing.latent
    samples: Tensor = comfy.sample.sample(
        model,
        shape,
        drawing.steps,
        drawing.cfg,
        drawing.sampler,
        drawing.scheduler,
        conditioning(drawing.family, 1, drawing.extra),
        conditioning(drawing.family, 2, drawing.extra),
        latent,
        denoise=drawing.denoise,
        noise_mask=drawing.mask,
        callback=drawing.callback,
        disable_pbar=True,
        seed=9,
    )
    return samples
