"""Each model with its own prompt embeddings: an anchor's LoRA with parts for text encoders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

import deradiff
import tiny
import tiny_loras
from deradiff.anchors import IncompatibleAnchor
from deradiff.anchors.text_encoders import text_encoders_of
from deradiff.sampling.blocked_methods import DialError, UnmirroredState
from messages import naming
from oracle import lock_step
from tiny import noise
from tiny_parts import TEXT_WIDTH, text_encoder, tokenizer

KINDS = ["sd", "sdxl", "sd3", "flux"]
PARTS = ("unet", "text_encoder", "text_encoder_2")
PROJECTIONS = ("q_proj", "v_proj", "q", "v", "fc1")


def make(kind: str) -> tuple[Any, nn.Module, dict[str, Any]]:
    """`tiny.make`, with text encoders where that leaves them out; equal on every call."""
    pipe, other, call = tiny.make(kind)
    if pipe.components.get("text_encoder") is not None:
        return pipe, other, call
    names, width = ["text_encoder"], TEXT_WIDTH
    if kind == "sd3":
        names, width = ["text_encoder", "text_encoder_2"], 2 * TEXT_WIDTH
        wide = {"joint_attention_dim": width, "pooled_projection_dim": width}
    with tiny.seeded(0):
        if kind == "sd3":
            pipe.transformer = SD3Transformer2DModel.from_config({**pipe.transformer.config, **wide}).eval()
        parts: dict[str, Any] = {name: text_encoder(projected=kind == "sd3") for name in names}
        t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_ff=8, d_kv=8, num_heads=2, num_layers=1))
        parts[f"text_encoder_{len(names) + 1}"] = t5.eval()
    parts |= {name.replace("text_encoder", "tokenizer"): tokenizer() for name in parts}
    pipe = type(pipe)(**{**pipe.components, **parts})
    call = {key: value for key, value in call.items() if "prompt_embeds" not in key}
    call |= {"prompt": tiny.PROMPTS, "negative_prompt": tiny.NEGATIVE, "max_sequence_length": 8}
    return pipe, other, call


def text_weights(pipe: Any, strength: float = 0.3) -> dict[str, Tensor]:
    """A random LoRA of rank 2 on every text encoder of the pipeline, in diffusers' layout."""
    weights, seed = {}, 100
    for component, encoder in text_encoders_of(pipe).items():
        for path, layer in encoder.named_modules():
            if isinstance(layer, nn.Linear) and path.split(".")[-1] in PROJECTIONS:
                weights[f"{component}.{path}.lora_A.weight"] = strength * noise(2, layer.in_features, seed=seed)
                weights[f"{component}.{path}.lora_B.weight"] = strength * noise(layer.out_features, 2, seed=seed + 1)
                seed += 2
    return weights


def aligned(kind: str, weights: dict[str, Tensor]) -> Any:
    """An untouched pipeline with all of the LoRA added to its weights by hand."""
    pipe = make(kind)[0]
    for key, down in weights.items():
        if key.endswith("lora_A.weight"):
            component, _, path = key.removesuffix(".lora_A.weight").partition(".")
            layer: Any = getattr(pipe, component).get_submodule(path)
            layer.weight.data += weights[key.replace("lora_A", "lora_B")] @ down
    return pipe


def both(kind: str) -> dict[str, Tensor]:
    pipe = make(kind)[0]
    return tiny_loras.lora_weights(pipe) | text_weights(pipe)


def file_of(weights: dict[str, Tensor], folder: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / "both.safetensors")
    return folder / "both.safetensors"


def drawn(pipe: Any, call: dict[str, Any]) -> Tensor:
    return pipe(**call, generator=torch.Generator().manual_seed(11)).images


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cases(2)
def test_each_model_has_its_own_prompt_embeddings(kind, tmp_path):
    weights = both(kind)
    pipe, _, call = make(kind)
    before = drawn(pipe, call)
    parameters = {name: len(list(encoder.named_parameters())) for name, encoder in text_encoders_of(pipe).items()}
    with deradiff.realign(pipe, file_of(weights, tmp_path), lam=0.0, text_encoder="both") as dial:
        assert torch.equal(drawn(pipe, call), before)
        dial.lam = 1.0
        expected = drawn(aligned(kind, weights), call)
        effect = (expected - before).abs().max()
        assert (drawn(pipe, call) - expected).abs().max() < 1e-4 * effect
        dial.lam = 0.5
        expected = lock_step([make(kind)[0], aligned(kind, weights)], call, 0.5)
        assert (drawn(pipe, call) - expected).abs().max() < 1e-4 * effect
        denoiser_alone = {key: tensor for key, tensor in weights.items() if not key.startswith("text_encoder")}
        denoiser_alone = lock_step([make(kind)[0], aligned(kind, denoiser_alone)], call, 0.5)
        assert (denoiser_alone - expected).abs().max() > 1e-2 * effect
    assert torch.equal(drawn(pipe, call), before)
    assert {name: len(list(part.named_parameters())) for name, part in text_encoders_of(pipe).items()} == parameters


