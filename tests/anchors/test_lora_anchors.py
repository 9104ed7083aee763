"""LoRA anchors: the aligned model exactly, inside a reference that does not notice."""

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from anchor_files import kohya, lora, lora_weights, made, merged, predict, state_of, trained
from deradiff.anchors import (
    Anchor,
    AnchorError,
    CorruptAnchor,
    IncompatibleAnchor,
    PickledAnchor,
    denoiser_of,
    load_anchor,
)
from messages import naming
from tiny import denoiser

TARGETS = ["to_q", "to_v", "conv1", "ff.net.2"]
PEFT_CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=4, lora_alpha=2, lora_dropout=0.5, target_modules=TARGETS),
    "ranks": LoraConfig(
        r=4, lora_alpha=2, target_modules=TARGETS, rank_pattern={"conv1": 2}, alpha_pattern={"to_v": 8}
    ),
    "rslora": LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=r".*attn2\.to_[qv]"),
    "dora": LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=TARGETS),
    "lokr": LoKrConfig(r=2, alpha=2, module_dropout=0.5, target_modules=TARGETS),
    "loha": LoHaConfig(r=2, alpha=1, rank_dropout=0.5, target_modules=TARGETS),
}
SGM = {  # names of Stable Diffusion XL's own code for the tiny UNet's blocks, as kohya's trainer writes them
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
}


