"""Realignment of networks of real shapes with random weights, beside plain sampling: a part of benchmarks/price.py."""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from peft import LoraConfig
from realignment import LORA_RANK, SD15_UNET, weights_in_memory

import deradiff
from deradiff.sampling.full_steps import errors as errors_of
from deradiff.sampling.reuse import Reuse

SDXL_UNET: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_TRANSFORMER: Mapping[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "in_channels": 16,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
TOKENS: Mapping[str, int] = {"SD 1.5": 77, "SDXL": 77, "SD3": 333}


def network(shape: str, size: int, device: str, dtype: torch.dtype) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    """A denoiser of that shape with random weights, and what it is told about a batch besides latents and time."""
    torch.manual_seed(0)
    with torch.device(device):
        if shape == "SD3":
            model: Any = SD3Transformer2DModel(**{**SD3_TRANSFORMER, "sample_size": size})
        else:
            model = UNet2DConditionModel(**{**(SDXL_UNET if shape == "SDXL" else SD15_UNET), "sample_size": size})
    model = model.to(dtype).eval().requires_grad_(False)
    width = model.config.joint_attention_dim if shape == "SD3" else model.config.cross_attention_dim

    def told(batch: int) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(1)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(batch, *sizes, generator=generator, device=device, dtype=dtype)

        found: dict[str, Any] = {"encoder_hidden_states": random(TOKENS[shape], width)}
        if shape == "SDXL":
            found["added_cond_kwargs"] = {"text_embeds": random(1280), "time_ids": random(6)}
        if shape == "SD3":
            found["pooled_projections"] = random(2048)
        return found

    return model, told


class Loop:
    """The sampling loop of a pipeline around one denoiser, for a dial to hold on to: a scheduler and nothing else."""

    def __init__(self, model: Any, told: Callable[[int], dict[str, Any]], steps: int) -> None:
        self.model, self.told, self.steps = model, told, steps
        flow = isinstance(model, SD3Transformer2DModel)
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else EulerAncestralDiscreteScheduler()
        self.components = {"transformer" if flow else "unet": model, "scheduler": self.scheduler}

    def __getattr__(self, name: str) -> Any:
        if name in ("unet", "transformer") and name in self.components:
            return self.components[name]
        raise AttributeError(name)

    @torch.no_grad()
    def __call__(self, batch: int) -> torch.Tensor:
        model, told = self.model, self.told(batch)
        generator = torch.Generator(model.device).manual_seed(0)
        shape = batch, model.config.in_channels, model.config.sample_size, model.config.sample_size
        x = torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)
        self.scheduler.set_timesteps(self.steps, device=model.device)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for t in self.scheduler.timesteps:
            flow = "transformer" in self.components
            scaled = x if flow else self.scheduler.scale_model_input(x, t)
            out = model(hidden_states=scaled, timestep=t.expand(batch), **told) if flow else model(scaled, t, **told)
            x = self.scheduler.step(out[0], t, x, generator=generator).prev_sample
        if x.is_cuda:
            torch.cuda.synchronize()
        return x


def perturbed(model: Any) -> Any:
    """Another model of the same shape, near enough that the difference is a tenth of the prediction."""
    other = type(model).from_config(model.config).to(model.device, model.dtype).eval().requires_grad_(False)
    for own, theirs in zip(other.parameters(), model.parameters(), strict=True):
        own.copy_(theirs + 0.02 * theirs.std() * torch.randn_like(theirs) if theirs.numel() > 1 else theirs)
    return other


