"""Anchors with weights of their own: each form in which they come is the aligned model bit for bit."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from anchor_files import edited, made, module_of, original_layout, original_sd3_layout, predict, saved
from deradiff.anchors import AnchorError, AnchorNotFound, denoiser_of, load_anchor
from messages import naming

BARE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def quiet():
    """Nothing may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart"])
def test_a_denoiser_folder_is_the_anchor_bit_for_bit(kind, tmp_path, quiet):
    pipe, aligned = made(kind)
    before = predict(pipe)
    anchor = load_anchor(saved(aligned, tmp_path), pipe, name="vivid")
    assert anchor.name == "vivid" and anchor.source == str(tmp_path) and anchor.adapter is None
    assert torch.equal(predict(pipe, module_of(anchor)), predict(pipe, aligned))
    assert torch.equal(predict(pipe), before)
    assert not module_of(anchor).training and not any(p.requires_grad for p in module_of(anchor).parameters())
    assert not any(tensor.is_meta for tensor in (*module_of(anchor).parameters(), *module_of(anchor).buffers()))


def test_weights_survive_the_file_they_came_from(tmp_path):
    """A view of a file that is later overwritten would change under the sampler."""
    pipe, aligned = made("sd")
    anchor = load_anchor(saved(aligned, tmp_path), pipe)
    file = tmp_path / BARE
    with file.open("r+b") as handle:
        handle.write(b"\0" * file.stat().st_size)
    assert torch.equal(predict(pipe, module_of(anchor)), predict(pipe, aligned))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_reference_has_an_anchor_in_its_precision(dtype, tmp_path):
    pipe, aligned = made("sd")
    pipe.unet.to(dtype)
    anchor = load_anchor(saved(aligned, tmp_path), pipe)
    assert {p.dtype for p in module_of(anchor).parameters()} == {dtype}
    assert torch.equal(module_of(anchor).conv_in.weight, aligned.conv_in.weight.to(dtype))


def test_tensors_that_the_reference_keeps_in_float32_stay_so(tmp_path):
    pipe, aligned = made("sd")
    pipe.unet.half().conv_norm_out.float()
    anchor = load_anchor(saved(aligned, tmp_path), pipe)
    assert (
        module_of(anchor).conv_norm_out.weight.dtype == torch.float32
        and module_of(anchor).conv_in.weight.dtype == torch.float16
    )


def test_a_reference_stored_in_eight_bits_has_an_anchor_in_the_precision_it_computes_in(tmp_path):
    pipe, aligned = made("sd")
    pipe.unet.to(torch.bfloat16)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    anchor = load_anchor(saved(aligned, tmp_path), pipe)
    assert {p.dtype for p in module_of(anchor).parameters()} == {torch.bfloat16}


def test_shards_and_variants(tmp_path, quiet):
    pipe, aligned = made("sd")
    saved(aligned, tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 2
    sharded = load_anchor(tmp_path / "shards", pipe)
    assert torch.equal(predict(pipe, sharded.module), predict(pipe, aligned))

    saved(aligned, tmp_path / "variants")
    saved(copy.deepcopy(aligned).half(), tmp_path / "variants", variant="fp16")
    assert torch.equal(module_of(load_anchor(tmp_path / "variants", pipe)).conv_in.weight, aligned.conv_in.weight)
    (tmp_path / "variants" / BARE).unlink()  # only the variant is left, or is the one wanted
    rounded = aligned.conv_in.weight.half().float()
    assert torch.equal(module_of(load_anchor(tmp_path / "variants", pipe)).conv_in.weight, rounded)


def test_a_half_precision_reference_reads_its_variant(tmp_path):
    pipe, aligned = made("sd")
    saved(copy.deepcopy(aligned).half(), tmp_path, variant="fp16")
    saved(aligned, tmp_path)
    (tmp_path / BARE).write_bytes(b"would be read for float32 only")
    pipe.unet.half()
    assert torch.equal(module_of(load_anchor(tmp_path, pipe)).conv_in.weight, aligned.conv_in.weight.half())


def test_a_missing_shard_is_named(tmp_path):
    pipe, aligned = made("sd")
    saved(aligned, tmp_path, max_shard_size="50KB")
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(AnchorNotFound, match=naming(tmp_path, "shards", [2])):
        load_anchor(tmp_path, pipe)


def test_a_repository_with_only_a_unet_folder_or_a_subfolder(tmp_path):
    pipe, aligned = made("sd")
    saved(aligned, tmp_path / "unet")
    saved(aligned, tmp_path / "runs" / "beta_500")
    wanted = predict(pipe, aligned)
    assert torch.equal(predict(pipe, module_of(load_anchor(tmp_path, pipe))), wanted)
    assert torch.equal(predict(pipe, module_of(load_anchor(str(tmp_path), pipe, subfolder="runs/beta_500"))), wanted)
    assert torch.equal(predict(pipe, module_of(load_anchor(tmp_path / "unet" / BARE, pipe))), wanted)
    with pytest.raises(AnchorNotFound, match=naming("'beta'", "unet, runs")):
        load_anchor(tmp_path, pipe, subfolder="beta")
    with pytest.raises(AnchorNotFound, match=naming(".safetensors", "subfolder=")):
        load_anchor(tmp_path / "runs", pipe)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_whole_pipeline_gives_its_denoiser(kind, tmp_path, quiet):
    pipe, aligned = made(kind)
    other, _ = made(kind)
    setattr(other, denoiser_of(other)[0], aligned)
    other.save_pretrained(tmp_path)
    assert torch.equal(predict(pipe, module_of(load_anchor(tmp_path, pipe))), predict(pipe, aligned))


def test_another_text_encoder_is_warned_about(tmp_path):
    pipe, aligned = made("sdxl")
    other, _ = made("sdxl")
    other.unet = aligned
    next(other.text_encoder_2.parameters()).data[-1, -1] += 1e-3
    other.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=naming(tmp_path, "text_encoder_2")):
        load_anchor(tmp_path, pipe)


