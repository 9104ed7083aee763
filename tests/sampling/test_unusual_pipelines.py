"""Pipelines that do in mid-image what others do not: switch layers off, copy their scheduler, take gradients inside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    KarrasVePipeline,
    KarrasVeScheduler,
    RePaintPipeline,
    RePaintScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionGLIGENPipeline,
    StableDiffusionPanoramaPipeline,
    TextToVideoZeroPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    WuerstchenPriorPipeline,
)
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from companions import agrees
from deradiff import realign, schedules
from deradiff.sampling.blocked_methods import DialError, UnmirroredState
from messages import naming
from tiny import SIZE, TEXT_CALL, assert_close, distance, sample, seeded
from tiny_parts import noise, perturbed, sd_components

ONE_PROMPT = TEXT_CALL | SIZE | {"prompt": "a red fox", "negative_prompt": "blurry"}


def three(build: Callable[[], Any]) -> tuple[Any, Any, list[Any]]:
    """A pipeline, an anchor for it, and the reference's and the anchor's own pipelines."""
    pipes = []
    for _ in range(3):
        with seeded(3):
            pipes.append(build())
    pipe, *own = pipes
    anchor, own[1].unet = perturbed(pipe.unet, 1), perturbed(pipe.unet, 1)
    return pipe, anchor, own


def gligen() -> Any:
    parts = sd_components()
    config = {name: value for name, value in parts["unet"].config.items() if name != "_use_default_values"}
    unet = UNet2DConditionModel.from_config(config | {"attention_type": "gated"})
    for layer in unet.modules():
        if isinstance(layer, GatedSelfAttentionDense):
            torch.nn.init.ones_(layer.alpha_attn)
            torch.nn.init.ones_(layer.alpha_dense)
    return StableDiffusionGLIGENPipeline(**parts | {"unet": unet.eval()}, requires_safety_checker=False)


def test_layers_that_gligen_switches_off_in_mid_image_are_off_in_both_models() -> None:
    pipe, anchor, own = three(gligen)
    box = {"gligen_phrases": ["a fox"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.7]], "gligen_scheduled_sampling_beta": 0.5}
    call = ONE_PROMPT | box
    grounded = sample(own[0], call | {"gligen_scheduled_sampling_beta": 1.0})
    assert distance(sample(own[0], call), grounded) > 1e-3
    with realign(pipe, anchor, 0.37) as dial:
        agrees(pipe, dial, own, call)
    fusers = [layer for layer in anchor.modules() if isinstance(layer, GatedSelfAttentionDense)]
    assert all(fuser.enabled for fuser in fusers)


def test_views_of_a_panorama_each_with_the_schedulers_state() -> None:
    pipe, anchor, own = three(lambda: StableDiffusionPanoramaPipeline(**sd_components(), requires_safety_checker=False))
    call = ONE_PROMPT | {"width": 576, "num_inference_steps": 2}
    with realign(pipe, anchor, 0.37) as dial:
        agrees(pipe, dial, own, call)
        assert pipe.scheduler.step.__wrapped__ is not None  # what the views' states gave back are its hooks
    assert "step" not in vars(pipe.scheduler)


def test_a_copy_that_takes_the_schedulers_place_goes_on_where_it_is() -> None:
    pipe, anchor, own = three(lambda: TextToVideoZeroPipeline(**sd_components(), requires_safety_checker=False))
    call = ONE_PROMPT | {"video_length": 2, "t0": 1, "t1": 2}
    with realign(pipe, anchor, 0.37) as dial:
        agrees(pipe, dial, own, call)
        seen: list[float] = []
        dial.lam = schedules.Power(1)
        sample(pipe, call, callback=lambda *_: seen.append(dial.last.progress.steps if dial.last else -1))
    assert seen == [0.0, 0.25, 0.25, 0.5, 0.75]  # the copy goes over a step again


def test_gradients_of_what_a_pipelines_own_attention_keeps_are_refused() -> None:
    pipe, anchor, own = three(
        lambda: StableDiffusionAttendAndExcitePipeline(**sd_components(), requires_safety_checker=False)
    )
    call = ONE_PROMPT | {"token_indices": [2], "max_iter_to_alter": 1, "thresholds": {}, "attn_res": (8, 8)}
    with realign(pipe, anchor, 0.37) as dial:
        with pytest.raises(UnmirroredState, match=naming("AttendExciteAttnProcessor", "attnstore")):
            sample(pipe, call)
        dial.lam = 0.0
        assert_close(sample(pipe, call), sample(own[0], call))


def unconditional() -> UNet2DModel:
    with seeded(2):
        return UNet2DModel(
            sample_size=32,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()


@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [(KarrasVePipeline, KarrasVeScheduler), (ScoreSdeVePipeline, ScoreSdeVeScheduler)]
)
def test_a_scheduler_without_a_step_from_a_prediction_is_refused(pipeline: Any, scheduler: Any) -> None:
    pipe = pipeline(unet=unconditional(), scheduler=scheduler())
    with pytest.raises(DialError, match=naming(scheduler.__name__, "step")):
        realign(pipe, perturbed(pipe.unet, 1))
    assert "step" not in vars(pipe.scheduler)


def test_a_scheduler_without_a_step_that_is_put_in_later_is_refused() -> None:
    pipe = DDPMPipeline(unet=unconditional(), scheduler=DDPMScheduler())
    with realign(pipe, perturbed(pipe.unet, 1), 0.5):
        pipe.scheduler = KarrasVeScheduler()
        with pytest.raises(DialError, match=naming("KarrasVeScheduler")):
            pipe(num_inference_steps=2)


def test_a_way_back_to_more_noise_is_no_progress() -> None:
    pipe = RePaintPipeline(unet=unconditional(), scheduler=RePaintScheduler())
    picture, mask = torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    seen: dict[int, float] = {}
    with realign(pipe, perturbed(pipe.unet, 1), 0.5) as dial:
        own = pipe.scheduler.step

        def step(prediction: Any, timestep: Any, *args: Any) -> Any:
            output = own(prediction, timestep, *args)
            assert dial.last is not None
            seen[int(timestep)] = dial.last.progress.steps
            return output

        pipe.scheduler.step = step
        pipe(picture, mask, num_inference_steps=4, jump_length=2, jump_n_sample=2, output_type="np")
    assert seen == {750: 0.0, 500: 0.25, 250: 0.5, 0: 0.75}


class OwnLoop(DiffusionPipeline):
    """Steps of a scheduler from what `predicted` makes of the denoiser."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, generator: torch.Generator) -> StableDiffusionPipelineOutput:
        latents, text = torch.randn(2, 4, 8, 8, generator=generator), noise(2, 5, 16)
        self.scheduler.set_timesteps(3)
        with torch.no_grad():
            for timestep in self.scheduler.timesteps:
                prediction = self.predicted(latents, timestep, text)
                latents = self.scheduler.step(prediction, timestep, latents).prev_sample
        return StableDiffusionPipelineOutput(images=latents, nsfw_content_detected=None)

    def predicted(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        raise NotImplementedError


class TwoSizes(OwnLoop):
    """Guidance by two calls of different sizes, as where one of them has the prompt's tokens in it."""

    def predicted(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        wide = self.unet(torch.cat([latents, latents], dim=3), timestep, text).sample[..., :8]
        narrow = self.unet(latents, timestep, text).sample
        return narrow + 2 * (wide - narrow)


class ListsOfLists(OwnLoop):
    """A denoiser that is given a list of pictures for every image."""

    def predicted(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return torch.cat(self.unet([[part] for part in latents.chunk(2)], timestep, text))


class UNetOfLists(UNet2DConditionModel):
    def forward(self, x: list[list[Tensor]], timestep: Tensor, text: Tensor) -> list[Tensor]:
        return [UNet2DConditionModel.forward(self, row[0], timestep, text[:1]).sample for row in x]


@pytest.mark.parametrize("kind", [TwoSizes, ListsOfLists])
def test_calls_of_other_shapes(kind: type[OwnLoop]) -> None:
    def build() -> OwnLoop:
        parts = sd_components()
        if kind is ListsOfLists:
            parts["unet"].__class__ = UNetOfLists
        return kind(unet=parts["unet"], scheduler=parts["scheduler"])

    pipe, anchor, own = three(build)
    with realign(pipe, anchor, 0.37) as dial:
        agrees(pipe, dial, own, {})


def test_a_prior_that_calls_its_time_r() -> None:
    def prior(seed: int | None = None) -> WuerstchenPriorPipeline:
        with seeded(3):
            model = WuerstchenPrior(c_in=2, c=8, c_cond=16, c_r=4, depth=2, nhead=2).eval()
            text = {name: sd_components()[name] for name in ("tokenizer", "text_encoder")}
        model = model if seed is None else perturbed(model, seed)
        return WuerstchenPriorPipeline(**text, prior=model, scheduler=DDPMWuerstchenScheduler())

    def drawn(pipe: Any) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        with seeded(2):
            return pipe("a red fox", 128, 128, num_inference_steps=3, generator=generator).image_embeddings

    pipe = prior()
    with realign(pipe, prior(seed=1).prior, 1.0) as dial:
        assert_close(drawn(pipe), drawn(prior(seed=1)))
        dial.lam = 0.0
        assert_close(drawn(pipe), drawn(prior()))
        dial.lam = 0.5
        assert min(distance(drawn(pipe), drawn(end)) for end in (prior(), prior(seed=1))) > 1e-3
