"""Pipelines made from a realigned one, or realigned after they were made from another; and what is saved of them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import PushToHubMixin
from safetensors.torch import save_file

from deradiff import realign
from deradiff.sampling.blocked_methods import DialError
from messages import naming
from oracle import lock_step
from tiny import assert_close, make, sample, trio
from tiny_loras import lora_weights

BEFORE_AND_AFTER = pytest.mark.parametrize("order", ["before", "after"])

AUTO: dict[str, tuple[Callable[[Any], DiffusionPipeline], str]] = {
    "image": (AutoPipelineForImage2Image.from_pipe, "{}_img2img"),
    "inpainting": (AutoPipelineForInpainting.from_pipe, "{}_inpaint"),
    "text": (AutoPipelineForText2Image.from_pipe, "{}"),
}


@BEFORE_AND_AFTER
@pytest.mark.parametrize("task", AUTO)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.cases(3)
def test_from_a_pipeline_for_text_to_one_for(task: str, family: str, order: str) -> None:
    build, kind = AUTO[task]
    pipe, anchor, call, own = trio(family)
    other_call = make(kind.format(family))[2]
    own_others = [build(each) for each in own]
    if order == "before":
        other = build(pipe)
        dial = realign(other, anchor, 0.37)
    else:
        dial = realign(pipe, anchor, 0.37)
        other = build(pipe)
    assert_close(sample(other, other_call), lock_step(own_others, other_call, 0.37))
    assert_close(sample(pipe, call), lock_step(own, call, 0.37))
    for lam in (0, 1):
        dial.lam = float(lam)
        assert torch.equal(sample(other, other_call), sample(own_others[lam], other_call))
        assert torch.equal(sample(pipe, call), sample(own[lam], call))
    dial.remove()
    assert torch.equal(sample(other, other_call), sample(own_others[0], other_call))
    assert torch.equal(sample(pipe, call), sample(own[0], call))
    assert type(other) is type(own_others[0]) and type(pipe) is type(own[0])


@BEFORE_AND_AFTER
def test_from_a_pipeline_for_images_to_one_for_text(order: str) -> None:
    pipe, anchor, call = make("sd_img2img")
    own = [StableDiffusionImg2ImgPipeline(**make("sd_img2img")[0].components) for _ in range(2)]
    own[1].unet = make("sd_img2img")[1]
    for each in own:
        each.set_progress_bar_config(disable=True)
    text_call, own_text = make("sd")[2], [StableDiffusionPipeline.from_pipe(each) for each in own]
    other = StableDiffusionPipeline.from_pipe(pipe) if order == "before" else None
    dial = realign(pipe if other is None else other, anchor, 0.37)
    other = StableDiffusionPipeline.from_pipe(pipe) if other is None else other
    assert_close(sample(other, text_call), lock_step(own_text, text_call, 0.37))
    assert_close(sample(pipe, call), lock_step(own, call, 0.37))
    dial.remove()
    assert torch.equal(sample(other, text_call), sample(own_text[0], text_call))


def test_a_third_pipeline_from_the_second() -> None:
    pipe, anchor, call, own = trio()
    with realign(pipe, anchor, 0.37):
        third = StableDiffusionPipeline.from_pipe(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
        assert_close(sample(third, call), lock_step(own, call, 0.37))
        with pytest.raises(DialError, match=naming("realigned")):
            realign(third, anchor)


# --- what is saved ----------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what would be uploaded to the hub is found."""

    def upload(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> None:
        shutil.copytree(working_dir, tmp_path / "hub")

    class Created:
        repo_id = "somebody/something"

    monkeypatch.setattr(PushToHubMixin, "_upload_folder", upload)
    for module in ("diffusers.utils.hub_utils", "diffusers.pipelines.pipeline_utils"):
        monkeypatch.setattr(f"{module}.create_repo", lambda *args, **kwargs: Created(), raising=False)
    return tmp_path / "hub"


def same_weights(folder: Path, unet: UNet2DConditionModel) -> bool:
    stored, own = UNet2DConditionModel.from_pretrained(folder).state_dict(), unet.state_dict()
    return stored.keys() == own.keys() and all(torch.equal(stored[name], own[name]) for name in own)


def test_what_a_realigned_pipeline_pushes_is_the_plain_reference(uploads: Path) -> None:
    pipe, anchor, call, own = trio()
    with realign(pipe, anchor, 0.37):
        during = sample(pipe, call)
        pipe.push_to_hub("somebody/something")
        assert torch.equal(sample(pipe, call), during)
    assert same_weights(uploads / "unet", own[0].unet)
    assert not any("deradiff" in path.read_text() for path in uploads.rglob("*.json"))
    assert type(DiffusionPipeline.from_pretrained(uploads)) is StableDiffusionPipeline


@pytest.mark.parametrize("how", ["save_pretrained", "push_to_hub"])
def test_a_pipeline_with_a_lora_anchor_is_not_saved_with_it(how: str, tmp_path: Path, uploads: Path) -> None:
    pipe, _, call = make("sd")
    plain = sample(pipe, call)
    (tmp_path / "lora").mkdir()
    save_file(lora_weights(pipe, seed=20), tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    target = str(tmp_path / "saved") if how == "save_pretrained" else "somebody/something"
    dial = realign(pipe, tmp_path / "lora", 0.37)
    for part in (pipe, pipe.unet):
        with pytest.raises(DialError, match=naming("LoRA", r"dial.remove()")):
            getattr(part, how)(target)
    assert not uploads.exists()
    dial.remove()
    pipe.save_pretrained(tmp_path / "plain")
    assert same_weights(tmp_path / "plain" / "unet", make("sd")[0].unet)
    assert torch.equal(sample(pipe, call), plain)


def test_a_whole_family_is_made_and_saved(tmp_path: Path) -> None:
    pipe, anchor, call, own = trio("sdxl")
    with realign(pipe, anchor, 0.37):
        StableDiffusionXLPipeline.from_pipe(pipe).save_pretrained(tmp_path)
    assert same_weights(tmp_path / "unet", own[0].unet)
    assert torch.equal(sample(pipe, call), sample(own[0], call))
