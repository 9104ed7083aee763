"""The mixture as a LoRA's file: its factors, its ranks, the names it has, and that everybody's loaders take it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deradiff
import tiny
from anchor_files import lora, lora_weights, saved
from baked import FAST, played
from deradiff.algorithm.schedules import Power
from deradiff.anchors import load_anchor
from deradiff.anchors.checks import base_tensors
from deradiff.baking import AsLora, Distillation, Sampler, bake, extraction, outputs
from deradiff.baking.dialects import WEIGHTS, Dialect, write_lora
from deradiff.baking.low_rank import change_of
from deradiff.files.disks import DiskFull
from holding import files_of_at_most
from messages import naming

FULL = AsLora(rank=4096)
QUICK = Sampler(steps=3, guidance_scale=2.0, batch_size=4)


def changed_in_matrices(pipe: Any, aligned: Any) -> None:
    """Take the reference's norms and biases, so that a LoRA can carry all that is left of the anchor."""
    own = dict(base_tensors(tiny.denoiser(pipe)))
    for name, parameter in aligned.named_parameters():
        if parameter.ndim < 2:
            parameter.data.copy_(own[name])


def with_lora(kind: str, folder: Path) -> torch.Tensor:
    """What a fresh pipeline samples after diffusers has loaded the file."""
    pipe, _, call = tiny.make(kind)
    pipe.load_lora_weights(folder)
    return tiny.sample(pipe, call)


# -- a sum of LoRAs --------------------------------------------------------------------------------------------------


def test_a_sum_of_loras_is_a_lora() -> None:
    pipe, _, _ = tiny.make("sd")
    other, _, _ = tiny.make("sd")
    pipe.unet.load_lora_adapter(lora_weights(lora(pipe.unet)), prefix=None, adapter_name="a")
    # Other layers, another rank, another scale.
    more = lora(other.unet, ("to_v", "conv1", "proj_in"), r=7, lora_alpha=3)
    other.unet.load_lora_adapter(lora_weights(more), prefix=None, adapter_name="b")
    assert outputs.can_be_joined(pipe.unet, ["a"])
    state = outputs.joined_loras([(pipe.unet, "a", 0.3), (other.unet, "b", -1.2)])
    assert {tensor.shape[0] for name, tensor in state.items() if "lora_A" in name} == {11}
    changes: dict[str, torch.Tensor] = {}
    for model, adapter, scale in ((pipe.unet, "a", 0.3), (other.unet, "b", -1.2)):
        for path, layer in model.named_modules():
            if adapter in getattr(layer, "lora_A", {}):
                changes[path] = changes.get(path, 0) + scale * layer.get_delta_weight(adapter)
    for path, change in changes.items():
        down, up = state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"]
        tiny.assert_close(torch.einsum("or,ri...->oi...", up.flatten(1), down), change.detach())
    assert len(state) == 2 * len(changes)


def test_a_dora_is_no_lora_to_be_added() -> None:
    pipe, _, _ = tiny.make("sd")
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], use_dora=True), "dora")
    assert not outputs.can_be_joined(pipe.unet, ["dora"])


# -- the decomposition -------------------------------------------------------------------------------------------------


def test_factors_are_the_nearest_of_their_rank_and_shares_go_where_they_are_worth_most() -> None:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 8), "b": torch.nn.Conv2d(3, 5, 3), "n": torch.nn.LayerNorm(4)})
    deltas = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    deltas["b.weight"] *= 10
    *_, change = change_of(model, list(deltas), deltas.__getitem__)
    assert set(change.layers) == {"a", "b"} and set(change.rest) == {"a.bias", "b.bias", "n.weight", "n.bias"}
    rest = sum(float(deltas[name].square().sum()) for name in change.rest)
    assert change.share_of_rest == pytest.approx(rest / sum(float(d.square().sum()) for d in deltas.values()), rel=1e-5)
    for rank in (2, 99):
        for path, (down, up) in change.of_rank(rank).items():
            delta = deltas[f"{path}.weight"].flatten(1)
            values = torch.linalg.svdvals(delta)
            assert len(down) == min(rank, len(values)) and down.shape[1:] == deltas[f"{path}.weight"].shape[1:]
            left = (delta - up.flatten(1) @ down.flatten(1)).norm()
            assert float(left) == pytest.approx(float(values[rank:].norm()), abs=1e-4)
    ranks = {path: len(down) for path, (down, _) in change.of_share(0.7).items()}
    assert ranks["b"] > ranks["a"] == 1


