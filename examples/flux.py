"""FLUX.1 [dev] and an aligned transformer: constant λ, and λ that grows along the way (annealed importance guidance).

    python examples/flux.py --lam 0 0.5 1 --power 2 --out lighthouses

The anchor by default is a whole pipeline on the hub, FLUX.1 [dev] aligned by Pref-GRPO, of which the transformer
alone is taken. Two transformers of 12 billion parameters are in memory then, 24 GB each in bfloat16. A LoRA,
`--anchor LORA`, adds its own few weights to one of them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline

import deradiff


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one picture for each λ, and one for each power."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="a hub id or a folder")
    parser.add_argument("--anchor", default="CodeGoat24/FLUX.1-dev-PrefGRPO", help="a hub id, a folder or a file")
    parser.add_argument("--prompt", default="an old lighthouse in a storm, oil on canvas")
    parser.add_argument("--lam", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--power", type=float, nargs="*", default=[2], help="λ(s) = s^power, from noise to image")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, default=1024, help="the side of a picture in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("flux"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = FluxPipeline.from_pretrained(options.model, dtype=dtype).to(device)
    dial = deradiff.realign(pipe, options.anchor)

    options.out.mkdir(parents=True, exist_ok=True)
    constant = {f"lam-{lam:g}": lam for lam in options.lam}
    annealed = {f"power-{power:g}": deradiff.schedules.Power(power) for power in options.power}
    for name, lam in (constant | annealed).items():
        dial.lam = lam
        image = pipe(
            options.prompt,
            generator=torch.Generator().manual_seed(options.seed),  # the same noise every time
            num_inference_steps=options.steps,
            guidance_scale=3.5,
            height=options.size,
            width=options.size,
        ).images[0]
        image.save(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
