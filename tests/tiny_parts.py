"""The parts of tiny random pipelines, of their real classes: text encoders, UNets, VAEs, adapters."""

import copy
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

CHANNELS = (8, 16)
TEXT_WIDTH = 16
SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that depend on nothing but shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perturbed(module: nn.Module, seed: int, scale: float = 0.05) -> nn.Module:
    """A copy of `module` with every weight moved by `scale` times normal noise, but for a loaded IP-Adapter's."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "_ip." not in name and "encoder_hid_proj" not in name:
                weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return other.eval()


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows single letters only."""
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=20)


def text_encoder(projected: bool = False) -> nn.Module:
    """A one-layer CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        projection_dim=TEXT_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def image_encoder() -> CLIPVisionModelWithProjection:
    """A one-layer CLIP image encoder for 16x16 images."""
    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def vae() -> AutoencoderKL:
    """A VAE from 16x16 images to 4x8x8 latents."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
        shift_factor=0.1,
        force_upcast=False,
    ).eval()


def unet(in_channels: int = 4, out_channels: int = 4, xl: bool = False) -> UNet2DConditionModel:
    """A two-level conditional UNet like SD1.5's; with `xl`, SDXL's block order and its added conditions."""
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + TEXT_WIDTH,
    }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[:: 1 if xl else -1],
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[:: 1 if xl else -1],
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=2 * TEXT_WIDTH if xl else TEXT_WIDTH,
        **(added if xl else {}),
    ).eval()


def controlnet(of: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet for `of` whose zero convolutions are not zero, so that it matters."""
    net = ControlNetModel.from_unet(of, conditioning_embedding_out_channels=(4, 8))
    return perturbed(net, seed=3)


def ip_adapter_weights(of: UNet2DConditionModel) -> dict[str, dict[str, Tensor]]:
    """A random IP-Adapter (4 image tokens) for `of`, in the layout of the published files."""
    attention: dict[str, Tensor] = {}
    key = 1
    for name in of.attn_processors:
        if name.endswith("attn2.processor"):
            width = of.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for matrix in ("to_k_ip", "to_v_ip"):
                attention[f"{key}.{matrix}.weight"] = 0.3 * noise(width, TEXT_WIDTH, seed=len(attention))
            key += 2
    projection = {
        "proj.weight": 0.3 * noise(4 * TEXT_WIDTH, 8, seed=30),
        "proj.bias": 0.3 * noise(4 * TEXT_WIDTH, seed=31),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": attention}


def load_ip_adapter(pipe: StableDiffusionPipeline) -> None:
    """Load the random IP-Adapter through diffusers' own public loader."""
    pipe.load_ip_adapter(ip_adapter_weights(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)


def sd_components(in_channels: int = 4, out_channels: int = 4) -> dict[str, Any]:
    """What a Stable Diffusion 1.5 pipeline is made of."""
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(in_channels, out_channels),
        "scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **SD_BETAS),
        "safety_checker": None,
        "feature_extractor": None,
    }


def sdxl_components(in_channels: int = 4) -> dict[str, Any]:
    """What an SDXL pipeline is made of."""
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(projected=True),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": unet(in_channels, xl=True),
        "scheduler": EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SD_BETAS),
    }


def safety_checker(blacks_out: bool) -> StableDiffusionSafetyChecker:
    """A tiny safety checker of Stable Diffusion's own class that blacks out everything, or nothing."""
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
    }
    config = CLIPConfig(text_config={"hidden_size": 8}, vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2 if blacks_out else 2)  # cosines lie between
        checker.special_care_embeds_weights.fill_(2)
    return checker


def feature_extractor() -> CLIPImageProcessorPil:
    """What prepares images for `safety_checker`."""
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
