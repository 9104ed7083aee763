"""ImageReward: BLIP tuned to experts' rankings of pictures that were generated for one prompt (Xu et al. 2023).

arXiv 2304.05977. The prompt's tokens look at the picture through cross attention, and what the first of them has become
goes through five linear layers with nothing between them. The published checkpoint is a pickle of the authors' modules:
it is read as tensors alone, renamed to transformers' BLIP and kept as safetensors.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from deradiff.files.models import reading_model
from deradiff.rewards.aesthetic import LINEAR, rating_layers
from deradiff.rewards.checkpoints import opened, read_checkpoint, require_fit, require_new, write_model
from deradiff.rewards.clip import tokenizer_in, tokens_of
from deradiff.rewards.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    Images,
    clip_pixels,
    require_pairs,
    resized_in_levels,
    resized_shape,
)

IMAGE_REWARD = "THUDM/ImageReward"
"""The name that the authors' code asks for; the organisation now calls itself zai-org."""
CHECKPOINT = "ImageReward.pt"
CONVERTED = ("config.json", "model.safetensors")

BERT = "google-bert/bert-base-uncased"
"""Whose tokenizer it is; the checkpoint's repository has none."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
LONGEST = 35
"""Tokens of a prompt that are read, its two ends among them."""

SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
"""What the authors subtract from the last layer's output, and divide by."""

BLIP_L: dict[str, Any] = {
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        # Only a decoder has cross attention in transformers; the call says that attention looks both ways.
        "is_decoder": True,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
}
"""The authors' BLIP in the fields of transformers' `BlipConfig`, whose defaults are other heads and another epsilon."""


class ImageReward:
    """How well people would like a picture for its prompt: the authors' four example pictures have 0.58 to -2.03.

    `vision` and `text` are transformers' `BlipVisionModel` and `BlipTextModel`, `layers` make a score of the text's
    first state; all are frozen. `tokenizer` is what `tokenizer_of` gives.

    Raises `ValueError` for a tokenizer of another vocabulary than the text model's.
    """

    name = "image-reward"

    def __init__(self, vision: Any, text: Any, layers: nn.Module, tokenizer: Any) -> None:
        self.vision = vision.requires_grad_(False).eval()
        self.text = text.requires_grad_(False).eval()
        self.layers = layers.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        if len(tokenizer) != text.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and the model {text.config.vocab_size}: it must be that of "
                f"{BERT}"
            )

    @classmethod
    def load(cls, model: str | Path | None, device: torch.device, dtype: torch.dtype) -> "ImageReward":
        """The reward from `model`: the .pt file, a folder or hub id that has it, or a converted folder.

        None is `IMAGE_REWARD`. A .pt file is converted once, into the folder `checkpoints.kept_at` says. The tokenizer
        is taken from beside it, or else is that of `BERT`. The last layers stay in float32 where `dtype` is half
        precision.

        Raises `ValueError` where files are missing, or do not fit.
        """
        folder, beside = opened(
            model or IMAGE_REWARD,
            CHECKPOINT,
            [*CONVERTED, *TOKENIZER_FILES],
            lambda folder: all((folder / name).is_file() for name in CONVERTED),
            partial(convert, config=BLIP_L),
        )
        return cls(*models(folder, device, dtype), tokenizer_of(beside))

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """Score `images`, each with its prompt, in float32 at least; differentiable in a tensor of images.

        An image with NaN scores NaN. Raises `ValueError` if there is not one prompt per image, and for images that
        `pixels.clip_pixels` refuses.
        """
        require_pairs(images, prompts)
        side = self.vision.config.image_size
        pixels = torchvision_pixels(images, side, CLIP_MEAN, CLIP_STD, self.vision.device, self.vision.dtype)
        tokens = tokens_of(self, prompts, LONGEST).to(self.text.device)
        states = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        first = states[:, 0].to(torch.promote_types(states.dtype, torch.float32))
        return (self.layers(first)[:, 0] - SCORE_MEAN) / SCORE_STD


def resized_evenly(images: Float[Tensor, "batch 3 _ _"], side: int) -> Float[Tensor, "batch 3 {side} {side}"]:
    """Resized and cropped as torchvision, which the authors use, does it with PIL images.

    It differs from CLIP's processor in half a pixel of margin: that gives it to the lower side, torchvision to the even
    one.
    """
    # Where the even side is the upper one, it is the lower one in the picture's mirror image.
    margins = (length - side for length in resized_shape(images, side))
    mirrored = [axis for axis, margin in zip((2, 3), margins, strict=True) if margin % 4 == 3]
    return resized_in_levels(images.flip(mirrored), side).flip(mirrored)


