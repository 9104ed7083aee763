"""The change of a denoiser's weights as products of low rank: `ΔW ≈ B A`, the best of its rank for every layer.

By Eckart and Young (1936) the first r terms of a singular value decomposition are the matrix of rank r nearest to
`ΔW`, in the Frobenius norm. A convolution's weights count as the matrix of output channels by all the rest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

Factors = tuple[Float[Tensor, "rank into *kernel"], Float[Tensor, "out rank *ones"]]
"""`A` and `B` of a layer, as a LoRA's file has them."""


ROUNDING = 1e-6
"""Singular values below this share of the largest are the decomposition's own rounding."""


@dataclass(frozen=True)
class LayerChange:
    """A layer's change by its singular values, largest first: `left · diag(values) · right`."""

    left: Float[Tensor, "out term"]
    values: Float[Tensor, " term"]
    right: Float[Tensor, "term columns"]
    kernel: tuple[int, ...]
    """The sides of a convolution's kernel; empty for a matrix."""

    @property
    def numbers(self) -> int:
        """How many a term is made of."""
        return self.left.shape[0] + self.right.shape[1]

    def factors(self, rank: int) -> Factors:
        """The first `rank` terms, at most as many as there are, each factor with the root of the singular values."""
        roots = self.values[:rank].sqrt()
        down, up = roots[:, None] * self.right[:rank], self.left[:, :rank] * roots
        if self.kernel:
            down, up = down.unflatten(1, (-1, *self.kernel)), up[..., None, None]
        return down.contiguous(), up.contiguous()


@dataclass(frozen=True)
class ModelChange:
    """A model's change: what factors can carry, by layer, and what they cannot, by parameter (norms and biases)."""

    layers: Mapping[str, LayerChange]
    rest: Mapping[str, Tensor]
    energy: float
    """The squared norm of all that changes."""

    @property
    def share_of_rest(self) -> float:
        """How much of the whole change's squared norm no factors carry, 0 to 1."""
        rest = sum(float(delta.double().square().sum()) for delta in self.rest.values())
        return rest / self.energy if self.energy else 0.0

    def of_rank(self, rank: int) -> dict[str, Factors]:
        """The factors of every layer, of the same rank, or of fewer terms where a layer has not so many."""
        return {path: layer.factors(rank) for path, layer in self.layers.items()}

    def of_share(self, share: float) -> dict[str, Factors]:
        """Factors that hold at least `share` (0 to 1) of the squared norm of what a LoRA can carry, in few numbers.

        Terms are taken in the order of their squared singular value per number that they cost; so each layer has the
        rank that it is worth, and at least 1.
        """
        paths = list(self.layers)
        squares = [self.layers[path].values.double().cpu().square() for path in paths]
        worth = torch.cat([s / self.layers[path].numbers for path, s in zip(paths, squares, strict=True)])
        layer = torch.cat([torch.full((len(s),), k) for k, s in enumerate(squares)])
        order = worth.argsort(descending=True)
        kept = torch.cat(squares)[order].cumsum(0)
        terms = int((kept < share * kept[-1]).sum()) + 1
        ranks = torch.bincount(layer[order[:terms]], minlength=len(paths)).clamp(min=1).tolist()
        return {path: self.layers[path].factors(r) for path, r in zip(paths, ranks, strict=True)}


@torch.no_grad()
def change_of(
    model: nn.Module, names: Sequence[str], difference: Callable[[str], Tensor], rank: int | None = None
) -> Iterator[ModelChange]:
    """Decompose `difference(name)` of one tensor of `model` after the other; `rank` keeps only so many terms of each.

    Yields after each what is known by then: the last is whole.
    """
    layers, rest, energy = {}, {}, 0.0
    modules = {path.replace(".base_layer", ""): module for path, module in model.named_modules()}
    for name in names:
        path, _, leaf = name.rpartition(".")
        delta = difference(name)
        norm = float(delta.detach().double().square().sum())
        energy += norm
        if norm and leaf == "weight" and takes_lora(modules[path]):
            left, values, right = torch.linalg.svd(delta.flatten(1), full_matrices=False)
            terms = int((values > values[0] * ROUNDING).sum())
            kept = slice(min(rank or terms, terms))
            layers[path] = LayerChange(
                left[:, kept].clone(), values[kept].clone(), right[kept].clone(), tuple(delta.shape[2:])
            )
        elif norm:
            rest[name] = delta
        yield ModelChange(layers, rest, energy)


def takes_lora(module: nn.Module) -> bool:
    """Whether PEFT, and the programs that read its files, have factors for it: a matrix, or a plain convolution."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear)
