"""PickScore: CLIP ViT-H/14 tuned to people's choices in Pick-a-Pic (Kirstain et al. 2023)."""

from pathlib import Path

import torch

from deradiff.rewards.clip import TOKENIZER_FILES, WEIGHT_FILES, ClipReward, clip_model, folder_of, tokenizer_of

PICKSCORE = "yuvalkirstain/PickScore_v1"


def load(model: str | Path | None, device: torch.device, dtype: torch.dtype) -> ClipReward:
    """PickScore as a cosine, about 0.23 for SDXL: the authors' code multiplies it by the logit scale, about 100.

    `model` is a folder or hub id, `PICKSCORE` if None. Raises `ValueError` where files are missing; a tokenizer that is
    missing is that of `clip.CLIP_H`, as in the authors' code.
    """
    folder = folder_of(model or PICKSCORE, [*WEIGHT_FILES, *TOKENIZER_FILES])
    return ClipReward("pickscore", clip_model(folder, device, dtype), tokenizer_of(folder))
