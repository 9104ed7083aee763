"""A full anchor as a LoRA: which ranks keep which error, and what it weighs: python benchmarks/lora_extraction.py.

Of the digits' anchor aligned hardest, whole (λ = 1): the error of images, in units of λ's own effect over final latents
of held-out prompts, with its standard error, of LoRAs of several ranks and of the one that was looked for at 2%; in
diffusers' names, which leave norms and biases out, and in kohya's, which have them. With --train also of one that is
trained from there.

In memory: bytes of all tensors that a pipeline's denoiser and its loaded anchor hold, by a full anchor and by the LoRA,
in units of the reference's. The same ratio for SDXL's shapes, where the layers are wider, without weights. Everything
goes to benchmarks/lora_extraction.json.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from price_shapes import SDXL_UNET
from recording import keep_parts
from torch import nn

from deradiff.anchors import load_anchor
from deradiff.baking import AsLora, Baked, Sampler, bake
from deradiff.baking.distillation import SHIPPED
from deradiff.baking.low_rank import takes_lora
from deradiff.sweep.jobs import reproducible
from deradiff.worlds import digits

BETA, LIMIT, RANKS, IMAGES = min(digits.BETAS), 0.02, (8, 16, 32), 32
SAMPLER = Sampler(steps=25, guidance_scale=digits.GUIDANCE, batch_size=32)
TRAINING = replace(SHIPPED, samples=256, steps=300, batch=32)
SHARED_RANKS = (8, 16, 32, 64)


def made(folder: Path, lora: AsLora, **options: Any) -> Baked:
    prompts = digits.draw_prompts(320 if options else 64, seed=1)
    pipe, anchor = digits.load_pipeline(), digits.anchor_path(BETA)
    return bake(
        pipe, anchor, 1.0, folder, lora=lora, prompts=prompts, images=IMAGES, sampler=SAMPLER, name="digits", **options
    )


def row(baked: Baked, **which: Any) -> dict[str, Any]:
    errors = {judged.lam: asdict(judged.error) for judged in baked.judgements}
    return {**which, "errors": errors, "said": baked.said}


def weights_held(anchor: Any) -> dict[str, float]:
    """Bytes of the tensors of a pipeline's denoiser and its loaded anchor, each once, beside the plain denoiser's."""
    pipe = digits.load_pipeline()
    plain = sum(tensor.nbytes for tensor in (*pipe.unet.parameters(), *pipe.unet.buffers()))
    loaded = load_anchor(anchor, pipe)
    modules = [pipe.unet] if loaded.module is None else [pipe.unet, loaded.module]
    tensors = {t.data_ptr(): t.nbytes for module in modules for t in (*module.parameters(), *module.buffers())}
    return {"plain": plain, "realigned": sum(tensors.values()), "ratio": sum(tensors.values()) / plain}


def of_shapes(model: nn.Module, rank: int) -> float:
    """Numbers of a model with a LoRA of that rank on all layers that can have one, in units of the model's."""
    layers: list[Any] = [layer for layer in model.modules() if takes_lora(layer)]
    numbers = sum(min(rank, *layer.weight.flatten(1).shape) * sum(layer.weight.flatten(1).shape) for layer in layers)
    return 1 + numbers / sum(parameter.numel() for parameter in model.parameters())


def memory(folder: Path) -> dict[str, Any]:
    held = {"full anchor": weights_held(digits.anchor_path(BETA))}
    for rank in RANKS:
        out = folder / f"memory-{rank}"
        bake(digits.load_pipeline(), digits.anchor_path(BETA), 1.0, out, lora=AsLora(rank=rank), images=0)
        held[f"LoRA of rank {rank}"] = weights_held(out)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    return {"digits": held, "SDXL's shapes, by rank": {f"{rank}": of_shapes(unet, rank) for rank in SHARED_RANKS}}


def parts(training: bool) -> Iterator[tuple[str, Any]]:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ranks = [
            row(made(folder / f"{dialect}-{rank}", AsLora(rank=rank, dialect=dialect)), rank=rank, dialect=dialect)
            for dialect in ("kohya", "diffusers")
            for rank in RANKS
        ]
        yield "ranks", ranks
        yield f"error {LIMIT:g}", row(made(folder / "limit", AsLora(error=LIMIT, dialect="kohya")), dialect="kohya")
        yield "memory", memory(folder)
        if not training:
            return
        trained = made(folder / "trained", AsLora(rank=32), method="distill", distillation=TRAINING)
        yield "trained", row(trained, rank=32, dialect="diffusers", distillation=asdict(TRAINING))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options.add_argument("--train", action="store_true", help="also train a LoRA from there: minutes more")
    options.add_argument("--memory", action="store_true", help="measure only the memory")
    chosen = options.parse_args()
    with reproducible(1), TemporaryDirectory() as folder:
        keep_parts([("memory", memory(Path(folder)))] if chosen.memory else parts(chosen.train), chosen.json)


if __name__ == "__main__":
    main()
