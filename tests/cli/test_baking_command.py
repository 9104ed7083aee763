"""`deradiff bake`, from its words to its files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import deradiff.baking
import tiny
from deradiff.algorithm.schedules import Power
from deradiff.baking import AsLora, Baked, Distillation, Sampler
from deradiff.baking.distillation import SHIPPED
from deradiff.cli import app
from deradiff.worlds import digits
from messages import naming

PROMPTS = ["-p", "a red fox", "-p", "two owls"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reference pipeline and an anchor for it."""
    folder = tmp_path_factory.mktemp("models")
    pipe, anchor, _ = tiny.make("sd")
    pipe.save_pretrained(folder / "reference")
    anchor.save_pretrained(folder / "anchor")  # type: ignore[operator]
    return folder


def run(models: Path, *words: str) -> Result:
    return CliRunner().invoke(
        app, ["bake", str(models / "reference"), "-a", str(models / "anchor"), "--device", "cpu", *words]
    )


def test_weights_and_report_are_written_and_said(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(models, "--lam", "0.25", "-o", str(out), *PROMPTS, "--images", "2", "--steps", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(out)
    assert "λ = 0.25" in result.stdout
    own, theirs, baked = (
        load_file(folder / "diffusion_pytorch_model.safetensors")
        for folder in (models / "reference/unet", models / "anchor", out / "unet")
    )
    assert all(torch.allclose(baked[name], 0.75 * own[name] + 0.25 * theirs[name], atol=1e-6) for name in own)
    record = json.loads((out / "baking.json").read_text())
    assert record["made_of"]["reference"]["name"] == str(models / "reference")
    assert record["drawn"]["prompts"] == ["a red fox", "two owls"] and record["drawn"]["steps"] == 2
    again = run(models, "--lam", "0.5", "-o", str(out), "--images", "0")
    assert again.exit_code == 2 and "--force" in again.stderr
    assert run(models, "--lam", "0.5", "-o", str(out), "--images", "0", "--force").exit_code == 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `bake` was called with, in place of baking."""
    found: dict[str, Any] = {}

    def bake(pipe: Any, anchor: Any, lam: Any, out: Any, **options: Any) -> Baked:
        found.update(options, anchor=anchor, lam=lam)
        return Baked(out, "pipeline", [])

    monkeypatch.setattr(deradiff.baking, "bake", bake)
    return found


def test_every_option_arrives(models: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    words = (
        "--method distill --schedule power:2 --over time --span=-0.5,1 --lora-rank 0 --samples 40 --train-steps 7 "
        "--batch 6 --accumulate 3 --gradient-checkpointing --learning-rate 0.01 --fold-guidance --seed 5 --steps 9 "
        "--guidance-scale 3 --batch-size 2 --images 4 --force"
    )
    result = run(models, "-l", "0.5", "-o", str(tmp_path), *PROMPTS, *words.split())
    assert result.exit_code == 0, result.output
    assert asked["lam"] == {"anchor": Power(2, lam=0.5, over="time")}
    assert asked["distillation"] == Distillation(
        lora_rank=None,
        samples=40,
        held_out=5,
        steps=7,
        batch=6,
        accumulate=3,
        gradient_checkpointing=True,
        learning_rate=0.01,
        fold_guidance=True,
        span=(-0.5, 1.0),
    )
    assert asked["sampler"] == Sampler(9, 3.0, 2)
    assert (asked["seed"], asked["images"], asked["force"], asked["method"]) == (5, 4, True, "distill")


def test_the_digits_have_prompts_guidance_and_settings_of_their_own(tmp_path: Path, asked: dict[str, Any]) -> None:
    words = ["bake", "digits", "-a", "bold=digits:30", "-a", "lora=digits:lora", "-l", "bold=0.5,lora=0.2"]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path), "--method", "distill"])
    assert result.exit_code == 0, result.output
    assert asked["anchor"] == {"bold": digits.anchor_path(30.0), "lora": digits.lora_path()}
    assert asked["lam"] == {"bold": 0.5, "lora": 0.2} and asked["distillation"] == SHIPPED
    assert asked["sampler"].guidance_scale == 1.5 and len(set(asked["prompts"])) > 300


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["-l", "nan"], ["--lam", "'nan'"]),
        (["-l", "0,1"], ["--lam 0,1"]),
        (["-l", "much"], ["--lam", "'much'"]),
        (["-l", "0.5", "--schedule", "power:2", "--images", "0"], ["method='distill'"]),
        (["-l", "0.5"], ["--prompts", "--images 0"]),
        (["-l", "0.5", "--lora-rank", "4", "--train-steps", "3"], ["--lora-rank, --train-steps:", "--method distill"]),
        (["-l", "0.5", "--method", "distill", "--span", "1"], ["--span 1"]),
        (["-l", "0.5", "--method", "distill"], ["0 different"]),
        (["-l", "0.5", "-a", "nowhere/to/be/found.safetensors"], ["NAME=SOURCE"]),
    ],
)
def test_wrong_words_are_a_sentence(models: Path, tmp_path: Path, words: list[str], values: list[str]) -> None:
    result = run(models, "-o", str(tmp_path / "out"), *words)
    assert result.exit_code == 2 and "Traceback" not in result.stderr, result.output
    assert re.search(naming(*values), result.stderr), result.stderr
    assert not list(tmp_path.iterdir())


def test_the_digits_are_baked_by_weights_as_any_model_is(tmp_path: Path) -> None:
    """What the digits are distilled with is nothing that was asked of interpolated weights."""
    out = tmp_path / "out"
    words = ["bake", "digits", "-a", "digits:100", "--lam", "0.5", "--images", "2", "--steps", "2", "-o", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_lora_is_asked_for(models: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    words = ["-l", "1", "-o", str(tmp_path), *PROMPTS, "--as", "lora"]
    assert run(models, *words, "--rank", "8", "--dialect", "kohya").exit_code == 0
    assert asked["lora"] == AsLora(rank=8, dialect="kohya")
    assert run(models, *words, "--error", "0.02").exit_code == 0
    assert asked["lora"] == AsLora(error=0.02)
    for wrong, value in ((["--rank", "8", "--error", "0.1"], "0.1"), (["--rank", "0"], "0"), (["--error", "1"], "1")):
        refused = run(models, *words, *wrong)
        assert refused.exit_code == 2 and value in refused.stderr
    alone = run(models, "-l", "1", "-o", str(tmp_path), *PROMPTS, "--rank", "8")
    assert alone.exit_code == 2 and "--as lora" in alone.stderr
