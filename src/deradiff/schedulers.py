"""A stochastic sampler for flow matching, which diffusers does not have.

Particles need noise in every step, and weights need a sampler that is a discretised diffusion. diffusers'
`stochastic_sampling` is none: it noises its estimate of x_0 all anew at every step, however small the step.
"""

from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow matching with noise: the diffusion that Flow-GRPO samples (Liu et al. 2025, arXiv 2505.05470, equation 9).

    Its noise is `a √(t/(1-t))` per unit of time with `a = √2 η`: η = 1 is memoryless, η = 0 is flow-matching Euler, and
    Flow-GRPO's a = 0.7 is η ≈ 0.5. Taken as DDIM takes it (Song et al. 2021, equation 12), with an exact transition of
    noise instead of an Euler-Maruyama step: the marginals stay right where that step is singular, at t = 1.

        x_0 = x - σ v,  ε = x + (1 - σ) v
        x' = (1 - σ') x_0 + √(σ'² - s²) ε + s z,      s² = η² (σ'/σ)² [σ² - σ'² ((1 - σ)/(1 - σ'))²]

    Flow-matching pipelines do not hand their generator to the scheduler: set `generator` for noise that can be drawn
    again. Arguments beside `eta`, in [0, 1], are those of `FlowMatchEulerDiscreteScheduler`.

    Raises:
        ValueError: `eta` outside [0, 1]; `stochastic_sampling` or `invert_sigmas`, which mean another sampler.
    """

    generator: torch.Generator | list[torch.Generator] | None = None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        eta: float | int = 1.0,
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta, the share of the memoryless noise, lies in [0, 1]; got {eta}")
        if stochastic_sampling or invert_sigmas:
            raise ValueError("FlowMatchSDEScheduler has noise of its own: leave stochastic_sampling, invert_sigmas off")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
        )

    def transition(self, i: int) -> tuple[float, float, float]:
        """`(carry, gain, s)` of the step from `sigmas[i]`: `x' = carry x + gain v + s z`."""
        sigma, after = float(self.sigmas[i]), float(self.sigmas[i + 1])
        eta = self.config.eta
        if sigma == after or after == 0:
            s2 = 0.0
        else:
            s2 = eta**2 * (after / sigma) ** 2 * (sigma**2 - (after * (1 - sigma) / (1 - after)) ** 2)
        noise = (after**2 - s2) ** 0.5
        return (1 - after) + noise, -(1 - after) * sigma + noise * (1 - sigma), s2**0.5

    def step(
        self,
        model_output: Float[Tensor, "batch channel *latent"],
        timestep: Any,
        sample: Float[Tensor, "batch channel *latent"],
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step towards the image from the predicted velocity; noise comes from `generator`, or `self.generator`."""
        if self._step_index is None:
            self._init_step_index(timestep)
        carry, gain, s = self.transition(self._step_index)
        previous = carry * sample.float() + gain * model_output.float()
        if s:
            source = generator if generator is not None else self.generator
            noise = randn_tensor(sample.shape, generator=source, device=sample.device, dtype=torch.float32)
            previous = previous + s * noise
        self._step_index += 1
        previous = previous.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=previous) if return_dict else (previous,)
