"""Stable Diffusion 3.5 Medium and a Flow-GRPO LoRA: a sweep of λ in one call, from one noise.

    python examples/sd35_flow_grpo.py --lam 0 0.25 0.5 0.75 1 --out foxes

Flow-GRPO's authors publish a LoRA for each of three rewards, jieliu/SD3.5M-FlowGRPO-PickScore, -GenEval and -Text,
each at one strength. The base weights are in memory once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

import deradiff


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one picture for each λ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stabilityai/stable-diffusion-3.5-medium", help="a hub id or a folder")
    parser.add_argument("--anchor", default="jieliu/SD3.5M-FlowGRPO-PickScore", help="a hub id, a folder or a file")
    parser.add_argument("--prompt", default="a fox in the snow, at dawn")
    parser.add_argument("--lam", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--size", type=int, default=512, help="the side of a picture in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("sd35"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = StableDiffusion3Pipeline.from_pretrained(options.model, dtype=dtype).to(device)
    deradiff.realign(pipe, options.anchor, lam=options.lam)  # one λ for each image of the batch

    same_noise = [torch.Generator().manual_seed(options.seed) for _ in options.lam]
    images = pipe(
        [options.prompt] * len(options.lam),
        generator=same_noise,
        num_inference_steps=options.steps,
        guidance_scale=4.5,
        height=options.size,
        width=options.size,
    ).images
    options.out.mkdir(parents=True, exist_ok=True)
    for lam, image in zip(options.lam, images, strict=True):
        image.save(options.out / f"lam-{lam:g}.png")


if __name__ == "__main__":
    main()
