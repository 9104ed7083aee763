"""The Inception v3 of FID: the network of December 2015 on whose last pooling FID is defined (Szegedy et al. 2016).

The weights are TensorFlow's, converted for torch-fidelity; torchvision's Inception v3 has others, and FID computed with
them is another number. Nothing but torch is needed: the network is written out here, with the weights' own names, and
the average pooling and the resizing that TensorFlow did.
"""

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from deradiff.rewards.checkpoints import read_checkpoint
from deradiff.rewards.pixels import LEVELS, Images, batches, rounded

WEIGHTS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
"""91 MB, Apache-2.0. The name ends with the beginning of the file's SHA-256, which is checked."""

SIDE = 299
CLASSES = 1008


class Layer(NamedTuple):
    """One convolution of a block: it reads `source`, another layer, the block's "input", or its "pool"."""

    name: str
    source: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1


class Convolution(nn.Module):
    """Convolution, batch normalisation, ReLU; `padded` so that a stride of 1 keeps the size."""

    def __init__(self, before: int, after: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=1e-3)

    def forward(self, x: Float[Tensor, "image before _ _"]) -> Float[Tensor, "image after _ _"]:
        """Its features."""
        return F.relu(self.bn(self.conv(x)))


Pool = Literal["average", "maximum", "halving"]


class Block(nn.Module):
    """Layers side by side and one after another; the outputs are what no other layer reads, in their order."""

    def __init__(self, before: int, pool: Pool, *branches: list[Layer]) -> None:
        super().__init__()
        self.pool, self.layers = pool, [layer for branch in branches for layer in branch]
        channels = {"input": before, "pool": before}
        for layer in self.layers:
            size = channels[layer.source], layer.channels, layer.kernel, layer.stride
            self.add_module(layer.name, Convolution(*size, padded=layer.stride == 1))
            channels[layer.name] = layer.channels
        read = {"input", *(layer.source for layer in self.layers)}
        self.outputs = [name for name in [*(layer.name for layer in self.layers), "pool"] if name not in read]

    def forward(self, x: Float[Tensor, "image before _ _"]) -> Float[Tensor, "image after _ _"]:
        """The outputs, along channels."""
        done = {"input": x, "pool": pooled(x, self.pool)}
        for layer in self.layers:
            done[layer.name] = self.get_submodule(layer.name)(done[layer.source])
        return torch.cat([done[name] for name in self.outputs], 1)


def pooled(x: Float[Tensor, "image channel _ _"], pool: Pool) -> Float[Tensor, "image channel _ _"]:
    """Over 3 x 3 pixels. TensorFlow's average leaves out what pads the borders."""
    if pool == "average":
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return F.max_pool2d(x, 3, 2) if pool == "halving" else F.max_pool2d(x, 3, 1, 1)


# -- the blocks -------------------------------------------------------------------------------------------------------


def chain(name: str, *steps: tuple[int, tuple[int, int]], source: str = "input", halved: bool = False) -> list[Layer]:
    """Layers `name_1`, `name_2`, ... one after another, or `name` alone; the last has stride 2 if `halved`."""
    names = [name] if len(steps) == 1 else [f"{name}_{place}" for place in range(1, len(steps) + 1)]
    sources = [source, *names]
    strides = [1] * (len(steps) - 1) + [2 if halved else 1]
    return [
        Layer(own, before, channels, kernel, stride)
        for own, before, (channels, kernel), stride in zip(names, sources, steps, strides, strict=False)
    ]


ONE, THREE, FIVE, WIDE, TALL = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def block_a(before: int, pool_channels: int) -> Block:
    """At 35 x 35: figure 5."""
    return Block(
        before,
        "average",
        chain("branch1x1", (64, ONE)),
        chain("branch5x5", (48, ONE), (64, FIVE)),
        chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE)),
        chain("branch_pool", (pool_channels, ONE), source="pool"),
    )


def block_b(before: int) -> Block:
    """From 35 x 35 to 17 x 17: figure 10."""
    double = chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE), halved=True)
    return Block(before, "halving", chain("branch3x3", (384, THREE), halved=True), double)


def block_c(before: int, inner: int) -> Block:
    """At 17 x 17: figure 6."""
    return Block(
        before,
        "average",
        chain("branch1x1", (192, ONE)),
        chain("branch7x7", (inner, ONE), (inner, WIDE), (192, TALL)),
        chain("branch7x7dbl", (inner, ONE), (inner, TALL), (inner, WIDE), (inner, TALL), (192, WIDE)),
        chain("branch_pool", (192, ONE), source="pool"),
    )