torchvision_pixels = partial(clip_pixels, resized=resized_evenly)
"""What torchvision makes of images; the arguments and errors are those of `pixels.clip_pixels`."""


# -- loading ----------------------------------------------------------------------------------------------------------


def models(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, nn.Module]:
    """Vision, text and last layers of a converted folder. Raises `ValueError` where tensors do not fit its config."""
    from transformers import BlipConfig, BlipTextModel, BlipVisionModel

    with reading_model(folder):
        config = BlipConfig.from_pretrained(folder, local_files_only=True)
        tensors = load_file(folder / "model.safetensors")
        require_whole(tensors, config, folder)
        vision, text = (
            kind.from_pretrained(None, config=part, state_dict=below(tensors, prefix), dtype=dtype, **options)
            for kind, part, prefix, options in (
                (BlipVisionModel, config.vision_config, "vision_model.", {}),
                (BlipTextModel, config.text_config, "text_model.", {"add_pooling_layer": False}),
            )
        )
        layers = rating_layers(tensors, config.text_config.hidden_size)
    vision, text = vision.to(device), text.to(device)
    return vision, text, layers.to(device, torch.promote_types(dtype, torch.float32))


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in `folder`, that of `BERT` where it has none, with the two tokens that BLIP adds.

    Raises `ValueError` if the hub does not give that either.
    """
    from transformers import BertTokenizer

    tokenizer = tokenizer_in(folder, BertTokenizer, BERT, TOKENIZER_FILES, ("vocab.txt",))
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer


# -- from the authors' modules ----------------------------------------------------------------------------------------

UNUSED = r"^blip\.(vision_proj|text_proj)\.|\.position_ids$"
"""Tensors of the checkpoint that the score does not depend on: BLIP's contrastive heads, and a list of places."""

RENAMED = (
    (r"^blip\.visual_encoder\.", "vision_model."),
    (r"^blip\.text_encoder\.", "text_model."),
    (r"^mlp\.layers\.", "layers."),
    (r"^vision_model\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_model\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^vision_model\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.norm\.", "vision_model.post_layernorm."),
    (r"^vision_model\.blocks\.", "vision_model.encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)
"""What to call a tensor of the authors' in transformers, one substitution after the other."""


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict as `vision_model.*`, `text_model.*`, `layers.*`; names nobody knows are kept."""
    converted: dict[str, Tensor] = {}
    for old, tensor in tensors.items():
        if re.search(UNUSED, old):
            continue
        name = old
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor.contiguous()
    return converted


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def expected(config: Any) -> dict[str, Tensor]:
    """The tensors, without values, that the two models of a `BlipConfig` have."""
    from transformers import BlipTextModel, BlipVisionModel

    with torch.device("meta"):
        vision = BlipVisionModel(config.vision_config).state_dict()
        text = BlipTextModel(config.text_config, add_pooling_layer=False).state_dict()
    return {f"vision_model.{name}": tensor for name, tensor in vision.items()} | {
        f"text_model.{name}": tensor for name, tensor in text.items()
    }


def require_whole(tensors: Mapping[str, Tensor], config: Any, source: Path) -> None:
    """Raise `ValueError` unless `tensors` of `source` are those of the two models, and of the last layers.

    What is missing or misshapen among the last layers, `aesthetic.rating_layers` says.
    """
    layers = {f"layers.{place}.{part}" for place in LINEAR for part in ("weight", "bias")}
    towers = {name: tensor for name, tensor in tensors.items() if name not in layers}
    require_fit(towers, expected(config), f"{source} is not ImageReward")


def convert(checkpoint: str | Path, folder: str | Path, config: Mapping[str, Any] = BLIP_L) -> Path:
    """Write the authors' `checkpoint` as safetensors in transformers' names into the new `folder`, in its precision.

    `config` are the fields of the `BlipConfig` it has. The folder appears when it is whole. Raises `ValueError` for a
    checkpoint that does not fit, and `FileExistsError` for a folder that is there.
    """
    from transformers import BlipConfig

    checkpoint, folder = Path(checkpoint).expanduser(), require_new(folder)
    described = BlipConfig(**config)
    tensors = renamed(read_checkpoint(checkpoint))
    require_whole(tensors, described, checkpoint)
    rating_layers(tensors, described.text_config.hidden_size)
    return write_model(tensors, described, folder)
