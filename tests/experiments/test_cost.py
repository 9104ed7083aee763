"""Operations counted against a count by hand, and the paper's arithmetic."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn
from typer.testing import CliRunner

from deradiff.cli import app
from deradiff.experiments.cost import (
    Costs,
    DenoiserCost,
    PaperInputs,
    costs,
    denoiser_config,
    denoiser_cost,
    per_example,
    saved,
)
from messages import naming

DIGITS = denoiser_config("digits")


def by_hand(config: dict[str, Any], tokens: int) -> int:
    """Multiplications and additions of every convolution, linear layer and attention of a real forward pass."""
    unet = UNet2DConditionModel.from_config(config).eval()
    total = 0

    def convolution(layer: nn.Conv2d, _: Any, out: torch.Tensor) -> None:
        nonlocal total
        height, width = layer.kernel_size
        total += 2 * out.numel() * layer.in_channels // layer.groups * height * width

    def linear(layer: nn.Linear, _: Any, out: torch.Tensor) -> None:
        nonlocal total
        total += 2 * out.numel() * layer.in_features

    def attention(layer: Attention, arguments: Any, keywords: Any, out: torch.Tensor) -> None:
        nonlocal total
        told = keywords.get("encoder_hidden_states")
        queries = out.shape[1]
        keys = queries if told is None else told.shape[1]
        total += 2 * 2 * queries * keys * layer.inner_dim

    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
        elif isinstance(module, Attention):
            module.register_forward_hook(attention, with_kwargs=True)
    side = config["sample_size"]
    with torch.no_grad():
        unet(torch.zeros(1, 4, side, side), 0, torch.zeros(1, tokens, config["cross_attention_dim"]))
    return total


def test_a_prediction_is_what_counting_by_hand_gives() -> None:
    assert denoiser_cost(DIGITS, tokens=16).forward == by_hand(DIGITS, 16)


def test_training_costs_about_three_predictions_and_a_lora_less() -> None:
    whole, lora = denoiser_cost(DIGITS, tokens=16), denoiser_cost(DIGITS, tokens=16, lora_rank=4)
    again = denoiser_cost(DIGITS, tokens=16, checkpointing=True)
    # The gradients of weights and of inputs cost a forward pass each, but for the first layer's input.
    assert 2.9 < whole.training / whole.forward < 3
    assert whole.forward == lora.forward and lora.training < 0.75 * whole.training
    assert 3.4 < again.training / again.forward < 4
    assert per_example(whole, "dpo") == 2 * (whole.training + whole.forward)
    assert denoiser_cost(DIGITS, tokens=16, side=16).forward > 3.9 * whole.forward


def test_a_sweep_and_realignment_add_up() -> None:
    found = costs(
        DenoiserCost(10, 30), strengths=4, train_steps=100, batch=8, images=5, sampling_steps=20, guided=False
    )
    assert found.alignment == 100 * 8 * 2 * 40 and found.sampling == 5 * 20 * 10
    assert found.sweep == 4 * (64_000 + 1000) and found.realignment == 64_000 + 4 * 2000
    assert found.saved == pytest.approx(1 - 72_000 / 260_000)
    only = Costs(DenoiserCost(1, 3), 10.0, 100.0, 110.0, 210.0)
    assert only.saved < 0


def test_the_papers_numbers() -> None:
    inputs = PaperInputs()
    assert inputs.tflop_hours == 52_416 and inputs.exaflops == pytest.approx(188.7, abs=0.05)
    assert [round(100 * saved(n), 1) for n in (3, 5, 10)] == [66.7, 80.0, 90.0]


@pytest.mark.parametrize(("wrong", "words"), [({"side": 7}, "7 x 7"), ({"lora_rank": 0}, "rank 0")])
def test_what_cannot_be_counted_is_refused(wrong: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        denoiser_cost(DIGITS, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=naming(0, "N")):
        saved(0)
    with pytest.raises(ValueError, match=naming("digits-flow", "UNet2DConditionModel")):
        denoiser_config("digits-flow")


def test_the_command_prints_the_paper_and_counts_the_digits(tmp_path: Path) -> None:
    runner = CliRunner()
    paper = runner.invoke(app, ["cost"], env={"COLUMNS": "120"})
    assert paper.exit_code == 0
    for number in (
        "52,416 TFLOP-hours",
        "188.7 EFLOPs",
    ):
        assert number in paper.output
    for line in (r"3\b.* 66.7%, 377.4", r"5\b.* 80.0%, 754.8", r"10\b.* 90.0%, 1,698.3"):
        assert re.search(rf"\b{line} EFLOPs", paper.output)
    file = tmp_path / "cost.json"
    mine = runner.invoke(app, ["cost", "digits", "--images", "100", "--json", str(file)], env={"COLUMNS": "120"})
    assert mine.exit_code == 0, mine.output
    found = json.loads(file.read_text())
    assert found["alignment"] == 300 * 64 * 2 * (found["denoiser"]["training"] + found["denoiser"]["forward"])
    assert f"{100 * found['saved']:.1f}%" in mine.output
    missing = runner.invoke(app, ["cost", str(tmp_path)])
    assert missing.exit_code == 2 and "Traceback" not in missing.output
    assert runner.invoke(app, ["cost", "--preset", "aig-sdxl"]).exit_code == 2
