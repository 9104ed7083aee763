"""ImageReward: the authors' checkpoints as transformers models, against numbers that their own code computed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors import safe_open

from deradiff import rewards
from deradiff.rewards import checkpoints, image_reward
from deradiff.rewards.image_reward import BLIP_L, ImageReward
from deradiff.rewards.pixels import CLIP_MEAN, CLIP_STD
from hub_server import Hub, standing_in
from messages import naming

GOLDEN = Path(__file__).parents[1] / "data" / "image_reward_golden.safetensors"
"""Made by the script of the same name, which says how."""

SIZES: dict[str, dict[str, int]] = {
    "text_config": {
        "vocab_size": 69,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 40,
        "bos_token_id": 67,
        "sep_token_id": 3,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
}
TINY: dict[str, Any] = {tower: BLIP_L[tower] | sizes for tower, sizes in SIZES.items()}
"""The golden model: what is said of the published one, but for its sizes."""


def golden() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file is no dict
        return tensors, {name: json.loads(value) for name, value in file.metadata().items()}


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' state dict, in float32 as it is published."""
    return {
        name.removeprefix("model."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }


def pictures(tensors: dict[str, torch.Tensor]) -> list[Image.Image]:
    return [Image.fromarray(tensors[f"picture.{at}"].numpy()) for at in range(5)]


def as_tensor(picture: torch.Tensor) -> torch.Tensor:
    return picture.permute(2, 0, 1)[None] / 255


def load(model: Path | None = None, **others: Any) -> Any:
    """Typed loosely: what every reward takes is a tensor, and this one takes PIL images too."""
    return rewards.load("image-reward", model=model, **others)


def written_vocabulary(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(golden()[1]["vocabulary"]))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint as published, of the tiny model, and a tokenizer beside it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(image_reward, "BLIP_L", TINY)
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "med_config.json").write_text("{}")
    written_vocabulary(folder)
    torch.save(weights(golden()[0]), folder / "ImageReward.pt")
    return folder / "ImageReward.pt"


@pytest.fixture
def reward(checkpoint: Path) -> Any:
    return load(checkpoint)


# --- the score


def test_scores_are_the_authors(reward: Any) -> None:
    tensors, said = golden()
    assert (
        isinstance(reward, rewards.Reward)
        and isinstance(reward, ImageReward)
        and reward.name.startswith("image-reward")
    )
    found = reward(pictures(tensors), said["prompts"])
    torch.testing.assert_close(found, tensors["scores"], atol=1e-5, rtol=0)
    for at, prompt in enumerate(said["prompts"]):  # neither the neighbours nor padding matter
        single = reward(as_tensor(tensors[f"picture.{at}"]), [prompt])
        torch.testing.assert_close(single, tensors["scores"][at : at + 1], atol=1e-5, rtol=0)
    # Each depends on both its picture and its prompt, so that the comparison means something.
    assert (found - reward(pictures(tensors), said["prompts"][::-1])).abs().max() > 0.05
    assert (found - reward(pictures(tensors)[::-1], said["prompts"])).abs().max() > 0.05


def test_tokens_are_the_authors(checkpoint: Path) -> None:
    tensors, said = golden()
    tokens = image_reward.tokenizer_of(checkpoint.parent)(
        said["prompts"], padding="max_length", truncation=True, max_length=image_reward.LONGEST, return_tensors="pt"
    )
    assert torch.equal(tokens.input_ids, tensors["tokens"])
    assert tensors["tokens"].shape == (5, 35) and (tensors["tokens"][-1] != 0).all()  # the last one was cut


def test_pixels_are_those_of_torchvision() -> None:
    tensors = golden()[0]
    found = image_reward.torchvision_pixels(pictures(tensors), 32, CLIP_MEAN, CLIP_STD, "cpu", torch.float32)
    torch.testing.assert_close(found, tensors["pixels"], atol=1e-5, rtol=0)
    for at, expected in enumerate(tensors["pixels"]):
        single = as_tensor(tensors[f"picture.{at}"]).requires_grad_()
        pixels = image_reward.torchvision_pixels(single, 32, CLIP_MEAN, CLIP_STD, "cpu", torch.float32)
        torch.testing.assert_close(pixels[0], expected, atol=1e-5, rtol=0)
        pixels.sum().backward()
        assert single.grad is not None and single.grad.abs().sum() > 0


