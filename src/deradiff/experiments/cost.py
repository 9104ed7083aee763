"""What alignment, a sweep of strengths and realignment cost in floating-point operations (DeRaDiff, §6).

Operations are counted by `torch.utils.flop_counter` on a model without memory (the meta device): matrix products,
convolutions and attention, forward and backward, a multiplication and an addition as two. Elementwise work, the
optimizer, the VAE and the text encoders are not counted; beside a denoiser they are small.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from deradiff.alignment.lora_targets import LORA_TARGETS
from deradiff.worlds import find

TERA = 1e12
EXA = 1e18


@dataclass(frozen=True)
class PaperInputs:
    """What §6 starts from: the hours of one alignment of SDXL, and two A100s at half of their peak in FP16."""

    gpu_hours: float = 336.0
    peak_tflops: float = 312.0
    utilisation: float = 0.5

    @property
    def tflop_hours(self) -> float:
        """TFLOP-hours of one alignment: hours x peak x utilisation."""
        return self.gpu_hours * self.peak_tflops * self.utilisation

    @property
    def exaflops(self) -> float:
        """EFLOPs of one alignment."""
        return self.tflop_hours * 3600 * TERA / EXA


def saved(strengths: int) -> float:
    """The share of alignments that aligning once saves against a sweep: `1 - 1/N`.

    Raises `ValueError` for fewer than one strength.
    """
    if strengths < 1:
        raise ValueError(f"a sweep of {strengths} strengths is none: N must be at least 1")
    return 1 - 1 / strengths


@dataclass(frozen=True)
class DenoiserCost:
    """Floating-point operations of one sample."""

    forward: int
    training: int
    """Forward and backward of what is trained."""


@dataclass(frozen=True)
class Costs:
    """Floating-point operations of the three ways to have N strengths, sampling included."""

    denoiser: DenoiserCost
    alignment: float
    sampling: float
    """Of the images of one strength, by an ordinary model."""
    sweep: float
    realignment: float

    @property
    def saved(self) -> float:
        """The share of the sweep that realignment saves; negative where sampling twice costs more than aligning."""
        return 1 - self.realignment / self.sweep


def denoiser_config(source: str) -> dict[str, Any]:
    """The configuration of the UNet of a folder, a hub id or a world that ships (`digits`). No weights are read.

    Raises `OSError` if it cannot be found, `ValueError` if it is no UNet.
    """
    world = find(source)
    folder = world.reference if world else Path(source)
    if (folder / "model_index.json").is_file() and not (folder / "unet").is_dir():
        raise ValueError(f"{source} denoises with no UNet; costs are counted for UNet2DConditionModel")
    is_unet = (folder / "config.json").is_file()
    config: Any = UNet2DConditionModel.load_config(
        str(folder) if world else source, subfolder=None if is_unet else "unet"
    )
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ValueError(f"{source} is a {config['_class_name']}; costs are counted for UNet2DConditionModel")
    return dict(config)


def denoiser_cost(
    config: dict[str, Any],
    *,
    side: int | None = None,
    lora_rank: int | None = None,
    checkpointing: bool = False,
    lora_targets: Sequence[str] = LORA_TARGETS,
    tokens: int = 77,
) -> DenoiserCost:
    """Count one sample of a UNet with latents of `side` (default: the model's own), all weights or a LoRA trained.

    `checkpointing` recomputes activations in the backward pass. Raises `ValueError` for a side that its levels cannot
    halve, and for a rank below 1.
    """
    side = side or int(config["sample_size"])
    halvings = 2 ** (len(config["block_out_channels"]) - 1)
    if side < 1 or side % halvings:
        raise ValueError(f"latents of {side} x {side} cannot be halved {len(config['block_out_channels']) - 1} times")
    if lora_rank is not None and lora_rank < 1:
        raise ValueError(f"a LoRA of rank {lora_rank} has no weights: take 1 or more, or none to train all weights")
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
        inputs = _inputs(unet, side, tokens)
        with torch.no_grad():
            forward = _counted(lambda: unet.eval()(**inputs))
        if lora_rank is not None:
            unet.requires_grad_(False)
            unet.add_adapter(LoraConfig(r=lora_rank, target_modules=list(lora_targets)))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    training = _counted(lambda: unet.train()(**inputs).sample.square().mean().backward())
    return DenoiserCost(forward, training)


def _inputs(unet: Any, side: int, tokens: int) -> dict[str, Any]:
    config = unet.config
    inputs: dict[str, Any] = {
        "sample": torch.zeros(1, config.in_channels, side, side),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, width), "time_ids": torch.zeros(1, 6)}
    return inputs


def _counted(work: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


Method = Literal["dpo", "denoising"]


def per_example(cost: DenoiserCost, method: Method) -> int:
    """Operations of one training example: a pair for Diffusion-DPO, whose reference is evaluated as well."""
    return 2 * (cost.training + cost.forward) if method == "dpo" else cost.training


def costs(
    cost: DenoiserCost,
    *,
    strengths: int,
    train_steps: int,
    batch: int,
    images: int,
    sampling_steps: int,
    guided: bool = True,
    method: Method = "dpo",
) -> Costs:
    """Aligning at every strength, against aligning once and realigning, `images` sampled at each strength either way.

    Guidance evaluates a denoiser twice per step; realignment evaluates two denoisers. Raises `ValueError` for counts
    below 1 (`images` may be 0).
    """
    counts = {"strengths": strengths, "train_steps": train_steps, "batch": batch, "sampling_steps": sampling_steps}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} = {count}: it must be at least 1")
    if images < 0:
        raise ValueError(f"images = {images}: it must be 0 or more")
    alignment = float(train_steps) * batch * per_example(cost, method)
    sampling = float(images) * sampling_steps * (2 if guided else 1) * cost.forward
    return Costs(cost, alignment, sampling, strengths * (alignment + sampling), alignment + strengths * 2 * sampling)


def record(counted: Costs) -> dict[str, Any]:
    """Everything as plain data."""
    return asdict(counted) | {"saved": counted.saved}
