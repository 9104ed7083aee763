"""Z-Image and a LoRA that was aligned from it, at the strengths β that you ask for.

    python examples/z_image.py --anchor LORA --anchor-beta 0.04 --beta 0.16 0.08 0.04 --out cats

We know of no public LoRA of Z-Image that was aligned with a penalty to it, so the anchor has to be named: a PEFT
folder (adapter_config.json beside adapter_model.safetensors), or a .safetensors file of any usual trainer. If it was
trained with a KL penalty of strength β, λ = β / target asks for another strength. Take the base model, not the
distilled Z-Image-Turbo, for an anchor that was trained from the base model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ZImagePipeline

import deradiff


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the reference's picture, and one for each strength."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Tongyi-MAI/Z-Image", help="a hub id or a folder")
    parser.add_argument("--anchor", required=True, help="the aligned LoRA: a hub id, a folder or a file")
    parser.add_argument("--anchor-beta", type=float, required=True, help="the strength that it was aligned at")
    parser.add_argument("--beta", type=float, nargs="+", required=True, help="the strengths to draw")
    parser.add_argument("--prompt", default="a ginger cat asleep on a stack of newspapers, morning light")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=1024, help="the side of a picture in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("z-image"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = ZImagePipeline.from_pretrained(options.model, dtype=dtype).to(device)
    dial = deradiff.realign(pipe, options.anchor)

    options.out.mkdir(parents=True, exist_ok=True)
    strengths = {f"beta-{beta:g}": deradiff.lam_for_beta(options.anchor_beta, beta) for beta in options.beta}
    for name, lam in ({"reference": 0.0} | strengths).items():
        dial.lam = lam
        image = pipe(
            options.prompt,
            generator=torch.Generator().manual_seed(options.seed),  # the same noise every time
            num_inference_steps=options.steps,
            guidance_scale=4.0,
            height=options.size,
            width=options.size,
        ).images[0]
        image.save(options.out / f"{name}.png")
        print(f"{name}: λ = {lam:g}")


if __name__ == "__main__":
    main()
