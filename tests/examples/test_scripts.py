"""The example scripts, each as a person runs it, on tiny pipelines of the same classes behind the same hub ids."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline, WanPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel

import deradiff
from hub_server import Hub, standing_in
from tiny import seeded
from tiny_loras import fused, lora_weights
from tiny_parts import perturbed
from tiny_video_families import wan_transformer
from trainable_families import t5_tokenizer, trainable, with_parts

STRONG = 1.0


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with standing_in(tmp_path, monkeypatch) as server:
        yield server


def saved(pipe: DiffusionPipeline, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


def peft_folder(weights: dict[str, Tensor], folder: Path) -> Path:
    """A LoRA as PEFT writes it, of rank 2 and scale 1."""
    LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]).save_pretrained(str(folder))
    named = {f"base_model.model.{key.removeprefix('transformer.')}": tensor for key, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def lora_file(weights: dict[str, Tensor], file: Path) -> Path:
    save_file(weights, file)
    return file


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, np.ndarray]]:
    """Runs a script, and gives its pictures by their paths; with `plain`, as if nothing were realigned."""

    def running(script: str, *arguments: object, plain: bool = False) -> dict[str, np.ndarray]:
        out = tmp_path / "out" / str(len(list(tmp_path.glob("out/*"))))
        module: Any = importlib.import_module(f"examples.{script}")
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(deradiff, "realign", lambda *_, **__: SimpleNamespace(reused=None))
            module.main([*map(str, arguments), "--out", str(out)])
        return {
            path.relative_to(out).with_suffix("").as_posix(): np.asarray(Image.open(path), dtype=int)
            for path in sorted(out.rglob("*.png"))
        }

    return running


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures are the same up to a level of rounding."""
    return one.shape == other.shape and int(np.abs(one - other).max()) <= 1


