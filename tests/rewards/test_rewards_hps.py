"""HPS v2: open_clip's checkpoints as transformers models, against numbers that open_clip itself computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from deradiff import rewards
from deradiff.rewards import checkpoints, hps
from deradiff.rewards.clip import ClipReward
from deradiff.rewards.pixels import CLIP_MEAN, CLIP_STD
from messages import naming
from small_clip import spelt, tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "open_clip_golden.safetensors"
"""Made by the script of the same name, which says how."""

SIZES: dict[str, dict[str, int]] = {
    "text_config": {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "projection_dim": 16,
        "vocab_size": 64,
        "max_position_embeddings": 12,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 16,
        "image_size": 32,
        "patch_size": 8,
    },
}
TINY: dict[str, Any] = {"projection_dim": 16} | {tower: hps.VIT_H_14[tower] | sizes for tower, sizes in SIZES.items()}
"""The golden model: what is said of the published one, but for its sizes."""


def golden() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file is no dict
        return tensors, {name: json.loads(value) for name, value in file.metadata().items()}


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


def pictures(tensors: dict[str, torch.Tensor]) -> list[Image.Image]:
    return [Image.fromarray(tensors[f"picture.{at}"].numpy()) for at in range(5)]


def written_checkpoint(place: Path) -> Path:
    """A pickle with other things in it, names as distributed training has them."""
    state = {f"module.{name}": tensor for name, tensor in weights(golden()[0]).items()}
    torch.save({"epoch": 3, "name": "vit-h", "state_dict": state}, place / "HPS_v2.1_compressed.pt")
    return place / "HPS_v2.1_compressed.pt"


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint as published, of the tiny model, and a tokenizer beside it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hps, "VIT_H_14", TINY)
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "vocab.json").write_text(json.dumps(tokenizer().get_vocab()))
    (tmp_path / "published" / "merges.txt").write_text("#version: 0.2\n")
    return written_checkpoint(tmp_path / "published")


def test_embeddings_and_scores_are_open_clips(checkpoint: Path) -> None:
    (tensors, said), reward = golden(), rewards.load(f"hps-v2.1={checkpoint}")
    assert isinstance(reward, ClipReward) and reward.name.startswith("hps-v2.1")
    prompts = spelt(said["prompts"])
    torch.testing.assert_close(reward.embed_images(pictures(tensors)), tensors["images"], atol=1e-5, rtol=0)
    torch.testing.assert_close(reward.embed_prompts(prompts), tensors["texts"], atol=1e-5, rtol=0)
    torch.testing.assert_close(reward(pictures(tensors), prompts), tensors["scores"], atol=1e-5, rtol=0)
    # Padded with 0 to the whole context, as open_clip does it.
    with torch.no_grad():
        padded = reward.model.get_text_features(input_ids=tensors["tokens"]).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(padded), tensors["texts"], atol=1e-5, rtol=0)
    assert tensors["scores"].std() > 0.1


def test_pixels_are_those_of_the_authors_code() -> None:
    tensors = golden()[0]
    found = hps.hps_pixels(pictures(tensors), 32, CLIP_MEAN, CLIP_STD, "cpu", torch.float32)
    torch.testing.assert_close(found, tensors["pixels"], atol=5e-5, rtol=0)
    for at, expected in enumerate(tensors["pixels"]):
        single = (tensors[f"picture.{at}"].permute(2, 0, 1)[None] / 255).requires_grad_()
        pixels = hps.hps_pixels(single, 32, CLIP_MEAN, CLIP_STD, "cpu", torch.float32)
        torch.testing.assert_close(pixels[0], expected, atol=5e-5, rtol=0)
        pixels.sum().backward()
        assert single.grad is not None and single.grad.abs().sum() > 0


def test_the_published_model_fits() -> None:
    """The names and shapes of open_clip's own ViT-H-14, of which nobody needs the weights to see that."""
    from transformers import CLIPConfig, CLIPModel

    said = golden()[1]["vit_h_14"]
    with torch.device("meta"):
        tensors = {
            name.replace("resblocks.0", f"resblocks.{block}"): torch.empty(shape)
            for name, shape in said["shapes"].items()
            for block in range(1 if "resblocks" not in name else 32 if name.startswith("visual.") else 24)
        }
        expected = CLIPModel(CLIPConfig(**hps.VIT_H_14)).state_dict()
    assert len(tensors) == said["tensors"]
    hps.require_fit(hps.renamed(tensors), expected, "not ViT-H-14")
    vision, text = hps.VIT_H_14["vision_config"], hps.VIT_H_14["text_config"]
    assert vision["hidden_size"] / vision["num_attention_heads"] == 80 and text["num_attention_heads"] == 16


def test_a_checkpoint_is_converted_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(1, 3, 40, 40)
    first = rewards.load(f"hps-v2.0={checkpoint}")(images, ["a"])
    monkeypatch.setattr(hps, "read_checkpoint", lambda path: pytest.fail("it was read again"))
    assert torch.equal(rewards.load("hps-v2.1", model=checkpoint.parent)(images, ["a"]), first)
    (folder,) = (Path(checkpoints.constants.HF_HOME) / "deradiff").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    tokenizer().save_pretrained(folder)
    assert torch.equal(rewards.load(f"hps-v2.1={folder}")(images, ["a"]), first)
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(checkpoint.parent / "home"))
    torch.save({"state_dict": {}}, checkpoint)  # other contents under the same name: not what was kept
    with pytest.raises(ValueError, match="logit_scale"):
        rewards.load(f"hps-v2.1={checkpoint}")


def test_half_precision_stays_on_disk_and_the_folder_is_named(checkpoint: Path, tmp_path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in weights(golden()[0]).items()}, tmp_path / "half.pt")
    folder = hps.convert(tmp_path / "half.pt", tmp_path / "named" / "here", TINY)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_tensor("logit_scale").dtype == torch.float16
    tokenizer().save_pretrained(folder)
    reward = rewards.load(f"hps-v2.1={folder}")
    tensors, said = golden()
    torch.testing.assert_close(reward(pictures(tensors), spelt(said["prompts"])), tensors["scores"], atol=2e-3, rtol=0)
    with pytest.raises(FileExistsError, match=naming(folder)):
        hps.convert(tmp_path / "half.pt", folder, TINY)


def test_what_does_not_fit_is_said_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    state = weights(golden()[0])
    state["visual.extra"] = state.pop("visual.proj")
    state["ln_final.bias"] = torch.zeros(3)
    torch.save(state, checkpoint)
    names = ("visual_projection.weight", "vision_model.extra", "text_model.final_layer_norm.bias")
    with pytest.raises(ValueError, match=naming(*names, (3,), (24,))):
        rewards.load(f"hps-v2.1={checkpoint}")
    assert not (tmp_path / "home").exists()


class Code:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "it ran")


def test_code_in_a_pickle_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": weights(golden()[0]), "epoch": Code(tmp_path / "trace")}, checkpoint)
    with pytest.raises(ValueError, match=naming(checkpoint, "code")):
        rewards.load(f"hps-v2.1={checkpoint}")
    assert not (tmp_path / "trace").exists()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=naming(checkpoint, "code")):
        rewards.load(f"hps-v2.1={checkpoint}")
    torch.save([torch.zeros(2)], checkpoint)
    with pytest.raises(ValueError, match=naming(checkpoint, "'state_dict'")):
        rewards.load(f"hps-v2.1={checkpoint}")


def test_a_folder_without_either_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming(tmp_path, "HPS_v2_compressed.pt", "config.json")):
        rewards.load(f"hps-v2.0={tmp_path}")