def block_d(before: int) -> Block:
    """From 17 x 17 to 8 x 8."""
    long = chain("branch7x7x3", (192, ONE), (192, WIDE), (192, TALL), (192, THREE), halved=True)
    return Block(before, "halving", chain("branch3x3", (192, ONE), (320, THREE), halved=True), long)


def block_e(before: int, pool: Pool) -> Block:
    """At 8 x 8: figure 7. The last of the two pools by maximum, which is an oddity of these weights."""

    def fork(name: str, source: str) -> list[Layer]:
        return [Layer(f"{name}a", source, 384, (1, 3)), Layer(f"{name}b", source, 384, (3, 1))]

    return Block(
        before,
        pool,
        chain("branch1x1", (320, ONE)),
        [Layer("branch3x3_1", "input", 384, ONE), *fork("branch3x3_2", "branch3x3_1")],
        [*chain("branch3x3dbl", (448, ONE), (384, THREE)), *fork("branch3x3dbl_3", "branch3x3dbl_2")],
        chain("branch_pool", (192, ONE), source="pool"),
    )


# -- the network ------------------------------------------------------------------------------------------------------


class Inception(nn.Module):
    """Pixels to the 2,048 features of the last pooling, `pool3`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, THREE, stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, THREE, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, THREE)
        self.Conv2d_3b_1x1 = Convolution(64, 80, ONE)
        self.Conv2d_4a_3x3 = Convolution(80, 192, THREE, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = block_c(768, 128), block_c(768, 160), block_c(768, 160)
        self.Mixed_6e = block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(2048, "maximum")
        self.fc = nn.Linear(2048, CLASSES)  # part of the weights; features are what comes before

    def forward(self, pixels: Float[Tensor, "image 3 299 299"]) -> Float[Tensor, "image 2048"]:
        """The features of `pixels` in [-1, 1)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def load(model: str | Path | None) -> Inception:
    """The network with its published weights, or those of the .pth file `model`, or of `WEIGHTS` in the folder `model`.

    Raises `ValueError` where there are none, or others.
    """
    network = Inception()
    tensors = published() if model is None else read_checkpoint(weights_file(model))
    expected = {name: tensor.shape for name, tensor in network.state_dict().items() if "tracked" not in name}
    wrong = [name for name, shape in expected.items() if name not in tensors or tensors[name].shape != shape]
    if wrong:
        raise ValueError(
            f"{model or WEIGHTS} does not hold FID's Inception v3: {len(wrong)} of {len(expected)} tensors are missing "
            f"or of another shape, {wrong[0]} for one. torchvision's weights are not the ones; these are at {WEIGHTS}"
        )
    network.load_state_dict({name: tensors[name] for name in expected}, strict=False)
    return network


def weights_file(model: str | Path) -> Path:
    """`model`, or the published file in the folder `model`. Raises `ValueError` where it is not."""
    path = Path(model).expanduser()
    file = path / WEIGHTS.rpartition("/")[2] if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} is not there: Inception's weights are the file at {WEIGHTS}")
    return file


def published() -> dict[str, Tensor]:
    """The tensors of `WEIGHTS`, downloaded once into torch's hub cache. Raises `ValueError` where that fails."""
    try:
        return torch.hub.load_state_dict_from_url(WEIGHTS, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # the network's errors are of many kinds, and a wrong hash is a RuntimeError
        raise ValueError(
            f"Inception's weights could not be had from {WEIGHTS} ({type(error).__name__}: {error}). Where that is not "
            "reachable, bring the file and load inception=FILE"
        ) from error


def inception_pixels(images: Images, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "image 3 299 299"]:
    """`images` as FID's graph took them: 8 bits, bilinear without antialiasing, whatever their shape, then [-1, 1).

    TensorFlow 1 resized so: a pixel's corner, not its centre, is where it is sampled, and a large image is not
    smoothed before it is shrunk. Published FIDs rest on that.

    Raises `ValueError` for no images, for a tensor that is not in [0, 1], and for a list of anything but PIL images.
    """
    resized = []
    for part in batches(images, device):
        rows, columns = (bilinear(length).to(part) for length in part.shape[-2:])
        resized.append(rows @ rounded(LEVELS * part) @ columns.T)
    return ((torch.cat(resized) - 128) / 128).to(dtype)


def bilinear(length: int) -> Float[Tensor, "299 {length}"]:
    """The weights of `SIDE` samples, evenly from the first of `length` pixels on. Float64."""
    places = torch.arange(SIDE, dtype=torch.float64) * (length / SIDE)
    lower = places.floor()
    weights = torch.zeros(SIDE, length, dtype=torch.float64)
    for index, share in ((lower, 1 - (places - lower)), (lower + 1, places - lower)):
        weights.scatter_add_(1, index.long().clamp(max=length - 1)[:, None], share[:, None])
    return weights