@pytest.fixture
def quiet():
    """Nothing may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def as_anchor(pipe: DiffusionPipeline, anchor: Anchor) -> torch.Tensor:
    """What the denoiser predicts with the anchor's adapter switched on, and nothing else."""
    layers = [layer for layer in denoiser(pipe).modules() if isinstance(layer, BaseTunerLayer)]
    assert anchor.adapter is not None
    before = [list(layer.active_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter = [anchor.adapter]
    prediction = predict(pipe)
    for layer, active in zip(layers, before, strict=True):
        layer._active_adapter = active
    return prediction


def assert_is(source: Any, pipe: DiffusionPipeline, expected: torch.Tensor) -> None:
    """`source` loads as the model that predicts `expected`, and neither loading nor unloading leaves a trace."""
    before, prediction = state_of(pipe), predict(pipe)
    anchor = load_anchor(source, pipe)
    assert anchor.module is None and anchor.adapter is not None
    assert torch.equal(predict(pipe), prediction), "the reference predicts something else"
    assert not torch.equal(expected, prediction), "the LoRA changes nothing: no test"
    assert torch.equal(as_anchor(pipe, anchor), expected)
    assert not any(p.requires_grad for name, p in denoiser(pipe).named_parameters() if anchor.adapter in name)
    anchor.unload(denoiser(pipe))
    assert torch.equal(predict(pipe), prediction)
    assert state_of(pipe) == before


def as_diffusers_loads(kind: str, source: Any) -> torch.Tensor:
    pipe, _ = made(kind)
    pipe.load_lora_weights(source)
    return predict(pipe)


# --- every form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_diffusers_form_is_what_diffusers_loads(kind, tmp_path, quiet):
    pipe, _ = made(kind)
    component, module = denoiser_of(pipe)
    aligned = lora(module)
    weights = {f"{component}_lora_layers": lora_weights(aligned)}
    type(pipe).save_lora_weights(tmp_path / "plain", **weights)
    assert_is(tmp_path / "plain", pipe, as_diffusers_loads(kind, str(tmp_path / "plain")))
    metadata = {f"{component}_lora_adapter_metadata": aligned.peft_config["default"].to_dict()}
    type(pipe).save_lora_weights(tmp_path / "scaled", **weights, **metadata)  # with its alpha
    assert_is(tmp_path / "scaled", pipe, predict(pipe, aligned))


def test_older_forms_of_diffusers(tmp_path, quiet):
    pipe, _ = made("sd")
    weights = lora_weights(lora(pipe.unet, ("to_q", "to_out.0")))
    middle = {f"unet.{key}": tensor for key, tensor in convert_state_dict_to_diffusers(weights).items()}
    assert any("lora.down" in key for key in middle)
    processors = {
        "unet."
        + key.replace(".to_q.lora_", ".processor.to_q_lora_").replace(".to_out.0.lora_", ".processor.to_out_lora_"): t
        for key, t in weights.items()
    }
    oldest = {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor for key, tensor in processors.items()
    }
    for number, form in enumerate((middle, oldest)):
        save_file(form, tmp_path / f"{number}.safetensors")
        assert_is(tmp_path / f"{number}.safetensors", pipe, as_diffusers_loads("sd", dict(form)))


def test_a_lora_saved_by_the_denoiser_itself(tmp_path, quiet):
    pipe, _ = made("sd")
    aligned = lora(pipe.unet)
    aligned.base_model.model.save_lora_adapter(tmp_path)
    assert_is(tmp_path, pipe, predict(pipe, aligned))


@pytest.mark.parametrize("form", PEFT_CONFIGS)
def test_peft_form_is_what_peft_loads(form, tmp_path, quiet):
    pipe, _ = made("sd")
    trained(pipe.unet, copy.deepcopy(PEFT_CONFIGS[form])).save_pretrained(tmp_path)
    expected = predict(pipe, PeftModel.from_pretrained(copy.deepcopy(pipe.unet), tmp_path).eval())
    assert_is(tmp_path if form != "ranks" else tmp_path / "adapter_model.safetensors", pipe, expected)


@pytest.mark.parametrize("kind", ["sd3", "pixart"])
def test_peft_form_on_other_denoisers(kind, tmp_path, quiet):
    pipe, _ = made(kind)
    aligned = lora(denoiser(pipe), ("to_q", "to_k", "to_out.0"))
    aligned.save_pretrained(tmp_path)
    assert_is(tmp_path, pipe, predict(pipe, aligned))


@pytest.mark.parametrize(("kind", "rename"), [("sd", {}), ("sdxl", SGM)])
def test_kohya_form_is_what_diffusers_loads(kind, rename, tmp_path, quiet):
    pipe, _ = made(kind)
    weights = lora_weights(lora(pipe.unet, ("to_q", "to_v", "to_out.0", "ff.net.2")))
    state = kohya(weights, lambda layer: 2.0, rename)
    save_file(state, tmp_path / "kohya.safetensors")
    assert_is(tmp_path / "kohya.safetensors", pipe, as_diffusers_loads(kind, dict(state)))


def test_kohya_alphas_that_vary_are_each_layers_own(tmp_path, quiet):
    """diffusers loses track of them where they vary, so here the oracle is the weights merged by hand."""
    pipe, _ = made("sd")
    weights = lora_weights(lora(pipe.unet, ("to_q", "to_v", "to_out.0", "conv1")))

    def alpha(layer: str) -> float | None:
        return 1.0 if "to_q" in layer else 3.0 if "conv1" in layer else None if "to_out" in layer else 8.0

    save_file(kohya(weights, alpha), tmp_path / "kohya.safetensors")
    expected = predict(pipe, merged(pipe.unet, weights, lambda layer: (alpha(layer) or 4.0) / 4))
    anchor = load_anchor(tmp_path / "kohya.safetensors", pipe)
    torch.testing.assert_close(as_anchor(pipe, anchor), expected, rtol=1e-4, atol=1e-5)


# --- the reference does not notice ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lora", "dora", "lokr"])
def test_a_style_lora_stays_active_at_its_scale(form, tmp_path, quiet):
    pipe, _ = made("sd")
    style = lora_weights(lora(pipe.unet, ("to_q", "to_k"), r=2))
    pipe.load_lora_weights({f"unet.{key}": tensor for key, tensor in style.items()}, adapter_name="style")
    pipe.set_adapters(["style"], [0.7])
    trained(made("sd")[0].unet, copy.deepcopy(PEFT_CONFIGS[form])).save_pretrained(tmp_path)
    styled, before = predict(pipe), state_of(pipe)
    anchor = load_anchor(tmp_path, pipe)
    assert torch.equal(predict(pipe), styled) and pipe.get_active_adapters() == ["style"]
    anchor.unload(pipe.unet)
    assert torch.equal(predict(pipe), styled) and state_of(pipe) == before


def test_a_style_lora_loaded_later_outlives_the_anchor(tmp_path):
    pipe, _ = made("sd")
    lora(pipe.unet).save_pretrained(tmp_path)
    style = {f"unet.{key}": t for key, t in lora_weights(lora(pipe.unet, ("to_q",), r=2)).items()}
    styled, _ = made("sd")
    styled.load_lora_weights(dict(style), adapter_name="style")
    anchor = load_anchor(tmp_path, pipe)
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters(["style"])
    anchor.unload(pipe.unet)
    assert torch.equal(predict(pipe), predict(styled)) and list(pipe.unet.peft_config) == ["style"]


def test_several_anchors_have_their_own_adapters(tmp_path):
    pipe, _ = made("sd")
    names, expected = ("text.v1", "text v1", "text_v1"), []
    for seed, name in enumerate(names):
        wrapped = trained(made("sd")[0].unet, LoraConfig(r=2, target_modules=["to_q", TARGETS[seed]]), seed=seed)
        wrapped.save_pretrained(tmp_path / name)
        expected.append(predict(pipe, wrapped))
    before = state_of(pipe)
    anchors = [load_anchor(tmp_path / name, pipe, name=name) for name in names]
    assert len({anchor.adapter for anchor in anchors}) == 3
    for anchor, wanted in zip(anchors, expected, strict=True):
        assert torch.equal(as_anchor(pipe, anchor), wanted)
    for anchor in anchors:
        anchor.unload(pipe.unet)
    assert state_of(pipe) == before


def test_one_copy_of_the_weights(tmp_path):
    pipe, _ = made("sd")
    lora(pipe.unet, ("to_q", "to_v"), r=1).save_pretrained(tmp_path)
    own = {parameter.data_ptr(): parameter.nbytes for parameter in pipe.unet.parameters()}
    load_anchor(tmp_path, pipe)
    after = {parameter.data_ptr(): parameter.nbytes for parameter in pipe.unet.parameters()}
    assert own.items() <= after.items() and sum(after.values()) < 1.05 * sum(own.values())


def test_a_half_precision_reference(tmp_path):
    pipe, _ = made("sd")
    lora(pipe.unet).save_pretrained(tmp_path)
    pipe.unet.to(torch.bfloat16)
    before = predict(pipe)
    anchor = load_anchor(tmp_path, pipe)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16} and torch.equal(predict(pipe), before)
    assert not torch.equal(as_anchor(pipe, anchor), before)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_goes_on(offload, tmp_path):
    pipe, _ = made("sd")
    lora(pipe.unet).save_pretrained(tmp_path)
    expected = predict(pipe, PeftModel.from_pretrained(copy.deepcopy(pipe.unet), tmp_path).eval())
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    before = predict(pipe)
    anchor = load_anchor(tmp_path, pipe)
    assert torch.equal(predict(pipe), before) and torch.equal(as_anchor(pipe, anchor), expected)
    anchor.unload(pipe.unet)
    assert torch.equal(predict(pipe), before)


# --- what is refused, and warned about --------------------------------------------------------------------------------


def refused(source: Any, pipe: DiffusionPipeline, error: type[AnchorError], match: str) -> None:
    before, prediction = state_of(pipe), predict(pipe)
    with pytest.raises(error, match=match):
        load_anchor(source, pipe)
    assert torch.equal(predict(pipe), prediction) and state_of(pipe) == before


def test_a_lora_for_another_model(tmp_path):
    pipe, _ = made("sd")
    transformer, _ = made("sd3")
    aligned = lora(transformer.transformer, ("to_q",))
    aligned.save_pretrained(tmp_path / "peft")
    type(transformer).save_lora_weights(tmp_path / "diffusers", transformer_lora_layers=lora_weights(aligned))
    expected = r"UNet2DConditionModel.*transformer_blocks\.0.*\.lora_A\.weight"
    for form in ("peft", "diffusers"):
        refused(tmp_path / form, pipe, IncompatibleAnchor, expected)
    weights = lora_weights(lora(pipe.unet))
    weights["up_blocks.7.conv.lora_A.weight"] = torch.ones(4, 8)
    save_file({f"unet.{key}": tensor for key, tensor in weights.items()}, tmp_path / "partly.safetensors")
    refused(tmp_path / "partly.safetensors", pipe, IncompatibleAnchor, naming(1, "up_blocks.7"))


@pytest.mark.parametrize("styled", [False, True])
def test_a_lora_of_other_widths_is_taken_out_again(styled, tmp_path):
    pipe, _ = made("sd")
    if styled:
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv2"]), "style")
    aligned = lora(made("sd")[0].unet)
    weights = lora_weights(aligned)
    layer = next(key for key in weights if "attn2.to_k.lora_A" in key)
    wider = weights | {layer: torch.ones(4, 99)}
    save_file({f"unet.{key}": tensor for key, tensor in wider.items()}, tmp_path / "wide.safetensors")
    refused(
        tmp_path / "wide.safetensors",
        pipe,
        IncompatibleAnchor,
        naming("wide.safetensors", "attn2.to_k", [4, 99]),
    )
    save_file({f"unet.{key}": t for key, t in weights.items() if key != layer}, tmp_path / "half.safetensors")
    rest = layer.replace("lora_A", "lora_B")
    refused(tmp_path / "half.safetensors", pipe, IncompatibleAnchor, naming(1, rest))
    aligned.save_pretrained(tmp_path)
    save_file(wider, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, pipe, IncompatibleAnchor, naming(tmp_path, "attn2.to_k", [4, 99]))


@pytest.mark.parametrize("mark", ["dora_scale", "hada_w1_a", "lokr_w1"])
def test_kohya_forms_that_diffusers_would_mangle(mark, tmp_path):
    pipe, _ = made("sd")
    weights = lora_weights(lora(pipe.unet, ("to_q",)))
    state = kohya(weights, lambda layer: 2.0)
    first = next(iter(state)).partition(".")[0]
    if mark != "dora_scale":
        state = {key: tensor for key, tensor in state.items() if not key.startswith(first)}
    save_file(state | {f"{first}.{mark}": torch.ones(7, 1)}, tmp_path / "kohya.safetensors")
    refused(tmp_path / "kohya.safetensors", pipe, IncompatibleAnchor, naming(f"{first}.{mark}"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"r": -3}, "no configuration that the installed PEFT reads|does not fit"),
    ],
)
def test_peft_adapters_that_are_more_than_an_addition(change, match, tmp_path):
    pipe, _ = made("sd")
    lora(pipe.unet).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    refused(tmp_path, pipe, AnchorError, match)


