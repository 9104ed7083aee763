"""Qwen-Image and a LoRA that was aligned from it, at less than the price of two models.

    python examples/qwen_image.py --anchor LORA --lam 0 0.5 1 --tolerance 0.05 --out shops

We know of no public LoRA of Qwen-Image that was aligned with a penalty to it, so the anchor has to be named: a folder
as Flow-GRPO writes it (adapter_config.json beside adapter_model.safetensors), or a .safetensors file of any usual
trainer.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import QwenImagePipeline

import deradiff


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one picture for each λ, and say what each was computed from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen-Image", help="a hub id or a folder")
    parser.add_argument("--anchor", required=True, help="the aligned LoRA: a hub id, a folder or a file")
    parser.add_argument("--prompt", default='a small bookshop with a sign above the door that says "Open late"')
    parser.add_argument("--lam", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--tolerance", type=float, help="the error allowed, relative to λ's own effect; default: exact")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=1024, help="the side of a picture in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("qwen-image"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = QwenImagePipeline.from_pretrained(options.model, dtype=dtype).to(device)
    dial = deradiff.realign(pipe, options.anchor, tolerance=options.tolerance)

    options.out.mkdir(parents=True, exist_ok=True)
    for lam in options.lam:
        dial.lam = lam
        image = pipe(
            options.prompt,
            negative_prompt=" ",  # guidance needs one
            generator=torch.Generator().manual_seed(options.seed),  # the same noise every time
            num_inference_steps=options.steps,
            true_cfg_scale=4.0,
            height=options.size,
            width=options.size,
        ).images[0]
        image.save(options.out / f"lam-{lam:g}.png")
        if dial.reused is not None:
            print(f"λ = {lam:g}: {dial.reused.words}")


if __name__ == "__main__":
    main()
