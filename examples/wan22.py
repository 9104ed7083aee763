"""Wan 2.2, which has a transformer for high noise and one for low, and a pair of LoRAs aligned to a reward.

    python examples/wan22.py --lam 0 0.5 1 --out boats
    python examples/wan22.py --lam 0.7 --lam-low 0.3 --out boats     # another λ for the second transformer

The LoRAs by default were trained by backpropagating HPS v2.1 through Wan2.2-Fun-A14B-InP; their card names the
text-to-video model as a base as well. It tells of no KL penalty, so that λ is how much of them, and stands for no β.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline

import deradiff

LORAS = "alibaba-pai/Wan2.2-Fun-Reward-LoRAs/Wan2.2-Fun-A14B-InP-{}-noise-HPS2.1.safetensors"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the frames of one video for each λ, in a folder each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan-AI/Wan2.2-T2V-A14B-Diffusers", help="a hub id or a folder")
    parser.add_argument("--anchor", default=LORAS.format("high"), help="the LoRA for high noise: a file or a hub id")
    parser.add_argument("--anchor-low", default=LORAS.format("low"), help="the LoRA for low noise")
    parser.add_argument("--prompt", default="a paper boat drifts down a stream through autumn leaves")
    parser.add_argument("--lam", type=float, nargs="+", default=[0, 0.5, 1])
    parser.add_argument("--lam-low", type=float, help="λ of the transformer for low noise; default: the same")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("wan22"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    vae = AutoencoderKLWan.from_pretrained(options.model, subfolder="vae", dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(options.model, vae=vae, dtype=dtype)
    if device == "cuda":
        pipe.enable_model_cpu_offload()  # one transformer of 14 billion parameters on the GPU at a time
    dial = deradiff.realign(pipe, {"transformer": options.anchor, "transformer_2": options.anchor_low})

    for lam in options.lam:
        dial.lam = {"transformer": lam, "transformer_2": lam if options.lam_low is None else options.lam_low}
        video = pipe(
            options.prompt,
            generator=torch.Generator().manual_seed(options.seed),  # the same noise every time
            num_inference_steps=options.steps,
            num_frames=options.frames,
            height=options.height,
            width=options.width,
            output_type="pil",
        ).frames[0]
        folder = options.out / f"lam-{lam:g}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(video):
            frame.save(folder / f"{number:03}.png")


if __name__ == "__main__":
    main()
