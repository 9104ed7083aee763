"""Every tensor of a LoRA file ends in the model, or is named in a refusal or a warning."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from anchor_files import kohya, lora, lora_weights, made, noise, state_of
from deradiff.anchors import Anchor, AnchorError, IncompatibleAnchor, denoiser_of, load_anchor
from messages import naming
from tiny import denoiser, seeded

attack = pytest.mark.attack("a LoRA loaded in part")
Changes = dict[str, tuple[Tensor, Tensor | None]]


def wan() -> Any:
    with seeded(0):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer.eval())


def pipeline(kind: str) -> Any:
    return wan() if kind == "wan" else made(kind)[0]


def file_of(tensors: Mapping[str, Tensor], folder: Path, name: str = "lora") -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def changes(pipe: Any, anchor: Anchor) -> Changes:
    """What the anchor adds to the weights and biases of every layer."""
    assert anchor.adapter is not None
    added: Changes = {}
    layers: dict[str, Any] = dict(denoiser(pipe).named_modules())
    for path, layer in layers.items():
        if anchor.adapter in getattr(layer, "lora_A", ()):
            bias = layer.lora_B[anchor.adapter].bias
            added[path] = (layer.get_delta_weight(anchor.adapter), None if bias is None else bias.data)
    return added


def assert_changes(file: Path, pipe: Any, expected: Changes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        anchor = load_anchor(file, pipe)
    added = changes(pipe, anchor)
    anchor.unload(denoiser(pipe))
    assert added.keys() == expected.keys()
    for path, (weight, bias) in expected.items():
        torch.testing.assert_close(added[path][0], weight, rtol=1e-5, atol=1e-6)
        if bias is not None:
            torch.testing.assert_close(added[path][1], bias)


def pair(out: int, inside: int, rank: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    return noise(rank, inside, seed=seed), noise(out, rank, seed=seed + 100)


# --- what is whole is loaded whole ------------------------------------------------------------------------------------


def flux_layers(pipe: Any) -> tuple[dict[str, Tensor], Changes]:
    """A Flux LoRA in the names of the original checkpoints (ComfyUI, kohya), and what it adds."""
    d, double, single = pipe.transformer.inner_dim, "transformer_blocks.0", "single_transformer_blocks.0"
    file: dict[str, Tensor] = {}
    added: Changes = {}
    for k, (name, paths) in enumerate(
        {
            "double_blocks.0.img_attn.qkv": [f"{double}.attn.to_{x}" for x in "qkv"],
            "double_blocks.0.txt_attn.qkv": [f"{double}.attn.add_{x}_proj" for x in "qkv"],
            "double_blocks.0.img_attn.proj": [f"{double}.attn.to_out.0"],
            "single_blocks.0.linear2": [f"{single}.proj_out"],
            "img_in": ["x_embedder"],
            "final_layer.linear": ["proj_out"],
        }.items()
    ):
        shapes = [pipe.transformer.get_submodule(path).weight.shape for path in paths]
        down, up = pair(sum(shape[0] for shape in shapes), shapes[0][1], seed=k)
        alpha = float(k + 1)
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
        whole = alpha / 4 * up @ down
        added |= dict(zip(paths, ((part, None) for part in whole.split([s[0] for s in shapes])), strict=True))
    assert d
    return file, added


@attack
@pytest.mark.parametrize("form", ["comfy", "kohya"])
def test_flux_in_the_original_names(form, tmp_path):
    """The scale of the final layer too, which diffusers' own converter throws away."""
    pipe = pipeline("flux")
    tensors, added = flux_layers(pipe)
    if form == "comfy":
        named = {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    else:
        named = {}
        for name, tensor in tensors.items():
            layer, mark, rest = name.partition(".lora_") if ".lora_" in name else name.partition(".alpha")
            named[f"lora_unet_{layer.replace('.', '_')}{mark}{rest}"] = tensor
    assert_changes(file_of(named, tmp_path), pipe, added)


@attack
def test_flux_as_xlabs_writes_it(tmp_path):
    pipe = pipeline("flux")
    d, block = pipe.transformer.inner_dim, "transformer_blocks.0.attn"
    file: dict[str, Tensor] = {}
    added: Changes = {}
    for k, (name, paths) in enumerate(
        {
            "qkv_lora1": ["to_q", "to_k", "to_v"],
            "qkv_lora2": ["add_q_proj", "add_k_proj", "add_v_proj"],
            "proj_lora1": ["to_out.0"],
            "proj_lora2": ["to_add_out"],
        }.items()
    ):
        down, up = pair(d * len(paths), d, seed=k)
        stem = f"double_blocks.0.processor.{name}"
        file |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        added |= {f"{block}.{p}": (part, None) for p, part in zip(paths, (up @ down).split(d), strict=True)}
    assert_changes(file_of(file, tmp_path), pipe, added)


WAN = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.self_attn.k": "blocks.0.attn1.to_k",
    "blocks.0.self_attn.v": "blocks.0.attn1.to_v",
    "blocks.0.self_attn.o": "blocks.0.attn1.to_out.0",
    "blocks.0.cross_attn.q": "blocks.0.attn2.to_q",
    "blocks.0.cross_attn.k": "blocks.0.attn2.to_k",
    "blocks.0.cross_attn.v": "blocks.0.attn2.to_v",
    "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0",
    "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
    "blocks.0.ffn.2": "blocks.0.ffn.net.2",
}


