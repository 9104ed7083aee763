"""Everything that decides what the build of the digits' flow makes."""

from dataclasses import dataclass

from deradiff.alignment.noising import Density
from deradiff.alignment.training import TrainingPlan

REFERENCE_PLAN = TrainingPlan(steps=8000, learning_rate=1e-3, cosine=8000, weight_decay=0.01, evaluate_every=200)


@dataclass(frozen=True)
class FlowSettings:
    """Everything that decides what the build makes."""

    seed: int = 0
    threads: int = 1
    batch: int = 128
    width: int = 96
    layers: int = 4
    density: Density = "logit-normal"
    pictures: int = 60_000
    held_out_pictures: int = 1024
    caption_dropout: float = 0.1
    reference: TrainingPlan = REFERENCE_PLAN
    measured_samples: int = 1000
