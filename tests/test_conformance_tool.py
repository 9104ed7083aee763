"""`python tests/conformance` on a checkout of its own: what works passes, what cannot be realigned never does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

WITH_ORACLES = {"half", "per_image", "sweep", "lora"}

FAKE = """
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from tiny_parts import sd_components


class OrdinaryTests:
    pipeline_class = StableDiffusionPipeline

    def get_dummy_components(self):
        torch.manual_seed(0)
        return sd_components()

    def get_dummy_inputs(self, device, seed=0):
        return {
            "prompt": "a red fox",
            "generator": torch.Generator().manual_seed(seed),
            "num_inference_steps": 2,
            "output_type": "pil",
            "height": 16,
            "width": 16,
        }


class OwnStepsPipeline(DiffusionPipeline):
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, generator, steps):
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            latents = latents - self.unet(latents, timestep, torch.ones(1, 5, 16)).sample / steps
        return {"images": latents}


class OwnStepsTests:
    pipeline_class = OwnStepsPipeline
    steps = 3

    def get_dummy_components(self):
        torch.manual_seed(0)
        return {name: sd_components()[name] for name in ("unet", "scheduler")}

    def get_dummy_inputs(self):
        return {"generator": torch.Generator().manual_seed(0), "steps": self.steps}


class OwnSingleStepPipeline(OwnStepsPipeline):
    pass


class OwnSingleStepTests(OwnStepsTests):
    pipeline_class = OwnSingleStepPipeline
    steps = 1

    def get_dummy_components(self):
        return super().get_dummy_components()


class MistakenPipeline(StableDiffusionPipeline):
    pass


class MistakenTests(OrdinaryTests):
    pipeline_class = MistakenPipeline

    def get_dummy_components(self):
        from deradiff.algorithm import step

        step.mixed = lambda predictions, weights: predictions[-1]  # in this class's own process
        return super().get_dummy_components()


class NoPipelineTests:
    def test_nothing(self):
        pass
"""


def run(checkout: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    return subprocess.run(
        [sys.executable, str(TESTS / "conformance"), str(checkout), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = tmp_path_factory.mktemp("checkout")
    folder = checkout / "tests" / "pipelines" / "tiny"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "test_tiny.py").write_text(FAKE)
    (folder / "test_broken.py").write_text("import a_module_that_is_nowhere")
    return checkout


@pytest.fixture(scope="module")
def out(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    run(checkout, "tiny", "own.DDPM", "own.KarrasVe", "--out", out, "--jobs", 2).check_returncode()
    return out


def test_an_ordinary_pipeline_passes_every_check(out: Path) -> None:
    result = json.loads((out / "results" / "tiny.test_tiny.OrdinaryTests.json").read_text())
    assert {name: check["outcome"] for name, check in result["checks"].items()} == dict.fromkeys(
        json.loads((out / "pipelines.json").read_text())["checks"], "passes"
    )
    assert {"lock_step", "wrapper"} <= set(result["checks"]["half"]["numbers"])  # neither oracle failed


@pytest.mark.parametrize("pipeline", ["OwnStepsPipeline", "OwnSingleStepPipeline"])
def test_a_pipeline_that_takes_steps_by_itself_does_not_pass(out: Path, pipeline: str) -> None:
    record = json.loads((out / "pipelines.json").read_text())["pipelines"][pipeline]
    assert record["verdict"] == "refused" and record["checks"]["half"] == ["refused"]
    assert any("cannot be realigned" in reason for reason in record["reasons"])


def test_a_mistake_of_the_library_is_found(out: Path) -> None:
    record = json.loads((out / "pipelines.json").read_text())["pipelines"]["MistakenPipeline"]
    assert record["verdict"] == "wrong" and record["checks"]["reference"] == ["passes", 0.0]
    assert {name for name, (outcome, *_) in record["checks"].items() if outcome == "wrong"} == WITH_ORACLES


def test_the_summary_counts_verdicts_and_tells_versions_and_what_was_not_imported(out: Path) -> None:
    record = json.loads((out / "pipelines.json").read_text())
    assert record["counts"] == {"wrong": 1, "crashes": 0, "refused": 3, "passes": 2, "not tried": 0}
    assert set(record["versions"]) == {"deradiff", "diffusers", "torch", "transformers", "peft"}
    assert list(record["not imported"]) == ["tiny.test_broken"]
    assert not list((out / "results").glob("*.log"))


def test_cases_of_our_own_are_tried_like_the_others(out: Path) -> None:
    record = json.loads((out / "pipelines.json").read_text())
    passing, refused = (record["pipelines"][name] for name in ("DDPMPipeline", "KarrasVePipeline"))
    assert passing["verdict"] == "passes" and passing["tests"] == ["own.DDPMPipeline"]
    assert refused["verdict"] == "refused" and refused["reasons"]
    assert record["left out"]


def test_a_record_takes_the_pipelines_of_another_run_in(checkout: Path, out: Path, tmp_path: Path) -> None:
    whole = json.loads((out / "pipelines.json").read_text())
    earlier = {**whole, "pipelines": {"MistakenPipeline": whole["pipelines"]["MistakenPipeline"]}}
    file, parts = tmp_path / "pipelines.json", tmp_path / "parts"
    file.write_text(json.dumps(earlier))
    shutil.copytree(out / "results", parts / "results")
    (parts / "results" / "tiny.test_tiny.MistakenTests.json").unlink()
    arguments = ("own.DDPM", "--resume", "--out", parts, "--add", file)
    run(checkout, *arguments).check_returncode()
    assert json.loads(file.read_text()) == whole
    file.write_text(json.dumps(earlier | {"checkout": "2001-01-01"}))
    refused = run(checkout, *arguments)
    assert refused.returncode == 2 and "2001-01-01" in refused.stderr
