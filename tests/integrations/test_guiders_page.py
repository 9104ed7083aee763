"""The code of the page on guiders runs, with a tiny SDXL in place of the published one."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLAutoBlocks,
)
from PIL import Image

from deradiff.integrations.diffusers import RealignGuider
from tiny_families import built
from tiny_parts import perturbed

PAGE = Path(__file__).parents[2] / "docs" / "tasks" / "guiders.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = built("sdxl")[0]
    pipe: Any = StableDiffusionXLAutoBlocks().init_pipeline()
    parts = {name: part for name, part in plain.components.items() if part is not None}
    pipe.update_components(**{name: part for name, part in parts.items() if name in pipe.component_names})
    aligned: Any = perturbed(plain.unet, 1)
    aligned.save_pretrained(tmp_path / "aligned")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModularPipeline, "from_pretrained", lambda name: pipe)
    code = "".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    for published, tiny in {
        "mhdang/dpo-sdxl-text2image-v1": str(tmp_path / "aligned"),
        "num_inference_steps=25": "num_inference_steps=2",
        '"cuda"': '"cpu"',
    }.items():
        assert published in code
        code = code.replace(published, tiny)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert isinstance(names["image"], Image.Image) and len(names["images"]) == 3
    assert isinstance(pipe.guider, RealignGuider) and pipe.guider.guidance_scale == 5.0 and pipe.guider.lam == 0.5
    assert not torch.equal(next(pipe.guider.modules["anchor"].parameters()), next(pipe.unet.parameters()))