@pytest.mark.parametrize(
    ("kind", "prefixes"),
    [
        ("sd", {"text_encoder": "lora_te_"}),
        ("sdxl", {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}),
        ("sd3", {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}),
        (
            "sd3",
            {"text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_3": "text_encoders.t5xxl.transformer."},
        ),
        ("flux", {"text_encoder": "lora_te1_", "text_encoder_2": "text_encoders.t5xxl.transformer."}),
    ],
)
@pytest.mark.cases(2)
def test_the_names_that_trainers_give_text_encoders(kind, prefixes, tmp_path):
    pipe, _, call = make(kind)
    own = {key: t for key, t in both(kind).items() if key.partition(".")[0] in (*prefixes, "unet", "transformer")}
    named = dict(own)
    for key in [key for key in own if key.startswith("text_encoder")]:
        component, _, rest = key.partition(".")
        layer, _, factor = rest.partition(".lora_")
        prefix = prefixes[component]
        layer = f"text_model.{layer}" if "clip" in prefix or component == "text_encoder" else layer
        layer = layer.replace("text_model.text_model.", "text_model.")
        layer = layer if prefix.endswith(".") else layer.replace(".", "_")
        up = factor == "B.weight"
        named[f"{prefix}{layer}.lora_{'up' if up else 'down'}.weight"] = named.pop(key) * (4 if up else 1)
        named[f"{prefix}{layer}.alpha"] = torch.tensor(0.5)  # of rank 2: a scale of a quarter
    with deradiff.realign(pipe, file_of(named, tmp_path), text_encoder="both"):
        renamed = drawn(pipe, call)
    expected = drawn(aligned(kind, own), call)
    assert (renamed - expected).abs().max() < 1e-4 * (expected - drawn(make(kind)[0], call)).abs().max()


def test_a_second_anchor_without_text_parts_reads_the_references(tmp_path):
    weights = both("sdxl")
    pipe, other, call = make("sdxl")
    anchors: dict[str, Path | nn.Module] = {"lora": file_of(weights, tmp_path), "full": other}
    second = make("sdxl")[0]
    second.unet = make("sdxl")[1]
    expected = lock_step([make("sdxl")[0], aligned("sdxl", weights), second], call, [0.3, 0.4])
    with deradiff.realign(pipe, anchors, {"lora": 0.3, "full": 0.4}, text_encoder="both"):
        mixed = drawn(pipe, call)
    assert (mixed - expected).abs().max() < 1e-4 * (expected - drawn(make("sdxl")[0], call)).abs().max()


def test_what_needs_one_text_for_all_is_refused(tmp_path):
    file = file_of(both("sd"), tmp_path)
    pipe, other, call = make("sd")
    embeddings = {"prompt_embeds": pipe.encode_prompt(call["prompt"], "cpu", 1, False)[0]}
    with pytest.raises(ValueError, match="text_encoder"):
        deradiff.realign(pipe, file, text_encoder="both", method="interpolate")
    with pytest.raises(ValueError, match="text_encoder"):
        deradiff.realign(pipe, file, text_encoder="both", reuse=deradiff.Reuse(every=2, carrier="interpolate"))
    with pytest.warns(UserWarning, match="no anchor"):
        deradiff.realign(pipe, other, text_encoder="both").remove()
    with deradiff.realign(pipe, file, 0.5, text_encoder="both") as dial:
        with pytest.raises(DialError, match="encode_prompt"):
            drawn(pipe, {**call, "prompt": None, "negative_prompt": None, "guidance_scale": 1.0, **embeddings})
        with pytest.raises(DialError, match=naming("remove()")):
            pipe.text_encoder.save_pretrained(tmp_path / "saved")
        dial.micro_batch = 1
        with pytest.raises(UnmirroredState, match="micro_batch"):
            drawn(pipe, call)
        dial.micro_batch = None
        dial.reuse = 2
        drawn(pipe, call)
        assert dial.reused is not None


def test_embeddings_of_the_realigned_pipeline_can_be_handed_over(tmp_path):
    pipe, _, call = make("sd")
    with deradiff.realign(pipe, file_of(both("sd"), tmp_path), 0.5, text_encoder="both"):
        direct = drawn(pipe, call)
        prompt, negative = pipe.encode_prompt(call["prompt"], "cpu", 1, True, call["negative_prompt"])
        given = {**call, "prompt": None, "negative_prompt": None}
        assert torch.equal(drawn(pipe, {**given, "prompt_embeds": prompt, "negative_prompt_embeds": negative}), direct)


