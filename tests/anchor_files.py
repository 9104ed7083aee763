"""Tiny anchors in every form they come in, and what a denoiser predicts at one fixed input."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deradiff.anchors import Anchor
from tiny import denoiser, make


def made(kind: str) -> tuple[Any, Any]:
    """A pipeline of that kind, and a denoiser that plays its aligned version."""
    pipe, aligned, _ = make(kind)
    return pipe, aligned


def module_of(anchor: Anchor) -> Any:
    """The denoiser that a full-weight anchor brings."""
    assert anchor.module is not None
    return anchor.module


def saved(module: Any, folder: Path, **options: Any) -> Path:
    """The folder, after `module.save_pretrained` into it."""
    module.save_pretrained(folder, **options)
    return folder


def edited(config: Path, **changes: Any) -> None:
    """Change settings in a JSON file."""
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def predict(pipe: DiffusionPipeline, model: Any = None) -> Tensor:
    """What the pipeline's denoiser, or another `model` of its kind, predicts."""
    model = denoiser(pipe) if model is None else model
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    kind, dtype = type(model).__name__, next(model.parameters()).dtype
    latents, text, pooled = (
        noise(*shape, seed=k).to(dtype) for k, shape in enumerate(((2, 4, 8, 8), (2, 5, 16), (2, 16)))
    )
    if kind == "UNet2DConditionModel":
        latents = latents.repeat(1, 3, 1, 1)[:, : model.config.in_channels]
        added = {"text_embeds": pooled, "time_ids": torch.ones(2, 6, dtype=dtype)}
        text = text.repeat(1, 1, 4)[..., : model.config.cross_attention_dim]
        return model(latents, torch.tensor([3, 500]), text, added_cond_kwargs=added).sample
    if kind == "SD3Transformer2DModel":
        return model(latents, text, pooled, torch.tensor([3.0, 500.0], dtype=dtype)).sample
    if kind == "FluxTransformer2DModel":
        tokens, times = noise(2, 16, 16, seed=4).to(dtype), torch.tensor([0.3, 0.5], dtype=dtype)
        guidance = torch.tensor([3.0, 3.0], dtype=dtype)
        return model(tokens, text, pooled, times, torch.zeros(16, 3), torch.zeros(5, 3), guidance).sample
    sizes = {"resolution": None, "aspect_ratio": None}
    return model(latents, text, torch.tensor([3, 500]), added_cond_kwargs=sizes).sample


def state_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Everything about a denoiser that loading an anchor might disturb."""
    module = denoiser(pipe)
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {
        "modules": [(path, type(layer), layer.training) for path, layer in module.named_modules()],
        "gradients": {path: parameter.requires_grad for path, parameter in module.named_parameters()},
        "memory": {path: parameter.data_ptr() for path, parameter in module.named_parameters()},
        "attributes": set(vars(module)),
        "adapters": list(getattr(module, "peft_config", {})),
        "active": {path: list(layer.active_adapters) for path, layer in layers.items()},
        "scaling": {path: dict(getattr(layer, "scaling", {})) for path, layer in layers.items()},
        "random": torch.get_rng_state().tolist(),
    }


def trained(model: nn.Module, config: PeftConfig, seed: int = 1) -> Any:
    """A copy of `model` in PEFT's wrapper, with an adapter whose weights are random instead of trained."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in wrapped.named_parameters():
        if any(mark in name for mark in ("lora_", "hada_", "lokr_", "oft_")):
            parameter.data = parameter.data.abs() if "magnitude" in name else torch.randn_like(parameter) * 0.2
    return wrapped


def lora(model: nn.Module, targets: tuple[str, ...] = ("to_q", "to_k", "to_out.0", "conv1"), **options: Any) -> Any:
    """A LoRA of rank 4 and alpha 2 on `targets`, as `trained`."""
    return trained(model, LoraConfig(**{"r": 4, "lora_alpha": 2, "target_modules": list(targets), **options}))


def lora_weights(wrapped: Any) -> dict[str, Tensor]:
    """The adapter's tensors under the denoiser's own names: `….to_q.lora_A.weight`."""
    state = get_peft_model_state_dict(wrapped)
    return {key.removeprefix("base_model.model."): tensor.contiguous() for key, tensor in state.items()}