def wan_layers(pipe: Any, biases: bool) -> tuple[dict[str, Tensor], Changes]:
    file: dict[str, Tensor] = {}
    added: Changes = {}
    for k, (name, path) in enumerate(WAN.items()):
        out, inside = pipe.transformer.get_submodule(path).weight.shape
        down, up = pair(out, inside, seed=k)
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(k + 0.5)}
        bias = noise(out, seed=k + 50) if biases and k % 2 else None
        if bias is not None:
            file[f"{name}.diff_b"] = bias
        added[path] = ((k + 0.5) / 4 * up @ down, bias)
    return file, added


@attack
@pytest.mark.parametrize("form", ["comfy", "comfy with biases", "musubi"])
def test_wan_in_the_original_names(form, tmp_path):
    """Biases are added as they are, however the factors are scaled; layers without one keep theirs."""
    pipe = pipeline("wan")
    tensors, added = wan_layers(pipe, "biases" in form)
    if form == "musubi":
        named = {
            "lora_unet_" + ".".join(part.replace(".", "_") for part in name.split(".lora_")[:1]) + rest: tensor
            for name, tensor in tensors.items()
            for rest in [name[len(name.split(".lora_")[0]) :]]
        }
        named = {
            (f"{name.removesuffix('_alpha')}.alpha" if name.endswith("_alpha") else name): tensor
            for name, tensor in named.items()
        }
    else:
        named = {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    assert_changes(file_of(named, tmp_path), pipe, added)


@attack
@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("sdxl", "lora_unet_"), ("sd", "bare"), ("sd3", "lora_unet_"), ("flux", "lora_transformer_"), ("sd3", "dotted")],
)
def test_names_of_the_denoisers_own_layers_with_scales_of_their_own(kind, prefix, tmp_path):
    """As OneTrainer and kohya write them, the embeddings of SDXL's sizes among them."""
    pipe = pipeline(kind)
    module = denoiser(pipe)
    targets = ["to_q", "to_out.0", "add_embedding.linear_1", "add_embedding.linear_2", "time_embedding.linear_1"]
    weights = lora_weights(lora(module, tuple(targets)))
    alphas = {key.partition(".lora_")[0]: 1.0 + k for k, key in enumerate(weights)}
    state = kohya(weights, alphas.__getitem__)
    if prefix == "lora_transformer_":
        state = {name.replace("lora_unet_", prefix): tensor for name, tensor in state.items()}
    elif prefix in ("dotted", "bare"):
        start = "" if prefix == "bare" else f"{denoiser_of(pipe)[0]}."
        state = {f"{start}{name}": tensor for name, tensor in weights.items()}
        state |= {f"{start}{layer}.alpha": torch.tensor(alpha) for layer, alpha in alphas.items()}
    expected: Changes = {
        layer: (alpha / 4 * weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"], None)
        for layer, alpha in alphas.items()
    }
    assert_changes(file_of(state, tmp_path), pipe, expected)


@attack
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_small_scales_in_coarse_precision(dtype, tmp_path):
    pipe = pipeline("sd")
    pipe.unet.to(torch.float16)
    weights = {name: (t * 1e-2).to(dtype) for name, t in lora_weights(lora(pipe.unet, ("to_q",))).items()}
    anchor = load_anchor(file_of(kohya(weights, lambda _: 2.0**-8), tmp_path), pipe)
    for path, (weight, _) in changes(pipe, anchor).items():
        up, down = (weights[f"{path}.lora_{x}.weight"].float() for x in "BA")
        torch.testing.assert_close(weight.float(), 2.0**-10 * up @ down, rtol=0.01, atol=1e-7)


# --- what is not is named ---------------------------------------------------------------------------------------------


def plain(kind: str) -> tuple[Any, dict[str, Tensor], str, str]:
    """A pipeline, a LoRA that loads, the name of one of its layers, and of one that it leaves alone."""
    pipe = pipeline(kind)
    if kind == "flux":
        file = {f"diffusion_model.{name}": tensor for name, tensor in flux_layers(pipe)[0].items()}
        return pipe, file, "diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.double_blocks.0.img_mlp.0"
    if kind == "wan":
        file = {f"diffusion_model.{name}": tensor for name, tensor in wan_layers(pipe, False)[0].items()}
        return pipe, file, "diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.norm3"
    component, module = denoiser_of(pipe)
    weights = lora_weights(lora(module, ("to_q",)))
    layer = next(iter(weights)).partition(".lora_")[0]
    if kind == "sdxl":
        file = kohya(weights, lambda _: 2.0)
        return pipe, file, "lora_unet_" + layer.replace(".", "_"), "lora_unet_down_blocks_0_resnets_0_norm1"
    return (
        pipe,
        {f"{component}.{key}": t for key, t in weights.items()},
        f"{component}.{layer}",
        f"{component}.norm_out",
    )


MORE = ["diff", "diff_b", "alpha", "dora_scale", "lora_mid.weight", "hada_w1_a", "lokr_w1", "w_norm", "oft_blocks"]


@attack
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "wan"])
def test_a_tensor_that_would_be_lost_is_named(kind, tmp_path):
    pipe, file, layer, other = plain(kind)
    before = state_of(pipe)
    for end in MORE:
        for where in (layer, other):
            name = f"{where}.{end}"
            if where == layer and (end == "alpha" or (kind, end) == ("wan", "diff_b")):
                continue  # has its place
            with pytest.raises(AnchorError) as refusal:
                load_anchor(file_of(file | {name: torch.ones(8, 8)}, tmp_path), pipe)
            assert name in str(refusal.value) and "Error:" not in str(refusal.value)
    assert state_of(pipe) == before
    load_anchor(file_of(file, tmp_path), pipe)


