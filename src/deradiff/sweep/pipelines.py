"""A reference pipeline from the words of a command line: which model, which scheduler, which device."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline

from deradiff.anchors.checks import prediction_type
from deradiff.files.inventory import Inventory, require_whole
from deradiff.files.models import reading_model
from deradiff.files.reading import Record, read
from deradiff.files.waiting import from_the_hub
from deradiff.worlds import find, find_anchor

SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp-1": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 1}),
    "dpmpp-3": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpmpp-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "edm": ("EDMEulerScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}),
    "flow-sde": ("FlowMatchSDEScheduler", {"stochastic_sampling": False}),
    "flow-euler-sde": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
}
"""Short names of diffusers' schedulers and one of ours. Latents are not pixels, so none of them clips its sample."""

DISTILLED = ("schnell", "turbo", "klein", "lightning", "hyper", "sprint")
"""In the names of models that were distilled to a few steps."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_pipeline(
    source: str,
    *,
    dtype: torch.dtype,
    scheduler: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> DiffusionPipeline:
    """The pipeline of a folder, a hub id or a world that ships with deradiff (`digits`), with `scheduler`.

    Raises `OSError` for a model that cannot be found or read, `ValueError` for one that lacks weights, a scheduler that
    does not fit it and a revision of a model that is not on the hub.
    """
    require_on_hub(source, revision)
    if world := find(source):
        pipe: DiffusionPipeline = world.load(torch_dtype=dtype)
    else:
        _require_baked_whole(Path(source))
        with reading_model(source), from_the_hub(source):
            pipe = DiffusionPipeline.from_pretrained(
                source,
                dtype=dtype,
                revision=revision,
                use_safetensors=None if allow_pickle else True,
                **_left_out(source, revision),
            )
        require_weights(source, pipe.components)
    if scheduler:
        pipe.scheduler = scheduler_like(pipe.scheduler, scheduler)
        warn_of_noise(source, pipe, pipe.scheduler)
    return pipe


def _left_out(source: str, revision: str | None) -> dict[str, None]:
    """The parts that a pipeline was saved without, a T5 encoder for one: diffusers wants them named."""
    index = DiffusionPipeline.load_config(source, revision=revision)
    return {name: None for name, part in index.items() if part == [None, None]}


def warn_of_noise(source: str, pipe: Any, scheduler: Any) -> None:
    """Warn where a flow that was distilled to few steps is to be sampled with noise in every step."""
    noisy = type(scheduler).__name__ == "FlowMatchSDEScheduler" and scheduler.config.eta > 0
    noisy = noisy or scheduler.config.get("stochastic_sampling")
    named = next((word for word in DISTILLED if word in source.lower()), None)
    if noisy and (named or pipe.config.get("is_distilled")):
        warnings.warn(
            f"{source} was distilled to a few steps along an ODE ({named or 'is_distilled'}): noise in each step takes "
            "it to states that it was not trained at, and images come out blurred or grainy. Take flow-euler or an eta "
            "near 0",
            stacklevel=3,
        )


def require_weights(source: str, parts: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a model of `source` lacks weights: diffusers leaves them without values, and warns."""
    models = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    absent = [f"{name}.{key}" for name, model in models.items() for key, p in model.named_parameters() if p.is_meta]
    if absent:
        raise ValueError(
            f"the model {source} is not whole: {len(absent)} weights are missing, {absent[0]} for one. Copy or "
            "download it again"
        )


class _BakedRecord(Record):
    files: Inventory | None = None


def _require_baked_whole(folder: Path) -> None:
    """Raise `ValueError` for a folder that `deradiff bake` filled, and that is not whole."""
    record, cure = folder / "baking.json", "bake it again"
    if record.is_file() and (baked := read(_BakedRecord, record, "record of a baked model", cure)).files is not None:
        require_whole(folder, baked.files, "baked model", cure)


def require_on_hub(source: str, revision: str | None) -> None:
    """Raise `ValueError` where a `revision` is asked of a model that ships with deradiff or is on this machine."""
    if revision is not None and (find(source) or Path(source).exists()):
        raise ValueError(
            f"revision {revision!r} is for models on the hub, but {source} is on this machine: leave it out, or name "
            "the hub id"
        )


def usual_guidance(reference: str) -> float | None:
    """The guidance scale of a world that ships, far from a pipeline's default; None for other references."""
    world = find(reference)
    return world.guidance_scale if world else None


def require_both_sides(width: int | None, height: int | None) -> None:
    """Raise `ValueError` where one side of the pictures is given: many pipelines then take neither, and say nothing."""
    if (width is None) != (height is None):
        given, other = ("width", "height") if height is None else ("height", "width")
        raise ValueError(f"{given} is given without {other}: give width and height both, or neither")


def anchor_source(source: str) -> str | Path:
    """The folder of an anchor that ships (`digits:lora`); any other source as it is."""
    anchor = find_anchor(source)
    return anchor.path if anchor else source


def noisy_scheduler(source: str, revision: str | None = None) -> str:
    """The sampler whose noise is that of the diffusion that a reference learned: `flow-sde` for flows, or `ddpm`.

    Raises `OSError` for a model whose scheduler cannot be found.
    """
    world = find(source)
    with reading_model(source), from_the_hub(source):
        config = DDPMScheduler.load_config(
            world.reference if world else source, subfolder="scheduler", revision=revision
        )
    return "flow-sde" if prediction_type(str(config["_class_name"]), config) == "flow" else "ddpm"


def scheduler_like(present: Any, name: str) -> Any:
    """The scheduler called `name` in `SCHEDULERS`, configured like `present`.

    Raises `ValueError` for an unknown name and for the scheduler of another kind of model (diffusion, flow matching,
    EDM).
    """
    import diffusers

    from deradiff import schedulers

    if name not in SCHEDULERS:
        raise ValueError(f"there is no scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}.")
    class_name, options = SCHEDULERS[name]
    if not _fits(class_name, present):
        fitting = [other for other, (other_class, _) in SCHEDULERS.items() if _fits(other_class, present)]
        raise ValueError(
            f"{class_name} does not fit this model, whose own scheduler is {type(present).__name__}; "
            f"choose one of {', '.join(fitting)}."
        )
    family = getattr(diffusers, class_name, None) or getattr(schedulers, class_name)
    if class_name.startswith("FlowMatch") and not type(present).__name__.startswith("FlowMatch"):
        return family(
            num_train_timesteps=present.config.num_train_timesteps, shift=present.config.flow_shift, **options
        )
    return family.from_config(present.config, **options)


def _fits(class_name: str, present: Any) -> bool:
    """Whether a scheduler of this class can replace `present`; multistep solvers of flows know both worlds."""
    own = type(present).__name__
    is_flow = present.config.get("prediction_type") == "flow_prediction" and present.config.get("use_flow_sigmas")
    if is_flow:
        return class_name.startswith(("FlowMatch", "UniPC", "DPMSolverMultistep"))
    return _kind(class_name) == _kind(own)


def _kind(class_name: str) -> str:
    return next((kind for kind in ("FlowMatch", "EDM") if class_name.startswith(kind)), "diffusion")
