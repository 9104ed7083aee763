"""Human Preference Score v2: CLIP ViT-H/14 tuned to people's rankings in HPD v2 (Wu et al. 2023, arXiv 2306.09341).

The published checkpoints are pickles of an open_clip model. They are read as tensors alone, renamed to transformers'
CLIP and kept as safetensors.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.rewards.checkpoints import opened, read_checkpoint, require_fit, require_new, write_model
from deradiff.rewards.clip import TOKENIZER_FILES, WEIGHT_FILES, ClipReward, clip_model, tokenizer_of
from deradiff.rewards.pixels import LEVELS, clip_pixels, crop, rounded

HPS = "xswu/HPSv2"
CHECKPOINTS = {"hps-v2.0": "HPS_v2_compressed.pt", "hps-v2.1": "HPS_v2.1_compressed.pt"}
"""The files of `HPS`, by the reward's name. Scores of the two versions cannot be compared."""

VIT_H_14: dict[str, Any] = {
    "projection_dim": 1024,
    # An end-of-text id of 2 is transformers' sign for pooling as open_clip does, at the highest token.
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "projection_dim": 1024,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 1024,
    },
}
"""open_clip's ViT-H-14 in the fields of transformers' `CLIPConfig`."""


def load_v2_0(model: str | Path | None, device: torch.device, dtype: torch.dtype) -> ClipReward:
    """HPS v2.0 as a cosine, about 0.27; `model` is as in `load`."""
    return load("hps-v2.0", model, device, dtype)


def load_v2_1(model: str | Path | None, device: torch.device, dtype: torch.dtype) -> ClipReward:
    """HPS v2.1 as a cosine, about 0.29; `model` is as in `load`."""
    return load("hps-v2.1", model, device, dtype)


def load(name: str, model: str | Path | None, device: torch.device, dtype: torch.dtype) -> ClipReward:
    """The version `name` of HPS from `model`: the .pt file, a folder or hub id that has it, or a converted folder.

    None is `HPS`. A .pt file is converted once, into the folder `checkpoints.kept_at` says; the tokenizer is taken from
    beside it, or is that of `clip.CLIP_H`, the same. Raises `ValueError` where files are missing, or no ViT-H/14 of
    open_clip.
    """
    published, config = CHECKPOINTS[name], "config.json"
    folder, beside = opened(
        model or HPS,
        published,
        [*WEIGHT_FILES, *TOKENIZER_FILES],
        lambda folder: (folder / config).is_file() and not (folder / published).is_file(),
        partial(convert, config=VIT_H_14),
    )
    return ClipReward(name, clip_model(folder, device, dtype), tokenizer_of(beside), hps_pixels)


def resized_exactly(images: Float[Tensor, "batch 3 _ _"], side: int) -> Float[Tensor, "batch 3 {side} {side}"]:
    """Resized and cropped as the authors' code does it, in [0, 1].

    It resizes a float tensor, so that nothing is rounded or clipped after that: torchvision 0.17 or later, whose
    interpolation is antialiased. Half a pixel too much of a margin goes to the even side.
    """
    rows, columns = (weights.to(images) for weights in crop(images, side, lambda margin: round(margin / 2)))
    return rows @ (rounded(LEVELS * images) / LEVELS) @ columns.T


hps_pixels = partial(clip_pixels, resized=resized_exactly)
"""What the authors' code makes of images; the arguments and errors are those of `pixels.clip_pixels`."""


# -- from open_clip ---------------------------------------------------------------------------------------------------

RENAMED = (
    (r"^(?!visual\.)", "text_model."),
    (r"^visual\.", "vision_model."),
    (r"^text_model\.(logit_scale|text_projection)$", r"\1"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^vision_model\.proj$", "visual_projection.weight"),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.(token_embedding\.weight|class_embedding)$", r".embeddings.\1"),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.ln_final\.", ".final_layer_norm."),
    (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.transformer\.resblocks\.", ".encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
"""What to call a tensor of open_clip's in transformers, one substitution after the other."""


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip's `CLIP` as one of transformers' `CLIPModel`; names nobody knows are kept.

    Queries, keys and values, one matrix there, are apart here; the projections, multiplied from the right there, are
    transposed. The prefix `module.` of distributed training goes.
    """
    converted: dict[str, Tensor] = {}
    for old, tensor in tensors.items():
        name = old.removeprefix("module.")
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if "self_attn.in_proj_" in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            converted |= {name.replace("in_proj_", f"{letter}_proj."): part.contiguous() for letter, part in parts}
        else:
            converted[name] = tensor.T.contiguous() if name.endswith("_projection.weight") else tensor.contiguous()
    return converted


def convert(checkpoint: str | Path, folder: str | Path, config: Mapping[str, Any] = VIT_H_14) -> Path:
    """Write the open_clip `checkpoint` as a transformers CLIP model into the new `folder`, in its own precision.

    `config` are the fields of the `CLIPConfig` it has. The folder appears when it is whole. Raises `ValueError` for a
    checkpoint that does not fit, and `FileExistsError` for a folder that is there.
    """
    from transformers import CLIPConfig, CLIPModel

    folder = require_new(folder)
    described = CLIPConfig(**config)
    with torch.device("meta"):
        expected = CLIPModel(described).state_dict()
    tensors = renamed(read_checkpoint(Path(checkpoint).expanduser()))
    require_fit(tensors, expected, "the checkpoint is not open_clip's ViT-H-14, which HPS v2 is")
    return write_model(tensors, described, folder)
