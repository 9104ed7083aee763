"""Diffusion-DPO and MaPO against their formulas written out, and the Bradley-Terry draw against its probability."""

import math

import pytest
import torch

from deradiff.alignment.objectives import bradley_terry, diffusion_dpo, margin_aware, squared_error


def errors(seed: int) -> list[torch.Tensor]:
    return list(torch.rand(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@pytest.mark.parametrize("beta", [1.0, 500.0])
def test_loss_is_the_formula(beta: float) -> None:
    winner, loser, winner_reference, loser_reference = errors(0)
    by_hand = [
        math.log1p(math.exp(0.5 * beta * ((w - wr) - (lo - lr))))
        if 0.5 * beta * ((w - wr) - (lo - lr)) < 30
        else 0.5 * beta * ((w - wr) - (lo - lr))
        for w, lo, wr, lr in zip(
            winner.tolist(), loser.tolist(), winner_reference.tolist(), loser_reference.tolist(), strict=True
        )
    ]
    loss = diffusion_dpo(winner, loser, winner_reference, loser_reference, beta)
    assert loss.item() == pytest.approx(sum(by_hand) / 6, rel=1e-12)


def test_the_reference_itself_has_loss_log_two() -> None:
    winner, loser, *_ = errors(1)
    assert diffusion_dpo(winner, loser, winner, loser, 2000.0).item() == pytest.approx(math.log(2), rel=1e-12)


def test_descent_lowers_the_winners_error_and_raises_the_losers() -> None:
    winner, loser, winner_reference, loser_reference = (e.requires_grad_() for e in errors(2))
    diffusion_dpo(winner, loser, winner_reference, loser_reference, 10.0).backward()
    assert winner.grad is not None and (winner.grad > 0).all()
    assert loser.grad is not None and (loser.grad < 0).all()
    torch.testing.assert_close(winner.grad, -loser.grad)


def test_mapo_is_the_formula_and_moves_winner_and_loser_apart() -> None:
    winner, loser, *_ = (e.requires_grad_() for e in errors(3))
    by_hand = []
    for w, lo in zip(winner.tolist(), loser.tolist(), strict=True):
        likelier = [0.5 * e / (math.exp(0.5 * e) - 1) for e in (w, lo)]
        by_hand.append(w + 0.1 * math.log1p(math.exp(-10 * (likelier[0] - likelier[1]))))
    loss = margin_aware(winner, loser, 0.1, timesteps=10)
    assert loss.item() == pytest.approx(sum(by_hand) / 6, rel=1e-12)
    loss.backward()
    assert winner.grad is not None and (winner.grad > 1 / 6).all()
    assert loser.grad is not None and (loser.grad < 0).all()
    assert margin_aware(winner, loser, 0, timesteps=1000).item() == pytest.approx(winner.mean().item())


def test_error_is_averaged_over_the_latent() -> None:
    prediction, noise = torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    prediction[1] = 3
    torch.testing.assert_close(squared_error(prediction, noise), torch.tensor([1.0, 9.0]))


def test_bradley_terry_wins_as_often_as_it_says() -> None:
    first = torch.full((20_000,), 3.0)
    wins = bradley_terry(first, first - 0.5, 0.25, torch.Generator().manual_seed(0))
    expected = 1 / (1 + math.exp(-2))
    assert wins.float().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 20_000))
