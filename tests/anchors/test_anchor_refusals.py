"""Every way in which a source can be no anchor: the error says which, and the pipeline is as it was."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, KandinskyPriorPipeline, PriorTransformer, UnCLIPScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from anchor_files import edited, made, module_of, original_layout, predict, saved
from deradiff.anchors import (
    AnchorError,
    AnchorNotFound,
    CorruptAnchor,
    IncompatibleAnchor,
    PickledAnchor,
    PipelineWithoutDenoiser,
    load_anchor,
)
from messages import naming
from tiny import denoiser

BARE = "diffusion_pytorch_model.safetensors"


# --- other models -----------------------------------------------------------------------------------------------------


def test_another_class_is_refused(tmp_path):
    pipe, _ = made("sd")
    _, transformer = made("sd3")
    with pytest.raises(IncompatibleAnchor, match=naming("SD3Transformer2DModel", "UNet2DConditionModel")):
        load_anchor(transformer, pipe)
    with pytest.raises(IncompatibleAnchor, match=naming("SD3Transformer2DModel", "UNet2DConditionModel")):
        load_anchor(saved(transformer, tmp_path / "denoiser"), pipe)
    made("sd3")[0].save_pretrained(tmp_path / "pipeline")
    with pytest.raises(IncompatibleAnchor, match=naming("'unet'", "transformer")):
        load_anchor(tmp_path / "pipeline", pipe)


def test_an_inpainting_anchor_is_named_as_such(tmp_path):
    pipe, _ = made("sd")
    _, inpainting = made("sd_inpaint_9_channels")
    expected = naming("in_channels", 9, 4, "inpainting")
    save_file(original_layout(inpainting), tmp_path / "original.safetensors")
    for source in (inpainting, saved(inpainting, tmp_path / "folder"), tmp_path / "original.safetensors"):
        with pytest.raises(IncompatibleAnchor, match=expected):
            load_anchor(source, pipe)


def test_a_guidance_distilled_anchor_is_named_as_such(tmp_path):
    pipe, aligned = made("flux")
    saved(aligned, tmp_path)
    edited(tmp_path / "config.json", guidance_embeds=False)
    with pytest.raises(IncompatibleAnchor, match=naming("guidance_embeds", False, "guidance-distilled")):
        load_anchor(tmp_path, pipe)


def test_the_first_five_differing_settings_are_named(tmp_path):
    pipe, aligned = made("sd")
    saved(aligned, tmp_path)
    changes = {
        "attention_head_dim": 4,  # same tensors, another function
        "act_fn": "gelu",
        "norm_eps": 1e-6,
        "mid_block_scale_factor": 2,
        "time_cond_proj_dim": 8,
        "freq_shift": 1,
    }
    edited(tmp_path / "config.json", **changes)
    with pytest.raises(IncompatibleAnchor) as refused:
        load_anchor(tmp_path, pipe)
    said = str(refused.value)
    named = [key for key, value in changes.items() if re.search(rf"\b{key}\b[^;]*{re.escape(repr(value))}", said)]
    assert len(named) == 5 and "1 more" in said


def test_weights_that_do_not_fit_their_own_config(tmp_path):
    pipe, aligned = made("sd")
    saved(aligned, tmp_path)
    state = load_file(tmp_path / BARE)
    state["conv_in.weight"] = state["conv_in.weight"][:, :3].contiguous()
    state["surplus"] = state.pop("conv_out.bias")
    save_file(state, tmp_path / BARE)
    values = ("conv_in.weight", [8, 3, 3, 3], "missing tensors: conv_out.bias", "unknown tensors: surplus")
    with pytest.raises(IncompatibleAnchor, match=naming(*values)):
        load_anchor(tmp_path, pipe)


def test_a_single_file_of_another_architecture(tmp_path):
    pipe, aligned = made("sd")
    _, larger = made("sdxl")
    save_file(original_layout(larger), tmp_path / "xl.safetensors")
    state = original_layout(aligned)
    del state["model.diffusion_model.out.2.weight"]
    save_file(state, tmp_path / "lacking.safetensors")
    save_file({"something.else": torch.ones(3), "entirely": torch.ones(2)}, tmp_path / "strange.safetensors")
    for file in ("xl", "lacking", "strange"):
        with pytest.raises(IncompatibleAnchor, match=f"{file}.safetensors"):
            load_anchor(tmp_path / f"{file}.safetensors", pipe)
    transformer, _ = made("pixart")
    with pytest.raises(IncompatibleAnchor, match=naming("PixArtTransformer2DModel", "entirely, something.else")):
        load_anchor(tmp_path / "strange.safetensors", transformer)


def test_another_prediction_type_is_refused(tmp_path):
    pipe, aligned = made("sd")
    other, _ = made("sd")
    other.unet, other.scheduler = aligned, DDIMScheduler(prediction_type="v_prediction")
    other.save_pretrained(tmp_path / "pipeline")
    state = original_layout(aligned) | {"v_pred": torch.zeros(0)}
    save_file(state, tmp_path / "v.safetensors")
    for source in ("pipeline", "v.safetensors"):
        with pytest.raises(IncompatibleAnchor, match=naming("'v_prediction'", "'epsilon'")):
            load_anchor(tmp_path / source, pipe)


def test_a_pipeline_without_a_denoiser():
    class Upscaler(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

    with pytest.raises(PipelineWithoutDenoiser, match=naming("Upscaler", "`unet`", "`transformer`", "scheduler")):
        load_anchor("anything", Upscaler(DDIMScheduler()))


def test_a_module_that_is_no_diffusers_model():
    pipe, _ = made("sd")
    with pytest.raises(IncompatibleAnchor, match="Linear"):
        load_anchor(nn.Linear(2, 2), pipe)
    aligned = copy.deepcopy(pipe.unet)
    aligned.conv_in = nn.Conv2d(9, aligned.conv_in.out_channels, 3, padding=1)
    with pytest.raises(IncompatibleAnchor, match=naming("conv_in.weight", [8, 9, 3, 3], [8, 4, 3, 3])):
        load_anchor(aligned, pipe)


# --- missing, damaged, pickled ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["./nowhere", "/no/where", "~/nowhere", "nowhere", "dir/model.safetensors", Path("a/b")]
)
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(source):
    path = Path(source).expanduser().absolute()
    with pytest.raises(AnchorNotFound, match=naming(path, "'owner/name/file.safetensors'")):
        load_anchor(source, made("sd")[0])


def test_names_that_cannot_be_looked_up():
    pipe, _ = made("sd")
    for empty in ("", "  "):
        with pytest.raises(AnchorNotFound, match="empty"):
            load_anchor(empty, pipe)
    for name in ("a/" + "b" * 5000, "~nobody-of-that-name/model"):
        with pytest.raises(AnchorNotFound, match=naming(f"'{name[:80]}'")):
            load_anchor(name, pipe)
    with pytest.raises(AnchorError, match=naming("/dev/null")):
        load_anchor("/dev/null", pipe)


def test_what_is_not_quite_a_hub_id():
    pipe, _ = made("sd")
    with pytest.raises(AnchorNotFound, match=naming("'https://huggingface.co/owner/name'")):
        load_anchor("https://huggingface.co/owner/name", pipe)
    with pytest.raises(AnchorNotFound, match="subfolder='unet'"):
        load_anchor("owner/name/unet", pipe)


def test_revision_and_subfolder_belong_to_hub_ids_and_folders(tmp_path):
    pipe, aligned = made("sd")
    saved(aligned, tmp_path)
    with pytest.raises(AnchorError, match="revision='v1'"):
        load_anchor(tmp_path, pipe, revision="v1")
    with pytest.raises(AnchorError, match=naming("subfolder='unet'", tmp_path / BARE)):
        load_anchor(tmp_path / BARE, pipe, subfolder="unet")


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "page", "pointer"])
def test_damaged_files_are_named(damage, tmp_path):
    pipe, aligned = made("sd")
    before = predict(pipe)
    file = saved(aligned, tmp_path) / BARE
    whole = file.read_bytes()
    file.write_bytes(
        {
            "truncated": whole[:-1000],
            "header": whole[:20],
            "empty": b"",
            "page": b"<html>moved</html>",
            "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        }[damage]
    )
    with pytest.raises(CorruptAnchor, match=naming(tmp_path / BARE)):
        load_anchor(tmp_path, pipe)
    assert torch.equal(predict(pipe), before)


def test_a_damaged_config_is_named(tmp_path):
    pipe, aligned = made("sd")
    saved(aligned, tmp_path)
    (tmp_path / "config.json").write_text('{"in_channels": 4,')
    with pytest.raises(CorruptAnchor, match=naming(tmp_path / "config.json")):
        load_anchor(tmp_path, pipe)


def test_an_empty_folder_and_a_choice_of_files(tmp_path):
    pipe, aligned = made("sd")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnchorNotFound, match=naming(tmp_path / "empty", ".safetensors")):
        load_anchor(tmp_path / "empty", pipe)
    for name in ("dpo-v1.0", "dpo-v1.5"):
        save_file(aligned.state_dict(), tmp_path / f"{name}.safetensors")
    with pytest.raises(AnchorError, match=naming("dpo-v1.0.safetensors, dpo-v1.5.safetensors")):
        load_anchor(tmp_path, pipe)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(AnchorError, match=naming(tmp_path / "notes.txt")):
        load_anchor(tmp_path / "notes.txt", pipe)


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "pt", "pth"])
def test_pickles_are_opened_only_on_request(suffix, tmp_path):
    pipe, aligned = made("sd")
    file = tmp_path / f"model.{suffix}"
    torch.save({"state_dict": original_layout(aligned), "epoch": 3} if suffix == "ckpt" else aligned.state_dict(), file)
    for source in (file, tmp_path):
        with pytest.raises(PickledAnchor, match=naming(f"model.{suffix}", "allow_pickle=True")):
            load_anchor(source, pipe)
        anchor = load_anchor(source, pipe, allow_pickle=True)
        assert torch.equal(predict(pipe, module_of(anchor)), predict(pipe, aligned))


def test_a_pickle_beside_safetensors_is_not_looked_at(tmp_path):
    pipe, aligned = made("sd")
    saved(aligned, tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    assert module_of(load_anchor(tmp_path, pipe)) is not None


def test_a_pickle_with_more_than_tensors_is_never_opened(tmp_path):
    pipe, _ = made("sd")
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save({"weight": torch.ones(2), "payload": Payload()}, tmp_path / "model.bin")
    with pytest.raises(PickledAnchor, match=naming(tmp_path / "model.bin")):
        load_anchor(tmp_path / "model.bin", pipe, allow_pickle=True)
    assert not ran.exists()
    (tmp_path / "model.bin").write_bytes(b"not a pickle at all")
    with pytest.raises(AnchorError, match=naming(tmp_path / "model.bin")):
        load_anchor(tmp_path / "model.bin", pipe, allow_pickle=True)


def test_a_failed_load_leaves_the_pipeline_as_it_was(tmp_path):
    pipe, aligned = made("sd")
    saved(aligned, tmp_path)
    edited(tmp_path / "config.json", act_fn="gelu")
    before, state, attributes = predict(pipe), copy.deepcopy(pipe.unet.state_dict()), set(vars(pipe.unet))
    for source in (tmp_path, "./nowhere"):
        with pytest.raises(AnchorError):
            load_anchor(source, pipe)
    shutil.rmtree(tmp_path)
    assert torch.equal(predict(pipe), before) and set(vars(pipe.unet)) == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in denoiser(pipe).state_dict().items())


def test_a_prior_that_scales_embeddings_otherwise_is_refused():
    prior = PriorTransformer(
        num_attention_heads=1,
        attention_head_dim=4,
        num_layers=1,
        embedding_dim=4,
        num_embeddings=2,
        additional_embeddings=4,
    )
    absent = dict.fromkeys(("image_encoder", "text_encoder", "tokenizer", "image_processor"))
    pipe = KandinskyPriorPipeline(prior=prior, scheduler=UnCLIPScheduler(), **absent)
    other = copy.deepcopy(prior)
    load_anchor(copy.deepcopy(prior), pipe)
    other.clip_std.data += 0.5
    with pytest.raises(IncompatibleAnchor, match="clip_std"):
        load_anchor(other, pipe)
