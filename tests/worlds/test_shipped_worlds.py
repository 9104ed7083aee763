"""What every trained world that ships has to bring: it is tried by its name, and one that is added has to pass."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from deradiff.alignment.methods import METHODS
from deradiff.alignment.presets import usual
from deradiff.anchors.checks import denoiser_of, prediction_type
from deradiff.baking.distillation import Distillation
from deradiff.baking.distillation import usual as usual_distillation
from deradiff.rewards import COMPUTED
from deradiff.sweep.alignment_records import known_beta
from deradiff.sweep.pipelines import anchor_source, load_pipeline, usual_guidance
from deradiff.worlds import SHIPPED, ShippedWorld, find, find_anchor
from messages import naming


@pytest.fixture(params=SHIPPED)
def world(request: pytest.FixtureRequest) -> ShippedWorld:
    shipped = find(request.param)
    assert shipped is not None and shipped.name == request.param
    return shipped


def test_the_reference_draws_pictures_as_described(world: ShippedWorld) -> None:
    pipe = load_pipeline(world.name, dtype=torch.float32)
    assert isinstance(pipe, DiffusionPipeline) and (world.reference / "model_index.json").is_file()
    denoiser: Any = denoiser_of(pipe)[1]
    assert denoiser.config.sample_size * pipe.vae_scale_factor == world.resolution
    assert pipe.tokenizer.model_max_length == world.tokens
    assert usual_guidance(world.name) == world.guidance_scale and {*world.rewards} <= {*COMPUTED}


def test_prompts_are_a_function_of_the_seed(world: ShippedWorld) -> None:
    prompts = world.sample_prompts(20, 1)
    assert len(prompts) == 20 and prompts == world.sample_prompts(20, 1) != world.sample_prompts(20, 2)


def test_anchors_are_known_by_their_names(world: ShippedWorld) -> None:
    assert world.example[0] in world.anchors
    module: dict[str, object] = {}
    exec(f"from deradiff.worlds import {world.module}", module)
    for name, anchor in world.anchors.items():
        source = f"{world.name}:{name}"
        assert find_anchor(source) == anchor and anchor.path.is_dir()
        assert anchor_source(source) == anchor.path == eval(anchor.code, module) and known_beta(source) == anchor.beta
    for wrong in ("none", ""):
        with pytest.raises(ValueError, match=naming(f"'{world.name}:{wrong}'", ", ".join(world.anchors))):
            find_anchor(f"{world.name}:{wrong}")


def test_every_method_has_a_preset_for_it(world: ShippedWorld) -> None:
    scheduler = world.load().scheduler
    is_flow = prediction_type(type(scheduler).__name__, scheduler.config) == "flow"
    for method in (name for name, known in METHODS.items() if known.aligns(is_flow)):
        assert (usual(world.name, method).base, usual(world.name, method).resolution) == (world.name, world.resolution)
    assert usual_distillation(world.name) != usual_distillation("a/model") == Distillation()


@pytest.mark.parametrize("source", ["", "some/model", "digits-like", "digitsfoo:1", "/digits", "other:lora"])
def test_another_model_is_none_that_ships(source: str) -> None:
    assert find(source) is None and find_anchor(source) is None
    assert anchor_source(source) == source and usual_guidance(source) is None
