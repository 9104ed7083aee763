"""Extractors: transformers' own computation on tiny random models, the digits' features, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from deradiff.measures import features
from deradiff.worlds.digits.classifier import features as digits_features
from deradiff.worlds.digits.classifier import recover_ink_map
from deradiff.worlds.digits.data import render
from messages import naming

SIZES = [(300, 300), (90, 131), (260, 400), (300, 257)]


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def shaken(model: Any) -> Any:
    """Far from the initial zeros and ones, so that features differ."""
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(1)
    place = tmp_path_factory.mktemp("models")
    dinov2 = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vision = {**small, "patch_size": 8, "image_size": 32}
    shaken(Dinov2Model(dinov2)).save_pretrained(place / "dinov2")
    both = CLIPConfig(projection_dim=16, text_config={**small, "vocab_size": 50}, vision_config=vision)
    shaken(CLIPModel(both)).save_pretrained(place / "clip")  # both towers, as the published ones are
    tower = CLIPVisionConfig(projection_dim=16, **vision)
    shaken(CLIPVisionModelWithProjection(tower)).save_pretrained(place / "tower")
    return {path.name: path for path in place.iterdir()}


def by_transformers(name: str, folder: Path) -> torch.Tensor:
    if name == "dinov2":
        processor = BitImageProcessorPil(
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        )
        model = Dinov2Model.from_pretrained(folder)
        with torch.no_grad():
            return model(**processor(pictures(), return_tensors="pt")).last_hidden_state[:, 0]
    clip = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    prepared = clip(pictures(), return_tensors="pt")
    with torch.no_grad():
        if name == "clip":
            return CLIPModel.from_pretrained(folder).get_image_features(**prepared).pooler_output
        return CLIPVisionModelWithProjection.from_pretrained(folder)(**prepared).image_embeds


@pytest.mark.parametrize("name", ["dinov2", "clip", "tower"])
def test_features_are_transformers_own(folders: dict[str, Path], name: str) -> None:
    kind = "clip" if name == "tower" else name
    extractor = features.load(f"{kind}={folders[name]}")
    assert isinstance(extractor, features.Extractor) and extractor.name == f"{kind}={folders[name]}"
    expected, found = by_transformers(name, folders[name]), extractor(pictures())
    assert found.dtype == torch.float32 and found.device.type == "cpu" and not found.requires_grad
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std(0).mean() > 1e-3
    for image, features_of_one in zip(pictures(), expected, strict=True):
        alone = extractor(as_tensor(image).requires_grad_())
        assert not alone.requires_grad
        torch.testing.assert_close(alone[0], features_of_one, atol=1e-5, rtol=1e-5)


def test_batches_change_nothing_and_are_bounded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(7, 3, 40, 40)
    whole = features.load("clip", model=folders["clip"])(images)
    monkeypatch.setattr(features, "BATCH", 3)
    extractor = features.load("clip", model=folders["clip"])
    assert isinstance(extractor, features.Network)
    sizes: list[int] = []
    tower = extractor.model.get_submodule("visual_projection")
    tower.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(extractor(images), whole)
    assert sizes == [3, 3, 1]


def test_half_precision_comes_back_as_float32(folders: dict[str, Path]) -> None:
    half = features.load("clip", model=folders["clip"], dtype=torch.bfloat16)(pictures())
    full = features.load("clip", model=folders["clip"])(pictures())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.05 * float(full.abs().max()), rtol=0)
    assert not torch.equal(half, full)


def test_the_digits_are_what_their_classifier_sees() -> None:
    images = render("held-out", 40, seed=3).images
    extractor = features.load("digits")
    assert isinstance(extractor, features.Extractor) and extractor.name == "digits"
    torch.testing.assert_close(extractor(images), digits_features(recover_ink_map(images)))
    eight_bits = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
    torch.testing.assert_close(
        extractor([Image.fromarray(image) for image in eight_bits]), extractor(images), atol=0.05, rtol=0
    )


def test_what_cannot_be_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("'vgg'", "inception, dinov2, clip, digits")):
        features.load("vgg")
    with pytest.raises(ValueError, match=naming("digits", "'here'")):
        features.load("digits=here")
    with pytest.raises(ValueError, match=naming("'clip='")):
        features.load("clip=")
    with pytest.raises(ValueError, match=naming("'clip=here'", "model='there'")):
        features.load("clip=here", model="there")
    with pytest.raises(ValueError, match=naming("'clip'", "DINOv2")):
        features.load("dinov2", model=folders["clip"])
    with pytest.raises(ValueError, match=naming("config.json", "model.safetensors")):
        features.load("dinov2", model=tmp_path)
    with pytest.raises(ValueError, match=naming("'dinov2'", "CLIP")):
        features.load("clip", model=folders["dinov2"])
    broken = tmp_path / "broken"
    shutil.copytree(folders["tower"], broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=naming(1, "CLIPVisionModelWithProjection", "visual_projection.weight")):
        features.load("clip", model=broken)


def test_images_that_are_refused(folders: dict[str, Path]) -> None:
    for extractor in (features.load("digits"), features.load("clip", model=folders["clip"])):
        with pytest.raises(ValueError, match="no images"):
            extractor(torch.rand(0, 3, 32, 32))
        with pytest.raises(ValueError, match=naming("x / 2 + 0.5")):
            extractor(2 * torch.rand(2, 3, 32, 32) - 1)
    with pytest.raises(ValueError, match=naming("32 x 48", "32 x 32")):
        features.load("digits")(torch.rand(2, 3, 32, 48))
    with pytest.raises(ValueError, match="90 x 131"):
        features.load("digits")([Image.new("RGB", (32, 32)), pictures()[1]])