def test_the_gradient_is_the_authors(reward: Any) -> None:
    tensors, said = golden()
    image = as_tensor(tensors["picture.0"]).requires_grad_()  # of the model's own size: not resized
    reward(image, said["prompts"][:1]).sum().backward()
    assert image.grad is not None
    by_pixel = image.grad[0] * torch.tensor(CLIP_STD)[:, None, None]
    torch.testing.assert_close(by_pixel, tensors["gradient"], atol=1e-6, rtol=1e-4)
    assert tensors["gradient"].abs().max() > 1e-3
    parts = (reward.vision, reward.text, reward.layers)
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters())
    assert not any(part.training for part in parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(checkpoint: Path, dtype: torch.dtype) -> None:
    tensors, said = golden()
    reward = load(checkpoint, dtype=dtype)
    found = reward(pictures(tensors), said["prompts"])
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    atol = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), tensors["scores"], atol=atol, rtol=0)


def test_a_batch_that_makes_no_sense(reward: Any) -> None:
    with pytest.raises(ValueError, match=naming(2, "images", 1, "prompts")):
        reward(torch.rand(2, 3, 32, 32), ["a cat"])
    with pytest.raises(ValueError, match="no images to score"):
        reward(torch.rand(0, 3, 32, 32), [])
    with pytest.raises(ValueError, match=naming([0, 1], "image 0", -1)):
        reward(torch.full((1, 3, 32, 32), -1.0), ["a cat"])
    images = torch.rand(2, 3, 32, 32)
    images[0, 0, 0, 0] = torch.nan
    assert reward(images, ["a cat", "a dog"]).isnan().tolist() == [True, False]


# --- loading


def test_the_published_model_fits() -> None:
    """The names and shapes of the authors' own model, of which nobody needs the weights to see that."""
    from transformers import BlipConfig

    said = golden()[1]["published"]
    with torch.device("meta"):
        tensors = {
            name.replace("blocks.0", f"blocks.{block}").replace("layer.0", f"layer.{block}"): torch.empty(shape)
            for name, shape in said["shapes"].items()
            for block in range(24 if "blocks" in name else 12 if "layer.0" in name else 1)
        }
    assert len(tensors) == said["tensors"]
    found = image_reward.renamed(tensors)
    image_reward.require_whole(found, BlipConfig(**BLIP_L), GOLDEN)
    layers = image_reward.rating_layers({name: torch.zeros(tensor.shape) for name, tensor in found.items()}, 768)
    assert [layer.out_features for layer in layers] == [1024, 128, 64, 16, 1]
    towers = BLIP_L["vision_config"], BLIP_L["text_config"]
    assert [tower["num_attention_heads"] for tower in towers] == said["heads"]
    assert [tower["layer_norm_eps"] for tower in towers] == said["epsilons"]
    assert said["numbers"] == [image_reward.SCORE_MEAN, image_reward.SCORE_STD]


def test_a_checkpoint_is_converted_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(1, 3, 40, 40)
    first = load(checkpoint)(images, ["a cat"])
    monkeypatch.setattr(image_reward, "read_checkpoint", lambda path: pytest.fail("it was read again"))
    assert torch.equal(load(checkpoint.parent)(images, ["a cat"]), first)
    (folder,) = (Path(constants.HF_HOME) / "deradiff").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    written_vocabulary(folder)
    assert torch.equal(load(folder)(images, ["a cat"]), first)
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(checkpoint.parent / "home"))
    torch.save({}, checkpoint)  # other contents under the same name: not what was kept
    with pytest.raises(ValueError, match=naming(checkpoint, "vision_model.embeddings.class_embedding")):
        load(checkpoint)


