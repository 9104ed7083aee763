"""Interpolated weights as files: they are the dial's, and diffusers loads them alone."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deradiff
import tiny
from anchor_files import lora, lora_weights, original_layout, saved
from baked import FAST, loaded, played
from deradiff.algorithm.schedules import Constant
from deradiff.anchors.checks import base_tensors
from deradiff.baking import bake, split_prompts
from deradiff.baking.weights import FORMATS, Blend, StoredAnchor, fingerprint, open_anchor, write_tensors
from deradiff.files.records import read_png
from deradiff.sweep.pipelines import load_pipeline


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_baked_weights_are_those_the_dial_computes_with(tmp_path: Path, kind: str) -> None:
    pipe, aligned, call = tiny.make(kind)
    before = fingerprint(tiny.denoiser(pipe))
    anchor = saved(aligned, tmp_path / "anchor")
    baked = bake(pipe, anchor, 0.4, tmp_path / "out", **FAST)
    assert baked.form == "pipeline" and fingerprint(tiny.denoiser(pipe)) == before
    assert torch.equal(tiny.sample(loaded(tmp_path / "out"), call), played(kind, anchor, 0.4))
    assert not torch.equal(played(kind, anchor, 0.4), played(kind, anchor, 0.5))


@pytest.mark.parametrize("lam", [0.0, 1.0, -0.5, 1.5, Constant(0.5)])
def test_the_ends_are_the_models_themselves_and_lam_may_lie_outside(tmp_path: Path, lam: Any) -> None:
    pipe, aligned, _ = tiny.make("sd")
    bake(pipe, aligned, lam, tmp_path / "out", **FAST)
    own, anchors = dict(base_tensors(tiny.denoiser(pipe))), dict(base_tensors(aligned))
    value = 0.5 if isinstance(lam, Constant) else lam
    for name, tensor in load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors").items():
        assert torch.allclose(tensor, (1 - value) * own[name] + value * anchors[name], atol=1e-6)
        if lam in (0.0, 1.0):
            assert torch.equal(tensor, (anchors if lam else own)[name])


def test_several_anchors_full_and_lora_together(tmp_path: Path) -> None:
    pipe, aligned, call = tiny.make("sd")
    third = tiny.anchor_of(pipe, seed=2)
    adapter = tmp_path / "lora.safetensors"
    save_file(lora_weights(lora(tiny.denoiser(pipe))), adapter)
    anchors = {"a": saved(aligned, tmp_path / "a"), "b": saved(third, tmp_path / "b"), "c": adapter}
    lams = {"a": 0.3, "b": -0.2, "c": 0.6}
    bake(pipe, anchors, lams, tmp_path / "out", **FAST)
    tiny.assert_close(tiny.sample(loaded(tmp_path / "out"), call), played("sd", anchors, lams))
    bake(pipe, anchors, {**lams, "c": 0.0}, tmp_path / "without", **FAST)
    assert tiny.distance(tiny.sample(loaded(tmp_path / "without"), call), played("sd", anchors, lams)) > 1e-3


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_lora_is_scaled_and_fused(tmp_path: Path, options: dict[str, Any]) -> None:
    pipe, _, call = tiny.make("sd")
    lora(tiny.denoiser(pipe), **options).save_pretrained(tmp_path / "lora")
    modules = [path for path, _ in tiny.denoiser(pipe).named_modules()]
    bake(pipe, tmp_path / "lora", 0.7, tmp_path / "out", **FAST)
    tiny.assert_close(tiny.sample(loaded(tmp_path / "out"), call), played("sd", tmp_path / "lora", 0.7))
    assert [path for path, _ in tiny.denoiser(pipe).named_modules()] == modules


@pytest.mark.parametrize("form", ["shards", "single file", "original layout", "pipeline"])
@pytest.mark.cases(2)
def test_every_form_of_an_anchor(tmp_path: Path, form: str) -> None:
    pipe, aligned, call = tiny.make("sd")
    source = tmp_path / "anchor"
    if form == "shards":
        saved(aligned, source, max_shard_size="100KB")
        assert len(list(source.glob("*.safetensors"))) > 2
    elif form == "pipeline":
        tiny.with_denoiser("sd", aligned).save_pretrained(source)
    else:
        source = tmp_path / "anchor.safetensors"
        save_file(aligned.state_dict() if form == "single file" else original_layout(aligned), source)
    opened = open_anchor(source, pipe, "anchor")
    assert isinstance(opened, StoredAnchor) == (form != "original layout")
    bake(pipe, source, 0.5, tmp_path / "out", **FAST)
    assert torch.equal(tiny.sample(loaded(tmp_path / "out"), call), played("sd", source, 0.5))


def test_precision_is_kept(tmp_path: Path) -> None:
    pipe, aligned, call = tiny.make("sd")
    anchor = saved(aligned, tmp_path / "anchor")
    bake(pipe.to(torch.bfloat16), anchor, 0.5, tmp_path / "out", **FAST)
    with safe_open(tmp_path / "out/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    expected = played("sd", anchor, 0.5, torch.bfloat16)
    assert torch.equal(tiny.sample(loaded(tmp_path / "out", torch.bfloat16), call), expected)


def test_a_file_of_tensors_reads_back_whatever_their_format(tmp_path: Path) -> None:
    made = {f"t{i}": torch.arange(2 * i + 1).to(dtype) for i, dtype in enumerate(FORMATS)}
    made |= {"scalar": torch.tensor(3.5), "odd": torch.ones(3, 1, 5)[:, 0, ::2], "none": torch.zeros(0, 4)}
    digest = write_tensors(tmp_path / "t.safetensors", made, lambda name: [made[name]])
    read = load_file(tmp_path / "t.safetensors")
    assert read.keys() == made.keys()
    assert all(t.dtype == made[n].dtype and torch.equal(t.float(), made[n].float()) for n, t in read.items())
    assert digest == hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="complex64"):
        write_tensors(tmp_path / "no", {"z": torch.zeros(1, dtype=torch.complex64)}, lambda name: [made[name]])


# -- without this library ----------------------------------------------------------------------------------------------

PLAIN = """
import sys, torch
sys.modules["deradiff"] = None
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
pipe.set_progress_bar_config(disable=True)
if len(sys.argv) > 3:
    pipe.load_lora_weights(sys.argv[3])