def test_a_peft_adapter_without_its_config(tmp_path):
    pipe, _ = made("sd")
    lora(pipe.unet).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    refused(tmp_path, pipe, AnchorError, r"adapter_config\.json")


def test_a_fused_style_lora_must_not_come_unfused(tmp_path):
    pipe, _ = made("sd")
    lora(pipe.unet).save_pretrained(tmp_path)
    style = {f"unet.{key}": t for key, t in lora_weights(lora(pipe.unet, ("to_q",), r=2)).items()}
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.fuse_lora()
    refused(tmp_path, pipe, AnchorError, naming(tmp_path, "pipe.unfuse_lora()"))


def test_fused_projections_would_pass_a_lora_by(tmp_path):
    pipe, _ = made("sd")
    lora(pipe.unet).save_pretrained(tmp_path)
    pipe.unet.fuse_qkv_projections()
    refused(tmp_path, pipe, AnchorError, naming(tmp_path, "pipe.unfuse_qkv_projections()"))
    pipe.unet.unfuse_qkv_projections()


def test_weights_out_of_reach_take_no_lora(tmp_path):
    pipe, _ = made("sd")
    lora(pipe.unet).save_pretrained(tmp_path)
    pipe.unet.to("meta")
    with pytest.raises(AnchorError, match=naming(tmp_path, "pipe.enable_model_cpu_offload()")):
        load_anchor(tmp_path, pipe)


