"""A Stable Diffusion or SDXL pipeline as training sees it, and the model that is trained beside its reference."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from deradiff.alignment.data_order import passes
from deradiff.alignment.lora_targets import LORA_TARGETS
from deradiff.anchors.checks import denoiser_of, prediction_type
from deradiff.sampling.pictures import upcast
from deradiff.sampling.truncation import watched

Conditions = dict[str, Tensor]
"""What a denoiser is told besides latents and time, a row per sample: `prompt_embeds`, and for SDXL
`pooled_prompt_embeds` and `time_ids` (original height and width, top and left of the crop, target height and width)."""


class Base:
    """The parts of `pipe` around its denoiser, as functions on batches.

    Raises `ValueError` for a pipeline that is not trained by noising latents with Gaussian noise and predicting ε or v:
    flow matching has other objectives.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        name, denoiser = denoiser_of(pipe)
        if name != "unet":
            raise ValueError(
                f"{type(pipe).__name__} denoises with a transformer; what is trained here is the UNet of Stable "
                "Diffusion and SDXL"
            )
        self.pipe: Any = pipe
        self.denoiser: Any = denoiser
        self.is_xl = isinstance(pipe, StableDiffusionXLPipeline)
        self.prediction = prediction_type(type(pipe.scheduler).__name__, pipe.scheduler.config)
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"a model that predicts {self.prediction!r} cannot be aligned here: ε or v is needed")
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    @property
    def timesteps(self) -> int:
        """How many steps the noise schedule has."""
        return int(self.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """What the denoiser is told of `prompts`, without the size of the picture (see `with_sizes`).

        Warns of prompts that are cut (`truncation.PromptCut`).
        """
        with watched(self.pipe):
            embedded = self.pipe.encode_prompt(
                list(prompts),
                device=self.pipe._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        conditions = {"prompt_embeds": embedded[0]}
        return conditions | ({"pooled_prompt_embeds": embedded[2]} if self.is_xl else {})

    def with_sizes(self, conditions: Conditions, sizes: Int[Tensor, "batch 6"] | None = None) -> Conditions:
        """`conditions` with SDXL's `time_ids`; by default a picture of the model's own size, uncropped."""
        if not self.is_xl or "time_ids" in conditions:
            return conditions
        prompts = conditions["prompt_embeds"]
        if sizes is None:
            side = self.denoiser.config.sample_size * self.pipe.vae_scale_factor
            sizes = torch.tensor([[side, side, 0, 0, side, side]]).expand(len(prompts), 6)
        return conditions | {"time_ids": sizes.to(prompts)}

    @torch.no_grad()
    def encode_images(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channel h w"]:
        """Latents of pictures in [-1, 1], as the denoiser sees them: the mean of the encoder's distribution."""
        with upcast(self.pipe.vae) as vae:
            latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        return latents * vae.config.scaling_factor

    def noise_of(
        self, generators: Sequence[torch.Generator], shape: Sequence[int], dropout: float | int
    ) -> tuple[Float[Tensor, "batch *latent"], Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """Noise of `shape`, a timestep, and whether a prompt is dropped, each row by its generator, in this order."""
        noise = torch.stack([torch.randn(*shape, generator=g) for g in generators])
        timesteps = torch.cat([torch.randint(self.timesteps, (1,), generator=g) for g in generators])
        return noise, timesteps, torch.cat([torch.rand(1, generator=g) for g in generators]) < dropout

    def noised(
        self,
        latents: Float[Tensor, "batch *latent"],
        noise: Float[Tensor, "batch *latent"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch *latent"]:
        """The latents at `timesteps` of the noise schedule."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(
        self,
        latents: Float[Tensor, "batch *latent"],
        noise: Float[Tensor, "batch *latent"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch *latent"]:
        """What a perfect model would predict: ε, or v (Salimans and Ho 2022)."""
        if self.prediction == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Float[Tensor, "batch *latent"],
        timesteps: Shaped[Tensor, " batch"],
        conditions: Conditions,
    ) -> Float[Tensor, "batch *latent"]:
        """The prediction of `denoiser`: this base's own, or another with its architecture."""
        more: dict[str, Any] = {}
        if self.is_xl:
            sized = self.with_sizes(conditions)
            more["added_cond_kwargs"] = {"text_embeds": sized["pooled_prompt_embeds"], "time_ids": sized["time_ids"]}
        return denoiser(noisy, timesteps, encoder_hidden_states=conditions["prompt_embeds"], **more).sample


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
    one copy is held. Without, a copy with all its weights: the base's denoiser stays the reference.
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
