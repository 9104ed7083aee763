"""Where a realigned pipeline lives: precision, offloading, other pipelines, folders, compilation."""

import copy
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch._subclasses import FakeTensorMode

from deradiff import realign
from deradiff.algorithm.step import per_element
from messages import naming
from oracle import ddpm, lock_step
from tiny import assert_close, denoiser, make, sample, trio

BEFORE_AND_AFTER = pytest.mark.parametrize("order", ["before", "after"])


def realigned(pipe, anchor, lam, order, change):
    """`realign` with a change to the pipeline before or after it."""
    if order == "before":
        change(pipe)
    dial = realign(pipe, anchor, lam)
    if order == "after":
        change(pipe)
    return dial


@BEFORE_AND_AFTER
@pytest.mark.parametrize("kind", ["sd", "flux"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
@pytest.mark.cases(3)
def test_precision(kind, dtype, tolerance, order):
    pipe, anchor, call, own = trio(kind)
    call = {key: value.to(dtype) if key.endswith("embeds") else value for key, value in call.items()}
    for each in own:
        each.to(dtype)
    dial = realigned(pipe, anchor, 0.0, order, lambda pipe: pipe.to(dtype))
    plain, aligned = (sample(each, call) for each in own)
    if dtype == torch.float64:
        assert plain.dtype == dtype
    assert torch.equal(sample(pipe, call), plain)
    dial.lam = 1.0
    assert torch.equal(sample(pipe, call), aligned)
    dial.lam = 0.37
    mixed = sample(pipe, call)
    assert mixed.dtype == plain.dtype
    assert_close(mixed, lock_step(own, call, 0.37), tolerance)
    dial.remove()
    assert torch.equal(sample(pipe, call), plain)


def test_precision_of_posteriors_is_double():
    """In bfloat16 the mixture of posteriors is not done in bfloat16."""
    pipe, anchor, call, own = trio()
    for each in (pipe, *own):
        each.to(torch.bfloat16)
        each.scheduler = DDPMScheduler.from_config(each.scheduler.config, clip_sample=True)
    with realign(pipe, anchor, 0.37) as dial:
        assert dial.path == "posterior"
        assert_close(sample(pipe, call), lock_step(own, call, 0.37, ddpm), tolerance=5e-2)


@pytest.mark.parametrize(("device", "dtype"), [("mps", torch.float32), ("cuda", torch.float64), ("cpu", torch.float64)])
def test_weights_are_double_where_a_device_has_that(device, dtype):
    """Apple's GPUs have no float64, and moving a tensor of it there fails."""
    with FakeTensorMode():
        weights, predictions = torch.ones(2, 3, dtype=torch.float64), torch.empty(2, 3, 4, 8, 8, device=device)
        placed = per_element(weights, predictions)
        assert (placed.device.type, placed.dtype, placed.shape) == (device, dtype, (2, 3, 1, 1, 1))


GROUPS = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group, denoiser": lambda pipe: denoiser(pipe).enable_group_offload(**GROUPS, offload_type="leaf_level"),
    "group, blocks": lambda pipe: denoiser(pipe).enable_group_offload(
        **GROUPS, offload_type="block_level", num_blocks_per_group=1
    ),
    "group, pipeline": lambda pipe: pipe.enable_group_offload(**GROUPS, offload_type="leaf_level"),
}


@BEFORE_AND_AFTER
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.cases(4)
def test_offloading_over_several_calls(kind, offload, order):
    pipe, anchor, call, own = trio(kind)
    expected = {0.0: sample(own[0], call), 1.0: sample(own[1], call), 0.37: lock_step(own, call, 0.37)}
    dial = realigned(pipe, anchor, 1.0, order, OFFLOADS[offload])
    for lam in (1.0, 0.37, 0.0, 1.0, 0.37):
        dial.lam = lam
        assert_close(sample(pipe, call), expected[lam])
    dial.remove()
    for _ in range(2):
        assert torch.equal(sample(pipe, call), expected[0.0])
    if offload == "model":
        pipe.maybe_free_model_hooks()
        pipe.remove_all_hooks()
        assert torch.equal(sample(pipe, call), expected[0.0])
    with realign(pipe, anchor, 0.37):
        assert_close(sample(pipe, call), expected[0.37])


@BEFORE_AND_AFTER
def test_sequential_offload_is_refused(order):
    """Its weights live on no device between calls; accelerate cannot do it on a CPU, so only its hook is put there."""
    pipe, anchor, call, _ = trio()
    realigned(pipe, anchor, 0.37, order, lambda pipe: add_hook_to_module(pipe.unet, AlignDevicesHook("cpu")))
    with pytest.raises(RuntimeError, match=naming("AlignDevicesHook", "enable_model_cpu_offload")):
        sample(pipe, call)


def test_a_scheduler_replaced_afterwards():
    pipe, anchor, call, own = trio()
    first = pipe.scheduler
    with realign(pipe, anchor, 0.37):
        for each in (pipe, *own):
            each.scheduler = EulerAncestralDiscreteScheduler.from_config(each.scheduler.config)
        assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler" and pipe.scheduler is not first
        assert_close(sample(pipe, call), lock_step(own, call, 0.37))
    plain = sample(own[0], call)
    assert torch.equal(sample(pipe, call), plain)
    assert type(pipe.scheduler) is EulerAncestralDiscreteScheduler
    fresh = type(pipe.scheduler).from_config(pipe.scheduler.config)
    assert type(fresh) is EulerAncestralDiscreteScheduler


COPIES = {
    "from_config": lambda scheduler: type(scheduler).from_config(scheduler.config),
    "constructor": lambda scheduler: type(scheduler)(clip_sample=False),
    "deepcopy": copy.deepcopy,
    "pickle": lambda scheduler: pickle.loads(pickle.dumps(scheduler)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.cases(2)
def test_copies_of_a_realigned_scheduler_are_of_its_own_class(way):
    pipe, anchor, call, own = trio()
    dial = realign(pipe, anchor, 0.37)
    twin = COPIES[way](pipe.scheduler)
    assert type(twin) is DDIMScheduler and twin.config.clip_sample is False
    if way != "constructor":
        assert twin.config == pipe.scheduler.config
    pipe.scheduler = twin if way != "constructor" else copy.deepcopy(own[0].scheduler)
    assert_close(sample(pipe, call), lock_step(own, call, 0.37))
    dial.remove()
    assert type(pipe.scheduler) is DDIMScheduler
    assert torch.equal(sample(pipe, call), sample(own[0], call))
    realign(pipe, anchor, 0.37).remove()


def test_a_scheduler_of_another_realigned_pipeline_is_refused_with_a_remedy_that_works():
    pipe, anchor, call, own = trio()
    other = make("sd")[0]
    with realign(pipe, anchor, 0.37):
        other.scheduler = pipe.scheduler
        with pytest.raises(RuntimeError, match=r"type\(pipe\.scheduler\)\.from_config"):
            realign(other, make("sd")[1])
        other.scheduler = type(other.scheduler).from_config(other.scheduler.config)
        with realign(other, make("sd")[1], 0.5):
            assert_close(sample(pipe, call), lock_step(own, call, 0.37))


def test_a_flow_scheduler_replaced_twice():
    pipe, anchor, call, own = trio("sd3")
    with realign(pipe, anchor, 0.37):
        first = sample(pipe, call)
        original = [each.scheduler for each in (pipe, *own)]
        for each in (pipe, *own):
            each.scheduler = FlowMatchHeunDiscreteScheduler.from_config(each.scheduler.config)
        assert_close(sample(pipe, call), lock_step(own, call, 0.37))
        for each, scheduler in zip((pipe, *own), original, strict=True):
            each.scheduler = scheduler
        assert torch.equal(sample(pipe, call), first)
    assert torch.equal(sample(pipe, call), sample(own[0], call))


@BEFORE_AND_AFTER
def test_from_pipe(order):
    """Image to image around the same parts: realigned with them, or refused in words."""
    pipe, anchor, call, own = trio()
    image_call = make("sd_img2img")[2]
    own_image = [AutoPipelineForImage2Image.from_pipe(each) for each in own]
    if order == "before":
        image_pipe = AutoPipelineForImage2Image.from_pipe(pipe)
        dial = realign(image_pipe, anchor, 0.37)
    else:
        dial = realign(pipe, anchor, 0.37)
        image_pipe = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert_close(sample(image_pipe, image_call), lock_step(own_image, image_call, 0.37))
    assert_close(sample(pipe, call), lock_step(own, call, 0.37))
    dial.lam = 1.0
    assert torch.equal(sample(image_pipe, image_call), sample(own_image[1], image_call))
    dial.remove()
    for served, own_pipe, arguments in ((pipe, own[0], call), (image_pipe, own_image[0], image_call)):
        assert torch.equal(sample(served, arguments), sample(own_pipe, arguments))


def test_a_second_pipeline_with_a_scheduler_of_its_own_is_noticed_and_can_be_attached():
    pipe, anchor, call, own = trio()
    with realign(pipe, anchor, 0.37) as dial:
        other = StableDiffusionPipeline.from_pipe(pipe)
        other.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(RuntimeError, match=r"dial\.attach"):
            sample(other, call | {"prompt": call["prompt"][:1], "negative_prompt": call["negative_prompt"][:1]})
        dial.attach(other)
        for each in own:
            each.scheduler = EulerAncestralDiscreteScheduler.from_config(each.scheduler.config)
        assert_close(sample(other, call), lock_step(own, call, 0.37))
        assert not torch.equal(sample(pipe, call), sample(other, call))


def test_what_a_realigned_pipeline_saves_is_the_plain_reference(tmp_path):
    pipe, anchor, call, own = trio()
    with realign(pipe, anchor, 0.37):
        during = sample(pipe, call)
        pipe.save_pretrained(tmp_path)
        assert torch.equal(sample(pipe, call), during)
    reloaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    assert type(reloaded.unet) is UNet2DConditionModel
    assert type(reloaded.scheduler) is type(own[0].scheduler)
    configs = [dict(each.scheduler.config) for each in (reloaded, own[0])]
    assert len({str({key: config[key] for key in config if key[0] != "_"}) for config in configs}) == 1
    assert torch.equal(sample(reloaded, call), sample(own[0], call))
    assert not any("deradiff" in path.read_text() for path in tmp_path.rglob("*.json"))


def test_components_and_config_are_untouched():
    pipe, anchor, _, _ = trio()
    names, config = set(pipe.components), dict(pipe.config)
    with realign(pipe, anchor, 0.37):
        assert set(pipe.components) == names and dict(pipe.config) == config
        assert isinstance(pipe.unet, UNet2DConditionModel) and pipe.unet.config.in_channels == 4
        assert set(pipe.unet.state_dict()) == set(make("sd")[0].unet.state_dict())


COMPILERS = {
    "torch.compile": lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet, backend="eager")),
    "module.compile": lambda pipe: pipe.unet.compile(backend="eager"),
}


@BEFORE_AND_AFTER
@pytest.mark.parametrize("how", COMPILERS)
@pytest.mark.cases(1)
def test_compilation(how, order):
    pipe, anchor, call, own = trio()
    plain, aligned = sample(own[0], call), sample(own[1], call)
    dial = realigned(pipe, anchor, 0.0, order, COMPILERS[how])
    assert_close(sample(pipe, call), plain)
    for lam in (0.37, 0.6):
        dial.lam = lam
        assert_close(sample(pipe, call), lock_step(own, call, lam))
    dial.lam = 1.0
    assert_close(sample(pipe, call), aligned)
    dial.remove()
    assert_close(sample(pipe, call), plain)


def test_compiled_by_repeated_blocks():
    pipe, anchor, call, own = trio("flux")
    dial = realign(pipe, anchor, 0.37)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    assert_close(sample(pipe, call), lock_step(own, call, 0.37))
    dial.remove()
    assert_close(sample(pipe, call), sample(own[0], call))


def test_memory_savers():
    pipe, anchor, call, own = trio()
    for each in (pipe, *own):
        each.unet.to(memory_format=torch.channels_last)
        each.enable_attention_slicing()
        each.vae.enable_tiling()
    with realign(pipe, anchor, 0.37):
        assert_close(sample(pipe, call), lock_step(own, call, 0.37))
