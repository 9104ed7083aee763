"""Which shots of a sweep share a batch."""

import functools
from typing import Any

import deradiff
from deradiff.sweep.drawing import sample
from deradiff.sweep.settings import Shot
from tiny import make


def test_shots_of_equal_weights_share_a_batch_of_interpolated_weights() -> None:
    pipe, anchor, _ = make("sd")
    sizes: list[int] = []
    call = pipe.__class__.__call__

    class Counted(pipe.__class__):  # type: ignore[name-defined]
        @functools.wraps(call)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(kwargs["prompt"]))
            return call(self, *args, **kwargs)

    pipe.__class__ = Counted
    shots = [Shot("a", seed, column) for column, seed in enumerate((0, 1, 2, 3))]
    with deradiff.realign(pipe, anchor, 0.5, method="interpolate") as dial:
        found = list(sample(pipe, dial, shots, [0.5, 0.2, 0.5, 0.5], steps=2, batch_size=4, guidance_scale=1.0))
    assert sorted(sizes) == [1, 3]
    assert {shot for shot, _, _ in found} == {*shots}