def test_the_folder_is_named_and_precision_kept(tmp_path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in weights(golden()[0]).items()}, tmp_path / "half.pt")
    folder = image_reward.convert(tmp_path / "half.pt", tmp_path / "named" / "here", TINY)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_tensor("layers.0.weight").dtype == torch.float16
    written_vocabulary(folder)
    tensors, said = golden()
    torch.testing.assert_close(load(folder)(pictures(tensors), said["prompts"]), tensors["scores"], atol=1e-5, rtol=0)
    with pytest.raises(FileExistsError, match=naming(folder)):
        image_reward.convert(tmp_path / "half.pt", folder, TINY)


def test_what_does_not_fit_is_said_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    state = weights(golden()[0])
    state["blip.visual_encoder.extra"] = state.pop("blip.visual_encoder.cls_token")
    state["mlp.layers.9.bias"] = torch.zeros(1)
    state["blip.text_encoder.embeddings.LayerNorm.bias"] = torch.zeros(3)
    torch.save(state, checkpoint)
    changed = ("vision_model.embeddings.class_embedding", "vision_model.extra", "layers.9.bias")
    with pytest.raises(
        ValueError, match=naming(checkpoint, *changed, "text_model.embeddings.LayerNorm.bias", (3,), (24,))
    ):
        load(checkpoint)
    state = weights(golden()[0])
    del state["mlp.layers.2.bias"]
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match=naming("layers.2.bias", (0, 2, 4, 6, 7))):
        load(checkpoint)
    assert not (tmp_path / "home").exists()


def test_a_full_disk_leaves_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, **others: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", full)
        with pytest.raises(OSError, match="no space left"):
            load(checkpoint)
    assert list((Path(constants.HF_HOME) / "deradiff").iterdir()) == []
    assert load(checkpoint)(torch.rand(1, 3, 32, 32), ["a cat"]).isfinite().all()


class Code:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "it ran")


def test_code_in_a_pickle_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(weights(golden()[0]) | {"blip.code": Code(tmp_path / "trace")}, checkpoint)
    with pytest.raises(ValueError, match=naming(checkpoint, "code")):
        load(checkpoint)
    assert not (tmp_path / "trace").exists()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=naming(checkpoint, "code")):
        load(checkpoint)
    torch.save({"model": weights(golden()[0])}, checkpoint)
    with pytest.raises(ValueError, match=naming(checkpoint, "'state_dict'")):
        load(checkpoint)


def test_files_that_are_missing(checkpoint: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=naming(empty, "ImageReward.pt", "config.json", "model.safetensors")):
        load(empty)
    (checkpoint.parent / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=naming("tokenizer.json", "vocab.txt", "google-bert/bert-base-uncased")):
        load(checkpoint)
    (checkpoint.parent / "vocab.txt").write_text("\n".join(golden()[1]["vocabulary"][:-1]))
    with pytest.raises(ValueError, match=naming(68, 69, "google-bert/bert-base-uncased")):
        load(checkpoint)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with standing_in(tmp_path, monkeypatch) as server:
        yield server


def test_it_is_fetched_with_berts_tokenizer(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert = checkpoint.parent.parent / "bert"
    bert.mkdir()
    (checkpoint.parent / "vocab.txt").rename(bert / "vocab.txt")
    (bert / "model.safetensors").write_bytes(b"not needed")
    (checkpoint.parent / "test_images.zip").write_bytes(b"not needed")
    hub.add("THUDM/ImageReward", checkpoint.parent)
    hub.add("google-bert/bert-base-uncased", bert)
    tensors, said = golden()
    torch.testing.assert_close(load()(pictures(tensors), said["prompts"]), tensors["scores"], atol=1e-5, rtol=0)
    assert sorted(hub.downloads()) == ["ImageReward.pt", "vocab.txt"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # from the cache, and from what was converted
    monkeypatch.setattr(image_reward, "read_checkpoint", lambda path: pytest.fail("it was read again"))
    hub.reset()
    torch.testing.assert_close(load()(pictures(tensors), said["prompts"]), tensors["scores"], atol=1e-5, rtol=0)
    assert hub.requests == []
