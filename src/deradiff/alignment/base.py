"""A pipeline as training sees it, and the model that is trained beside its reference."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from deradiff.alignment.call_roles import Conditions
from deradiff.alignment.data_order import passes
from deradiff.alignment.lora_targets import LORA_TARGETS
from deradiff.alignment.noising import Density, noising_of
from deradiff.alignment.pipeline_calls import call_of, is_stable_diffusion
from deradiff.alignment.pixels import Packing, encoded
from deradiff.anchors.checks import denoisers_of
from deradiff.sampling.pictures import upcast

__all__ = ["Base", "Conditions", "EncodedPrompts", "Policy", "with_dropped"]


class Base:
    """The parts of `pipe` around its denoiser, as functions on batches.

    `call` is how the denoiser is told things and what it predicts, `noising` how it is trained to. `resolution` is the
    side of the pictures in pixels, by default the pipeline's own, and `density` spreads the times of a flow
    (`noising.Density`).

    Raises `ValueError` for a pipeline whose call cannot be captured (`call_roles.CannotCapture`), and for a model that
    predicts neither ε, nor v, nor the velocity of a flow.
    """

    def __init__(self, pipe: DiffusionPipeline, resolution: int | None = None, density: Density | None = None) -> None:
        self.call = call_of(pipe, resolution)
        self.noising = noising_of(pipe.scheduler, density, self.call.mu)
        self.pipe: Any = pipe
        self.component, denoiser = next(iter(denoisers_of(pipe).items()))
        self.denoiser: Any = denoiser

    @property
    def is_flow(self) -> bool:
        """Whether it predicts the velocity of a flow."""
        return self.noising.prediction == "flow"

    @cached_property
    def packing(self) -> Packing:
        """Between latents and what the VAE works on."""
        return self.call.packing()

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch *latent"]:
        """Latents of pictures in [-1, 1], as the scheduler steps them: the mean of the encoder's distribution."""
        with upcast(self.pipe.vae) as vae:
            return self.packing.packed(encoded(vae, images))

    def noise_of(
        self, generators: Sequence[torch.Generator], shape: Sequence[int], dropout: float | int
    ) -> tuple[Float[Tensor, "batch *latent"], Shaped[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Noise of `shape`, a time, and whether a prompt is dropped, each row by its generator, in this order."""
        noise = torch.stack([torch.randn(*shape, generator=g) for g in generators])
        timesteps = torch.cat([self.noising.drawn(g) for g in generators])
        return noise, timesteps, torch.cat([torch.rand(1, generator=g) for g in generators]) < dropout


def stable_diffusion(pipe: DiffusionPipeline, what: str) -> Base:
    """The base of Stable Diffusion or SDXL. Raises `ValueError` for others, which `what` is not for."""
    if not is_stable_diffusion(pipe):
        raise ValueError(
            f"{type(pipe).__name__} denoises with a transformer or a network of its own; {what} is for Stable "
            "Diffusion and SDXL"
        )
    return Base(pipe)


def with_dropped(conditions: Conditions, dropped: Bool[Tensor, " batch"], empty: Conditions) -> Conditions:
    """`conditions` with `empty`, what is told without a prompt, in the rows that are dropped."""
    return {
        name: torch.where(dropped.view(-1, *[1] * (rows.ndim - 1)), empty[name], rows)
        for name, rows in conditions.items()
    }


@dataclass(frozen=True)
class EncodedPrompts:
    """What the denoiser is told of each of some prompts, and without one, on the CPU."""

    prompts: Conditions
    nothing: Conditions

    @classmethod
    def of(
        cls,
        encode: Callable[[Sequence[str]], Conditions],
        prompts: Sequence[str],
        nothing: Callable[[], Conditions],
        per_pass: int,
    ) -> "EncodedPrompts":
        """`prompts` encoded, `per_pass` at a time."""
        parts = [encode(prompts[rows.start : rows.stop]) for rows in passes(len(prompts), per_pass)]
        together = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
        # Last: what a tokenizer was last called with is saved with it.
        return cls(together, {name: rows.cpu() for name, rows in nothing().items()})

    def rows(self, numbers: Int[Tensor, " batch"], dropped: Bool[Tensor, " batch"], device: torch.device) -> Conditions:
        """Of these prompts, some of them dropped."""
        chosen = with_dropped({name: rows[numbers] for name, rows in self.prompts.items()}, dropped, self.nothing)
        return {name: rows.to(device) for name, rows in chosen.items()}


class Policy:
    """The model that is trained, and its reference.

    With `lora_rank`, a LoRA on the base's own denoiser: the reference is the same weights with the adapter off, so that
    one copy is held. Without, a copy with all its weights: the base's denoiser stays the reference. Raises `ValueError`
    for a rank below 1, and for a denoiser that takes no LoRA.
    """

    def __init__(
        self, base: Base, lora_rank: int | None = None, targets: Sequence[str] = LORA_TARGETS, seed: int = 0
    ) -> None:
        base.denoiser.requires_grad_(False)
        self.is_lora = lora_rank is not None
        if lora_rank is None:
            self.model: Any = copy.deepcopy(base.denoiser).float().requires_grad_(True)
            self._reference = base.denoiser
            return
        from peft import LoraConfig

        if lora_rank < 1:
            raise ValueError(f"a LoRA of rank {lora_rank} has no weights: take 1 or more")
        if not hasattr(base.denoiser, "add_adapter"):
            raise ValueError(
                f"{type(base.denoiser).__name__} takes no LoRA in this version of diffusers: train all of its weights, "
                "without --lora-rank"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = base.denoiser
            self.model.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=list(targets)))
        cast_training_params(self.model, torch.float32)

    @contextmanager
    def reference(self, prepared: nn.Module) -> Iterator[nn.Module]:
        """The reference, without gradients. `prepared` is the model as Accelerate prepared it."""
        with torch.no_grad():
            if not self.is_lora:
                yield self._reference
                return
            from peft.tuners.tuners_utils import BaseTunerLayer

            # Not those of `self.model`, which has no weights while they are divided between processes.
            layers: list[Any] = [module for module in prepared.modules() if isinstance(module, BaseTunerLayer)]
            for layer in layers:
                # `disable_adapters()` also freezes them, and walks the model twice a step.
                layer._disable_adapters = True
            try:
                yield prepared
            finally:
                for layer in layers:
                    layer._disable_adapters = False
