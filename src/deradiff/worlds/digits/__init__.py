"""The digits: a tiny Stable Diffusion trained on real handwriting, and anchors aligned from it at six strengths.

Everything ships with the package. The reference draws handwritten digits in colour from captions such as "a blue seven
on yellow paper"; the anchors were aligned by Diffusion-DPO to prefer bold ink and vivid colours, from barely (large β)
to beyond legibility (small β). `python -m studies.digits build` makes all of it again.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deradiff.worlds import ShippedAnchor, ShippedWorld

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

BETAS: tuple[float, ...] = (2000.0, 1000.0, 500.0, 250.0, 100.0, 30.0)
"""The anchors' β, from barely aligned to reward-hacked (Diffusion-DPO's convention, see `alignment.objectives`)."""

LORA_BETA: float = 250.0
"""The β of the anchor that is a LoRA."""

GUIDANCE = 1.5
"""The guidance scale of every published number: at 1 every tenth digit is hard to read, at 1.5 hardly one in fifty, and
the variety of the handwriting survives."""

MAX_LENGTH = 16
"""Tokens of a caption, start and end included."""

FILES = Path(__file__).parent / "files"


def reference_path() -> Path:
    """The folder of the reference, a `StableDiffusionPipeline`."""
    return FILES / "reference"


def anchor_path(beta: float) -> Path:
    """The UNet folder of the anchor aligned at `beta`. Raises `ValueError` for a β that was not trained."""
    if beta not in BETAS:
        raise ValueError(f"there is no digits anchor at β = {beta:g}: choose from {', '.join(f'{b:g}' for b in BETAS)}")
    return FILES / "anchors" / f"beta-{beta:g}"


def lora_path() -> Path:
    """The folder of the LoRA aligned at `LORA_BETA` (`pytorch_lora_weights.safetensors`)."""
    return FILES / f"lora-beta-{LORA_BETA:g}"


def load_pipeline(torch_dtype: Any = None) -> "StableDiffusionPipeline":
    """The reference as a pipeline, on the CPU, without progress bars; float32 unless `torch_dtype` says otherwise."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(reference_path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe if torch_dtype is None else pipe.to(torch_dtype)


def draw_prompts(count: int, seed: int) -> list[str]:
    """So many captions (`captions.sample_prompts`, which takes longer to import)."""
    from deradiff.worlds.digits.captions import sample_prompts

    return sample_prompts(count, seed)


WORLD = ShippedWorld(
    name="digits",
    title="the digits",
    reference=reference_path(),
    anchors={
        **{f"{b:g}": ShippedAnchor(anchor_path(b), b, f"digits.anchor_path({b:g})", "dpo", "digits") for b in BETAS},
        "lora": ShippedAnchor(lora_path(), LORA_BETA, "digits.lora_path()", "dpo", "digits"),
    },
    load=load_pipeline,
    sample_prompts=draw_prompts,
    example=("100", "a blue eight on white paper"),
    guidance_scale=GUIDANCE,
    rewards=("digits", "legible", "colours"),
    resolution=32,
    tokens=MAX_LENGTH,
)
