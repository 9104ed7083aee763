"""A LoRA that was baked in kohya's names, read by ComfyUI's own reader; skipped where no checkout is given."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import comfyui_host
import tiny
from baked import FAST
from deradiff.baking import AsLora, bake
from deradiff.baking.dialects import WEIGHTS

pytestmark = pytest.mark.skipif(comfyui_host.PATH is None, reason=comfyui_host.WITHOUT)

PUBLISHED: dict[str, Any] = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}
"""SDXL's blocks as ComfyUI has them."""

SMALL: dict[str, Any] = {
    "layers_per_block": 2,
    "block_out_channels": (32, 64, 64),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
}
"""The same for diffusers, narrow."""


def test_comfyui_has_a_place_for_every_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    comfyui_host.require_comfyui()
    import comfy.lora
    import comfy.utils

    pipe: Any = tiny.make("sdxl")[0]
    pipe.unet, aligned = (UNet2DConditionModel.from_config({**pipe.unet.config, **SMALL}) for _ in range(2))
    aligned.load_state_dict(pipe.unet.state_dict())
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    bake(pipe, aligned, 1.0, tmp_path / "out", lora=AsLora(rank=2, dialect="kohya"), **FAST)

    own = comfy.utils.unet_to_diffusers(PUBLISHED).values()
    host = SimpleNamespace(
        state_dict=lambda: {f"diffusion_model.{name}": None for name in own},
        model_config=SimpleNamespace(unet_config=PUBLISHED),
    )
    state = comfy.utils.load_torch_file(str(tmp_path / "out" / WEIGHTS), safe_load=True)
    patches = comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(host, {}))
    assert "lora key not loaded" not in caplog.text
    assert len({name.split(".")[0] for name in state}) == len({name.rsplit(".", 1)[0] for name in patches})
    factors = sum(name.endswith(".lora_up.weight") for name in state)
    assert factors == sum(not isinstance(patch, tuple) for patch in patches.values()) > 0
