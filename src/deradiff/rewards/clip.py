"""CLIP score: how well a picture fits its prompt, the cosine of CLIP's two embeddings (Hessel et al. 2021).

In the scale of the papers on preference alignment, about 0.37 for SDXL: the bare cosine of OpenCLIP's ViT-H/14, not
multiplied by 2.5 or by the model's logit scale. PickScore and HPS v2 are this same reward with other weights.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from deradiff.files.models import reading_model
from deradiff.files.waiting import from_the_hub
from deradiff.rewards.pixels import CLIP_MEAN, CLIP_STD, Images, clip_pixels, require_pairs
from deradiff.sampling.truncation import watched

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""OpenCLIP ViT-H/14 of LAION-2B: weights, and the tokenizer that its descendants share."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
WEIGHT_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors")


class ClipReward:
    """The cosine of a CLIP model's embeddings of image and prompt, in [-1, 1].

    `model` is a transformers `CLIPModel`, which is frozen; `tokenizer` its tokenizer; `pixels` makes of images what the
    model was trained on.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, pixels: Callable[..., Float[Tensor, "_ 3 _ _"]] = clip_pixels
    ) -> None:
        self.name, self.tokenizer, self.pixels = name, tokenizer, pixels
        self.model = model.requires_grad_(False).eval()

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
        """Score `images`, each with its prompt, in float32 at least; differentiable in a tensor of images.

        An image with NaN scores NaN. Raises `ValueError` if there is not one prompt per image, and for images that
        `pixels.clip_pixels` refuses.
        """
        require_pairs(images, prompts)
        return (self.embed_images(images) * self.embed_prompts(prompts)).sum(1)

    def embed_images(self, images: Images) -> Float[Tensor, "batch embedding"]:
        """Unit vectors of the images."""
        side = self.model.config.vision_config.image_size
        pixels = self.pixels(images, side, CLIP_MEAN, CLIP_STD, self.model.device, self.model.dtype)
        return unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    def embed_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "batch embedding"]:
        """Unit vectors of the prompts, cut at the model's context length, with a warning (`truncation.PromptCut`)."""
        # Attention is causal and padding is on the right: what pads, and how far, does not reach the end of the text.
        tokens = tokens_of(self, prompts, self.model.config.text_config.max_position_embeddings)
        return unit(self.model.get_text_features(input_ids=tokens.input_ids.to(self.model.device)).pooler_output)


def tokens_of(reward: Any, prompts: Sequence[str], longest: int) -> Any:
    """The tokens of `prompts`, cut at `longest`, with a warning (`truncation.PromptCut`)."""
    with watched(reward, {f"the reward {reward.name}": reward.tokenizer}):
        form = {"padding": True, "padding_side": "right", "truncation": True, "return_tensors": "pt"}
        return reward.tokenizer(list(prompts), max_length=longest, **form)


def unit(embeddings: Float[Tensor, "batch embedding"]) -> Float[Tensor, "batch embedding"]:
    """Of length one, in float32 at least."""
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)


# -- loading ----------------------------------------------------------------------------------------------------------


def load(model: str | Path | None, device: torch.device, dtype: torch.dtype) -> ClipReward:
    """The CLIP score of `model`, a folder or hub id of a transformers CLIP model; of `CLIP_H` if None.

    Raises `ValueError` where files are missing.
    """
    folder = folder_of(model or CLIP_H, [*WEIGHT_FILES, *TOKENIZER_FILES])
    return ClipReward("clip", clip_model(folder, device, dtype), tokenizer_of(folder))


def folder_of(model: str | Path, files: Sequence[str]) -> Path:
    """The folder `model`, or a local copy of these files of the hub's model of that id.

    Raises `ValueError` where there is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        with from_the_hub(str(model)):
            return Path(snapshot_download(str(model), allow_patterns=list(files)))
    except Exception as error:  # the hub's own errors, and those of the library that it is reached by
        raise ValueError(
            f"{str(model)!r} is neither a folder here ({folder.absolute()}) nor a model that the hub gave "
            f"({type(error).__name__}: {error}). Without the hub, pass a folder with its files."
        ) from error


def clip_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The `CLIPModel` of a folder, on `device` in `dtype`. Raises `ValueError` where files or tensors are missing."""
    from transformers import CLIPModel

    require_weights(folder)
    with reading_model(folder):
        model, loading = CLIPModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    absent = sorted(loading["missing_keys"])
    if absent:
        raise ValueError(
            f"{folder} is not a whole CLIP model: {len(absent)} tensors are missing, {absent[0]} for one. A reward "
            "needs both towers and their projections, all that transformers' CLIPModel has."
        )
    return model.to(device)


def require_weights(folder: Path) -> None:
    """Raise `ValueError` unless `folder` has a config and weights in safetensors."""
    absent = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        absent.append("model.safetensors")
    if absent:
        raise ValueError(
            f"{folder} has no {' and no '.join(absent)}: a model's folder is what transformers' save_pretrained writes"
        )


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in `folder`, that of `CLIP_H` where it has none. Raises as `tokenizer_in` does."""
    from transformers import CLIPTokenizer

    return tokenizer_in(folder, CLIPTokenizer, CLIP_H, TOKENIZER_FILES, ("vocab.json", "merges.txt"))


def tokenizer_in(folder: Path, kind: Any, model: str, files: Sequence[str], vocabulary: Sequence[str]) -> Any:
    """The tokenizer of class `kind` in `folder`, that of the hub's `model` where it has none.

    It is there with tokenizer.json or with the files of its `vocabulary`; without them transformers makes one that
    knows no word. Raises `ValueError` if the hub does not give these `files` either.
    """

    def has_tokenizer(place: Path) -> bool:
        return (place / "tokenizer.json").is_file() or all((place / name).is_file() for name in vocabulary)

    if not has_tokenizer(folder):
        advice = (
            f"no tokenizer in {folder}: there is neither tokenizer.json nor {' with '.join(vocabulary)}. Copy these "
            f"files there from {model}"
        )
        try:
            folder = folder_of(model, files)
        except ValueError as error:
            raise ValueError(f"{advice}. It could not be had from the hub: {error}") from error
        if not has_tokenizer(folder):
            raise ValueError(f"{advice}. The copy in the hub's cache, {folder}, has none either.")
    with reading_model(folder):
        return kind.from_pretrained(folder, local_files_only=True)