@attack
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_the_factors_of_a_layer_that_there_is_not_are_named(kind, tmp_path):
    pipe, file, layer, _ = plain(kind)
    for stranger in ("lora_unet_nowhere", f"{layer[:-1]}9", "connectors.nowhere", "vae.nowhere"):
        ends = sorted({name.removeprefix(layer) for name in file if name.startswith(f"{layer}.")})
        more = {f"{stranger}{end}": file[f"{layer}{end}"] for end in ends}
        with pytest.raises(AnchorError) as refusal:
            load_anchor(file_of(file | more, tmp_path), pipe)
        assert stranger in str(refusal.value) and "Error:" not in str(refusal.value)


@attack
@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux", "wan"])
def test_one_layer_twice_is_refused(kind, tmp_path):
    pipe, file, _, _ = plain(kind)
    component, module = denoiser_of(pipe)
    again = {f"{component}.{key}": tensor for key, tensor in lora_weights(lora(module, ("to_q",))).items()}
    if again.keys() <= file.keys():
        again = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for key, t in again.items()}
    with pytest.raises(IncompatibleAnchor) as refusal:
        load_anchor(file_of(file | again, tmp_path), pipe)
    assert any(name in str(refusal.value) for name in file | again)


PARTS = [
    "text_encoder.",
    "text_encoder_2.",
    "text_encoders.t5xxl.transformer.",
    "text_encoders.clip_l.transformer.",
    "lora_te_text_model_",
    "lora_te1_text_model_",
    "lora_te2_text_model_",
    "lora_te3_",
    "bundle_emb.",
]