# -- files that everybody loads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_diffusers_loads_it_and_strength_one_is_lam(tmp_path: Path, kind: str) -> None:
    pipe, aligned, _ = tiny.make(kind)
    changed_in_matrices(pipe, aligned)
    anchor = saved(aligned, tmp_path / "anchor")
    baked = bake(pipe, anchor, 0.4, tmp_path / "out", lora=FULL, **FAST)
    assert baked.form == "lora" and not list(tiny.denoiser(pipe).config.get("peft", []))
    tiny.assert_close(with_lora(kind, tmp_path / "out"), played(kind, anchor, 0.4), 1e-3)
    assert tiny.distance(with_lora(kind, tmp_path / "out"), played(kind, anchor, 0.6)) > 1e-2
    assert "load_lora_weights" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_ranks_that_differ_are_read_as_they_are_by_diffusers_peft_and_kohyas_readers(tmp_path: Path) -> None:
    pipe, aligned, call = tiny.make("sd")
    own, others = dict(base_tensors(pipe.unet)), dict(base_tensors(aligned))
    *_, change = change_of(pipe.unet, list(own), lambda name: others[name] - own[name])
    factors = change.of_share(0.8)
    ranks = [len(down) for down, _ in factors.values()]
    assert len(set(ranks)) > 3
    for dialect in get_args(Dialect):
        write_lora(pipe, tmp_path / dialect, factors, {}, dialect, {})
    for path, (down, up) in factors.items():
        own[f"{path}.weight"].data += (up.flatten(1) @ down.flatten(1)).view_as(own[f"{path}.weight"])
    by_hand = tiny.sample(pipe, call)
    for dialect in ("diffusers", "kohya"):
        tiny.assert_close(with_lora("sd", tmp_path / dialect), by_hand, 1e-3)
    fresh, _, _ = tiny.make("sd")
    PeftModel.from_pretrained(fresh.unet, str(tmp_path / "peft"))
    tiny.assert_close(tiny.sample(fresh, call), by_hand, 1e-3)
    with safe_open(tmp_path / "kohya" / WEIGHTS, "pt") as file:
        assert file.metadata()["ss_network_dim"] == f"{max(ranks)}"


def test_an_error_decides_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "PROBES", 2)
    pipe, aligned, _ = tiny.make("sd")
    options: dict[str, Any] = {"prompts": tiny.PROMPTS, "images": 1, "sampler": Sampler(2, 1.0)}
    asked = AsLora(error=0.7, dialect="kohya")
    baked = bake(pipe, aligned, 1.0, tmp_path / "out", lora=asked, **options)
    record = json.loads((tmp_path / "out/baking.json").read_text(encoding="utf-8"))["made_of"]["lora"]
    held = [probe["left_out"] for probe in record["tried"] if probe["error"] <= 0.7]
    low, _, high = record["ranks"]
    assert len(record["tried"]) == 3 and low < high and max(held) > 0
    assert baked.judgements[0].error.value < 1


