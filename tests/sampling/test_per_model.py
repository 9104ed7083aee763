"""Tensors of several models in the place of one: torch does everything for each model by itself."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from deradiff import realign
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.call_arguments import is_only_rows
from deradiff.sampling.per_model import ModelsOwn, PerModel, is_divided, merged, of_model
from tiny import make, noise
from tiny_loras import lora_weights
from tiny_parts import TEXT_WIDTH

ORIGIN = SimpleNamespace(serial=1)


def pair() -> tuple[PerModel, Tensor, Tensor]:
    one, other = noise(4, 6, 3, 3, seed=1), noise(4, 6, 3, 3, seed=2)
    return PerModel.of({0: one.clone(), 1: other.clone()}, ORIGIN), one, other


def guided(x: Tensor) -> Tensor:
    uncond, cond = x.chunk(2)
    return uncond + 3 * (cond - uncond)


def rescaled(x: Tensor) -> Tensor:
    return x * x.std(dim=list(range(1, x.ndim)), keepdim=True)


def written(x: Tensor) -> Tensor:
    buffer = torch.zeros(4, 8, 3, 3)
    buffer[:, 1:7] = x
    buffer[:, :1] += x[:, :1]
    return buffer


def through_a_view(x: Tensor) -> Tensor:
    buffer = torch.ones(4, 8, 3, 3)
    window = buffer[:, 2:8]
    window.mul_(x)
    return buffer


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "guidance": guided,
    "rescaling": rescaled,
    "statistics of its own": lambda x: (x - x.mean()) / x.var(),
    "combined with the sample": lambda x: torch.cat([x, noise(4, 6, 3, 3, seed=3)], 1),
    "written into zeros": written,
    "written through a view": through_a_view,
    "in place": lambda x: x.add_(1).clamp_(min=0),
    "by rows": lambda x: torch.stack([row * k for k, row in enumerate(x)]),
    "unpacked": lambda x: sum(x.unbind(1)),
    "functional": lambda x: F.interpolate(x, scale_factor=2.0),
    "named tuples": lambda x: x.max(dim=1).values,
    "where": lambda x: torch.where(x > 0, x, noise(4, 6, 3, 3, seed=4)),
    "precision": lambda x: x.to(torch.bfloat16).float(),
    "conjunctions": lambda x: torch.einsum("bchw,bdhw->bcd", x, noise(4, 2, 3, 3, seed=5)),
    "copies": lambda x: copy.deepcopy(x) + x.clone(),
    "permuted": lambda x: x.permute(0, 2, 3, 1).reshape(4, -1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_done_for_each_model_as_if_it_were_alone(name: str) -> None:
    both, one, other = pair()
    result = OPERATIONS[name](both)
    assert type(result) is PerModel and result.origin is ORIGIN
    assert torch.equal(result.parts[0], OPERATIONS[name](one)) and torch.equal(result.parts[1], OPERATIONS[name](other))


def test_it_passes_for_the_tensor_of_one_model() -> None:
    both, one, _ = pair()
    assert isinstance(both, Tensor) and torch.is_tensor(both)
    assert (both.shape, both.dtype, both.ndim, len(both)) == (one.shape, one.dtype, 4, 4)
    assert torch.equal(both.stacked()[0], one)


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["global", "own"])
def test_noise_is_the_same_for_all_models(generator: torch.Generator | None) -> None:
    both, *_ = pair()
    drawn: Any = torch.randn_like(both) if generator is None else torch.empty_like(both).normal_(generator=generator)
    assert torch.equal(drawn.parts[0], drawn.parts[1])
    dropped: Any = F.dropout(torch.ones_like(both), 0.5)
    assert torch.equal(dropped.parts[0], dropped.parts[1])
    again: Any = torch.randn_like(both)
    assert not torch.equal(again.parts[0], drawn.parts[0]), "the generator goes on"


def test_gradients_reach_every_models_own() -> None:
    weight = torch.ones(3, requires_grad=True)
    both: Any = PerModel.of({0: weight * 2, 1: weight * 5}, ORIGIN)
    (both * torch.tensor([1.0, 10.0, 100.0])).stacked().sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [7, 70, 700]


@pytest.mark.parametrize(
    "leaving",
    [
        lambda x: x.numpy(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 1).all()) or bool(x.mean() > 0),
        lambda x: x.tolist(),
        lambda x: torch.nn.Parameter(torch.zeros(4, 6, 3, 3), requires_grad=False).add_(x),
    ],
    ids=["numpy", "number", "decision", "list", "parameter"],
)
def test_what_cannot_be_different_for_each_model_is_refused(leaving: Callable[[Any], Any]) -> None:
    both = PerModel.of({0: torch.full((4, 6, 3, 3), 2.0), 1: torch.full((4, 6, 3, 3), -2.0)}, ORIGIN)
    with pytest.raises(DialError):
        leaving(both)


def test_values_in_which_the_models_agree_may_decide() -> None:
    both, *_ = pair()
    assert not both.isnan().any() and both.shape[0] == 4 and both.is_floating_point()


def test_shapes_and_precisions_have_to_be_the_same() -> None:
    with pytest.raises(DialError, match=r"\[2\].*\[3\]|\[3\].*\[2\]"):
        PerModel.of({0: torch.zeros(2), 1: torch.zeros(3)}, ORIGIN)
    with pytest.raises(DialError, match="float16"):
        PerModel.of({0: torch.zeros(2), 1: torch.zeros(2, dtype=torch.float16)}, ORIGIN)


def test_predictions_of_other_models_are_not_combined() -> None:
    both, one, _ = pair()
    earlier = PerModel.of({0: one, 2: one}, ORIGIN)
    with pytest.raises(DialError, match=r"dial\.watching"):
        both + earlier


def test_the_latest_origin_counts() -> None:
    both, one, other = pair()
    later = SimpleNamespace(serial=2)
    latest: Any = both + PerModel.of({0: one, 1: other}, later)
    assert latest.origin is later


class Cache:
    def __init__(self, keys: Tensor):
        self.keys = keys

    def grown(self, by: Tensor) -> Tensor:
        self.keys = self.keys + by
        return self.keys


def test_what_is_no_tensor_is_each_models_own_and_is_handed_back_to_it() -> None:
    outputs = {k: (torch.full((2,), float(k)), Cache(torch.full((2,), float(k))), 7) for k in (0, 1)}
    prediction, cache, number = merged(outputs, ORIGIN)
    assert isinstance(cache, ModelsOwn) and number == 7
    assert of_model({"cache": [cache], "x": prediction}, 1)["cache"][0] is outputs[1][1]
    grown = cache.grown(prediction)
    assert [part.tolist() for part in grown.parts.values()] == [[0, 0], [2, 2]] and is_divided(cache.keys)
    with pytest.raises(DialError, match="8"):
        merged({0: 7, 1: 8}, ORIGIN)


def test_what_is_each_models_own_goes_to_it_where_a_lora_would_share_a_batch(tmp_path: Path) -> None:
    pipe, *_ = make("sd")
    save_file(lora_weights(pipe), tmp_path / "lora.safetensors")
    texts = {k: noise(2, 5, TEXT_WIDTH, seed=k) for k in (0, 1)}
    latents, timestep = noise(2, 4, 8, 8, seed=7), torch.tensor(500)
    with realign(pipe, tmp_path / "lora.safetensors", 0.5) as dial, torch.no_grad():
        denoisers = dial._components["unet"].denoisers
        own = {"encoder_hidden_states": PerModel.of(texts, ORIGIN)}
        both = denoisers.predict([0, 1], (latents, timestep), own)
        for k, text in texts.items():
            alone = denoisers.predict([k], (latents, timestep), {"encoder_hidden_states": text})[k].sample
            assert type(both[k].sample) is Tensor and torch.equal(both[k].sample, alone)


@pytest.mark.parametrize(
    ("output", "rows"),
    [
        ((torch.zeros(4, 2),), True),
        ((torch.zeros(4, 2), torch.zeros(4), None), True),
        (([torch.zeros(2)] * 4,), True),
        ((torch.zeros(4, 2), torch.zeros(1)), False),
        ((torch.zeros(4, 2), torch.tensor(0.5)), False),
        ((torch.zeros(4, 2), Cache(torch.zeros(4))), False),
        (([torch.zeros(2)] * 3,), False),
    ],
    ids=["tensor", "tensors and nothing", "list", "another length", "a scalar", "cache", "short list"],
)
def test_what_has_not_a_row_for_each_of_the_batch_is_not_taken_apart(output: Any, rows: bool) -> None:
    assert is_only_rows(output, 4) is rows