@attack
@pytest.mark.parametrize("kind", ["sdxl", "flux", "wan"])
def test_parts_for_text_encoders_are_named_in_a_warning(kind, tmp_path):
    pipe, file, _, _ = plain(kind)
    whole = load_anchor(file_of(file, tmp_path), pipe)
    expected = changes(pipe, whole)
    whole.unload(denoiser(pipe))
    for part in PARTS:
        more = {f"{part}layers_0_q_proj.{end}": torch.ones(4, 4) for end in ("lora_down.weight", "lora_up.weight")}
        with pytest.warns(UserWarning, match=r"lora\.safetensors") as caught:
            anchor = load_anchor(file_of(file | more, tmp_path), pipe)
        assert all(any(name in str(warning.message) for warning in caught) for name in more)
        left = changes(pipe, anchor)
        assert left.keys() == expected.keys()
        assert all(torch.equal(left[path][0], weight) for path, (weight, _) in expected.items())
        anchor.unload(denoiser(pipe))
        with pytest.raises(IncompatibleAnchor, match=naming(*more)):
            load_anchor(file_of(more, tmp_path), pipe)


@attack
@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_changes_that_are_zero_are_named_in_a_warning(kind, tmp_path):
    pipe, file, _, other = plain(kind)
    more = {f"{other}.diff": torch.zeros(8), f"{other}.diff_b": torch.zeros(8)}
    with pytest.warns(UserWarning, match="zero") as caught:
        anchor = load_anchor(file_of(file | more, tmp_path), pipe)
    assert all(any(name in str(warning.message) for warning in caught) for name in more)
    anchor.unload(denoiser(pipe))


@attack
def test_a_scale_stated_twice_and_a_base_that_is_changed_are_refused(tmp_path):
    pipe = pipeline("sd")
    aligned = lora(pipe.unet, ("to_q",))
    weights, settings = {"unet_lora_layers": lora_weights(aligned)}, aligned.peft_config["default"].to_dict()
    write = type(pipe).save_lora_weights
    write(tmp_path, **weights, unet_lora_adapter_metadata=settings | {"init_lora_weights": "pissa"})
    with pytest.raises(AnchorError, match="init_lora_weights='pissa'"):
        load_anchor(tmp_path, pipe)
    layer = next(iter(weights["unet_lora_layers"])).partition(".lora_")[0]
    weights["unet_lora_layers"][f"{layer}.alpha"] = torch.tensor(1.0)
    write(tmp_path, **weights, unet_lora_adapter_metadata=settings)
    with pytest.raises(IncompatibleAnchor, match=naming("lora_alpha=2", f"{layer}.alpha")):
        load_anchor(tmp_path, pipe)


@attack
def test_two_names_for_one_tensor_of_a_peft_adapter(tmp_path):
    pipe = pipeline("sd")
    lora(pipe.unet, ("to_q",)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    name = next(iter(state))
    save_file(state | {name.removeprefix("base_model.model."): torch.zeros_like(state[name])}, file)
    with pytest.raises(IncompatibleAnchor, match=naming(name, name.removeprefix("base_model.model."))):
        load_anchor(tmp_path, pipe)
