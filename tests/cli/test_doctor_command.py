"""`deradiff doctor`, from its words to its exit status."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import tiny
from deradiff.algorithm import step
from deradiff.cli import app
from deradiff.sweep import examining
from deradiff.sweep.examining import tried
from tiny_loras import lora_weights

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a reference pipeline and of anchors for it, and of another pipeline's denoiser."""
    folder = tmp_path_factory.mktemp("models")
    pipe, anchor, _ = tiny.make("sd")
    pipe.save_pretrained(folder / "reference")
    anchor.save_pretrained(folder / "anchor")  # type: ignore[operator]
    tiny.make("sdxl")[1].save_pretrained(folder / "other")  # type: ignore[operator]
    (folder / "lora").mkdir()
    save_file(lora_weights(pipe, seed=20), folder / "lora" / "pytorch_lora_weights.safetensors")
    return folder


@pytest.fixture
def doctor(models: Path) -> Run:
    def run(anchor: str, *words: str, reference: str = "reference") -> Result:
        return CliRunner().invoke(app, ["doctor", str(models / reference), "--anchor", str(models / anchor), *words])

    return run


def lines(result: Result, start: str) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith(start)]


def test_it_holds(doctor: Run) -> None:
    result = doctor("anchor", "--height", "16", "--width", "16")
    assert result.exit_code == 0, result.output
    assert len(lines(result, "holds")) == 6 and not lines(result, "FAILS")
    assert lines(result, "pipeline: StableDiffusionPipeline") and lines(result, "scheduler: DDIMScheduler")
    assert "diffusers" in lines(result, "versions: ")[0]


def test_it_holds_for_a_lora_under_another_scheduler(doctor: Run) -> None:
    size = ("--height", "16", "--width", "16")
    result = doctor("lora", "--scheduler", "euler-a", "--lam", "0.3", "--steps", "3", *size)
    assert result.exit_code == 0, result.output
    assert lines(result, "LoRAs in one batch: yes") and lines(result, "scheduler: EulerAncestralDiscreteScheduler")
    assert any("0.3" in line for line in lines(result, "holds"))


def test_it_holds_on_what_ships() -> None:
    result = CliRunner().invoke(app, ["doctor", "digits", "--anchor", "digits:lora"])
    assert result.exit_code == 0, result.output


def test_what_fails_is_status_1_and_the_line_that_fails(doctor: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    own = step.mixed
    monkeypatch.setattr(step, "mixed", lambda predictions, weights: own(predictions, weights.flip(0)))
    result = doctor("anchor", "--lam", "0.3", "--height", "16", "--width", "16")
    assert result.exit_code == 1
    (failed,) = lines(result, "FAILS")
    assert "λ = 0.3" in failed
    assert "1 of 6" in result.stdout


def test_another_architecture_is_refused(doctor: Run) -> None:
    result = doctor("other", "--height", "16", "--width", "16")
    assert result.exit_code == 1
    assert lines(result, "refused: ") and "architecture" in result.stdout


@pytest.mark.parametrize(
    ("reference", "anchor", "words", "named"),
    [
        ("nowhere", "anchor", [], ["nowhere"]),
        ("reference", "nowhere", [], ["nowhere"]),
        ("reference", "anchor", ["--lam", "1"], ["λ", "1"]),
        ("reference", "anchor", ["--lam", "nan"], ["nan"]),
        ("reference", "anchor", ["--width", "16"], ["width", "height"]),
        ("reference", "anchor", ["--scheduler", "flow-euler"], ["FlowMatchEulerDiscreteScheduler"]),
    ],
)
def test_wrong_input_is_status_2_and_one_sentence(
    doctor: Run, reference: str, anchor: str, words: list[str], named: list[str]
) -> None:
    result = doctor(anchor, *words, reference=reference)
    assert result.exit_code == 2
    assert not result.stdout
    assert all(name in result.stderr for name in named), result.stderr


def test_what_diffusers_own_tests_came_to(tmp_path: Path) -> None:
    record = tmp_path / "pipelines.json"
    assert tried("StableDiffusionPipeline", record) is None
    pipelines = {"StableDiffusionPipeline": {"verdict": "passes", "reasons": [], "checks": {}}}
    record.write_text(json.dumps({"versions": {"diffusers": "0.42.1"}, "pipelines": pipelines}))
    verdict = tried("StableDiffusionPipeline", record)
    assert verdict is not None and "passes" in verdict and "0.42.1" in verdict
    assert "passes" not in (tried("OtherPipeline", record) or "")
    assert tried("OtherPipeline", record)
    assert examining.TRIED.parts[-3:] == ("docs", "data", "pipelines.json")
