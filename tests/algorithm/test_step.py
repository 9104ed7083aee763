"""Algorithm 1's step: the weights that it mixes with, the mixing, and posteriors that are made once."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from deradiff import realign
from deradiff.algorithm import posteriors
from deradiff.algorithm.step import mixed, with_reference_weight
from tiny import make, sample


def test_the_reference_has_what_the_anchors_leave() -> None:
    lams = torch.tensor([[0.7, 0.25, 1.5], [0.2, 0.25, 0.5], [0.1, 0.25, 0.0]], dtype=torch.float64)
    assert (1 - lams.sum(0))[0] != 0, "0.7, 0.2 and 0.1 leave what rounding does"
    weights = with_reference_weight(lams)
    assert weights[0].tolist() == [0.0, 0.25, -1.0] and torch.equal(weights[1:], lams)
    assert with_reference_weight(torch.tensor([[1 - 1e-6]], dtype=torch.float64))[0].item() == pytest.approx(1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_mixed_in_single_and_rounded_once(dtype: torch.dtype) -> None:
    predictions = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.tensor([[0.63, -1.0], [0.37, 2.0]], dtype=torch.float64)
    each = weights.view(2, 2, 1, 1, 1)
    exact = (each * predictions.double()).sum(0)
    mixture = mixed(predictions, weights)
    assert mixture.dtype == dtype
    # Half a unit in the last place, and no more.
    assert ((mixture.double() - exact).abs() <= 0.5001 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_one_model_alone_is_mixed_to_the_bit() -> None:
    predictions = torch.randn(2, 2, 4, 8, 8)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(mixed(predictions, weights), torch.stack([predictions[0, 0], predictions[1, 1]]))


def test_posteriors_are_made_once_for_the_step_and_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, anchor, call = make("sd")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    made: list[Any] = []
    posterior = posteriors.posterior

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return posterior(*args, **kwargs)

    monkeypatch.setattr(posteriors, "posterior", counted)
    with realign(pipe, anchor, 0.4) as dial:
        sample(pipe, call, num_inference_steps=4)
        assert dial.path == "posterior" and dial.importance_weights.path_kl is not None
    assert len(made) == 4 * 2