call = torch.load(sys.argv[2], weights_only=False)
torch.save(pipe(generator=torch.Generator().manual_seed(11), **call).images, sys.argv[2] + ".out")
assert not [name for name in sys.modules if name.startswith("deradiff.")]
"""


def sampled_without_deradiff(folder: Path, call: dict[str, Any], tmp_path: Path, *lora: Path) -> torch.Tensor:
    """The latents of a fresh Python that cannot import deradiff."""
    torch.save(call, tmp_path / "call")
    command = [sys.executable, "-c", PLAIN, str(folder), str(tmp_path / "call"), *map(str, lora)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "call.out")


def test_a_fresh_python_without_deradiff_samples_the_same(tmp_path: Path) -> None:
    pipe, aligned, call = tiny.make("sd")
    bake(pipe, aligned, 0.5, tmp_path / "out", **FAST)
    tiny.assert_close(sampled_without_deradiff(tmp_path / "out", call, tmp_path), played("sd", aligned, 0.5))


MEASURING = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
import deradiff, deradiff.baking
from transformers import CLIPTextModel

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

folder, anchor, out = map(Path, sys.argv[1:])
# What is loaded once whatever is baked: the libraries, and one small model.
deradiff.bake(StableDiffusionPipeline.from_pretrained(folder.parent / "small"), folder.parent / "small-anchor", 0.5,
              folder.parent / "small-out", images=0)
before = status("VmRSS")
pipe = StableDiffusionPipeline.from_pretrained(folder)
for parameter in pipe.unet.parameters():
    parameter.sum()  # whether read or only mapped: it is a model in memory
loaded = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
deradiff.bake(pipe, anchor, 0.5, out, images=0)
print(json.dumps({"model": sum(p.numel() * p.element_size() for p in pipe.unet.parameters()),
                  "held": loaded - before, "peak": status("VmHWM") - before}))
"""