def shaped(
    shape: str, size: int, steps: int, batch: int, rounds: int, device: str, compiled: str | None
) -> dict[str, Any]:
    """Ratios of each mode to plain sampling for a network of a real shape, memory and errors among them."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, told = network(shape, size, device, dtype)
    other = perturbed(model)
    loop = Loop(model, told, steps)
    if compiled:
        model.compile(mode=compiled)
        other.compile(mode=compiled)
    memory = {"plain": weights_in_memory(model)}
    modes: dict[str, Reuse | None] = {"exact": None, "tolerance 0.05": Reuse(tolerance=0.05)}
    seconds: dict[str, list[float]] = {}
    latents: dict[str, torch.Tensor] = {}

    def timed(mode: str) -> None:
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        latents[mode] = loop(batch)
        seconds.setdefault(mode, []).append(time.perf_counter() - start)
        if device != "cpu":
            memory[f"peak, {mode}"] = torch.cuda.max_memory_allocated()

    def plainly() -> None:
        start = time.perf_counter()
        _two(loop, other, batch)
        seconds.setdefault("two forwards, plainly", []).append(time.perf_counter() - start)

    loop(batch)
    evaluations = {}
    for _ in range(rounds):
        timed("plain")
        plainly()
        with deradiff.realign(loop, other, 0.5) as dial:
            memory["full weights"] = weights_in_memory(model, other)
            for mode, dial.reuse in modes.items():
                timed(mode)
                evaluations[mode] = dial.reused.evaluations / dial.reused.predictions if dial.reused else 2.0
    del other
    gc.collect()
    model.add_adapter(
        LoraConfig(r=LORA_RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    held = tempfile.TemporaryDirectory()
    folder = Path(held.name)
    model.save_lora_adapter(folder)
    model.delete_adapters("default")
    for _ in range(rounds):
        timed("plain, for the LoRA")
        for batched in (True, False):
            with deradiff.realign(loop, folder, 0.5, batched=batched) as dial:
                memory["LoRA"] = weights_in_memory(model)
                timed(f"LoRA, exact, {'one pass' if batched else 'two passes'}")
                if batched:
                    dial.reuse = Reuse(tolerance=0.05)
                    timed("LoRA, tolerance 0.05")
    held.cleanup()
    found: dict[str, Any] = {"shape": shape, "latents": size, "steps": steps, "batch": batch, "compiled": compiled}
    found["ratios"] = {
        mode: statistics.median(many) / statistics.median(seconds["plain, for the LoRA" if "LoRA" in mode else "plain"])
        for mode, many in seconds.items()
    }
    found["seconds"] = {mode: statistics.median(many) for mode, many in seconds.items()}
    found["evaluations"] = evaluations
    found["errors"] = errors_of(latents["tolerance 0.05"], latents["exact"], latents["plain"])._asdict()
    found["memory"] = {name: amount / memory["plain"] for name, amount in memory.items()}
    print(json.dumps(found, indent=1), flush=True)
    return found


@torch.no_grad()
def _two(loop: Loop, other: Any, batch: int) -> None:
    """Both models one after the other at every step, without a dial."""
    model, told = loop.model, loop.told(batch)
    shape = batch, model.config.in_channels, model.config.sample_size, model.config.sample_size
    generator = torch.Generator(model.device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)
    loop.scheduler.set_timesteps(loop.steps, device=model.device)
    for t in loop.scheduler.timesteps:
        flow = "transformer" in loop.components
        scaled = x if flow else loop.scheduler.scale_model_input(x, t)
        inputs: dict[str, Any] = (
            {"hidden_states": scaled, "timestep": t.expand(batch)} if flow else {"sample": scaled, "timestep": t}
        )
        mixed = (model(**inputs, **told)[0] + other(**inputs, **told)[0]) / 2
        x = loop.scheduler.step(mixed, t, x, generator=generator).prev_sample
    if x.is_cuda:
        torch.cuda.synchronize()


NARROW: Mapping[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "sample_size": 8,
}


def bookkeeping(rounds: int, steps: int = 20) -> dict[str, Any]:
    """Processor time that a dial takes at every step itself: with all the layers of SD 1.5's UNet, but narrow ones.

    In milliseconds, and as a share of two evaluations of the network at its own width for 64 x 64 pixels, the least
    that one is used for.
    """
    torch.manual_seed(0)
    model = UNet2DConditionModel(**{**SD15_UNET, **NARROW}).eval().requires_grad_(False)
    condition = torch.randn(1, 8, NARROW["cross_attention_dim"])
    other, loop = perturbed(model), Loop(model, lambda _: {"encoder_hidden_states": condition}, steps)

    def per_step(run: Callable[[], Any]) -> float:
        start = time.process_time()
        run()
        return (time.process_time() - start) / steps * 1000

    two, exact = [], []
    for _ in range(rounds + 1):
        two.append(per_step(lambda: _two(loop, other, 1)))
        with deradiff.realign(loop, other, 0.5):
            exact.append(per_step(lambda: loop(1)))
    added = [after - before for before, after in zip(two[1:], exact[1:], strict=True)]  # the first runs warm up
    whole, told = network("SD 1.5", 8, "cpu", torch.float32)
    evaluations = [per_step(lambda: _two(Loop(whole, told, steps=2), whole, 1)) * steps / 2 for _ in range(3)][1:]
    found = {
        "modules": sum(1 for _ in model.modules()),
        "milliseconds a step": statistics.median(added),
        "quartiles": statistics.quantiles(added)[::2],
        "two evaluations": min(evaluations),
        "share": statistics.median(added) / min(evaluations),
    }
    print(json.dumps(found, indent=1), flush=True)
    return found


def accelerator(rounds: int) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here")
    found = []
    for shape, size in (("SD 1.5", 64), ("SDXL", 128), ("SD3", 128)):
        for batch in (1, 8):
            for compiled in (None, "default", "reduce-overhead"):  # the last captures graphs
                found.append(shaped(shape, size, 50, batch, rounds, "cuda", compiled))
                torch.compiler.reset()
                gc.collect()
                torch.cuda.empty_cache()
    return [{"device": torch.cuda.get_device_name()} | one for one in found]
