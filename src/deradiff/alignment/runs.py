"""Alignments from one command: base and data in, per strength an anchor on disk that `deradiff.realign` loads."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import disable_fsdp_ram_efficient_loading
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from torch import nn
from transformers import PreTrainedModel

from deradiff.alignment import processes, sharding
from deradiff.alignment.base import Base, Policy
from deradiff.alignment.cards import card
from deradiff.alignment.checkpoints import CurveRecord
from deradiff.alignment.fitting import base_of, sampling_of
from deradiff.alignment.methods import METHODS, Data, TrainingMethod, fitted
from deradiff.alignment.path_kl import path_kl
from deradiff.alignment.rehearsal import rehearse
from deradiff.alignment.settings import Preset
from deradiff.alignment.training import LossCurve, TrainingRun
from deradiff.anchors.checks import denoisers_of
from deradiff.files.folders import require_same
from deradiff.files.inventory import Inventory, inventory, require_whole
from deradiff.files.locks import PRIVATE, discard, taken
from deradiff.files.models import reading_model
from deradiff.files.reading import Record, read
from deradiff.files.records import versions
from deradiff.files.writing import atomic_folder, write_json
from deradiff.sweep import pipelines
from deradiff.sweep.jobs import Report
from deradiff.sweep.notation import plain

RECORD = "alignment.json"
"""What tells a finished alignment from any other folder."""

MEASURED = 64
"""Held-out prompts from which a trained model's divergence is measured, at most."""

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Each tracker, and the packages of which one must be installed."""


def align_all(
    settings: Preset,
    betas: list[float],
    out: Path,
    report: Report,
    *,
    count: int | None = None,
    seed: int = 0,
    track: str | None = None,
    cpu: bool = False,
) -> list[Path]:
    """Align the base of `settings` at every strength, and return the anchors' folders, in the first process alone.

    What is not there yet is made: first the data, from `count` pairs, prompts or samples, which all strengths share.

    Raises:
        ValueError: settings, data, folder or Accelerate's configuration are not what they should be (see `methods`,
            `align` and `sharding`).
        ModuleNotFoundError: the tracker is not installed.
    """
    method = METHODS[settings.method]
    if track and not any(map(find_spec, TRACKERS[track])):
        raise ModuleNotFoundError(f"--track {track} needs a package that is not installed: pip install {track}")
    # One process may align again with another precision, which Accelerate otherwise remembers from the first time.
    AcceleratorState._reset_state()
    meeting = processes.meet()
    patient = InitProcessGroupKwargs(timeout=processes.LONGEST)
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=settings.precision, log_with=track, project_dir=str(out), kwargs_handlers=[patient]
    )
    del meeting
    # It would leave text encoders and rewards without weights in all processes but the first.
    disable_fsdp_ram_efficient_loading()
    sharding.require_supported(accelerator, settings.plan.optimizer)
    if not accelerator.is_main_process:

        def report(*_: Any) -> None: ...

    with _holding(out, accelerator):
        pipe = load_base(settings).to(accelerator.device)
        settings = fitted(settings, pipe)
        with accelerator.main_process_first():
            data = method.prepare(pipe, settings, out, count, seed, report)
        if settings.cache and not method.decodes:
            _park(pipe)
        anchors = []
        for beta in betas:
            with _tracked(accelerator, anchor_name(beta), beta):
                anchors.append(align(pipe, data, beta, settings, out, report, seed=seed, accelerator=accelerator))
    return anchors if accelerator.is_main_process else []


def rehearsed(settings: Preset, *, count: int | None = None, seed: int = 0, cpu: bool = False) -> Iterator[str]:
    """What `align_all` would do, tried as far as one step (`rehearsal.rehearse`), line by line; nothing is written."""
    pipe = load_base(settings)
    pipe.to("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    yield from rehearse(settings, pipe, count=count, seed=seed)


def _holding(out: Path, accelerator: Accelerator | None) -> AbstractContextManager[Path]:
    """Hold `out`, by the first of the processes that align together; its folder for what is not finished."""
    if accelerator is None or accelerator.is_main_process:
        return taken(out, "an alignment")
    return nullcontext(out.resolve() / PRIVATE)


def load_base(settings: Preset) -> Any:
    """The pipeline to align. A LoRA's base is held in the precision of the training; the VAE always in float32.

    All weights are trained in float32, whatever the precision: what they gain per step is below a half's resolution.
    """
    dtype = DTYPES[settings.precision] if settings.lora_rank else torch.float32
    pipe: Any = pipelines.load_pipeline(settings.base, dtype=dtype)
    if settings.vae is None:
        if getattr(pipe, "vae", None) is None:
            raise ValueError(
                f"{settings.base} has no VAE to make latents of pictures with: alignment trains on latents"
            )
        pipe.vae = pipe.vae.float()
    else:
        with reading_model(settings.vae):
            pipe.vae = AutoencoderKL.from_pretrained(settings.vae)
        pipelines.require_weights(settings.vae, {"vae": pipe.vae})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _park(pipe: Any) -> None:
    """All but the denoiser in host memory."""
    denoisers = denoisers_of(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in denoisers:
            part.to("cpu")


@contextmanager
def _unparked(pipe: Any) -> Iterator[None]:
    """While this lasts, all parts are where the denoiser is."""
    denoiser: Any = next(iter(denoisers_of(pipe).values()))
    parked = any(
        part.device != denoiser.device
        for part in pipe.components.values()
        if isinstance(part, ModelMixin | PreTrainedModel)
    )
    pipe.to(denoiser.device)
    try:
        yield
    finally:
        if parked:
            _park(pipe)


@contextmanager
def _tracked(accelerator: Accelerator, name: str, beta: float) -> Iterator[None]:
    """A run of its own for every strength. (`end_training` would end the processes' communication as well.)"""
    if accelerator.log_with:
        accelerator.init_trackers(name, config={"beta": beta})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def align(
    pipe: DiffusionPipeline,
    data: Data,
    beta: float,
    settings: Preset,
    out: Path,
    report: Report,
    *,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> Path:
    """Align `pipe` at the strength `beta` into `out/beta-<β>`, and return that folder.

    What is there already is kept; an interrupted alignment goes on at its checkpoint. With `settings.lora_rank` the
    folder holds a LoRA, otherwise a denoiser. The pipeline is given back as it was. Raises `ValueError` if the folder
    holds an alignment with other settings (see also the methods' own `train_...` and `loop.train`).
    """
    method, name = METHODS[settings.method], anchor_name(beta)
    label, path, is_first = (
        f"{method.symbol} = {beta:g}",
        out / name,
        accelerator is None or accelerator.is_main_process,
    )
    with _holding(out, accelerator) as private:
        checkpoint = private / f"{name}-checkpoint"
        _require_no_older(out / checkpoint.name)
        made_of = _identity(beta, settings, data, seed)
        if path.exists():
            require_finished(path, made_of)
            return path
        with _unparked(pipe):
            base = base_of(pipe, settings)
        policy = Policy(base, settings.lora_rank, settings.lora_targets, seed)
        if settings.gradient_checkpointing:
            policy.model.enable_gradient_checkpointing()
        run = TrainingRun(seed, checkpoint, partial(report, label), accelerator, json.dumps(made_of))
        try:
            curve = method.train(base, policy, data, beta, settings, run=run)
            if is_first:
                report(label, settings.plan.steps, settings.plan.steps, "measuring the path KL")
                away = divergence(base, policy, method.prompts(data, settings, MEASURED), settings, seed)
                with atomic_folder(path, within=private) as folder:
                    _save(pipe, policy, method, made_of, curve, away, folder)
                discard(checkpoint)
        finally:
            policy.model.disable_gradient_checkpointing()
            if policy.is_lora:
                base.denoiser.delete_adapters(base.denoiser.active_adapters())
    return path


def _require_no_older(checkpoint: Path) -> None:
    """Raise `ValueError` for a training that deradiff 0.1 has begun: its checkpoint is not read any more."""
    if (checkpoint / "progress.json").is_file():
        raise ValueError(
            f"{checkpoint} is the checkpoint of an alignment that deradiff 0.1 has begun, which later versions do not "
            "go on with: finish it with 0.1, or delete it to begin anew"
        )


class AlignmentRecord(Record):
    """The `alignment.json` of an anchor."""

    made_of: dict[str, Any]
    curve: CurveRecord
    path_kl: dict[str, Any]
    versions: dict[str, str]
    files: Inventory | None = None


def require_finished(path: Path, made_of: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the model in `path` is made of just that, and its files are there and whole."""
    cure = "delete that folder, and it is aligned anew, or name another"
    if not (path / RECORD).is_file():
        raise ValueError(f"{path} is there and holds no alignment: name another folder, or delete it")
    record = read(AlignmentRecord, path / RECORD, "record of an alignment", cure)
    require_same(path, "model", record.made_of, made_of)
    require_whole(path, record.files, "model", cure)


def anchor_name(beta: float) -> str:
    """What the folder of the anchor at `beta` is called."""
    return f"beta-{plain(beta, 12)}"


def divergence(base: Base, policy: Policy, prompts: list[str], settings: Preset, seed: int) -> dict[str, Any]:
    """The path KL of a trained model to its reference (`path_kl.path_kl`), and how it was measured, as plain data.

    At full noise whatever `settings` sample with, which may be deterministic: by DDIM, or the SDE of a flow; with their
    steps and guidance.
    """
    sampling = sampling_of(settings, "flow-sde" if base.is_flow else "ddim")
    # A standard error takes two paths.
    drawn = prompts * 2 if len(prompts) == 1 else prompts
    per_pass = max(1, settings.batch // settings.plan.accumulate)
    with _unparked(base.pipe):
        estimate = path_kl(base, policy, drawn, sampling, seed=seed, per_pass=per_pass)
    return {**asdict(estimate), "prompts": len(prompts), **asdict(sampling)}


def _identity(beta: float, settings: Preset, data: Data, seed: int) -> dict[str, Any]:
    """What decides the weights, as plain data."""
    changing_nothing = ("source", "betas", "notes", "gradient_checkpointing")
    decisive = {key: value for key, value in asdict(settings).items() if key not in changing_nothing}
    if settings.density is None:  # version 0.1 did not say it, and what it began goes on
        del decisive["density"]
    return json.loads(json.dumps({"beta": beta, "seed": seed, "settings": decisive, "data": data.fingerprint}))


def _save(
    pipe: Any,
    policy: Policy,
    method: TrainingMethod,
    made_of: dict[str, Any],
    curve: LossCurve,
    away: dict[str, Any],
    folder: Path,
) -> None:
    from peft.utils import get_peft_model_state_dict

    if policy.is_lora:
        layers = {key: value.contiguous() for key, value in get_peft_model_state_dict(policy.model).items()}
        (component,) = denoisers_of(pipe)
        LoraBaseMixin.write_lora_layers(
            {f"{component}.{key}": value for key, value in layers.items()},
            folder,
            is_main_process=True,
            weight_name=LORA_WEIGHT_NAME_SAFE,
            save_function=None,
            safe_serialization=True,
        )
    else:
        policy.model.save_pretrained(folder)
    record = {"made_of": made_of, "curve": asdict(curve), "path_kl": away, "versions": versions()}
    write_json(folder / RECORD, {**record, "files": inventory(folder)})
    (folder / "README.md").write_text(card(method, made_of, curve, away), encoding="utf-8")
