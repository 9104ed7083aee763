"""A LoRA in kohya's names through ComfyUI's own reader: COMFYUI names a checkout of it, or this is skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import tiny
from baked import FAST
from deradiff.baking import AsLora, bake
from deradiff.baking.dialects import WEIGHTS

COMFYUI = os.environ.get("COMFYUI")

READING = """
import sys, types
path = sys.argv.pop()
# Only a model's image transforms want it, which nothing here does.
sys.modules["torchvision"] = types.ModuleType("torchvision")
sys.modules["torchvision"].transforms = types.ModuleType("torchvision.transforms")
sys.path.insert(0, "")
from comfy.cli_args import args
args.cpu = True
import comfy.lora, comfy.utils
config = {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
          "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10}
names = comfy.utils.unet_to_diffusers(config)
model = types.SimpleNamespace(
    state_dict=lambda: {f"diffusion_model.{own}": None for own in names.values()},
    model_config=types.SimpleNamespace(unet_config=config),
)
state = comfy.utils.load_torch_file(path, safe_load=True)
patches = comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(model, {}))
layers = {name.split(".")[0] for name in state}
factors = [patch for patch in patches.values() if not isinstance(patch, tuple)]
print(len(layers), len({name.rsplit(".", 1)[0] for name in patches}), len(factors))
"""


@pytest.mark.skipif(not COMFYUI, reason="COMFYUI names no checkout of ComfyUI")
def test_comfyui_has_a_place_for_every_layer(tmp_path: Path) -> None:
    pipe, _, _ = tiny.make("sdxl")
    shape = {"layers_per_block": 2, "block_out_channels": (32, 64, 64), "norm_num_groups": 8, "attention_head_dim": 8}
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
    }
    pipe.unet, aligned = (UNet2DConditionModel.from_config({**pipe.unet.config, **shape, **blocks}) for _ in range(2))
    aligned.load_state_dict(pipe.unet.state_dict())
    for parameter in aligned.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    bake(pipe, aligned, 1.0, tmp_path / "out", lora=AsLora(rank=2, dialect="kohya"), **FAST)
    command = [sys.executable, "-c", READING, str(tmp_path / "out" / WEIGHTS)]
    done = subprocess.run(command, cwd=COMFYUI, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    layers, placed, factors = map(int, done.stdout.split())
    assert "lora key not loaded" not in done.stderr and layers == placed and factors > 0
