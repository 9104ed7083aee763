"""What an alignment would do, tried as far as one step: models, data, memory; nothing is written."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deradiff.alignment.base import Base, Policy
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.fitting import (
    base_of,
    prompts_of,
    require_held_out,
    require_pairs,
    reward_of,
    sampling_of,
)
from deradiff.alignment.loop import make_optimizer
from deradiff.alignment.methods import METHODS, fitted
from deradiff.alignment.noising import FlowNoising
from deradiff.alignment.objectives import squared_error
from deradiff.alignment.pairs import open_pairs
from deradiff.alignment.parameters import trainable
from deradiff.alignment.sampling import decode, sample, told
from deradiff.alignment.scoring import scored
from deradiff.alignment.settings import Preset
from deradiff.anchors.checks import denoiser_of

LAYERS = ("num_layers", "num_single_layers", "num_refiner_layers", "n_layers", "n_refiner_layers")
"""Settings of transformers that say how many layers of a kind they have."""

MOMENTS = {"adamw": 8, "adamw8bit": 2, "adafactor": 0}
"""Bytes that an optimizer keeps for each trained weight, about; Adafactor's grow with rows and columns alone."""


def rehearse(settings: Preset, pipe: Any, *, count: int | None = None, seed: int = 0) -> Iterator[str]:
    """Try an alignment of `pipe` with `settings`, and say line by line what was found; see `runs.load_base` for `pipe`.

    One step is that of a model of the same class with one layer of each kind, of the model itself where it has no such
    settings: prediction, loss and gradient at the noised latents of a picture; for methods that draw, one step of the
    sampler, the decoder and the reward as well. Raises whatever the alignment would.
    """
    settings = fitted(settings, pipe)
    method = METHODS[settings.method]
    yield from _data(settings, count, seed)
    with _one_layer(pipe) as cut:
        base = base_of(pipe, settings)
        yield from _model(base, cut)
        method.require(base, settings)
        yield from _step(base, settings, seed)
        if method.batch != "pairs":
            yield _drawn(base, settings, seed)
    yield from _memory(denoiser_of(pipe)[1], settings)


def _data(settings: Preset, count: int | None, seed: int) -> Iterator[str]:
    batch = METHODS[settings.method].batch
    if batch == "pairs":
        require_pairs(settings, count)
        if settings.data == "own":
            yield "data: pairs of the model's own pictures, to be drawn"
            return
        pairs: Any = open_pairs(settings.data, held_out=settings.held_out)
        first = next(iter(pairs.in_order(None)), None)
        if first is None:
            raise ValueError(f"{settings.data} holds no pair")
        size = f"{len(pairs)} rows" if hasattr(pairs, "__len__") else "a stream"
        yield f"data: {size} of pairs in {settings.data}; the first is of {pairs.open(first.row).prompt!r}"
        return
    texts = prompts_of(settings, count, seed)
    # Reward-weighted denoising holds samples out, and trains on some of all prompts.
    held, each = ("samples", settings.options["per_prompt"]) if batch == "samples" else ("prompts", 1)
    require_held_out(settings, each * len(texts), held)
    yield f"data: {len(texts)} prompts; {settings.held_out} {held} are held out; the first prompt is {texts[0]!r}"


@contextmanager
def _one_layer(pipe: Any) -> Iterator[str]:
    """`pipe` with a random denoiser of its class that has one layer of each kind, where such a setting is known."""
    component, module = denoiser_of(pipe)
    denoiser: Any = module
    cut = {name: 1 for name in LAYERS if isinstance(denoiser.config.get(name), int) and denoiser.config[name] > 1}
    if not cut:
        yield "the model itself"
        return
    small: Any = type(denoiser).from_config(dict(denoiser.config) | cut)
    setattr(pipe, component, small.to(denoiser.device, denoiser.dtype).eval())
    try:
        yield f"a {type(denoiser).__name__} with {', '.join(f'{name} = 1' for name in cut)}"
    finally:
        setattr(pipe, component, denoiser)


