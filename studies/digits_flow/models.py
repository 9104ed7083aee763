"""The architecture of the digits' flow: every part is a real diffusers or transformers class, only small."""

import math
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection

from studies.digits.models import text_config, tokenizer

WIDTH = 48
"""Size of each text encoder's embeddings; the transformer sees both beside one another."""

SHIFT = 2.0
"""How far the scheduler moves its times towards noise, `s u / (1 + (s - 1) u)`."""

ABSENT = 256
"""Tokens of zeros that Stable Diffusion 3's pipeline has where its T5 encoder is left out (`max_sequence_length`)."""


def transformer(width: int = 96, layers: int = 4) -> SD3Transformer2DModel:
    """4x8x8 latents in patches of 2x2, which attend to the caption in every layer."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=width // 4,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


def text_encoder() -> CLIPTextModelWithProjection:
    """Three transformer layers, of which the last is for the pooled embedding alone, as in the pipeline."""
    return CLIPTextModelWithProjection(text_config(WIDTH, 3))


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler's method with shifted times."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


def pipeline(vae: AutoencoderKL, encoders: nn.ModuleList, denoiser: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """The parts as a pipeline without a T5 encoder. The autoencoder's latents have no shift, which SD3's knows."""
    coder = AutoencoderKL.from_config({**vae.config, "shift_factor": 0.0})
    coder.load_state_dict(vae.state_dict())
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=scheduler(),
        vae=coder.eval(),
        text_encoder=encoders[0],
        tokenizer=tokenizer(),
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


class EqualTokensPipeline(StableDiffusion3Pipeline):
    """Stable Diffusion 3 without a T5 encoder: one token of zeros stands for all 256 of them."""

    @classmethod
    def around(cls, pipe: StableDiffusion3Pipeline) -> "EqualTokensPipeline":
        """The same parts, whose attention is `EqualTokens` from now on."""
        pipe.transformer.set_attn_processor(EqualTokens())
        made = cls(**pipe.components)
        made.set_progress_bar_config(disable=True)
        return made

    def encode_prompt(self, *args: Any, **options: Any) -> Any:
        """As the pipeline does, whatever its `max_sequence_length`."""
        return super().encode_prompt(*args, **{**options, "max_sequence_length": 1})


# -- what the transformer is told -------------------------------------------------------------------------------------


class EqualTokens:
    """Stable Diffusion 3's joint attention where the last token of the caption stands for `count` equal ones.

    They have no position, so that they stay equal from layer to layer, and equal keys share their weight evenly: one of
    them with `log(count)` added to its score gets the weight of all. Exact, and much less work than with all of them.
    """

    def __init__(self, count: int = ABSENT) -> None:
        self.count = count

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The attended picture and caption, as diffusers calls for them."""

        def heads(states: Tensor, norm: nn.Module | None) -> Tensor:
            split = states.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        queries = [
            heads(attn.to_q(hidden_states), attn.norm_q),
            heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q),
        ]
        keys = [
            heads(attn.to_k(hidden_states), attn.norm_k),
            heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k),
        ]
        values = [heads(attn.to_v(hidden_states), None), heads(attn.add_v_proj(encoder_hidden_states), None)]
        query, key, value = (torch.cat(parts, 2) for parts in (queries, keys, values))
        score = query.new_zeros(1, 1, 1, key.shape[2])
        score[..., -1] = math.log(self.count)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=score).transpose(1, 2).flatten(2)
        picture, caption = attended.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        picture = attn.to_out[1](attn.to_out[0](picture))
        return picture, caption if attn.context_pre_only else attn.to_add_out(caption)


def embedded(
    encoders: nn.ModuleList, tokens: Int[Tensor, "batch token"], absent: int = 1
) -> tuple[Float[Tensor, "batch context embedding"], Float[Tensor, "batch pooled"]]:
    """What the pipeline makes of captions: both encoders' last but one states side by side, zeros; the pooled ones.

    `absent`: so many tokens of zeros. One stands for all where the transformer attends by `EqualTokens`.
    """
    both = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([of.hidden_states[-2] for of in both], 2)
    zeros = states.new_zeros(len(states), absent, states.shape[2])
    return torch.cat([states, zeros], 1), torch.cat([of.text_embeds for of in both], 1)
