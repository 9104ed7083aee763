"""Full steps, measured once, that keep their tolerance on other prompts and seeds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deradiff
from deradiff.sampling.full_steps import FullSteps, errors, find_full_steps
from deradiff.sampling.reuse import Reuse
from deradiff.worlds import digits
from messages import naming
from tiny import make


def test_full_steps_are_measured_kept_and_used_on_other_images(tmp_path: Path) -> None:
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 1.0}
    with deradiff.realign(pipe, digits.anchor_path(250), 0.5) as dial:
        full_steps = find_full_steps(pipe, ["a red seven", "a blue two", "three", "a green zero"] * 2, 0.08, **call)
        assert dial.reuse is None and dial.lam == 0.5, "as it was"
        assert full_steps.error <= 0.08 and full_steps.cost < 1.5 and full_steps.images == 8
        full_steps.save(tmp_path / "full_steps.json")
        assert FullSteps.load(tmp_path / "full_steps.json") == full_steps

        def drawn(lam: float, reuse: Reuse | None) -> torch.Tensor:
            dial.lam, dial.reuse = lam, reuse
            latents = [torch.Generator().manual_seed(100 + i) for i in range(8)]
            return pipe(["a purple five", "nine"] * 4, generator=latents, output_type="latent", **call).images

        made = errors(drawn(0.5, full_steps.reuse), drawn(0.5, None), drawn(0.0, None))
        assert made.median < 2 * 0.08
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=naming("other.json", "reuse", "tolerance", "changed")):
        FullSteps.load(tmp_path / "other.json")


def test_errors_are_relative_to_what_the_weight_does() -> None:
    reference = torch.zeros(3, 4)
    exact = torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, 4)
    made = errors(exact + torch.tensor([0.1, 0.2, 1.5])[:, None], exact, reference)
    assert made.median == pytest.approx(0.1) and made.changed == pytest.approx(1 / 3)
    assert made.whole == pytest.approx(((0.01 + 0.04 + 2.25) / 14) ** 0.5)
    with pytest.raises(ValueError, match="λ"):
        errors(exact, reference, reference)


def test_measuring_needs_a_realigned_pipeline_and_a_tolerance_that_can_be_kept() -> None:
    pipe, anchor, _ = make("sd")
    with pytest.raises(ValueError, match=r"deradiff\.realign"):
        find_full_steps(pipe, ["a"], 0.1)
    with deradiff.realign(pipe, anchor, 0.5), pytest.raises(ValueError, match=naming("tolerance", 0, 1, -1.0)):
        find_full_steps(pipe, ["a"], -1.0)
    with deradiff.realign(pipe, anchor, 0.5), pytest.raises(ValueError, match=naming("reference", "anchor", 1e-9)):
        find_full_steps(pipe, ["a", "b"], 1e-9, num_inference_steps=3)


def test_what_0_1_measured_is_read(tmp_path: Path) -> None:
    reuse = {"tolerance": None, "every": None, "steps": [0, 2], "carrier": "weights", "slope": 1.0}
    numbers = {"tolerance": 0.1, "error": 0.05, "changed": 0.0, "cost": 1.2, "steps": 3, "images": 4}
    (tmp_path / "old.json").write_text(json.dumps({"reuse": reuse, "scheduler": "DDIMScheduler"} | numbers))
    assert FullSteps.load(tmp_path / "old.json").reuse == Reuse(steps=(0, 2), carrier="interpolate")
