"""Inception's features: torch-fidelity's own, from the same random weights and the same pictures."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from deradiff.measures import features, inception
from deradiff.measures.inception import Inception, bilinear, inception_pixels
from measures_inputs import pictures, random_weights
from messages import naming

GOLDENS = json.loads((Path(__file__).parents[1] / "data" / "measures_goldens.json").read_text())["inception"]


def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = Inception().state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if "tracked" not in name}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file as it is published: a pickled state dict under the published name."""
    path = tmp_path_factory.mktemp("inception") / inception.WEIGHTS.rpartition("/")[2]
    torch.save(random_weights(shapes()), path)
    return path


def test_the_weights_have_the_published_names_and_shapes() -> None:
    known = shapes()
    listed = "\n".join(f"{name} {known[name]}" for name in sorted(known))
    assert len(known) == GOLDENS["tensors"]
    assert hashlib.sha256(listed.encode()).hexdigest() == GOLDENS["sha256"]


def test_the_features_are_torch_fidelitys(weights: Path) -> None:
    extractor = features.load(f"inception={weights}")
    assert extractor.name == f"inception={weights}"
    for picture, expected in zip(pictures(), GOLDENS["features"], strict=True):
        found = extractor(picture[None].float() / 255)
        assert found.shape == (1, 2048) and found.dtype == torch.float32 and not found.requires_grad
        wanted = torch.tensor(expected)
        torch.testing.assert_close(found[0, ::64], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_the_folder_will_do(weights: Path) -> None:
    state = inception.load(weights.parent).state_dict()
    assert torch.equal(state["fc.bias"], random_weights(shapes())["fc.bias"])


def test_pictures_are_resized_as_tensorflow_1_did() -> None:
    """Position i of 299 is pixel i n / 299: grid_sample, corners aligned, on coordinates made so."""
    picture = torch.randint(0, 256, (1, 3, 40, 500)) / 255
    rows, columns = (torch.arange(299) * n / 299 / (n - 1) * 2 - 1 for n in (40, 500))
    grid = torch.stack([columns.expand(299, -1), rows[:, None].expand(-1, 299)], -1)[None]
    sampled = F.grid_sample(picture, grid, padding_mode="border", align_corners=True)
    found = inception_pixels(picture, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(found, (255 * sampled - 128) / 128, atol=2e-3, rtol=0)
    torch.testing.assert_close(bilinear(299), torch.eye(299).double())
    between = picture + 0.4 / 255 * torch.rand_like(picture)  # what saving in 8 bits does not keep
    assert torch.equal(inception_pixels(between.clamp(max=1), torch.device("cpu"), torch.float32), found)


def test_what_is_no_inception(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("nowhere.pth", "Inception")):
        features.load(f"inception={tmp_path / 'nowhere.pth'}")
    with pytest.raises(ValueError, match=naming(tmp_path)):
        features.load(f"inception={tmp_path}")
    other = random_weights(shapes())
    other["fc.weight"], other["fc.bias"] = other["fc.weight"][:1000], other["fc.bias"][:1000]
    torch.save(other, tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match=naming("2 of 472", "fc.weight")):
        features.load("inception", model=tmp_path / "torchvision.pth")
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=naming(tmp_path / "broken.pth")):
        features.load("inception", model=tmp_path / "broken.pth")


def test_without_the_network_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match=naming("no route to host", "inception=FILE")):
        features.load("inception")
