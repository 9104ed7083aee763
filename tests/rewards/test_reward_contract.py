"""What every reward that has a name has to pass: it is added to `rewards.LEARNED` or `COMPUTED`, and tried here.

A model is tried with tiny random weights: it needs a row in `WRITTEN`, which writes them as they are published.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff import rewards
from deradiff.rewards import hps, image_reward
from small_clip import as_tensor, tokenizer, written, written_predictor
from test_rewards_hps import TINY as TINY_HPS
from test_rewards_hps import written_checkpoint
from test_rewards_image_reward import TINY as TINY_IMAGE_REWARD
from test_rewards_image_reward import golden, weights, written_vocabulary

PROMPTS = ["a red seven", "a blue two on white paper", "a seven"]


def published_hps(folder: Path) -> Path:
    (folder / "vocab.json").write_text(json.dumps(tokenizer().get_vocab()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return written_checkpoint(folder)


def published_image_reward(folder: Path) -> Path:
    (folder / "med_config.json").write_text("{}")
    written_vocabulary(folder)
    torch.save(weights(golden()[0]), folder / "ImageReward.pt")
    return folder / "ImageReward.pt"


WRITTEN: dict[str, Callable[[Path], Path]] = {
    "pickscore": written,
    "clip": written,
    "aesthetic": written_predictor,
    "hps-v2.0": published_hps,
    "hps-v2.1": published_hps,
    "image-reward": published_image_reward,
}


@pytest.fixture(params=[*rewards.LEARNED, *rewards.COMPUTED])
def reward(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hps, "VIT_H_14", TINY_HPS)
    monkeypatch.setattr(image_reward, "BLIP_L", TINY_IMAGE_REWARD)
    if request.param in rewards.COMPUTED:
        return rewards.load(request.param)
    (tmp_path / "published").mkdir()
    return rewards.load(request.param, model=WRITTEN[request.param](tmp_path / "published"))


def pictures() -> list[Image.Image]:
    chance = np.random.default_rng(1)
    return [Image.fromarray(chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in PROMPTS]


def test_a_reward_scores_pictures_one_by_one(reward: Any) -> None:
    images = pictures()
    assert isinstance(reward, rewards.PictureReward) and reward.name
    scores = reward(images, PROMPTS)
    assert scores.shape == (3,) and scores.is_floating_point() and torch.isfinite(scores).all()
    torch.testing.assert_close(reward(as_tensor(images), PROMPTS), scores, atol=1e-5, rtol=1e-5)
    alone = [reward([image], [prompt]).item() for image, prompt in zip(images, PROMPTS, strict=True)]
    torch.testing.assert_close(scores.detach(), torch.tensor(alone).to(scores), atol=1e-5, rtol=1e-5)
    assert torch.equal(reward(images, PROMPTS), scores)


def test_a_gradient_is_a_picture_s_own(reward: Any) -> None:
    images = as_tensor(pictures()).requires_grad_()
    scores = reward(images, PROMPTS)
    assert scores.requires_grad  # alignment by DRaFT and ReFL, and the optimisation of noise, ask for it by name
    (gradient,) = torch.autograd.grad(scores[1], images)
    assert torch.isfinite(gradient).all() and gradient[1].abs().sum() > 0
    assert not gradient[[0, 2]].any()


def test_a_batch_that_makes_no_sense_is_refused(reward: Any) -> None:
    with pytest.raises(ValueError):
        reward(pictures(), PROMPTS[:2])
    with pytest.raises(ValueError):
        reward(as_tensor(pictures()) * 255, PROMPTS)


def test_nan_is_the_score_of_its_picture_alone(reward: Any) -> None:
    images = as_tensor(pictures())
    images[1] = torch.nan
    assert torch.isnan(reward(images, PROMPTS)).tolist() == [False, True, False]
