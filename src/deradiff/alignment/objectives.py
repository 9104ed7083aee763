"""Objectives of alignment: what to minimise so that a model prefers what people, or a reward, prefer."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def squared_error(
    prediction: Float[Tensor, "batch *latent"], target: Float[Tensor, "batch *latent"]
) -> Float[Tensor, " batch"]:
    """The squared error of a prediction, of ε, v or a velocity, averaged over the elements of each latent."""
    return (prediction - target).square().flatten(1).mean(1)


def diffusion_dpo(
    winner: Float[Tensor, " pair"],
    loser: Float[Tensor, " pair"],
    winner_reference: Float[Tensor, " pair"],
    loser_reference: Float[Tensor, " pair"],
    beta: float,
) -> Float[Tensor, ""]:
    """Diffusion-DPO: `-mean log σ(-½ β [(e_w - e_w^ref) - (e_l - e_l^ref)])` (Wallace et al. 2023, equation 14).

    Each argument is an error `e` per pair (see `squared_error`): of the model and of the reference, on the winner and
    on the loser of the pair. Winner and loser share noise and timestep. Errors are those of what the model predicts.

    Convention for `beta`: the errors are *means* over the elements of the latent, and the ½ is written out, as in the
    authors' released code. Equation 14 in the paper, with sums and the factor T ω, has another β for the same loss.

    Of a flow, `e` is the error of the velocity: Flow-DPO (Liu et al. 2025, arXiv 2501.13918), which is derived with
    β_t = β (1 - σ)² and used with a constant β, as here. At the noise level σ an error of ε is (1 - σ)² that of the
    velocity, so that a constant β for velocities is β / (1 - σ)² in the convention of ε, and β_t would be a constant
    there: near pure noise a flow is held far more loosely to its data at the same β. Figures of β for models that
    predict ε do not carry over.
    """
    margin = (winner - winner_reference) - (loser - loser_reference)
    return -F.logsigmoid(-0.5 * beta * margin).mean()


def margin_aware(
    winner: Float[Tensor, " pair"], loser: Float[Tensor, " pair"], beta: float | int, timesteps: int, snr: float = 0.5
) -> Float[Tensor, ""]:
    """MaPO: `mean(e_w) - β mean log σ(T [s(e_w) - s(e_l)])`, `s(e) = k e / (exp(k e) - 1)` (Hong et al. 2024).

    Each argument is an ε-error `e` per pair (see `squared_error`); no reference is needed, the winners' own denoising
    loss holds the model. T is `timesteps`, those of the noise schedule, and k is `snr`: arXiv 2406.06424, with the
    constants of the authors' released code, where β is 0.1. A larger β moves farther; 0 is fine-tuning on the winners.
    """
    scores = [snr * error / torch.expm1(snr * error) for error in (winner, loser)]
    return winner.mean() - beta * F.logsigmoid(timesteps * (scores[0] - scores[1])).mean()


def regularised_reward(
    rewards: Float[Tensor, " sample"], divergences: Float[Tensor, " sample"], kl: float | int
) -> Float[Tensor, ""]:
    """`mean(-r + λ_KL D)` (Annealed Importance Guidance, equations 3 and 4).

    `divergences` are the D of each sample, how far it is from the reference's (see `draft.divergence`).
    """
    return (kl * divergences - rewards).mean()


def bradley_terry(
    first: Float[Tensor, " pair"], second: Float[Tensor, " pair"], temperature: float, generator: torch.Generator
) -> Bool[Tensor, " pair"]:
    """Whether the first of each pair wins, drawn with probability `σ((first - second) / temperature)`.

    The arguments are rewards; the temperature is in their unit (Bradley and Terry 1952).
    """
    probability = torch.sigmoid((first - second) / temperature)
    return torch.rand(probability.shape, generator=generator, dtype=probability.dtype) < probability