def _model(base: Base, cut: str) -> Iterator[str]:
    name, noising = type(base.pipe).__name__, base.noising
    what = {"epsilon": "ε", "v_prediction": "v", "flow": "the velocity of a flow"}[noising.prediction]
    times = f", times {noising.density}, shifted by {noising.shift:g}" if isinstance(noising, FlowNoising) else ""
    yield f"model: {name}, whose {base.component} predicts {what}{times}; tried here: {cut}"
    conditions = base.call.encode_prompts(["a picture"])
    shapes = ", ".join(f"{key} {list(rows.shape[1:])}" for key, rows in conditions.items())
    yield f"a picture is {list(base.call.latent_shape(None))} of latents; the denoiser is told {shapes}"


def _step(base: Base, settings: Preset, seed: int) -> Iterator[str]:
    policy = Policy(base, settings.lora_rank, settings.lora_targets, seed)
    try:
        parameters, began = trainable(policy.model), time.perf_counter()
        generators, device = row_generators(seed, range(1)), base.denoiser.device
        side = settings.resolution
        latents = base.encode_images(torch.zeros(1, 3, side, side, device=device)).float()
        noise, times, _ = base.noise_of(generators, latents.shape[1:], 0.0)
        noise, times = noise.to(device), times.to(device)
        conditions = {name: rows.to(device) for name, rows in base.call.encode_prompts(["a picture"]).items()}
        noisy = base.noising.noised(latents, noise, times).to(base.denoiser.dtype)
        prediction = base.call.predict(policy.model, noisy, times, conditions).float()
        loss = squared_error(prediction, base.noising.target(latents, noise, times)).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, settings.plan.max_norm)
        if not bool(loss.isfinite()) or not bool(norm.isfinite()) or not float(norm):
            raise ValueError(f"one step has a loss of {loss.item():g} and a gradient of {float(norm):g}")
        make_optimizer(parameters, settings.plan).step()
        trained = sum(parameter.numel() for parameter in parameters)
        yield (
            f"one step: loss {loss.item():.4g}, gradient {float(norm):.4g}, {trained:,} weights trained, "
            f"{time.perf_counter() - began:.1f} s"
        )
    finally:
        if policy.is_lora:
            base.denoiser.delete_adapters(base.denoiser.active_adapters())


@torch.no_grad()
def _drawn(base: Base, settings: Preset, seed: int) -> str:
    reward, sampling = reward_of(settings, base.pipe.device), sampling_of(settings)
    noise = sampling.noise(base, row_generators(seed, range(1)))
    prompted, unprompted = told(base, ["a picture"], sampling)
    step = sample(base, base.denoiser, prompted, unprompted, noise, sampling, keep=0, until=1)
    picture = decode(base, step.latents)
    score = scored(reward, picture, ["a picture"]).item()
    return f"one step of {sampling.scheduler}, decoded to {list(picture.shape[1:])}: {reward.name} says {score:.4g}"


def _memory(denoiser: Any, settings: Preset) -> Iterator[str]:
    """Of the whole model on one device, without activations, which depend on the batch."""
    whole = sum(parameter.numel() for parameter in denoiser.parameters())
    trained, frozen = whole, whole * 4
    if settings.lora_rank:
        targets = [
            module
            for name, module in denoiser.named_modules()
            if name.endswith(tuple(settings.lora_targets)) and hasattr(module, "weight")
        ]
        trained = sum(settings.lora_rank * sum(module.weight.flatten(1).shape) for module in targets)
        frozen = whole * (2 if settings.precision in ("fp16", "bf16") else 4)
    kept = 4 + 4 + MOMENTS[settings.plan.optimizer] + (4 if settings.plan.average else 0)
    kept += 4 if settings.plan.patience else 0
    # An older policy that draws, and the trained one that waits meanwhile.
    kept += 8 if "memory" in settings.options or settings.options.get("updates", 1) > 1 else 0
    total = (trained * kept + frozen) / 1e9
    yield (
        f"memory: {whole:,} weights, {trained:,} trained; {trained * kept / 1e9:.3g} GB for weights, gradients and "
        f"{settings.plan.optimizer}, {frozen / 1e9:.3g} GB for the frozen model: {total:.3g} GB and the activations"
    )