def test_memory_holds_one_model_and_a_tenth(tmp_path: Path) -> None:
    """Peak resident memory of a process that bakes a model of 280 MB from an anchor in shards."""
    from diffusers import UNet2DConditionModel

    for name, channels in (("small", (32, 32)), ("large", (256, 512))):
        pipe, _, _ = tiny.make("sd")
        config = {**pipe.unet.config, "block_out_channels": channels, "layers_per_block": 2}
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(config)
        pipe.unet = unet.to_empty(device="cpu")
        for value, place in ((0.5, tmp_path / name), (1.5, tmp_path / f"{name}-anchor")):
            for parameter in pipe.unet.parameters():
                torch.nn.init.constant_(parameter, value)
            (pipe if value == 0.5 else pipe.unet).save_pretrained(place, max_shard_size="60MB")
    assert len(list((tmp_path / "large-anchor").glob("*.safetensors"))) > 2
    command = [sys.executable, "-c", MEASURING, *(str(tmp_path / name) for name in ("large", "large-anchor", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["model"] > 200e6 and measured["held"] > 0.9 * measured["model"]
    assert measured["peak"] < 1.08 * measured["model"], measured
    with safe_open(tmp_path / "out/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert all(bool((file.get_tensor(name) == 1).all()) for name in file.keys())  # noqa: SIM118


# -- the record --------------------------------------------------------------------------------------------------------


def test_report_sheet_and_card_say_what_was_made_from_what(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    anchor = saved(aligned, tmp_path / "anchor")
    sampler = deradiff.baking.Sampler(steps=3, guidance_scale=2.0, batch_size=3)
    baked = bake(
        pipe, anchor, 0.5, tmp_path / "out", prompts=tiny.PROMPTS, images=4, sampler=sampler, name="owner/base"
    )
    record = json.loads((tmp_path / "out/baking.json").read_text(encoding="utf-8"))
    (judged,) = baked.judgements
    assert record["judged"] == [judged.record()] and judged.images == 4

    def latents(anchor: Any, lam: float, method: Any = "mixture") -> torch.Tensor:
        pipe, _, _ = tiny.make("sd")
        with deradiff.realign(pipe, anchor, lam, method=method):
            rows = [
                tiny.sample(
                    pipe,
                    {"prompt": tiny.PROMPTS[i % 2]},
                    seed=i,
                    num_inference_steps=3,
                    guidance_scale=2.0,
                    output_type="latent",
                )
                for i in range(4)
            ]
        return torch.cat(rows)

    reference, exact, own = latents(anchor, 0.0), latents(anchor, 0.5), latents(anchor, 0.5, "interpolate")
    by_hand = (own - exact).flatten(1).norm(dim=1) / (exact - reference).flatten(1).norm(dim=1)
    assert judged.error.value == pytest.approx(by_hand.mean().item(), rel=1e-3)
    assert judged.error.error == pytest.approx(by_hand.std().item() / 2, rel=1e-3)
    made_of = record["made_of"]
    weights = anchor / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert made_of["anchors"] == {"anchor": {"source": str(anchor), "sha256": {weights.name: digest}}}
    assert made_of["lam"] == {"anchor": 0.5} and made_of["reference"]["sha256"] == fingerprint(pipe.unet)
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert all(
        said in card for said in ("base_model: owner/base", "λ = 0.5", digest, f"{judged.error.value:.1%}", "licence")
    )
    with Image.open(tmp_path / "out/sheet.png") as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 4 * 128
    assert read_png(tmp_path / "out/sheet.png")["words"] == "λ = 0.5"


def test_the_card_loads_a_pipeline_that_was_saved_without_some_parts(tmp_path: Path) -> None:
    pipe, aligned, call = tiny.make("sd3")
    bake(pipe, aligned, 0.5, tmp_path / "out", **FAST)
    (usage,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    made: dict[str, Any] = {}
    exec(usage.replace("this folder", str(tmp_path / "out")), made)
    again = load_pipeline(str(tmp_path / "out"), dtype=torch.float32)
    for of in (made["pipe"], again):
        assert torch.equal(tiny.sample(of, call), tiny.sample(loaded(tmp_path / "out"), call))


def test_where_lam_does_nothing_there_is_no_error_to_state(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    baked = bake(pipe, aligned, 0.0, tmp_path / "out", prompts=["a"], images=1, sampler=deradiff.baking.Sampler(2, 1.0))
    assert "no effect" in baked.judgements[0].words
    assert json.loads((tmp_path / "out/baking.json").read_text())["judged"][0]["error"] == {
        "value": None,
        "error": None,
    }


def test_prompts_held_out_are_not_trained_with() -> None:
    prompts = [f"prompt {i}" for i in range(20)]
    trained, held_out = split_prompts([*prompts, *prompts], 8, "distill")
    assert len(held_out) == 4 and trained + held_out == prompts
    assert split_prompts(prompts, 3, "interpolate") == ([], prompts[:3])


def test_the_blend_names_what_files_hold(tmp_path: Path) -> None:
    pipe, _, _ = tiny.make("sd")
    blend = Blend(pipe.unet, [])
    assert set(blend.names) == set(pipe.unet.state_dict())
    assert all(torch.equal(blend.tensor(name), blend.like(name)) for name in blend.names)
