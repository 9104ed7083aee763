"""Rewards by name, from folders and from a hub of our own."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from deradiff import rewards
from deradiff.rewards import hps
from deradiff.worlds.digits.rewards import BoldReward, DigitsReward, InkReward
from hub_server import Hub, standing_in
from messages import naming
from small_clip import pictures, spelt, written, written_predictor
from test_rewards_hps import TINY, written_checkpoint


def test_what_is_computed_needs_no_model() -> None:
    images = torch.rand(2, 3, 32, 32)
    expected: dict[str, Any] = {"digits": DigitsReward(), "bold": BoldReward(), "ink": InkReward()}
    for name, reward in expected.items():
        assert torch.equal(rewards.load(name)(images, ["a", "b"]), reward(images, ["a", "b"]))
    for name in ("legible", "colours"):
        assert rewards.load(name)(images, ["a red seven", "a blue two"]).shape == (2,)
    with pytest.raises(ValueError, match=naming("bold", "'/a/folder'")):
        rewards.load("bold=/a/folder")


@pytest.mark.parametrize("name", [*rewards.LEARNED, *rewards.COMPUTED])
def test_every_name_leads_somewhere(name: str) -> None:
    assert callable(resolve_name({**rewards.LEARNED, **rewards.COMPUTED}[name]))


def test_names_that_are_none() -> None:
    with pytest.raises(ValueError, match=naming("'beauty'", "pickscore, hps-v2.0", "digits, bold")):
        rewards.load("beauty")
    with pytest.raises(ValueError, match=naming("'clip=a'", "model='b'")):
        rewards.load("clip=a", model="b")
    with pytest.raises(ValueError, match=naming("'clip='", "clip=FOLDER")):
        rewards.load("clip=")


def test_importing_the_protocol_imports_no_model() -> None:
    code = "import sys, deradiff.rewards; sys.exit('transformers' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with standing_in(tmp_path, monkeypatch) as server:
        yield server


def published(hub: Hub, repo: str, folder: Path) -> None:
    for extra in ("README.md", "pytorch_model.bin", "open_clip_model.safetensors", "HPS_v2.pt"):
        (folder / extra).write_bytes(b"not needed")
    hub.add(repo, folder)


def test_published_models_are_found_and_only_what_they_need(hub: Hub, tmp_path: Path) -> None:
    clip, beauty = tmp_path / "clip", tmp_path / "aesthetic"
    clip.mkdir()
    beauty.mkdir()
    published(hub, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", written(clip))
    published(hub, "yuvalkirstain/PickScore_v1", clip)
    published(hub, "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE", written_predictor(beauty))
    images, prompts = pictures(), spelt(["a", "b", "c", "d"])
    for name, folder in {"clip": clip, "pickscore": clip, "aesthetic": beauty}.items():
        there = rewards.load(name)(images, prompts)
        assert torch.equal(there, rewards.load(f"{name}={folder}")(images, prompts))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(hub.downloads())
    assert not {"README.md", "pytorch_model.bin", "open_clip_model.safetensors", "HPS_v2.pt"} & set(hub.downloads())


def test_hps_is_fetched_converted_and_given_clips_tokenizer(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hps, "VIT_H_14", TINY)
    for name in ("clip", "hps"):
        (tmp_path / name).mkdir()
    published(hub, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", written(tmp_path / "clip"))
    written_checkpoint(tmp_path / "hps")
    published(hub, "xswu/HPSv2", tmp_path / "hps")
    reward = rewards.load("hps-v2.1")
    assert "HPS_v2.1_compressed.pt" in hub.downloads() and "HPS_v2.pt" not in hub.downloads()
    assert "model.safetensors" not in hub.downloads() and "tokenizer.json" in hub.downloads()
    images, prompts = pictures(), spelt(["a", "b", "c", "d"])
    here = rewards.load("hps-v2.1", model=tmp_path / "hps")
    torch.testing.assert_close(reward(images, prompts), here(images, prompts))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # from the cache, and from what was converted
    hub.reset()
    monkeypatch.setattr(hps, "read_checkpoint", lambda path: pytest.fail("it was read again"))
    assert torch.equal(rewards.load("hps-v2.1")(images, prompts), reward(images, prompts))
    assert hub.requests == []
