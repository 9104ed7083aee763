"""What images are compared by: features of a network that `load` finds by name. One protocol.

The network decides what counts as different. FID is defined on Inception's features; distances between DINOv2's agree
better with what people judge (Stein et al. 2023); CLIP's follow what words would say. Numbers of different extractors
cannot be compared.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.files.models import model_of, reading_model
from deradiff.measures import inception
from deradiff.rewards.clip import folder_of, require_weights
from deradiff.rewards.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    Images,
    batches,
    clip_pixels,
    normalized,
    resized_in_levels,
)

__all__ = ["COMPUTED", "EXTRACTORS", "Extractor", "load"]

BATCH = 16
"""Images that are prepared and go through a network at a time; of 1024 x 1024 pixels they take about 1 GB meanwhile."""

DINOV2 = "facebook/dinov2-base"
CLIP = "openai/clip-vit-large-patch14"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DINOV2_RESIZED, DINOV2_SIDE = 256, 224
"""DINOv2's processor resizes the shortest side to the one and keeps a centre of the other."""


@runtime_checkable
class Extractor(Protocol):
    """Images in [0, 1] to one feature vector each."""

    name: str

    def __call__(self, images: Images) -> Float[Tensor, "image feature"]:
        """The features of `images`, a float tensor or PIL images, on the CPU in float32 at least, without gradients."""
        ...


class Network:
    """An extractor that is a network: `pixels` prepares a batch for it, `features` reads its output."""

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        pixels: Callable[[Images], Float[Tensor, "part 3 _ _"]],
        features: Callable[[Float[Tensor, "part 3 _ _"]], Float[Tensor, "part feature"]],
    ) -> None:
        self.name, self.pixels, self.features = name, pixels, features
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, images: Images) -> Float[Tensor, "image feature"]:
        """The features of `images`, `BATCH` at a time, on the CPU in float32 at least.

        An image with NaN has features of NaN. Raises `ValueError` for no images, and for those that
        `rewards.pixels.clip_pixels` refuses.
        """
        parts = [self.features(self.pixels(part)) for part in parts_of(images)]
        return torch.cat([part.to("cpu", torch.promote_types(part.dtype, torch.float32)) for part in parts])


def parts_of(images: Images) -> Iterator[Images]:
    """At most `BATCH` images at a time. Raises `ValueError` for none."""
    if len(images) == 0:
        raise ValueError("there are no images to extract features of")
    for start in range(0, len(images), BATCH):
        yield images[start : start + BATCH]


# -- loading ----------------------------------------------------------------------------------------------------------


def load_inception(model: str | Path | None, device: torch.device, dtype: torch.dtype) -> Network:
    """`pool3` of FID's Inception v3, 2,048 features; see `inception.load` for `model` and errors."""
    network = inception.load(model).to(device, dtype)
    return Network("inception", network, lambda images: inception.inception_pixels(images, device, dtype), network)


def load_dinov2(model: str | Path | None, device: torch.device, dtype: torch.dtype) -> Network:
    """The class token of `DINOV2`, 768 features, or of another DINOv2, a folder or hub id, after the last layer norm.

    Raises `ValueError` where files or tensors are missing, or if it is another kind of model.
    """
    from transformers import AutoModel

    folder = folder_with_weights(model or DINOV2)
    require_kind(folder, "DINOv2", ("dinov2", "dinov2_with_registers"))
    network = whole(AutoModel, folder, device, dtype)

    def pixels(images: Images) -> Float[Tensor, "part 3 _ _"]:
        # A centre of the centre is the same pixels that the processor keeps, also where a side is odd.
        margin = (DINOV2_RESIZED - DINOV2_SIDE) // 2
        resized = torch.cat([resized_in_levels(part, DINOV2_RESIZED) for part in batches(images, device)])
        return normalized(resized[..., margin:-margin, margin:-margin], IMAGENET_MEAN, IMAGENET_STD).to(dtype)

    return Network("dinov2", network, pixels, lambda prepared: network(pixel_values=prepared).pooler_output)


def load_clip(model: str | Path | None, device: torch.device, dtype: torch.dtype) -> Network:
    """The image embedding of `CLIP`, 768 features, or of another CLIP model, a folder or hub id; not normalised.

    A model of both towers will do, as published, or one of the image tower alone. Raises `ValueError` where files or
    tensors are missing, or if it is another kind of model.
    """
    from transformers import CLIPModel, CLIPVisionModelWithProjection

    folder = folder_with_weights(model or CLIP)
    has_both_towers = require_kind(folder, "CLIP", ("clip", "clip_vision_model")) == "clip"
    network = whole(CLIPModel if has_both_towers else CLIPVisionModelWithProjection, folder, device, dtype)
    if has_both_towers:
        del network.text_model  # a third of the weights, which would be held for nothing
    side = (network.config.vision_config if has_both_towers else network.config).image_size

    def pixels(images: Images) -> Float[Tensor, "part 3 _ _"]:
        return clip_pixels(images, side, CLIP_MEAN, CLIP_STD, device, dtype)

    def embedding(prepared: Float[Tensor, "part 3 _ _"]) -> Float[Tensor, "part feature"]:
        if has_both_towers:
            return network.get_image_features(pixel_values=prepared).pooler_output
        return network(pixel_values=prepared).image_embeds

    return Network("clip", network, pixels, embedding)


def require_kind(folder: Path, family: str, kinds: tuple[str, ...]) -> str:
    """The type of the model in `folder`. Raises `ValueError` unless it is one of `kinds`."""
    from transformers import AutoConfig

    with reading_model(folder):
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if kind not in kinds:
        raise ValueError(f"{folder} holds a model of the type {kind!r}, and not a {family}")
    return kind


def folder_with_weights(model: str | Path) -> Path:
    """The folder `model`, or the hub's copy. Raises `ValueError` where there is no config or no safetensors."""
    folder = folder_of(
        model, ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    )
    require_weights(folder)
    return folder


def whole(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A transformers model of that class. Raises `ValueError` where the folder lacks tensors of it."""
    with reading_model(folder):
        network, loading = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    absent = sorted(loading["missing_keys"])
    if absent:
        raise ValueError(f"{folder} lacks {len(absent)} tensors of {kind.__name__}, {absent[0]} for one")
    return network.to(device)


EXTRACTORS: dict[str, Callable[[str | Path | None, torch.device, torch.dtype], Network]] = {
    "inception": load_inception,
    "dinov2": load_dinov2,
    "clip": load_clip,
}
"""Extractors that are networks, by name: what loads one from `(model, device, dtype)`."""

COMPUTED: dict[str, str] = {"digits": "deradiff.worlds.digits.extractor:DigitsExtractor"}
"""Extractors that are formulas, by name: the class."""


def load(
    name: str,
    *,
    model: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Extractor:
    """The extractor of that name: one of `EXTRACTORS`, or one of `COMPUTED`.

    `model` is a folder or a hub id to load instead of the published one (for "inception", the weights' file or its
    folder); `load("dinov2=FOLDER")` is short for it. Parameters are frozen, on `device` (the CPU if None) in `dtype`
    (float32 if None).

    Raises `ValueError` for an unknown name, or a `model` for a formula.
    """
    kind, chosen = model_of(name, model, EXTRACTORS, COMPUTED, "extractor")
    if kind in COMPUTED:
        extractor: Extractor = resolve_name(COMPUTED[kind])()
        return extractor
    place = torch.device("cpu" if device is None else device)
    network = EXTRACTORS[kind](chosen, place, torch.float32 if dtype is None else dtype)
    if chosen is not None:
        network.name = f"{kind}={chosen}"  # features of one model are not to be taken for another's
    return network
