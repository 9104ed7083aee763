"""What cannot be baked is refused, and what stood there stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import deradiff
import tiny
from anchor_files import lora, lora_weights, saved
from baked import FAST, loaded
from deradiff.algorithm.schedules import Power
from deradiff.anchors import AnchorError, IncompatibleAnchor
from deradiff.baking import bake, outputs
from deradiff.baking.weights import fingerprint
from deradiff.files.disks import DiskFull
from deradiff.sampling.blocked_methods import DialError
from holding import files_of_at_most
from messages import naming

# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lam", "options", "words"),
    [
        (float("nan"), {}, naming("λ", "nan")),
        (float("inf"), {}, naming("λ", "inf")),
        ([0.1, 0.2], {}, naming("λ", 2)),
        (Power(2), {}, "method='distill'"),
        ({"other": 1.0}, {}, "unknown: \\['other'\\]"),
        (0.5, {"images": 2}, "--images 0"),
        (0.5, {"images": -1}, "-1 images"),
        (0.5, {"images": 2, "prompts": "a fox"}, naming(["a fox"])),
        (0.5, {"method": "distill"}, "0 different"),
    ],
)
def test_wrong_input_is_said_and_nothing_written(tmp_path: Path, lam: Any, options: dict[str, Any], words: str) -> None:
    pipe, aligned, _ = tiny.make("sd")
    with pytest.raises(ValueError, match=words):
        bake(pipe, aligned, lam, tmp_path / "out", **(FAST | options))
    assert not list(tmp_path.iterdir())


def test_anchors_that_do_not_fit(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    wider, _, _ = tiny.make("sd_inpaint_9_channels")
    saved(wider.unet, tmp_path / "wider")
    with pytest.raises(IncompatibleAnchor, match=naming("in_channels", 9)):
        bake(pipe, tmp_path / "wider", 0.5, tmp_path / "out", **FAST)
    state = {k: v for k, v in aligned.state_dict().items() if k != "conv_out.bias"}
    save_file({**state, "conv_in.bias": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(IncompatibleAnchor, match=naming("conv_in.bias", [3], "conv_out.bias")):
        bake(pipe, tmp_path / "odd.safetensors", 0.5, tmp_path / "out", **FAST)
    with pytest.raises(AnchorError, match=naming(tmp_path / "nowhere")):
        bake(pipe, tmp_path / "nowhere", 0.5, tmp_path / "out", **FAST)
    with pytest.warns(UserWarning, match=naming(tmp_path / "same", "reference")):
        bake(pipe, saved(pipe.unet, tmp_path / "same"), 0.5, tmp_path / "out", **FAST)


def test_an_anchor_that_is_no_number(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    aligned.get_parameter("conv_in.bias").data[0] = torch.nan
    with pytest.raises(AnchorError, match=naming("conv_in.bias", "NaN")):
        bake(pipe, saved(aligned, tmp_path / "anchor"), 0.5, tmp_path / "out", **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["anchor"]


def test_references_that_cannot_be_baked(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    dial = deradiff.realign(pipe, aligned, 0.5)
    with pytest.raises(DialError, match=r"dial.remove\(\)"):
        bake(pipe, aligned, 0.5, tmp_path / "out", **FAST)
    dial.remove()
    pipe.unet.load_lora_adapter(lora_weights(lora(pipe.unet)), prefix=None, adapter_name="style")
    with pytest.raises(AnchorError, match=naming("LoRA", "style")):
        bake(pipe, aligned, 0.5, tmp_path / "out", **FAST)
    assert not list(tmp_path.iterdir())


def test_what_stands_there_is_replaced_only_if_it_was_baked_and_one_asks(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    out, weights = tmp_path / "out", tmp_path / "out/unet/diffusion_pytorch_model.safetensors"
    out.mkdir()
    bake(pipe, aligned, 0.5, out, **FAST)  # empty folders are no obstacle
    first = weights.read_bytes()
    with pytest.raises(FileExistsError, match="--force"):
        bake(pipe, aligned, 0.6, out, **FAST)
    assert weights.read_bytes() == first
    bake(pipe, aligned, 0.6, out, force=True, **FAST)
    assert weights.read_bytes() != first and [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/mother.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=naming(tmp_path / "letters", "baking.json")):
        bake(pipe, aligned, 0.6, tmp_path / "letters", force=True, **FAST)
    with pytest.raises(FileExistsError, match=naming(tmp_path / "letters/mother.txt")):
        bake(pipe, aligned, 0.6, tmp_path / "letters/mother.txt", force=True, **FAST)


def test_a_disk_that_fills_leaves_what_was_there(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    with files_of_at_most(100_000), pytest.raises(DiskFull, match=naming(tmp_path / "out")):
        bake(pipe, aligned, 0.5, tmp_path / "out", **FAST)
    assert not list(tmp_path.iterdir())
    bake(pipe, aligned, 0.5, tmp_path / "out", **FAST)
    first = fingerprint(loaded(tmp_path / "out").unet)
    with files_of_at_most(100_000), pytest.raises(DiskFull, match=naming(tmp_path / "out")):
        bake(pipe, aligned, 0.6, tmp_path / "out", force=True, **FAST)
    assert fingerprint(loaded(tmp_path / "out").unet) == first and len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_is_too_small_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, aligned, _ = tiny.make("sd")
    assert 0 < outputs.size_of(pipe) < 1e8
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=naming(tmp_path / "out", "0.00 GB")):
        bake(pipe, aligned, 0.5, tmp_path / "out", **FAST)
    assert not list(tmp_path.iterdir())