def kohya(
    weights: Mapping[str, Tensor], alpha: Callable[[str], float | None], rename: Mapping[str, str] = {}
) -> dict[str, Tensor]:
    """kohya's form: underscores, down and up, one alpha per layer (none where `alpha` is None for it)."""
    state = {}
    for key, tensor in weights.items():
        layer, _, factor = key.partition(".lora_")
        name = layer
        for ours, theirs in rename.items():
            name = name.replace(ours, theirs) if name.startswith(ours) else name
        name = "lora_unet_" + name.replace(".", "_")
        state[f"{name}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = tensor
        if (value := alpha(layer)) is not None:
            state[f"{name}.alpha"] = torch.tensor(float(value))
    return state


@torch.no_grad()
def merged(model: Any, weights: Mapping[str, Tensor], scale: Callable[[str], float]) -> Any:
    """A copy of `model` with `scale(layer)` times B·A added to each layer's weight."""
    model = copy.deepcopy(model)
    for key in weights:
        layer, _, factor = key.partition(".lora_")
        if factor.startswith("A"):
            down, up = weights[key], weights[f"{layer}.lora_B.weight"]
            change = torch.einsum("or,ri...->oi...", up.flatten(1), down)
            model.get_submodule(layer).weight += scale(layer) * change
    return model


def original_layout(model: Any, prefix: str = "model.diffusion_model.") -> dict[str, Tensor]:
    """A UNet's weights under the names that Stable Diffusion's own code gives them."""
    per_block, blocks = model.config.layers_per_block, len(model.down_blocks)
    names = {
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "conv_in.": "input_blocks.0.0.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    for i in range(blocks):
        first = (per_block + 1) * i
        for j in range(per_block + 1):
            for part, slot in (("resnets", 0), ("attentions", 1)):
                names[f"down_blocks.{i}.{part}.{j}."] = f"input_blocks.{first + j + 1}.{slot}."
                names[f"up_blocks.{i}.{part}.{j}."] = f"output_blocks.{first + j}.{slot}."
        names[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{first + per_block + 1}.0.op."
        slot = 2 if getattr(model.up_blocks[i], "attentions", None) else 1
        names[f"up_blocks.{i}.upsamplers.0.conv."] = f"output_blocks.{first + per_block}.{slot}.conv."
    inside = {
        ".norm1.": ".in_layers.0.",
        ".conv1.": ".in_layers.2.",
        ".norm2.": ".out_layers.0.",
        ".conv2.": ".out_layers.3.",
        ".time_emb_proj.": ".emb_layers.1.",
        ".conv_shortcut.": ".skip_connection.",
    }
    state = {}
    for key, tensor in model.state_dict().items():
        ours = next(name for name in names if key.startswith(name))
        rest = "." + key.removeprefix(ours)
        if ".resnets." in ours:
            for new, old in inside.items():
                rest = rest.replace(new, old)
        state[prefix + names[ours] + rest.removeprefix(".")] = tensor.contiguous()
    return state


def original_sd3_layout(model: Any) -> dict[str, Tensor]:
    """The same for a Stable Diffusion 3 transformer, which fuses queries, keys and values and swaps shift and scale."""
    inside = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    outside = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    own, state = model.state_dict(), {}
    last = len(model.transformer_blocks) - 1
    for kind in ("weight", "bias"):
        for i in range(last + 1):
            ours, theirs = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
            for block, names in {
                "x": ("to_q", "to_k", "to_v"),
                "context": ("add_q_proj", "add_k_proj", "add_v_proj"),
            }.items():
                fused = [own[f"{ours}attn.{name}.{kind}"] for name in names]
                state[f"{theirs}{block}_block.attn.qkv.{kind}"] = torch.cat(fused)
            for name, original in inside.items():
                if f"{ours}{name}.{kind}" in own:
                    state[f"{theirs}{original}.{kind}"] = own[f"{ours}{name}.{kind}"]
        for name, original in outside.items():
            if f"{name}.{kind}" in own:
                state[f"{original}.{kind}"] = own[f"{name}.{kind}"]
        for name in (
            f"joint_blocks.{last}.context_block.adaLN_modulation.1.{kind}",
            f"final_layer.adaLN_modulation.1.{kind}",
        ):
            state[name] = torch.cat(state[name].chunk(2)[::-1])
    state["pos_embed"] = own["pos_embed.pos_embed"]
    return {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in state.items()}
