"""A store that the pipeline makes anew for each call, and the denoiser keeps something in: every model has its own."""

from typing import Any

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from companions import agrees
from deradiff import realign, schedules
from deradiff.sampling.blocked_methods import DialError, UnmirroredState
from deradiff.sampling.reuse import Reuse
from messages import naming
from oracle import lock_step
from tiny import SIZE, TEXT_CALL, assert_close, distance, sample, seeded
from tiny_parts import perturbed, sd_components


class Store:
    """What a denoiser keeps of its first step; `gain` is the pipeline's."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.gain = 1.0


class Remembering(UNet2DConditionModel):
    """Every prediction has some of the first one in it."""

    def forward(self, sample: Tensor, timestep: Any, cross_attention_kwargs: Any = None, **kwargs: Any) -> Any:
        store = cross_attention_kwargs["store"]
        predicted, *others = super().forward(sample, timestep, **kwargs)
        if not store.kept:
            store.kept.append(predicted)
        return (predicted + store.gain * store.kept[0], *others)


class RememberingPipeline(StableDiffusionPipeline):
    """Makes a store for each call, and does something to it after every step."""

    def __call__(self, **call: Any) -> Any:
        store = Store()

        def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.change(store)
            return tensors

        return super().__call__(cross_attention_kwargs={"store": store}, callback_on_step_end=after, **call)

    def change(self, store: Store) -> None:
        store.gain /= 2


class WritingPipeline(RememberingPipeline):
    def change(self, store: Store) -> None:
        store.kept[0] = 2 * store.kept[0]


CALL = TEXT_CALL | SIZE


def remembering(kind: type[RememberingPipeline] = RememberingPipeline, seed: int | None = None) -> Any:
    with seeded(3):
        parts = sd_components()
        config = {name: value for name, value in parts["unet"].config.items() if name != "_use_default_values"}
        own = Remembering.from_config(config).eval()
    return kind(**parts | {"unet": own if seed is None else perturbed(own, seed)}, requires_safety_checker=False)


def test_each_model_has_a_store_of_its_own() -> None:
    own = [remembering(), remembering(seed=1)]
    pipe = remembering()
    assert distance(sample(own[0], CALL), sample(own[1], CALL)) > 1e-2
    with realign(pipe, remembering(seed=1).unet, 0.37) as dial:
        agrees(pipe, dial, own, CALL)
        assert_close(sample(pipe, CALL), lock_step(own, CALL, 0.37))  # a second call has a store of its own


def test_a_model_that_comes_later_has_kept_nothing() -> None:
    pipe = remembering()
    with realign(pipe, remembering(seed=1).unet, schedules.Power(1)) as dial:
        with pytest.raises(DialError, match=naming("dial.watching")):
            sample(pipe, CALL)
        dial.watching = True
        assert sample(pipe, CALL).isfinite().all()


def test_what_the_pipeline_puts_into_its_own_store_is_refused_for_several_models() -> None:
    pipe, own = remembering(WritingPipeline), [remembering(WritingPipeline), remembering(WritingPipeline, seed=1)]
    with realign(pipe, remembering(seed=1).unet, 0.37) as dial:
        with pytest.raises(UnmirroredState, match=naming("Store")):
            sample(pipe, CALL)
        for lam in (0.0, 1.0):
            dial.lam = lam
            assert_close(sample(pipe, CALL), sample(own[int(lam)], CALL))


def test_the_weight_interpolated_model_has_a_store_beside_the_others() -> None:
    pipe, exact = remembering(), remembering()
    with realign(pipe, remembering(seed=1).unet, 0.37, reuse=Reuse(every=1, carrier="interpolate")):
        carried = sample(pipe, CALL)
    with realign(exact, remembering(seed=1).unet, 0.37):
        assert_close(carried, sample(exact, CALL))


class Settings:
    """What is handed over and never written to."""


class Plain(Remembering):
    def forward(self, sample: Tensor, timestep: Any, cross_attention_kwargs: Any = None, **kwargs: Any) -> Any:
        return UNet2DConditionModel.forward(self, sample, timestep, **kwargs)


def test_settings_that_are_handed_over_are_no_store() -> None:
    def plain(seed: int | None = None) -> StableDiffusionPipeline:
        pipe = remembering(seed=seed)
        pipe.unet.__class__ = Plain
        return StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)

    pipe, own = plain(), [plain(), plain(seed=1)]
    call = CALL | {"cross_attention_kwargs": {"settings": Settings()}}  # the same ones for every call
    with realign(pipe, plain(seed=1).unet, 0.0) as dial:
        sample(pipe, call)
        agrees(pipe, dial, own, call)
