"""How each family of pipelines is called in training: Stable Diffusion and SDXL by name, all others as captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deradiff.alignment.call_roles import CannotCapture, Conditions
from deradiff.alignment.captured_call import CapturedCall
from deradiff.alignment.pixels import Packing, ScaledLatents
from deradiff.anchors.checks import denoiser_of, denoisers_of, unwrapped
from deradiff.sampling.truncation import watched


@runtime_checkable
class DenoiserCall(Protocol):
    """The parts of a pipeline around its denoiser, as functions on batches."""

    guidance_is_embedded: bool
    """Whether the denoiser is told the guidance scale, and no second prediction is needed."""
    mu: float | None
    """What the pipeline shifts the times of its scheduler by, where that depends on the resolution."""

    def encode_prompts(self, prompts: Sequence[str], guidance_scale: float | None = None) -> Conditions:
        """What the denoiser is told of `prompts`, but for the sizes of pictures (see `with_sizes`)."""
        ...

    def unprompted(self, count: int) -> Conditions:
        """What it is told without a prompt, `count` times."""
        ...

    def with_sizes(self, conditions: Conditions, sizes: Tensor | None = None) -> Conditions:
        """`conditions` with what it is told of sizes and crops, by default the model's own size, uncropped."""
        ...

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Float[Tensor, "batch *latent"],
        timesteps: Shaped[Tensor, " batch"],
        conditions: Conditions,
    ) -> Float[Tensor, "batch *latent"]:
        """The prediction of `denoiser`: the pipeline's own, or another with its architecture."""
        ...

    def latent_shape(self, resolution: int | None) -> tuple[int, ...]:
        """The shape of one picture's latents."""
        ...

    def prepared(self, scheduler: Any, steps: int) -> Any:
        """A scheduler with its timesteps set as the pipeline sets them."""
        ...

    def packing(self) -> Packing:
        """Between latents and what the VAE works on."""
        ...


class StableDiffusionCall:
    """The call of Stable Diffusion and SDXL.

    It is not captured: SDXL's denoiser is told size and crop of every picture, which its pipeline takes once for a
    batch.
    """

    guidance_is_embedded: bool = False
    mu: float | None = None

    def __init__(self, pipe: DiffusionPipeline, denoiser: Any) -> None:
        self.pipe: Any = pipe
        self._denoiser = denoiser
        self._is_xl = isinstance(pipe, StableDiffusionXLPipeline)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], guidance_scale: float | None = None) -> Conditions:
        """`prompt_embeds`, and for SDXL `pooled_prompt_embeds`. Warns of prompts that are cut."""
        with watched(self.pipe):
            embedded = self.pipe.encode_prompt(
                list(prompts),
                device=self.pipe._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        return self._named(embedded[0], embedded[2] if self._is_xl else None)

    @torch.no_grad()
    def unprompted(self, count: int) -> Conditions:
        """The pipeline's own choice, zeros for SDXL."""
        embedded = self.pipe.encode_prompt(
            [""] * count, device=self.pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return self._named(embedded[1], embedded[3] if self._is_xl else None)

    def _named(self, embeds: Tensor, pooled: Tensor | None) -> Conditions:
        return {"prompt_embeds": embeds} | ({} if pooled is None else {"pooled_prompt_embeds": pooled})

    def with_sizes(self, conditions: Conditions, sizes: Tensor | None = None) -> Conditions:
        """With SDXL's `time_ids`: original height and width, top and left of the crop, target height and width."""
        if not self._is_xl or "time_ids" in conditions:
            return conditions
        prompts = conditions["prompt_embeds"]
        if sizes is None:
            side = self._denoiser.config.sample_size * self.pipe.vae_scale_factor
            sizes = torch.tensor([[side, side, 0, 0, side, side]]).expand(len(prompts), 6)
        return conditions | {"time_ids": sizes.to(prompts)}

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Float[Tensor, "batch *latent"],
        timesteps: Shaped[Tensor, " batch"],
        conditions: Conditions,
    ) -> Float[Tensor, "batch *latent"]:
        """See `DenoiserCall`."""
        more: dict[str, Any] = {}
        if self._is_xl:
            sized = self.with_sizes(conditions)
            more["added_cond_kwargs"] = {"text_embeds": sized["pooled_prompt_embeds"], "time_ids": sized["time_ids"]}
        return denoiser(noisy, timesteps, encoder_hidden_states=conditions["prompt_embeds"], **more).sample

    def latent_shape(self, resolution: int | None) -> tuple[int, ...]:
        """Channels and two equal sides."""
        config = self._denoiser.config
        side = resolution // self.pipe.vae_scale_factor if resolution else config.sample_size
        return config.in_channels, side, side

    def prepared(self, scheduler: Any, steps: int) -> Any:
        """`scheduler` itself, with its timesteps set."""
        scheduler.set_timesteps(steps, device=self._denoiser.device)
        return scheduler

    def packing(self) -> Packing:
        """One factor for all."""
        return ScaledLatents(self.pipe.vae.config.scaling_factor)


def call_of(pipe: DiffusionPipeline, resolution: int | None = None) -> DenoiserCall:
    """How `pipe` calls its denoiser, for pictures of `resolution` pixels a side (by default its own size).

    Raises `CannotCapture` for a pipeline with several denoisers, and for those that `CapturedCall` refuses.
    """
    if len(several := denoisers_of(pipe)) > 1:
        raise CannotCapture(pipe, f"it has several denoisers, {' and '.join(several)}, and what is trained here is one")
    if is_stable_diffusion(pipe):
        return StableDiffusionCall(pipe, denoiser_of(pipe)[1])
    return CapturedCall(pipe, resolution)


def is_stable_diffusion(pipe: DiffusionPipeline) -> bool:
    """Whether it has the UNet of Stable Diffusion and SDXL, and no other denoiser."""
    return [isinstance(unwrapped(module), UNet2DConditionModel) for module in denoisers_of(pipe).values()] == [True]