def test_damaged_and_pickled_loras(tmp_path):
    pipe, _ = made("sd")
    weights = {f"unet.{key}": tensor for key, tensor in lora_weights(lora(pipe.unet)).items()}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    whole = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(whole[:-100])
    refused(tmp_path, pipe, CorruptAnchor, r"pytorch_lora_weights\.safetensors")
    torch.save(weights, tmp_path / "lora.bin")
    refused(tmp_path / "lora.bin", pipe, PickledAnchor, "allow_pickle=True")
    anchor = load_anchor(tmp_path / "lora.bin", pipe, allow_pickle=True)
    assert torch.equal(as_anchor(pipe, anchor), as_diffusers_loads("sd", weights))


def test_text_encoder_parts_are_left_out_with_a_warning(tmp_path):
    pipe, _ = made("sd")
    weights = {f"unet.{key}": tensor for key, tensor in lora_weights(lora(pipe.unet)).items()}
    expected = as_diffusers_loads("sd", dict(weights))
    encoder = lora_weights(lora(pipe.text_encoder, ("q_proj",)))
    save_file(weights | {f"text_encoder.{key}": t for key, t in encoder.items()}, tmp_path / "both.safetensors")
    text_before = {name: parameter.clone() for name, parameter in pipe.text_encoder.named_parameters()}
    with pytest.warns(UserWarning, match=naming("both.safetensors", "text_encoder")):
        anchor = load_anchor(tmp_path / "both.safetensors", pipe)
    assert torch.equal(as_anchor(pipe, anchor), expected)
    assert all(torch.equal(parameter, text_before[name]) for name, parameter in pipe.text_encoder.named_parameters())


def test_an_untrained_lora_is_warned_about(tmp_path):
    pipe, _ = made("sd")
    weights = lora_weights(lora(pipe.unet))
    zeroed = {f"unet.{key}": torch.zeros_like(t) if "lora_B" in key else t for key, t in weights.items()}
    save_file(zeroed, tmp_path / "lora.safetensors")
    with pytest.warns(UserWarning, match=naming("lora.safetensors", "B")):
        load_anchor(tmp_path / "lora.safetensors", pipe)