def test_kohyas_names_carry_norms_and_biases_too(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    anchor = saved(aligned, tmp_path / "anchor")
    said = bake(pipe, anchor, 1.0, tmp_path / "kohya", lora=replace(FULL, dialect="kohya"), **FAST).said
    again = load_anchor(tmp_path / "kohya" / WEIGHTS, pipe)
    for name, tensor in base_tensors(again.module):  # type: ignore[arg-type]
        assert torch.allclose(tensor, aligned.state_dict()[name], atol=1e-5), name
    plain = bake(pipe, anchor, 1.0, tmp_path / "diffusers", lora=FULL, **FAST).said
    few = sum(p.ndim < 2 for p in aligned.parameters())
    assert any(f"{few} changes of norms and biases" in line for line in said)
    assert any(f"{few} norms and biases are left out" in line for line in plain)
    # diffusers refuses those changes in these names.
    cards = {
        dialect: (tmp_path / dialect / "README.md").read_text(encoding="utf-8") for dialect in ("kohya", "diffusers")
    }
    assert "load_lora_weights" not in cards["kohya"] and "deradiff.realign" in cards["kohya"]
    assert "load_lora_weights" in cards["diffusers"]


def test_kohyas_names_of_sdxl_are_the_published_ones(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sdxl")
    anchor = saved(aligned, tmp_path / "anchor")
    layers_per_block = pipe.unet.config.layers_per_block
    if layers_per_block != 2:
        config = {**pipe.unet.config, "layers_per_block": 2}
        pipe.unet, aligned = (UNet2DConditionModel.from_config(config) for _ in range(2))
        anchor = saved(aligned, tmp_path / "wider")
    bake(pipe, anchor, 1.0, tmp_path / "out", lora=replace(FULL, dialect="kohya"), **FAST)
    names = set(load_file(tmp_path / "out" / WEIGHTS))
    assert {
        "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight",
        "lora_unet_middle_block_1_proj_in.alpha",
        "lora_unet_time_embed_0.diff_b",
    } <= names
    again = load_anchor(tmp_path / "out" / WEIGHTS, pipe)
    for name, tensor in base_tensors(again.module):  # type: ignore[arg-type]
        assert torch.allclose(tensor, aligned.state_dict()[name], atol=1e-5), name


def test_half_precision_keeps_small_changes(tmp_path: Path) -> None:
    pipe, _, _ = tiny.make("sd")
    pipe.to(torch.float16)
    adapter = tmp_path / "lora.safetensors"
    save_file({name: 1e-3 * t for name, t in lora_weights(lora(tiny.make("sd")[0].unet)).items()}, adapter)
    bake(pipe, adapter, 0.5, tmp_path / "out", lora=AsLora(rank=1), **FAST)
    state = load_file(tmp_path / "out" / WEIGHTS)
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() and tensor.any() for tensor in state.values())


def test_an_anchor_that_is_a_lora_is_re_expressed_exactly_up_to_its_own_rank(tmp_path: Path) -> None:
    pipe, _, _ = tiny.make("sd")
    adapter = tmp_path / "lora.safetensors"
    save_file(lora_weights(lora(pipe.unet)), adapter)
    baked = bake(pipe, adapter, 0.7, tmp_path / "out", lora=AsLora(rank=64), **FAST)
    own = max(len(t) for name, t in load_file(tmp_path / "out" / WEIGHTS).items() if "lora_A" in name)
    assert own < 64 and any(f"rank {own}" in line and "exactly" in line for line in baked.said)
    tiny.assert_close(with_lora("sd", tmp_path / "out"), played("sd", adapter, 0.7), 1e-4)
    bake(pipe, adapter, 0.7, tmp_path / "low", lora=AsLora(rank=1), **FAST)
    assert {len(t) for name, t in load_file(tmp_path / "low" / WEIGHTS).items() if "lora_A" in name} == {1}


def test_it_realigns_in_the_anchors_place_with_the_weights_in_memory_once(tmp_path: Path) -> None:
    pipe, aligned, call = tiny.make("sd")
    changed_in_matrices(pipe, aligned)
    anchor = saved(aligned, tmp_path / "anchor")
    bake(pipe, anchor, 1.0, tmp_path / "out", lora=FULL, **FAST)
    images = []
    for source in (anchor, tmp_path / "out"):
        with deradiff.realign(pipe, source, 0.5):
            images.append(tiny.sample(pipe, call))
    tiny.assert_close(images[1], images[0], 1e-3)


# -- training from there -----------------------------------------------------------------------------------------------


def test_a_lora_is_trained_from_its_decomposition_and_both_errors_are_told(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    settings = Distillation(samples=8, held_out=2, steps=3, batch=4, learning_rate=1e-3, per_pass=4)
    baked = bake(
        pipe,
        saved(aligned, tmp_path / "anchor"),
        0.5,
        tmp_path / "out",
        method="distill",
        lora=AsLora(rank=2),
        prompts=[f"{prompt} {i}" for i in range(5) for prompt in tiny.PROMPTS],
        images=2,
        sampler=replace(QUICK, steps=2),
        distillation=settings,
    )
    after, before = baked.judgements
    assert "before training" in before.lam and after.error.value != before.error.value
    assert len(json.loads((tmp_path / "out/baking.json").read_text(encoding="utf-8"))["curve"]["held_out"]) > 1
    with_lora("sd", tmp_path / "out")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, naming("rank", "error")),
        ({"rank": 4, "error": 0.1}, naming(4, 0.1)),
        ({"rank": 0}, naming("rank", 0)),
        ({"rank": -2}, naming("rank", -2)),
        ({"error": 0.0}, naming("error", 0)),
        ({"error": 1.0}, naming("error", 1)),
        ({"error": float("nan")}, naming("error", "nan")),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AsLora(**fields)


@pytest.mark.parametrize(
    ("kind", "lam", "options", "words"),
    [
        ("sd", Power(2), {"lora": FULL}, "distill"),
        ("sd", 0.5, {"lora": AsLora(error=0.1)}, naming(0.1, 0)),
        ("sd", 0.0, {"lora": FULL}, "λ changes nothing"),
        ("sd3", 0.5, {"lora": replace(FULL, dialect="kohya")}, naming("SD3Transformer2DModel", "'diffusers'")),
        ("sd", 0.5, {"lora": AsLora(error=0.1), "method": "distill", "prompts": ["a", "b"]}, naming(0.1)),
    ],
)
def test_what_no_lora_can_be_is_said_and_nothing_written(
    tmp_path: Path, kind: str, lam: Any, options: dict[str, Any], words: str
) -> None:
    pipe, aligned, _ = tiny.make(kind)
    with pytest.raises(ValueError, match=words):
        bake(pipe, aligned, lam, tmp_path / "out", **(FAST | options))
    assert not list(tmp_path.iterdir())


def test_an_error_out_of_reach_names_the_least_there_is(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    options: dict[str, Any] = {"prompts": tiny.PROMPTS, "images": 2, "sampler": QUICK}
    with pytest.raises(ValueError, match=naming(0.0001, "kohya")):
        bake(pipe, aligned, 1.0, tmp_path / "out", lora=AsLora(error=1e-4), **options)
    assert not list(tmp_path.iterdir())


def test_folders_and_disks(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    with files_of_at_most(10_000), pytest.raises(DiskFull, match=naming(tmp_path / "out")):
        bake(pipe, aligned, 0.5, tmp_path / "out", lora=FULL, **FAST)
    assert not list(tmp_path.iterdir())
    bake(pipe, aligned, 0.5, tmp_path / "out", lora=FULL, **FAST)
    with pytest.raises(FileExistsError, match="--force"):
        bake(pipe, aligned, 0.5, tmp_path / "out", lora=FULL, **FAST)
