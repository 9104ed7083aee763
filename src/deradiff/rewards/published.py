"""Which files of the hub the published rewards are loaded from: what there has to be before one is needed."""

from __future__ import annotations

from typing import NamedTuple

from deradiff.rewards import aesthetic, clip, hps, image_reward, pickscore


class HubFiles(NamedTuple):
    """Files of one repository."""

    repo: str
    needed: tuple[tuple[str, ...], ...]
    """Of each of these groups one file has to be there."""
    download: tuple[str, ...]
    """What to fetch, as patterns."""


WEIGHTS = (("config.json",), ("model.safetensors", "model.safetensors.index.json"))
CLIP_TOKENIZER = (("tokenizer.json", "vocab.json"),)

_CLIP_FILES = (*clip.WEIGHT_FILES, *clip.TOKENIZER_FILES)
_OF_CLIP_H = HubFiles(clip.CLIP_H, CLIP_TOKENIZER, clip.TOKENIZER_FILES)
_OF_BERT = HubFiles(image_reward.BERT, (("tokenizer.json", "vocab.txt"),), image_reward.TOKENIZER_FILES)


def _hps(name: str) -> tuple[HubFiles, ...]:
    checkpoint = hps.CHECKPOINTS[name]
    return HubFiles(hps.HPS, ((checkpoint,),), (checkpoint,)), _OF_CLIP_H


FILES: dict[str, tuple[HubFiles, ...]] = {
    "pickscore": (HubFiles(pickscore.PICKSCORE, (*WEIGHTS, *CLIP_TOKENIZER), _CLIP_FILES),),
    "hps-v2.0": _hps("hps-v2.0"),
    "hps-v2.1": _hps("hps-v2.1"),
    "clip": (HubFiles(clip.CLIP_H, (*WEIGHTS, *CLIP_TOKENIZER), _CLIP_FILES),),
    "aesthetic": (HubFiles(aesthetic.AESTHETIC, WEIGHTS, ("config.json", "model.safetensors")),),
    "image-reward": (
        HubFiles(image_reward.IMAGE_REWARD, ((image_reward.CHECKPOINT,),), (image_reward.CHECKPOINT,)),
        _OF_BERT,
    ),
}
"""By the names of `rewards.LEARNED`."""
