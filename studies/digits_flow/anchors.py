"""The aligned half of the build: anchors and a LoRA by Diffusion-DPO, and a LoRA by Flow-GRPO without a KL term.

They are what `deradiff align digits-flow` makes, at a fraction of the price: the pipeline that is aligned computes one
of the equal tokens that stand where Stable Diffusion 3 has its T5 encoder.
"""

from pathlib import Path

from deradiff.alignment.methods import METHODS, Data
from deradiff.alignment.runs import align, anchor_name
from deradiff.alignment.settings import Preset
from deradiff.sweep.jobs import Report
from studies.digits_flow.models import EqualTokensPipeline
from studies.digits_flow.reference import load
from studies.digits_flow.settings import FlowSettings


def anchor_folder(folder: Path, beta: float) -> Path:
    """Where the transformer that is aligned at `beta` lies."""
    return folder / f"dpo-{beta:g}" / anchor_name(beta)


def lora_folder(folder: Path, settings: FlowSettings) -> Path:
    """Where the LoRA by Diffusion-DPO lies."""
    return folder / "dpo-lora" / anchor_name(settings.lora_beta)


def grpo_folder(folder: Path) -> Path:
    """Where the LoRA by Flow-GRPO lies."""
    return folder / "grpo" / anchor_name(0)


def draw_pairs(folder: Path, settings: FlowSettings, report: Report) -> None:
    """Pairs of the reference's own pictures, compared by the digits' reward, and their latents."""
    _pairs(folder, settings, EqualTokensPipeline.around(load(folder / "reference")), report)


def train_anchor(folder: Path, settings: FlowSettings, beta: float, report: Report) -> None:
    """All weights of the transformer, by Diffusion-DPO at `beta`."""
    _train_dpo(folder, settings, settings.dpo, beta, anchor_folder(folder, beta).parent, report)


def train_lora(folder: Path, settings: FlowSettings, report: Report) -> None:
    """A LoRA by Diffusion-DPO."""
    _train_dpo(folder, settings, settings.lora, settings.lora_beta, lora_folder(folder, settings).parent, report)


def train_grpo(folder: Path, settings: FlowSettings, report: Report) -> None:
    """A LoRA by Flow-GRPO, with λ_KL = 0."""
    grpo, out = settings.grpo, grpo_folder(folder).parent
    pipe = EqualTokensPipeline.around(load(folder / "reference"))
    prompts = METHODS[grpo.method].prepare(pipe, grpo, out, None, settings.seed, report)
    align(pipe, prompts, 0.0, grpo, out, report, seed=settings.seed)


def _train_dpo(folder: Path, settings: FlowSettings, training: Preset, beta: float, out: Path, report: Report) -> None:
    pipe = EqualTokensPipeline.around(load(folder / "reference"))
    align(pipe, _pairs(folder, settings, pipe, report), beta, training, out, report, seed=settings.seed)


def _pairs(folder: Path, settings: FlowSettings, pipe: EqualTokensPipeline, report: Report) -> Data:
    dpo = settings.dpo
    return METHODS[dpo.method].prepare(pipe, dpo, folder / "pairs", settings.pairs, settings.seed, report)
