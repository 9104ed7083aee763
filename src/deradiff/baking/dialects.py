"""A LoRA's file in the names of those who read it: diffusers, kohya's tools and ComfyUI, or PEFT.

Strength 1 is the product of the factors in each of them. For diffusers and PEFT alpha is the rank, in every layer. In
kohya's names it is the same number in all layers, and the factors make up for it: diffusers' reader of these names
loses an attention layer's alpha where alphas differ.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from deradiff.anchors import denoiser_of, load_anchor
from deradiff.anchors.adapters import remove_adapter
from deradiff.anchors.checks import unwrapped
from deradiff.anchors.lora_files import PEFT_PREFIX
from deradiff.baking.low_rank import Factors

Dialect = Literal["diffusers", "kohya", "peft"]

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file that diffusers looks for in a folder; kohya's names go into one of that name, too."""


def require_dialect(dialect: Dialect, pipe: Any) -> None:
    """Raise `ValueError` where the model has no names in that dialect, or diffusers no loader for its LoRAs."""
    denoiser = unwrapped(denoiser_of(pipe)[1])
    if dialect == "kohya" and not isinstance(denoiser, UNet2DConditionModel):
        raise ValueError(
            f"kohya's names are written for the UNets of Stable Diffusion and SDXL, and this is a "
            f"{type(denoiser).__name__}: take the dialect 'diffusers', which ComfyUI reads for transformers as well"
        )
    if dialect == "diffusers" and not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} loads no LoRA files in diffusers: take the dialect 'peft'")


def write_lora(
    pipe: Any,
    folder: Path,
    factors: Mapping[str, Factors],
    rest: Mapping[str, Tensor],
    dialect: Dialect,
    note: Mapping[str, str],
    name: str = WEIGHTS,
) -> None:
    """Write factors, by the layers of the pipeline's denoiser and in its precision, into `folder`.

    `rest` are changes of other parameters, which only kohya's names can tell (`.diff`, `.diff_b`, as ComfyUI reads
    them). `note` goes into the header of the file called `name`; PEFT's is `adapter_model.safetensors`.
    """
    component, denoiser = denoiser_of(pipe)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = unwrapped(denoiser).dtype
    plain = {path: tuple(f.to("cpu", dtype).contiguous() for f in pair) for path, pair in factors.items()}
    config = config_of(factors)
    if dialect == "kohya":
        short = _published if isinstance(pipe, StableDiffusionXLPipeline) else str
        state = _kohya({short(path): pair for path, pair in plain.items()})
        for parameter, delta in rest.items():
            path, _, leaf = parameter.rpartition(".")
            end = {"weight": "diff", "bias": "diff_b"}[leaf]
            state[f"lora_unet_{short(path).replace('.', '_')}.{end}"] = delta.to("cpu", dtype).contiguous()
        rank = f"{config['r']}"
        header = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
        save_file(state, folder / name, {**header, **note})
        return
    prefix = PEFT_PREFIX if dialect == "peft" else f"{component}."
    ends = ("lora_A", "lora_B")
    state = {
        f"{prefix}{path}.{end}.weight": f for path, pair in plain.items() for end, f in zip(ends, pair, strict=True)
    }
    if dialect == "peft":
        LoraConfig(**config, inference_mode=True).save_pretrained(str(folder))
        save_file(state, folder / "adapter_model.safetensors", {"format": "pt", **note})
        return
    stated = json.dumps({f"{component}.{key}": value for key, value in config.items()}, sort_keys=False)
    save_file(state, folder / name, {"format": "pt", LORA_ADAPTER_METADATA_KEY: stated, **note})


def config_of(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """PEFT's settings for these factors: each layer its rank, and alpha the same.

    Longer paths come first: PEFT takes the first pattern that a path ends with.
    """
    ranks = {path: len(factors[path][0]) for path in sorted(factors, key=lambda path: (-len(path), path))}
    most = max(ranks.values())
    varied = ranks if len(set(ranks.values())) > 1 else {}
    return {
        "r": most,
        "lora_alpha": most,
        "target_modules": sorted(ranks),
        "rank_pattern": varied,
        "alpha_pattern": dict(varied),
    }


def _kohya(factors: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """`lora_unet_` and the layer's name with underscores; as alpha the largest rank in every layer."""
    state: dict[str, Tensor] = {}
    most = max(len(down) for down, _ in factors.values())
    for path, (down, up) in factors.items():
        layer = f"lora_unet_{path.replace('.', '_')}"
        alpha = torch.tensor(float(most), dtype=torch.float32)
        up = up * (len(down) / most)
        state |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": alpha}
    return state


# SDXL's layers by the names it was published with, which kohya's tools have for it.
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
}
_OF_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)")
_PER_BLOCK = 2
"""`layers_per_block` of SDXL's UNet, which fixes the numbers."""


def _published(path: str) -> str:
    """A layer of SDXL's UNet by its published name. Raises `ValueError` for one that the published model has not."""
    if path in _OUTER:
        return _OUTER[path]
    if match := _MIDDLE.fullmatch(path):
        kind, number, rest = match.groups()
        at, inner = (1, rest) if kind == "attentions" else (2 * int(number), _OF_RESNET.get(rest, rest))
        return f"middle_block.{at}.{inner}"
    if match := _BLOCK.fullmatch(path):
        side, block, kind, number, rest = match.groups()
        i, j = int(block), int(number)
        if kind == "downsamplers":
            return f"input_blocks.{(_PER_BLOCK + 1) * (i + 1)}.0.op"
        at = 1 + (_PER_BLOCK + 1) * i + j if side == "down" else (_PER_BLOCK + 1) * i + j
        if kind == "upsamplers":  # after the last of its block, which has attention in all blocks that are followed
            return f"output_blocks.{(_PER_BLOCK + 1) * i + _PER_BLOCK}.2.conv"
        part, inner = (0, _OF_RESNET.get(rest, rest)) if kind == "resnets" else (1, rest)
        return f"{'input' if side == 'down' else 'output'}_blocks.{at}.{part}.{inner}"
    raise ValueError(f"{path} has no name among the layers of SDXL's published UNet: take the dialect 'diffusers'")


@contextmanager
def wearing_lora(pipe: Any, folder: Path, dialect: Dialect) -> Iterator[None]:
    """`pipe` with the LoRA in `folder` at strength 1, loaded by diffusers or PEFT alone.

    One in kohya's names is read here: diffusers refuses changes of norms and biases, which ComfyUI has no trouble with.
    """
    component, denoiser = denoiser_of(pipe)
    own: Any = unwrapped(denoiser)
    if dialect == "diffusers":
        pipe.load_lora_weights(folder)
        try:
            yield
        finally:
            pipe.unload_lora_weights()
    elif dialect == "peft":
        PeftModel.from_pretrained(own, str(folder))
        try:
            yield
        finally:
            remove_adapter(own, "default")
    else:
        anchor = load_anchor(folder / WEIGHTS, pipe)
        if anchor.adapter:
            own.set_adapter(anchor.adapter)
        else:
            setattr(pipe, component, anchor.module)
        try:
            yield
        finally:
            setattr(pipe, component, denoiser)
            anchor.unload(own)
