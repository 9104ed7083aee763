"""The flow digits: a tiny Stable Diffusion 3 on the digits' pictures and captions, and anchors aligned from it.

Everything ships with the package. The reference predicts the velocity of a flow with a transformer that attends to
picture and caption together, and shares the digits' autoencoder, captions, rewards and classifier. Anchors were aligned
by Diffusion-DPO at four strengths, one of them as a LoRA as well, and by Flow-GRPO without a KL term.
`python -m studies.digits_flow build` makes all of it again.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deradiff.worlds import ShippedAnchor, ShippedWorld
from deradiff.worlds.digits import MAX_LENGTH, draw_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

BETAS: tuple[float, ...] = (500.0, 100.0, 20.0, 5.0)
"""The anchors' β, from barely aligned to reward-hacked (Flow-DPO's convention, see `alignment.objectives`)."""

LORA_BETA: float = 100.0
"""The β of the anchor that is a LoRA."""

GUIDANCE = 1.1
"""The guidance scale of every published number: more digits are legible than at 1, and their variety survives."""

FILES = Path(__file__).parent / "files"


def reference_path() -> Path:
    """The folder of the reference, a `StableDiffusion3Pipeline` without a T5 encoder."""
    return FILES / "reference"


def anchor_path(beta: float) -> Path:
    """The transformer folder of the anchor aligned at `beta`. Raises `ValueError` for a β that was not trained."""
    if beta not in BETAS:
        known = ", ".join(f"{b:g}" for b in BETAS)
        raise ValueError(f"there is no anchor of the flow digits at β = {beta:g}: choose from {known}")
    return FILES / "anchors" / f"beta-{beta:g}"


def lora_path() -> Path:
    """The folder of the LoRA aligned at `LORA_BETA` (`pytorch_lora_weights.safetensors`)."""
    return FILES / f"lora-beta-{LORA_BETA:g}"


def grpo_path() -> Path:
    """The folder of the LoRA aligned by Flow-GRPO, whose λ_KL was 0 (`pytorch_lora_weights.safetensors`)."""
    return FILES / "lora-grpo"


def load_pipeline(torch_dtype: Any = None) -> "StableDiffusion3Pipeline":
    """The reference as a pipeline, on the CPU, without progress bars; float32 unless `torch_dtype` says otherwise."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(
        reference_path(), dtype=torch_dtype or torch.float32, local_files_only=True, **absent
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


WORLD = ShippedWorld(
    name="digits-flow",
    title="the flow digits",
    reference=reference_path(),
    anchors={
        **{
            f"{b:g}": ShippedAnchor(anchor_path(b), b, f"digits_flow.anchor_path({b:g})", "dpo", "digits")
            for b in BETAS
        },
        "lora": ShippedAnchor(lora_path(), LORA_BETA, "digits_flow.lora_path()", "dpo", "digits"),
        "grpo": ShippedAnchor(grpo_path(), None, "digits_flow.grpo_path()", "flow-grpo", "digits"),
    },
    load=load_pipeline,
    sample_prompts=draw_prompts,
    example=("5", "a blue eight on white paper"),
    guidance_scale=GUIDANCE,
    rewards=("digits", "legible", "colours"),
    resolution=32,
    tokens=MAX_LENGTH,
)
