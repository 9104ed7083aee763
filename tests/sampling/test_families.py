"""The families that people use, realigned: every one of `tiny_families` is held against its own plain pipelines."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from deradiff import realign
from deradiff.algorithm.schedules import Power, Spline
from deradiff.sampling.shared_settings import UnmirroredState
from messages import naming
from oracle import lock_step
from tiny import assert_close, distance, tensors_in
from tiny_families import FAMILIES, anchors_of, around, built, denoisers, drawn

every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def plain(family: str) -> tuple[Tensor, ...]:
    pipe, call = built(family)
    return drawn(pipe, call)


@cache
def aligned(family: str) -> tuple[Tensor, ...]:
    pipe, call = built(family)
    anchors = {name: module.requires_grad_(False) for name, module in anchors_of(pipe).items()}
    return drawn(around(family, anchors), call)


def anchors_for(pipe: Any) -> Any:
    """As `realign` takes them: one, or one for each denoiser."""
    anchors = anchors_of(pipe)
    return anchors if len(anchors) > 1 else next(iter(anchors.values()))


def realigned(family: str, lam: Any) -> tuple[Any, dict[str, Any], Any]:
    """A realigned pipeline, the arguments of its call, and the dial."""
    pipe, call = built(family)
    return pipe, call, realign(pipe, anchors_for(pipe), lam)


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected) > 0
    assert all(map(torch.equal, actual, expected))


@every_family
@pytest.mark.cases(10)
def test_at_zero_and_one_it_is_a_single_model_to_the_bit_and_removed_the_pipeline_is_what_it_was(family):
    pipe, call, dial = realigned(family, 0.0)
    originals = denoisers(pipe)
    assert_equal(drawn(pipe, call), plain(family))
    dial.lam = 1.0
    assert_equal(drawn(pipe, call), aligned(family))
    assert distance(aligned(family)[0], plain(family)[0]) > 1e-2
    dial.lam = 0.5
    drawn(pipe, call)
    dial.remove()
    assert_equal(drawn(pipe, call), plain(family))
    assert denoisers(pipe) == originals and type(pipe) is type(built(family)[0])


@every_family
@pytest.mark.cases(10)
def test_between_it_is_algorithm_1(family):
    pipe, call, _ = realigned(family, 0.5)
    own = [built(family)[0], around(family, anchors_of(built(family)[0]))]
    for actual, expected in zip(drawn(pipe, call), lock_step(own, call, 0.5, read=tensors_in), strict=True):
        assert_close(actual, expected)


@every_family
@pytest.mark.cases(7)
def test_every_image_has_its_own_lam(family):
    pipe, call, _ = realigned(family, [0.0, 1.0])
    for actual, first, second in zip(drawn(pipe, call), plain(family), aligned(family), strict=True):
        assert_close(actual, torch.stack([first[0], second[1]]))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "flux2_klein_kv"])
@pytest.mark.cases(6)
def test_a_batch_in_parts_is_the_same(family):
    pipe, call, dial = realigned(family, 0.5)
    whole = drawn(pipe, call)
    rows = []
    by_component = dial.modules if len(denoisers(pipe)) > 1 else {"": dial.modules}
    for modules in by_component.values():
        modules["anchor"].register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(len([*args, *kwargs.values()][0])), with_kwargs=True
        )
    dial.micro_batch = 1
    for actual, expected in zip(drawn(pipe, call), whole, strict=True):
        assert_close(actual, expected)
    assert {*rows} == {1}


def test_a_batch_of_a_model_that_keeps_rows_of_it_is_not_divided():
    pipe, call, dial = realigned("flux2_klein_kv", 0.5)
    dial.micro_batch = 1
    with pytest.raises(UnmirroredState, match=naming("dial.micro_batch", "Flux2Transformer2DModel")):
        drawn(pipe, call)


@every_family
@pytest.mark.cases(7)
def test_a_schedule_is_read_at_the_share_of_steps_done(family):
    schedule = Spline([(0, 0.2), (1, 0.9)])
    pipe, call, dial = realigned(family, schedule)
    steps: dict[Any, list[float]] = {}

    def look(_: Any, scheduler: Any, latents: Tensor) -> Tensor:
        steps.setdefault(scheduler, []).append(dial.last.progress.steps)
        assert float(dial.last.mixture_weights[1]) == pytest.approx(schedule(dial.last.progress.steps))
        return latents

    dial.population = look
    drawn(pipe, call)
    n = call["num_inference_steps"]
    for own in steps.values():
        assert own == pytest.approx([k / n for k in range(n)])


def test_frames_that_are_at_different_times_each_have_the_lam_of_their_own():
    """Of two frames the second begins a step later, and λ passes through 0, where one model is enough for a step."""
    pipe, call, _ = realigned("skyreels_in_turn", Power(1))
    own = [built("skyreels_in_turn")[0], around("skyreels_in_turn", anchors_of(built("skyreels_in_turn")[0]))]
    lams = [k / 3 for k in (0, 1, 0, 2, 1, 2)]  # of the frames 1; 1, 2; 1, 2; 2
    expected = lock_step(own, call, lambda k: lams[k], read=tensors_in)
    assert_close(drawn(pipe, call)[0], expected[0])


@pytest.mark.parametrize("family", ["ltx2", "skyreels", "skyreels_in_turn"])
def test_every_scheduler_of_a_call_carries_over_what_it_steps_itself(family):
    pipe, call, dial = realigned(family, 0.5)
    call |= {"num_inference_steps": 6}
    exact = drawn(pipe, call)
    dial.reuse = 1
    assert_equal(drawn(pipe, call), exact)
    dial.reuse = 2
    for actual, expected in zip(drawn(pipe, call), exact, strict=True):
        assert 1e-4 < distance(actual, expected) < 0.3


def test_a_first_step_that_images_share_remembers_for_each_of_them():
    """Images of one noise and prompt are evaluated as one at the first step, but what is kept of it is for both."""
    pipe, call, dial = realigned("flux2_klein_kv", [0.3, 0.7])
    call |= {"prompt_embeds": call["prompt_embeds"][:1].expand(2, -1, -1)}

    def alike() -> Tensor:
        return pipe(generator=[torch.Generator().manual_seed(3) for _ in range(2)], **call).images

    both = alike()
    dial.lam = 0.3
    first = alike()[0]
    dial.lam = 0.7
    assert_close(both, torch.stack([first, alike()[1]]))


@pytest.mark.xfail(
    strict=True,
    reason="anchors are frozen, and torch takes the product of frozen weights with what is not contiguous another way",
)
def test_an_anchor_of_sana_is_to_the_bit_what_it_is_unfrozen():
    pipe, call, _ = realigned("sana", 1.0)
    own = around("sana", anchors_of(pipe))
    assert next(own.transformer.parameters()).requires_grad
    assert_equal(drawn(pipe, call), drawn(own, call))
