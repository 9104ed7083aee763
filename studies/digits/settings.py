"""Everything that decides what the digits build makes."""

from dataclasses import dataclass

from deradiff.alignment.training import TrainingPlan
from deradiff.worlds.digits import BETAS, LORA_BETA

VAE_PLAN = TrainingPlan(steps=3600, learning_rate=1.5e-3, cosine=3600, average=0.995, evaluate_every=200)
REFERENCE_PLAN = TrainingPlan(steps=5000, learning_rate=1e-3, cosine=6400, weight_decay=0.01, evaluate_every=200)
# Diffusion-DPO sees β times a difference of errors, so that with a rate proportional to 1/β it takes as many steps at
# any β. These two rates are for β = 1.
DPO_PLAN = TrainingPlan(
    steps=1000, learning_rate=0.0125, warmup=20, average=0.97, evaluate_every=25, patience=10, tolerance=0.03
)
LORA_PLAN = TrainingPlan(
    steps=1000, learning_rate=0.1, warmup=20, average=0.97, evaluate_every=25, patience=10, tolerance=0.03
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the build makes."""

    seed: int = 0
    threads: int = 2
    workers: int = 2
    batch: int = 128
    vae_pictures: int = 12_000
    vae_batch: int = 32
    vae_kl_weight: float = 2e-5
    vae: TrainingPlan = VAE_PLAN
    pictures: int = 30_000
    held_out_pictures: int = 1024
    caption_dropout: float = 0.1
    reference: TrainingPlan = REFERENCE_PLAN
    pairs: int = 6000
    held_out_pairs: int = 512
    pairs_chunk: int = 500
    sampling_steps: int = 25
    reward_temperature: float = 0.25
    betas: tuple[float, ...] = BETAS
    dpo: TrainingPlan = DPO_PLAN
    lora_beta: float = LORA_BETA
    lora_rank: int = 16
    lora: TrainingPlan = LORA_PLAN
    measured_samples: int = 1000

    @property
    def chunks(self) -> int:
        """In how many files the pairs are drawn."""
        return -(-self.pairs // self.pairs_chunk)
