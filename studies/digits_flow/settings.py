"""Everything that decides what the build of the digits' flow makes."""

from dataclasses import dataclass, replace

from deradiff.alignment.noising import Density
from deradiff.alignment.presets import preset
from deradiff.alignment.settings import Preset
from deradiff.alignment.training import TrainingPlan
from deradiff.worlds.digits_flow import BETAS, LORA_BETA

REFERENCE_PLAN = TrainingPlan(steps=8000, learning_rate=1e-3, cosine=8000, weight_decay=0.01, evaluate_every=200)

LORA, GRPO = preset("digits-flow"), preset("digits-flow-grpo")
DPO = replace(LORA, lora_rank=None, rate_times_beta=0.004)


@dataclass(frozen=True)
class FlowSettings:
    """Everything that decides what the build makes."""

    seed: int = 0
    workers: int = 2
    batch: int = 128
    width: int = 96
    layers: int = 4
    density: Density = "logit-normal"
    pictures: int = 60_000
    held_out_pictures: int = 1024
    caption_dropout: float = 0.1
    reference: TrainingPlan = REFERENCE_PLAN
    pairs: int = 2000
    betas: tuple[float, ...] = BETAS
    dpo: Preset = DPO
    lora_beta: float = LORA_BETA
    lora: Preset = LORA
    grpo: Preset = GRPO
    measured_samples: int = 1000
