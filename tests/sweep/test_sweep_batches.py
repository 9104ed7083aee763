"""Which drawings share a batch."""

import functools
from dataclasses import replace
from typing import Any

import pytest

import deradiff
from deradiff.sweep.batches import attempts, sample
from deradiff.sweep.description import Drawing, SamplingSettings
from tiny import make


def test_drawings_of_equal_weights_share_a_batch_of_interpolated_weights() -> None:
    pipe, anchor, _ = make("sd")
    sizes: list[int] = []
    call = pipe.__class__.__call__

    class Counted(pipe.__class__):  # type: ignore[name-defined]
        @functools.wraps(call)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(kwargs["prompt"]))
            return call(self, *args, **kwargs)

    pipe.__class__ = Counted
    drawings = [drawing(seed, lam) for seed, lam in enumerate((0.5, 0.2, 0.5, 0.5))]
    with deradiff.realign(pipe, anchor, 0.5, method="interpolate") as dial:
        places = [place for place, _, _ in sample(pipe, dial, drawings, batch_size=4)]
    assert sorted(sizes) == [1, 3]
    assert places == [0, 2, 3, 1]


def drawing(seed: int, lam: float) -> Drawing:
    sampling = SamplingSettings(steps=2, guidance_scale=1.0)
    return Drawing("a", seed, sampling, "r", (("anchor", lam),), ("a",), method="interpolate")


@pytest.mark.parametrize("other", [{"sampling": SamplingSettings(steps=3)}, {"particles": 2}, {"reference": "other"}])
def test_drawings_that_are_sampled_otherwise_share_no_batch(other: dict[str, Any]) -> None:
    first = drawing(0, 0.5)
    with pytest.raises(ValueError, match="batch"):
        list(attempts(make("sd")[0], None, [first, replace(first, **other)], batch_size=4))