def test_text_parts_without_a_place_are_named_and_nothing_is_left_behind(tmp_path):
    pipe, _, call = make("sd")
    before = drawn(pipe, call)
    weights = both("sd")
    strange = {"text_encoder.elsewhere.q_proj.lora_A.weight": torch.ones(2, 8)}
    strange["text_encoder_2.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 8)
    with pytest.raises(IncompatibleAnchor, match=naming("both.safetensors", *strange)):
        deradiff.realign(pipe, file_of(weights | strange, tmp_path), text_encoder="both")
    wrong = {"unet.no.such.layer.lora_A.weight": torch.ones(2, 8), "unet.no.such.layer.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(IncompatibleAnchor, match=naming("both.safetensors", "unet.no.such.layer.lora_A.weight")):
        deradiff.realign(pipe, file_of(weights | wrong, tmp_path), text_encoder="both")
    assert torch.equal(drawn(pipe, call), before)
    assert not any("lora" in name for name, _ in pipe.text_encoder.named_parameters())


def test_a_style_lora_stays_active_beside(tmp_path):
    pipe, _, call = make("sd")
    style = {key: 0.5 * tensor for key, tensor in text_weights(pipe).items()}
    pipe.load_lora_weights(dict(style), adapter_name="style")
    styled = drawn(pipe, call)
    weights = both("sd")
    with deradiff.realign(pipe, file_of(weights, tmp_path), 0.0, text_encoder="both") as dial:
        assert torch.equal(drawn(pipe, call), styled)
        dial.lam = 1.0
        anchor = aligned("sd", weights)
        anchor.load_lora_weights(dict(style), adapter_name="style")
        assert (drawn(pipe, call) - drawn(anchor, call)).abs().max() < 1e-4 * styled.abs().max()
    assert torch.equal(drawn(pipe, call), styled)


def test_a_scale_in_the_files_metadata_is_that_of_its_text_parts_too(tmp_path):
    pipe, _, call = make("sdxl")
    weights = both("sdxl")
    parts = {name: {k.partition(".")[2]: t for k, t in weights.items() if k.startswith(f"{name}.")} for name in PARTS}
    settings = {"r": 2, "lora_alpha": 1, "lora_dropout": 0.5, "target_modules": ["q_proj", "v_proj", "fc1"]}
    type(pipe).save_lora_weights(
        tmp_path,
        unet_lora_layers=parts["unet"],
        text_encoder_lora_layers=parts["text_encoder"],
        text_encoder_2_lora_layers=parts["text_encoder_2"],
        unet_lora_adapter_metadata=settings | {"target_modules": ["to_q", "to_k", "to_v"]},
        text_encoder_lora_adapter_metadata=settings,
        text_encoder_2_lora_adapter_metadata=settings | {"lora_alpha": 4},
    )
    plain = make("sdxl")[0]
    plain.load_lora_weights(tmp_path)
    plain.unet.eval()  # diffusers leaves the layers' dropout on
    with deradiff.realign(pipe, tmp_path, text_encoder="both"):
        assert torch.equal(drawn(pipe, call), drawn(plain, call))


def test_in_half_precision_an_anchor_is_what_diffusers_loads(tmp_path):
    pipe, plain, call = make("sd")[0].to(torch.bfloat16), make("sd")[0].to(torch.bfloat16), make("sd")[2]
    file = file_of(both("sd"), tmp_path)
    plain.load_lora_weights(file.parent, weight_name=file.name)
    with deradiff.realign(pipe, file, text_encoder="both"):
        assert torch.equal(drawn(pipe, call), drawn(plain, call))


def test_prompt_embeddings_of_another_dial_are_refused(tmp_path):
    pipe, other, call = make("sd")
    file = file_of(both("sd"), tmp_path)
    with deradiff.realign(pipe, file, lam=0.5, text_encoder="both"):
        embedded = pipe.encode_prompt(call["prompt"], "cpu", 1, True, call["negative_prompt"])
    del call["prompt"], call["negative_prompt"]
    call |= dict(zip(("prompt_embeds", "negative_prompt_embeds"), embedded, strict=True))
    with (
        deradiff.realign(pipe, file, lam=0.5, text_encoder="both"),
        pytest.raises(DialError, match="another realignment"),
    ):
        drawn(pipe, call)
    with deradiff.realign(pipe, other, lam=0.5), pytest.raises(DialError, match="another realignment"):
        drawn(pipe, call)


def test_a_text_encoder_answers_for_the_models_of_one_dial(tmp_path):
    pipe, _, call = make("sd")
    second = make("sd")[0]
    second.text_encoder = pipe.text_encoder
    file = file_of(both("sd"), tmp_path)
    with deradiff.realign(pipe, file, lam=0.5, text_encoder="both"):
        expected = drawn(pipe, call)
        with pytest.raises(DialError, match=naming("text_encoder", "a copy of it")):
            deradiff.realign(second, file, lam=0.5, text_encoder="both")
        assert torch.equal(drawn(pipe, call), expected)
    deradiff.realign(second, file, lam=0.5, text_encoder="both").remove()