def test_the_same_text_encoder_in_half_precision_is_no_other(tmp_path, quiet):
    pipe, aligned = made("sd")
    other, _ = made("sd")
    other.unet, other.text_encoder = aligned, other.text_encoder.half()
    other.save_pretrained(tmp_path)
    load_anchor(tmp_path, pipe)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_single_file_in_the_original_or_in_diffusers_layout(kind, tmp_path, quiet):
    pipe, aligned = made(kind)
    before, wanted = predict(pipe), predict(pipe, aligned)
    others = {
        "first_stage_model.x": torch.ones(2),
        "cond_stage_model.y": torch.ones(2),
        "model_ema.decay": torch.ones(1),
    }
    save_file(original_layout(aligned) | others, tmp_path / "merged-v1.0.safetensors")
    save_file(aligned.state_dict(), tmp_path / "bare.safetensors")
    for file in ("merged-v1.0.safetensors", "bare.safetensors"):
        anchor = load_anchor(tmp_path / file, pipe)
        assert torch.equal(predict(pipe, module_of(anchor)), wanted)
        assert not any(p.requires_grad for p in module_of(anchor).parameters())
    assert torch.equal(predict(pipe), before)


def test_stable_diffusion_3_in_its_original_layout(tmp_path, quiet):
    pipe, aligned = made("sd3")
    save_file(original_sd3_layout(aligned), tmp_path / "sd3.safetensors")
    anchor = load_anchor(tmp_path / "sd3.safetensors", pipe)
    assert torch.equal(predict(pipe, module_of(anchor)), predict(pipe, aligned))


def test_a_half_precision_reference_takes_a_single_file(tmp_path):
    pipe, aligned = made("sd")
    pipe.unet.half()
    save_file(original_layout(aligned), tmp_path / "a.safetensors")
    anchor = load_anchor(tmp_path / "a.safetensors", pipe)
    assert torch.equal(module_of(anchor).conv_in.weight, aligned.conv_in.weight.half())


class Wrapped(nn.Module):
    """What `torch.compile` puts around a module, without its import."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def test_a_reference_that_carries_more_than_its_own_weights(tmp_path, quiet):
    """A style LoRA's wrappers or an IP-Adapter's projections are no part of the architecture."""
    _, aligned = made("sd")
    saved(aligned, tmp_path)
    styled, _ = made("sd")
    styled.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    prompted, _ = made("sd_ip_adapter")
    compiled, _ = made("sd")
    compiled.unet = Wrapped(compiled.unet)
    for pipe in (styled, prompted, compiled):
        anchor = load_anchor(tmp_path, pipe)
        assert torch.equal(module_of(anchor).conv_in.weight, aligned.conv_in.weight)
        assert torch.equal(
            module_of(anchor).mid_block.attentions[0].proj_in.weight, aligned.mid_block.attentions[0].proj_in.weight
        )


def test_settings_that_do_not_enter_the_function_may_differ(tmp_path, quiet):
    pipe, aligned = made("sd")
    saved(aligned, tmp_path)
    heads = pipe.unet.config.attention_head_dim
    edited(
        tmp_path / "config.json",
        sample_size=96,
        upcast_attention=True,
        _name_or_path="elsewhere",
        _diffusers_version="0.4.0",
        attention_head_dim=[heads, heads] if isinstance(heads, int) else heads,
    )
    assert torch.equal(predict(pipe, module_of(load_anchor(tmp_path, pipe))), predict(pipe, aligned))


# --- a denoiser that is loaded already --------------------------------------------------------------------------------


def test_a_loaded_denoiser_is_taken_and_given_back(quiet):
    pipe, aligned = made("sd")
    aligned.train().conv_in.requires_grad_(False)
    anchor = load_anchor(aligned, pipe)
    assert (
        module_of(anchor) is aligned and not aligned.training and not any(p.requires_grad for p in aligned.parameters())
    )
    anchor.unload(pipe.unet)
    assert aligned.training and aligned.conv_out.weight.requires_grad and not aligned.conv_in.weight.requires_grad


def test_a_loaded_denoiser_is_cast_to_the_reference_with_a_warning():
    pipe, aligned = made("sd")
    pipe.unet.half()
    with pytest.warns(UserWarning, match=naming("UNet2DConditionModel", "torch.float32", "torch.float16")):
        anchor = load_anchor(aligned, pipe)
    assert module_of(anchor) is aligned and aligned.dtype == torch.float16


def test_the_reference_itself_is_no_anchor():
    pipe, _ = made("sd")
    with pytest.raises(AnchorError, match="itself"):
        load_anchor(pipe.unet, pipe)


def test_an_anchor_equal_to_the_reference_is_warned_about(tmp_path):
    pipe, _ = made("sd")
    for source in (copy.deepcopy(pipe.unet), saved(pipe.unet, tmp_path)):
        with pytest.warns(UserWarning, match="weights"):
            load_anchor(source, pipe)