def sd35() -> tuple[Any, int]:
    """With all three text encoders, as the published one."""
    pipe, side = trainable("sd3")
    with seeded(1):
        third = T5EncoderModel(T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    return with_parts(pipe, text_encoder_3=third.eval(), tokenizer_3=t5_tokenizer()), side


def test_sd35(hub, run, tmp_path):
    pipe, side = sd35()
    weights = lora_weights(pipe, strength=STRONG)
    hub.add("stabilityai/stable-diffusion-3.5-medium", saved(pipe, tmp_path / "reference"))
    hub.add("jieliu/SD3.5M-FlowGRPO-PickScore", peft_folder(weights, tmp_path / "lora"))
    settings = ("--size", side, "--steps", 3)
    images = run("sd35_flow_grpo", "--lam", 0, 0.5, 1, *settings)
    assert {name: image.shape for name, image in images.items()} == dict.fromkeys(
        ("lam-0", "lam-0.5", "lam-1"), (side, side, 3)
    )
    reference = run("sd35_flow_grpo", "--lam", 0, *settings, plain=True)["lam-0"]
    aligned = saved(fused(pipe, weights), tmp_path / "aligned")
    anchor = run("sd35_flow_grpo", "--model", aligned, "--lam", 1, *settings, plain=True)["lam-1"]
    assert same(images["lam-0"], reference) and same(images["lam-1"], anchor)
    assert not same(images["lam-0.5"], reference) and not same(images["lam-0.5"], anchor)


def test_flux(hub, run, tmp_path):
    pipe, side = trainable("flux")
    other, _ = trainable("flux")
    other.transformer = perturbed(pipe.transformer, seed=1, scale=0.3)
    hub.add("black-forest-labs/FLUX.1-dev", saved(pipe, tmp_path / "reference"))
    hub.add("CodeGoat24/FLUX.1-dev-PrefGRPO", saved(other, tmp_path / "aligned"))
    settings = ("--size", side, "--steps", 4)
    images = run("flux", "--lam", 0, 1, "--power", 2, *settings)
    assert {name: image.shape for name, image in images.items()} == dict.fromkeys(
        ("lam-0", "lam-1", "power-2"), (side, side, 3)
    )
    reference = run("flux", "--lam", 0, "--power", *settings, plain=True)["lam-0"]
    anchor = run("flux", "--model", tmp_path / "aligned", "--lam", 1, "--power", *settings, plain=True)["lam-1"]
    assert same(images["lam-0"], reference) and same(images["lam-1"], anchor)
    assert not same(images["power-2"], reference) and not same(images["power-2"], anchor)


def test_qwen_image(hub, run, tmp_path, capsys):
    pipe, side = trainable("qwen_image")
    weights = lora_weights(pipe, strength=STRONG)
    hub.add("Qwen/Qwen-Image", saved(pipe, tmp_path / "reference"))
    settings = ("--anchor", peft_folder(weights, tmp_path / "lora"), "--size", side, "--steps", 4)
    images = run("qwen_image", "--lam", 0, 0.5, 1, *settings)
    assert {name: image.shape for name, image in images.items()} == dict.fromkeys(
        ("lam-0", "lam-0.5", "lam-1"), (side, side, 3)
    )
    assert capsys.readouterr().out == ""
    reference = run("qwen_image", "--lam", 0, *settings, plain=True)["lam-0"]
    aligned = saved(fused(pipe, weights), tmp_path / "aligned")
    anchor = run("qwen_image", "--model", aligned, "--lam", 1, *settings, plain=True)["lam-1"]
    assert same(images["lam-0"], reference) and same(images["lam-1"], anchor)
    capsys.readouterr()
    cheaper = run("qwen_image", "--lam", 0.5, "--tolerance", 0.05, *settings)
    assert "λ = 0.5" in capsys.readouterr().out and list(cheaper) == ["lam-0.5"]


def test_z_image(hub, run, tmp_path, capsys):
    pipe, side = trainable("z_image")
    weights = lora_weights(pipe, strength=STRONG)
    hub.add("Tongyi-MAI/Z-Image", saved(pipe, tmp_path / "reference"))
    lora = lora_file(weights, tmp_path / "aligned.safetensors")
    settings = ("--anchor", lora, "--anchor-beta", 0.04, "--size", side, "--steps", 3)
    images = run("z_image", "--beta", 0.08, 0.04, *settings)
    assert {name: image.shape for name, image in images.items()} == dict.fromkeys(
        ("beta-0.04", "beta-0.08", "reference"), (side, side, 3)
    )
    assert "beta-0.08: λ = 0.5" in capsys.readouterr().out
    reference = run("z_image", "--beta", 1, *settings, plain=True)["reference"]
    aligned = saved(fused(pipe, weights), tmp_path / "aligned")
    anchor = run("z_image", "--model", aligned, "--beta", 1, *settings, plain=True)["reference"]
    assert same(images["reference"], reference) and same(images["beta-0.04"], anchor)
    assert not same(images["beta-0.08"], reference) and not same(images["beta-0.08"], anchor)


def wan22() -> tuple[WanPipeline, int]:
    """With two transformers, text encoder and VAE."""
    pipe, side = trainable("wan")
    with seeded(1):
        both = pipe.components | {"transformer_2": wan_transformer()}
    return WanPipeline(**both, boundary_ratio=0.8), side


def fun_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA of Wan's attention in the names of VideoX-Fun's files."""
    own = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v"}
    named = {}
    for key, tensor in weights.items():
        layer, factor = key.removeprefix("transformer.").rsplit(".", 2)[:2]
        stem = "lora_unet__" + "_".join(own.get(part, part) for part in layer.split("."))
        named[f"{stem}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = tensor
    return named


def test_wan22(hub, run, tmp_path):
    pipe, side = wan22()
    weights = {end: lora_weights(pipe, seed=seed, strength=3 * STRONG) for seed, end in enumerate(("high", "low"))}
    hub.add("Wan-AI/Wan2.2-T2V-A14B-Diffusers", saved(pipe, tmp_path / "reference"))
    (tmp_path / "loras").mkdir()
    for end in weights:
        lora_file(fun_names(weights[end]), tmp_path / "loras" / f"Wan2.2-Fun-A14B-InP-{end}-noise-HPS2.1.safetensors")
    hub.add("alibaba-pai/Wan2.2-Fun-Reward-LoRAs", tmp_path / "loras")
    settings = ("--height", side, "--width", side, "--frames", 5, "--steps", 4)
    frames = run("wan22", "--lam", 0, 1, *settings)
    assert {name: frame.shape for name, frame in frames.items()} == {
        f"lam-{lam}/{number:03}": (side, side, 3) for lam in (0, 1) for number in range(5)
    }
    reference = run("wan22", "--lam", 0, *settings, plain=True)
    fused(pipe, weights["high"])
    low = WanPipeline(**(pipe.components | {"transformer": pipe.transformer_2, "transformer_2": None}))
    fused(low, weights["low"])
    aligned = saved(pipe, tmp_path / "aligned")
    anchor = run("wan22", "--model", aligned, "--lam", 1, *settings, plain=True)
    uneven = run("wan22", "--lam", 1, "--lam-low", 0, *settings)
    assert all(same(frames[name], frame) for name, frame in (reference | anchor).items())
    for other in (reference, anchor):  # the videos; a single frame of one may be that of another
        assert not all(same(frame, it) for frame, it in zip(uneven.values(), other.values(), strict=True))
