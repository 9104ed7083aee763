"""CLIP score, PickScore and the aesthetic predictor, against transformers' own computation on tiny random models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection as Tower
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from deradiff import rewards
from deradiff.rewards import clip, pickscore
from deradiff.rewards.clip import ClipReward
from messages import naming
from small_clip import (
    CONTEXT,
    END,
    PROMPTS,
    SIDE,
    as_tensor,
    config,
    model,
    pictures,
    spelt,
    tokenizer,
    words,
    written,
    written_predictor,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("clip"))


def by_transformers(images: Sequence[Image.Image], prompts: Sequence[str], made: Any) -> torch.Tensor:
    """Processor, tokenizer and model as in transformers' documentation; the logit scale taken out again."""
    prepare = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = prepare(list(images), return_tensors="pt")["pixel_values"]
    tokens = tokenizer()(list(prompts), padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        found = made(pixel_values=pixels, **tokens)
    return found.logits_per_image.diagonal() / made.logit_scale.exp()


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_the_score_is_the_cosine(folder: Path, name: str) -> None:
    reward, images, prompts = rewards.load(f"{name}={folder}"), pictures(), spelt(PROMPTS)
    assert isinstance(reward, rewards.Reward) and isinstance(reward, ClipReward) and reward.name == f"{name}={folder}"
    expected = by_transformers(images, prompts, model())
    torch.testing.assert_close(reward(images, prompts), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.05
    for image, prompt, score in zip(images, prompts, expected, strict=True):
        torch.testing.assert_close(reward(as_tensor([image]), [prompt]), score[None], atol=1e-5, rtol=0)


@pytest.mark.parametrize("end", [END, 2])
@pytest.mark.parametrize("pad", ["!", "<|endoftext|>"])
def test_neither_padding_nor_neighbours_nor_the_way_of_pooling_matter(end: int, pad: str) -> None:
    reward = ClipReward("clip", model(end=end), tokenizer(pad_token=pad))
    together = reward.embed_prompts(spelt(PROMPTS))
    alone = torch.cat([reward.embed_prompts([prompt]) for prompt in spelt(PROMPTS)])
    usual = ClipReward("clip", model(), tokenizer()).embed_prompts(spelt(PROMPTS))
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together, usual, atol=1e-6, rtol=0)


def test_prompts_are_cut_at_the_context_and_still_end() -> None:
    reward = ClipReward("clip", model(), tokenizer())
    letters = " ".join("abcdefghijklmnop")
    cut = reward.embed_prompts([" ".join("abcdefghij")])  # ten words, a start and an end
    torch.testing.assert_close(reward.embed_prompts([letters]), cut, atol=1e-6, rtol=0)


# --- gradients, precision


def test_gradients_are_the_models_own() -> None:
    reward = ClipReward("clip", model().double(), tokenizer())
    images = (torch.randint(0, 256, (2, 3, SIDE, SIDE)) / 255).double().requires_grad_()
    prompts = ["a b", "c"]
    (found,) = torch.autograd.grad(reward(images, prompts).sum(), images)

    def plain(pixels: torch.Tensor) -> torch.Tensor:
        """Without rounding or resizing, which leave pictures of this size and these levels as they are."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (clip.CLIP_MEAN, clip.CLIP_STD))
        embedded = reward.model.get_image_features(pixel_values=(pixels - mean) / std).pooler_output
        return (F.normalize(embedded, dim=1) * reward.embed_prompts(prompts)).sum()

    direction = torch.randn_like(images)
    with torch.no_grad():
        difference = (plain(images + 1e-5 * direction) - plain(images - 1e-5 * direction)) / 2e-5
    assert (found * direction).sum().item() == pytest.approx(difference.item(), rel=1e-5)
    assert all(not parameter.requires_grad for parameter in reward.model.parameters())


def test_ascending_the_gradient_raises_the_score() -> None:
    reward = ClipReward("clip", model(), tokenizer())
    images, prompts = torch.rand(2, 3, 70, 50), ["a b", "c"]
    before = reward(images, prompts)
    for _ in range(3):
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
        images = (images + 0.05 * gradient.sign()).clamp(0, 1).detach()
    assert (reward(images, prompts) > before + 0.05).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(folder: Path, dtype: torch.dtype) -> None:
    half, full = rewards.load("clip", model=folder, dtype=dtype), rewards.load("clip", model=folder)
    images, prompts = torch.rand(3, 3, 50, 40), ["a", "b", "c"]
    gradients = []
    for reward in (half, full):
        inputs = images.clone().requires_grad_()
        scores = reward(inputs, prompts)
        gradients.append(torch.autograd.grad(scores.sum(), inputs)[0].flatten())
        assert scores.dtype == torch.float32
    assert (half(images, prompts) - full(images, prompts)).abs().max() < 0.03
    assert F.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.95
    assert half(images.to(dtype), prompts).isfinite().all()


def test_files_in_half_precision_are_loaded_in_single(tmp_path: Path) -> None:
    model().half().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    reward = rewards.load("clip", model=tmp_path)
    assert isinstance(reward, ClipReward) and reward.model.dtype == torch.float32 and not reward.model.training


def test_nan_is_the_score_of_its_picture_alone(folder: Path) -> None:
    images = torch.rand(2, 3, 40, 40)
    images[0, 0, 0, 0] = torch.nan
    scores = rewards.load("clip", model=folder)(images, ["a", "b"])
    assert scores.isnan().tolist() == [True, False]


# --- files


def test_prompts_and_pictures_must_match(folder: Path) -> None:
    reward = rewards.load("clip", model=folder)
    with pytest.raises(ValueError, match=naming(2, "images", 1, "prompts")):
        reward(torch.rand(2, 3, 32, 32), ["a"])
    with pytest.raises(ValueError, match="no images"):
        reward(torch.rand(0, 3, 32, 32), [])


def test_a_tokenizer_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model().save_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=naming(tmp_path, "tokenizer.json", "vocab.json", "merges.txt")):
        rewards.load("clip", model=tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"!": 0, **words(), "<|startoftext|>": 62, "<|endoftext|>": 63}))
    assert rewards.load("clip", model=tmp_path)(torch.rand(1, 3, 32, 32), ["a"]).isfinite().all()


def test_pickscore_takes_the_tokenizer_of_clip(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model().save_pretrained(tmp_path)
    asked = []

    def hub(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, "vocab.json" in allow_patterns, "model.safetensors" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(clip, "snapshot_download", hub)
    reward = pickscore.load(tmp_path, torch.device("cpu"), torch.float32)
    assert asked == [("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", True, False)]
    expected = rewards.load("pickscore", model=folder)(pictures(), spelt(PROMPTS))
    assert torch.equal(reward(pictures(), spelt(PROMPTS)), expected)


def test_weights_that_are_missing_are_said(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=naming(tmp_path / "nowhere")):
        rewards.load(f"clip={tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=naming(tmp_path, "config.json", "model.safetensors")):
        rewards.load(f"clip={tmp_path}")
    CLIPTextModel(config().text_config).save_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=naming(tmp_path, "CLIP", "tensors")):
        rewards.load(f"clip={tmp_path}")


# --- aesthetic


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_predictor(tmp_path_factory.mktemp("aesthetic"))


def test_the_rating_by_hand(predictor: Path) -> None:
    reward, images = rewards.load(f"aesthetic={predictor}"), pictures()
    tensors = load_file(predictor / "model.safetensors")
    tower = Tower(CLIPVisionConfig(**(config().vision_config.to_dict() | {"projection_dim": 16})))
    tower.load_state_dict(tensors, strict=False)
    prepare = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    with torch.no_grad():
        embedded = tower(prepare(images, return_tensors="pt")["pixel_values"]).image_embeds.numpy()
    rated = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    for at in (0, 2, 4, 6, 7):
        rated = rated @ tensors[f"layers.{at}.weight"].numpy().T + tensors[f"layers.{at}.bias"].numpy()
    scores = reward(images, [""] * len(images))
    torch.testing.assert_close(scores, torch.from_numpy(rated[:, 0]), atol=1e-5, rtol=1e-5)
    half = rewards.load("aesthetic", model=predictor, dtype=torch.bfloat16)(images, [""] * len(images))
    assert half.dtype == torch.float32 and (half - scores).abs().max() < 0.1
    single = torch.rand(1, 3, 40, 40, requires_grad=True)
    reward(single, ["not read"]).sum().backward()
    assert single.grad is not None and single.grad.abs().sum() > 0


def test_predictors_of_another_form_are_refused(predictor: Path, tmp_path: Path) -> None:
    tensors = load_file(predictor / "model.safetensors")
    (tmp_path / "config.json").write_text((predictor / "config.json").read_text())

    def refused(changed: dict[str, torch.Tensor], words: str) -> None:
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=words):
            rewards.load(f"aesthetic={tmp_path}")

    # With activations in between, layers have the places 0, 3, 6, 9 and 11.
    places = {"0": "0", "2": "3", "4": "6", "6": "9", "7": "11"}
    renamed = {
        f"layers.{places[name.split('.')[1]]}.{name.split('.')[2]}" if name.startswith("layers.") else name: tensor
        for name, tensor in tensors.items()
    }
    refused(renamed, naming("layers.2.weight", "layers.2.bias"))
    refused(tensors | {"layers.0.weight": torch.rand(24, 15)}, naming(16, (24, 15)))
    refused({n: t for n, t in tensors.items() if "visual_projection" not in n}, naming(1, "visual_projection.weight"))
