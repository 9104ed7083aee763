"""Pipelines with several denoisers, an anchor and λ for each: Wan 2.2's for high and low noise."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from deradiff import realign
from deradiff.anchors import AnchorError
from oracle import lock_step
from tiny import assert_close, distance, noise, perturbed, seeded

NAMES = ("transformer", "transformer_2")


def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()


class Wan(WanPipeline):
    """Returns its video as other pipelines do their images."""

    def __call__(self, **call: Any) -> Any:
        output = super().__call__(**call)
        output["images"] = output.frames
        output.images = output.frames
        return output


def wan(anchors: Mapping[str, Any] | None = None) -> WanPipeline:
    with seeded(0):
        vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
        parts = {name: transformer() for name in NAMES} | dict(anchors or {})
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = Wan(**parts, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None, boundary_ratio=0.8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL: dict[str, Any] = {
    "prompt_embeds": noise(2, 5, 16, seed=1),
    "negative_prompt_embeds": noise(2, 5, 16, seed=2),
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "output_type": "latent",
}


def anchors_of(pipe: WanPipeline) -> dict[str, Any]:
    return {name: perturbed(getattr(pipe, name), seed) for seed, name in enumerate(NAMES, 1)}


def drawn(pipe: WanPipeline) -> Tensor:
    with seeded(11):
        return pipe(generator=torch.Generator().manual_seed(11), **CALL).images


def test_each_denoiser_has_its_own_anchor():
    pipe, anchors = wan(), anchors_of(wan())
    plain, aligned = drawn(wan()), drawn(wan(anchors_of(wan())))
    dial = realign(pipe, anchors, 0.0)
    assert torch.equal(drawn(pipe), plain)
    dial.lam = 1.0
    assert torch.equal(drawn(pipe), aligned)
    dial.lam = 0.4
    assert_close(drawn(pipe), lock_step([wan(), wan(anchors_of(wan()))], CALL, 0.4))
    assert dial.anchors == ("anchor",) and dial.lam == 0.4
    dial.remove()
    assert torch.equal(drawn(pipe), plain)


def test_each_denoiser_has_its_own_lam():
    pipe = wan()
    own = anchors_of(pipe)
    with realign(pipe, own, {"transformer": 1.0, "transformer_2": 0.0}) as dial:
        assert torch.equal(drawn(pipe), drawn(wan({"transformer": anchors_of(wan())["transformer"]})))
        dial.lam = {"transformer": 0.0, "transformer_2": 1.0}
        assert torch.equal(drawn(pipe), drawn(wan({"transformer_2": anchors_of(wan())["transformer_2"]})))
        assert dial.lam == {"transformer": 0.0, "transformer_2": 1.0}
        with pytest.raises(ValueError, match=r"transformer_2"):
            dial.lam = {"transformer": 0.5}


def test_what_is_left_out_stays_the_references_and_that_is_said():
    pipe = wan()
    with (
        pytest.warns(UserWarning, match="transformer_2"),
        realign(pipe, {"transformer": anchors_of(pipe)["transformer"]}, 1.0),
    ):
        assert torch.equal(drawn(pipe), drawn(wan({"transformer": anchors_of(wan())["transformer"]})))


def lora(module: WanTransformer3DModel, seed: int) -> dict[str, Tensor]:
    """A LoRA of rank 2 on the attention's projections, under the module's own names."""
    layers = [name for name, _ in module.named_modules() if name.endswith((".to_q", ".to_v"))]
    tensors = {}
    for k, name in enumerate(layers):
        out, into = module.get_submodule(name).weight.shape
        tensors[f"{name}.lora_A.weight"] = noise(2, into, seed=seed + 2 * k)
        tensors[f"{name}.lora_B.weight"] = noise(out, 2, seed=seed + 2 * k + 1)
    return tensors


def test_loras_come_as_a_pair_of_files_or_as_one_whose_keys_name_the_denoiser(tmp_path):
    pipe = wan()
    own = {name: lora(getattr(pipe, name), 100 * seed) for seed, name in enumerate(NAMES, 1)}
    for name, tensors in own.items():
        save_file({f"transformer.{key}": tensor for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
    both = {f"{name}.{key}": tensor for name, tensors in own.items() for key, tensor in tensors.items()}
    save_file(both, tmp_path / "both.safetensors")
    plain = drawn(pipe)
    with realign(pipe, {name: tmp_path / f"{name}.safetensors" for name in NAMES}, 0.5):
        pair = drawn(pipe)
    assert torch.equal(drawn(pipe), plain)
    with realign(pipe, tmp_path / "both.safetensors", 0.5):
        assert torch.equal(drawn(pipe), pair)
    assert distance(pair, plain) > 1e-3
    with realign(pipe, {name: tmp_path / f"{name}.safetensors" for name in NAMES}, 1.0, batched=False):
        aligned = drawn(pipe)
    loaded = wan()
    for name in NAMES:
        prefixed = {f"transformer.{key}": tensor for key, tensor in own[name].items()}
        getattr(loaded, name).load_lora_adapter(prefixed, prefix="transformer")
    assert_close(drawn(loaded), aligned)


def test_a_pipeline_is_an_anchor_for_all_its_denoisers(tmp_path):
    aligned = wan(anchors_of(wan()))
    for name in NAMES:
        getattr(aligned, name).save_pretrained(tmp_path / name)
    aligned.register_to_config(_class_name="WanPipeline")
    aligned.save_config(tmp_path)
    pipe = wan()
    with realign(pipe, tmp_path, 1.0):
        assert torch.equal(drawn(pipe), drawn(aligned))


@pytest.mark.parametrize("form", ["module", "file"])
def test_one_anchor_for_several_denoisers_has_to_say_which_it_is_for(form, tmp_path):
    pipe = wan()
    plain = drawn(pipe)
    source: Any = anchors_of(pipe)["transformer"]
    if form == "file":
        source = tmp_path / "lora.safetensors"
        save_file({f"transformer.{key}": value for key, value in lora(pipe.transformer, 5).items()}, source)
    with pytest.raises(AnchorError, match=r"transformer and transformer_2"):
        realign(pipe, source)
    with pytest.raises(ValueError, match=r"transformer_3"):
        realign(pipe, {"transformer": source, "transformer_3": source})
    assert torch.equal(drawn(pipe), plain)
