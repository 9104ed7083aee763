"""LoRAs that are trained to predict what the mixture predicts, from where the decomposition of weights leaves them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn

from deradiff.alignment.base import Base
from deradiff.alignment.training import TrainingRun
from deradiff.anchors import Anchor, load_anchor
from deradiff.anchors.checks import base_tensors
from deradiff.anchors.full_weights import empty_copy
from deradiff.baking.dialects import config_of, write_lora
from deradiff.baking.distillation import ADAPTER, Distillation, Teacher, accelerator_of, distil
from deradiff.baking.drawing import Sampler
from deradiff.baking.extraction import AsLora, extracted, ranks_in
from deradiff.baking.low_rank import Factors
from deradiff.baking.methods import BakingJob, identity_of, taught_on
from deradiff.sampling.denoisers import Denoisers


def as_lora(
    job: BakingJob,
    folder: Path,
    work: Path,
    lora: AsLora,
    settings: Distillation | None,
    prompts: Sequence[str],
    images: int,
    sampler: Sampler,
) -> Path | None:
    """Write the LoRA that is asked for into `folder`, after training with `settings`, and note it in the job's record.

    Returns the folder, in `work`, of the LoRA that training began with.
    """
    start = extracted(job, lora, prompts, images, sampler)
    factors, before = start.factors, None
    if settings is not None:
        before = work / "start"
        write_lora(job.pipe, before, start.factors, start.rest, lora.dialect, {})
        factors = trained(job, work, settings, start.factors, start.rest, prompts, sampler)
    note = {"deradiff": f"{job.made_of['reference']['name']} at {job.made_of['words']}"}
    write_lora(job.pipe, folder, factors, start.rest, lora.dialect, note)
    numbers = ranks_in(factors)
    model = sum(parameter.numel() for name, parameter in base_tensors(job.reference))
    job.made_of["lora"] |= {**start.said, **numbers, "share_of_model": numbers["numbers"] / model}
    return before


def trained(
    job: BakingJob,
    work: Path,
    settings: Distillation,
    start: Mapping[str, Factors],
    rest: Mapping[str, Tensor],
    prompts: Sequence[str],
    sampler: Sampler,
) -> dict[str, Factors]:
    """The factors of `start` after training; `rest` is what else changes.

    What an interruption must not lose is in `work`; raises `ValueError` where that was begun with other settings.
    """
    base, guidance, identity = Base(job.pipe), sampler.guidance(job.pipe), identity_of(job)
    samples, lams = taught_on(job, work, base, settings, prompts, sampler)
    student = plain_copy(job.reference)
    # Kohya's names carry changes of norms and biases beside the factors, which stay as they are.
    for name, delta in rest.items():
        student.get_parameter(name).data += delta.to(student.dtype)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    add_lora(student, ADAPTER, start)
    cast_training_params(student, torch.float32)
    with job.anchors(load_anchor) as opened:
        denoisers = Denoisers(job.reference, [anchor for anchor in opened if isinstance(anchor, Anchor)])
        made_of, report = json.dumps(identity, sort_keys=True), partial(job.report, "training")
        run = TrainingRun(job.seed, work / "checkpoint", report, accelerator_of(base), made_of)
        try:
            curve = distil(base, Teacher(base, denoisers), student, samples, prompts, lams, settings, guidance, run)
        finally:
            denoisers.undo()
    job.trained["curve"] = asdict(curve)
    return factors_in(student, ADAPTER)


def plain_copy(reference: Any) -> Any:
    """A copy of the reference without adapters, not trained."""
    copy: Any = empty_copy(reference)
    kept = copy.state_dict().keys()
    tensors = {name: tensor.clone() for name, tensor in base_tensors(reference) if name in kept}
    copy.load_state_dict(tensors, assign=True)
    return copy.requires_grad_(False)


def add_lora(model: Any, name: str, factors: Mapping[str, Factors]) -> None:
    """Put a LoRA with these factors into `model`."""
    model.add_adapter(LoraConfig(**config_of(factors)), name)
    layers = dict(model.named_modules())
    for path, (down, up) in factors.items():
        for side, factor in ((layers[path].lora_A, down), (layers[path].lora_B, up)):
            side[name].weight.data = factor.to(layers[path].weight.device, torch.float32).clone()


def factors_in(model: nn.Module, name: str) -> dict[str, Factors]:
    """The factors of a LoRA in `model`, by layer."""
    layers: dict[str, Any] = dict(model.named_modules())
    return {
        path: (_detached(layer.lora_A[name].weight), _detached(layer.lora_B[name].weight))
        for path, layer in layers.items()
        if name in getattr(layer, "lora_A", {})
    }


def _detached(factor: Tensor) -> Tensor:
    return factor.detach().clone()
