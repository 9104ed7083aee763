"""Everything that decides what an alignment makes of its base and data."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from deradiff.alignment.lora_targets import LORA_TARGETS
from deradiff.alignment.noising import Density
from deradiff.alignment.training import TrainingPlan


@dataclass(frozen=True)
class Preset:
    """The settings of an alignment, published or a user's own."""

    source: str
    method: str
    base: str
    data: str
    plan: TrainingPlan
    batch: int
    """Pairs or prompts per step, over all processes and micro-batches."""
    resolution: int
    cache: bool = True
    """Whether pairs are encoded once, before training, or anew in every step."""
    flip: bool = False
    """Whether the pictures of pairs are mirrored by chance: once where they are cached."""
    betas: tuple[float, ...] = ()
    """Strengths to align at: β of methods on pairs and of reward-weighted denoising, λ_KL of the others."""
    rate_times_beta: float | None = None
    """The learning rate is this over β, in place of the plan's: for small models that are trained until it is flat."""
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = LORA_TARGETS
    prompt_dropout: float = 0.0
    density: Density | None = None
    """How the times of a flow are spread in training; evenly by default."""
    held_out: int = 256
    sampling: dict[str, Any] = field(default_factory=dict)
    """`sampling.SamplerSettings` in training, of the model's own pictures, or the paper's from its result."""
    reward: str | None = None
    """What is maximised, by name (see `deradiff.rewards.load`); for Diffusion-DPO what compares own pairs."""
    options: dict[str, Any] = field(default_factory=dict)
    """What only this method asks for."""
    precision: str = "no"
    gradient_checkpointing: bool = False
    vae: str | None = None
    notes: str = ""

    @property
    def model(self) -> str:
        """What the data of a base are made by: its name, and that of another VAE."""
        return " with ".join(filter(None, (self.base, self.vae)))

    def plan_at(self, beta: float) -> TrainingPlan:
        """How to train at `beta`."""
        if self.rate_times_beta is None:
            return self.plan
        return replace(self.plan, learning_rate=self.rate_times_beta / beta)

    def shown(self) -> dict[str, Any]:
        """As plain data."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "", {}, ())}
