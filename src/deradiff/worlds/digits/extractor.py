"""What the digits' classifier sees, as features that images are compared by."""

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.measures.features import parts_of
from deradiff.rewards.pixels import Images, batches
from deradiff.worlds.digits import classifier
from deradiff.worlds.digits.data import SIZE


class DigitsExtractor:
    """What the digits' own classifier sees, 256 numbers in [0, 1]: the ink at 16 x 16, the shape of the handwriting.

    Colours are not in it: a model that has settled on one ink is as diverse as before.
    """

    name = "digits"

    def __call__(self, images: Images) -> Float[Tensor, "image 256"]:
        """The features of `images` of 32 x 32 pixels. Raises `ValueError` for no images, and for others."""
        found = []
        for part in parts_of(images):
            for pictures in batches(part, torch.device("cpu")):
                height, width = pictures.shape[-2:]
                if (height, width) != (SIZE, SIZE):
                    raise ValueError(f"pictures of {height} x {width} pixels: the digits are {SIZE} x {SIZE}")
                found.append(classifier.features(classifier.recover_ink_map(pictures.detach().float())))
        return torch.cat(found)
