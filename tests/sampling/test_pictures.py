"""Images that are none: NaN and infinity from decoders and denoisers, and what safety checkers black out."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from typer.testing import CliRunner

import deradiff
import tiny
from deradiff import baking
from deradiff.cli import app
from deradiff.experiments import executors, running
from deradiff.experiments.export import write
from deradiff.experiments.plan import parse_plan
from deradiff.experiments.results import Results
from deradiff.experiments.store import IMAGE, Store
from deradiff.files.folders import RunFolder
from deradiff.sampling import pictures
from deradiff.sampling.particles import sample_particles
from deradiff.sampling.pictures import NotFinite
from deradiff.studio import drawing
from deradiff.studio.jobs import PageJob
from deradiff.study import sources
from deradiff.study.plan import parse_plan as parse_study
from deradiff.sweep import pipelines
from deradiff.sweep.batches import attempts, sample
from deradiff.sweep.drawing import draw
from deradiff.sweep.settings import Column, Settings
from messages import naming
from small_experiment import SMALL, reported, silent
from tiny_parts import feature_extractor, safety_checker

pixels = pytest.mark.attack("NaN pixels")
hidden = pytest.mark.attack("blacked out by a safety checker")
Decode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def decoding(pipe: Any, change: Decode) -> Any:
    """`pipe`, whose decoder returns what `change(latents, pixels)` makes of what it is."""
    kind = type(pipe.vae)

    def decode(self: Any, latents: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        output = kind.decode(self, latents, *arguments, **options)
        first = output[0] if isinstance(output, tuple) else output.sample
        first.copy_(change(latents, first))
        return output

    pipe.vae.__class__ = type(kind.__name__, (kind,), {"decode": decode})
    return pipe


def some(value: float) -> Decode:
    """A decoder that fails for about half of all latents, whichever batch they are in."""

    def change(latents: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        wrong = latents[:, 0, 0, 0] > latents[:, 0, 0, 1]
        return torch.where(wrong.view(-1, 1, 1, 1), torch.tensor(value), decoded)

    return change


# -- what is seen ------------------------------------------------------------------------------------------------------


@pixels
@pytest.mark.parametrize(
    ("kind", "output"),
    [("sd", "pil"), ("sd", "np"), ("sdxl", "pt"), ("sd3", "pil"), ("flux", "latent"), ("pixart", "pil")],
)
def test_looking_changes_nothing(kind: str, output: str) -> None:
    pipe, _, call = tiny.make(kind)
    expected = tiny.sample(pipe, call, output_type=output)
    with tiny.seeded(11):
        drawn = pictures.draw(pipe, generator=torch.Generator().manual_seed(11), **call | {"output_type": output})
    assert drawn.flaws == [None, None] and drawn.blacked_out == [False, False]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(drawn.images, expected, strict=True))
    assert "decode" not in vars(pipe.vae) and "postprocess" not in vars(pipe.image_processor)


@pixels
@pytest.mark.parametrize(
    ("kind", "value"), [("sd", torch.nan), ("sd", torch.inf), ("sdxl", -torch.inf), ("sd3", torch.nan)]
)
def test_a_decoder_that_fails_is_named(kind: str, value: float) -> None:
    pipe, _, call = tiny.make(kind)
    decoding(pipe, lambda latents, decoded: torch.where(torch.arange(2).view(2, 1, 1, 1) == 1, value, decoded))
    drawn = pictures.draw(pipe, **call | {"output_type": "pil"})
    first, second = drawn.flaws
    assert first is None and second is not None
    assert (second.origin, second.part, second.dtype) == ("decoder", "AutoencoderKL", torch.float32)
    with pytest.raises(NotFinite) as error:
        drawn.require_finite(["one", "two"])
    assert error.value.image == "two" and str(error.value).startswith("two")


@pixels
def test_slices_and_frames_find_their_image() -> None:
    pipe, _, call = tiny.make("sd")
    pipe.vae.enable_slicing()
    decoding(pipe, lambda latents, decoded: torch.where(torch.arange(2).view(2, 1, 1, 1) == 0, torch.nan, decoded))
    assert [flaw is None for flaw in pictures.draw(pipe, **call | {"output_type": "pil"}).flaws] == [False, True]


@pixels
def test_latents_that_were_not_finite_are_told_apart_from_the_decoder() -> None:
    pipe, _, call = tiny.make("sd")
    latents = tiny.noise(2, 4, 8, 8)
    latents[1, 0, 0, 0] = torch.nan
    for output, origin in (("pil", "latents"), ("latent", "model")):
        flaws = pictures.draw(pipe, **call | {"output_type": output, "latents": latents}).flaws
        assert flaws[0] is None and flaws[1] is not None
        assert (flaws[1].origin, flaws[1].part) == (origin, "UNet2DConditionModel")


@pixels
def test_a_pipeline_that_paints_pixels_is_looked_at() -> None:
    class Output:
        images = np.stack([np.zeros((4, 4, 3)), np.full((4, 4, 3), np.nan)])

    class Painter:
        def __call__(self, **_: Any) -> Output:
            return Output()

    flaws = pictures.draw(Painter()).flaws
    assert flaws[0] is None and flaws[1] is not None and flaws[1].origin == "model"


@pixels
def test_what_to_do_is_said_in_half_precision() -> None:
    for origin, words in (("decoder", ["float32", "sdxl-vae-fp16-fix"]), ("latents", ["float32"])):
        half = str(NotFinite(origin, "AutoencoderKL", torch.float16, "the image of 'a fox'"))  # type: ignore[arg-type]
        assert all(word in half for word in ["a fox", "float16", "--dtype", *words])
    assert "--dtype" not in str(NotFinite("decoder", "AutoencoderKL", torch.float32))


# -- makers of images --------------------------------------------------------------------------------------------------


@pixels
def test_a_sweep_ends_at_the_first_that_is_none_and_names_it(tmp_path: Path) -> None:
    pipe, anchor, _ = tiny.make("sd")
    decoding(pipe, some(torch.nan))
    settings = Settings(
        reference="r",
        anchors={"anchor": "a"},
        prompts=("a red fox",),
        columns=(Column(lam=0.5),),
        steps=2,
        seeds=tuple(range(6)),
        batch_size=4,
        device="cpu",
    )
    with deradiff.realign(pipe, anchor, 0.5) as dial:
        tried = list(attempts(pipe, dial, settings.drawings, batch_size=4))
        bad = [settings.drawings[place].seed for place, image, _ in tried if isinstance(image, NotFinite)]
        assert 0 < len(bad) < 6
        with pytest.raises(NotFinite) as error, RunFolder(tmp_path / "out") as folder:
            draw(settings, pipe, dial, folder)
        with pytest.raises(NotFinite):
            list(sample(pipe, dial, settings.drawings, batch_size=4))
    assert all(word in str(error.value) for word in ("a red fox", f"seed {bad[0]}", "0.5", "AutoencoderKL"))
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == bad[0]
    assert not (tmp_path / "out" / "record.json").exists()


@pixels
def test_generate_says_so_and_fails(tmp_path: Path) -> None:
    pipe, anchor, _ = tiny.make("sd")
    with torch.no_grad():
        pipe.vae.decoder.conv_in.bias.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "reference")
    anchor.save_pretrained(tmp_path / "anchor")  # type: ignore[operator]
    for more in ((), ("--particles", "2", "--scheduler", "euler-a")):
        words = ["generate", tmp_path / "reference", "-a", tmp_path / "anchor", "-p", "a red fox", "--lam", "0,1"]
        words += ["--seed", "3", "--steps", "2", "--out", tmp_path / "out", *more]
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 2
        assert all(word in result.output for word in ("NaN", "a red fox", "seed 3", "λ = 0"))
        assert not list(tmp_path.glob("out/images/*.png"))


@pixels
def test_particles_baking_and_the_studio_refuse(tmp_path: Path) -> None:
    pipe, anchor, _ = tiny.make("sd")
    decoding(pipe, lambda latents, decoded: decoded * torch.nan)
    with deradiff.realign(pipe, anchor, 0.5) as dial:
        pipe.scheduler = pipelines.scheduler_like(pipe.scheduler, "euler-a")
        with pytest.raises(NotFinite, match="particle"):
            sample_particles(pipe, "a red fox", 2, num_inference_steps=2)
        settings = Settings(
            reference="r", anchors={"anchor": "a"}, prompts=("a",), columns=(Column(lam=0.5),), seeds=(0,)
        )
        with pytest.raises(NotFinite):
            drawing.draw(settings.model_copy(update={"steps": 2}), pipe, dial, PageJob(), lambda _: None)
    anchor.save_pretrained(tmp_path / "anchor")  # type: ignore[operator]
    with pytest.raises(NotFinite):
        baking.bake(pipe, tmp_path / "anchor", 0.5, tmp_path / "baked", prompts=["a red fox"], images=1)
    assert not (tmp_path / "baked").exists()


# -- experiments -------------------------------------------------------------------------------------------------------

PLAN = SMALL | {
    "prompts": {"few": {"prompts": ["the digit one"], "seeds": "0:8"}},
    "features": ["digits"],
    "methods": [{"method": "reference"}, {"method": "realign", "targets": "all"}],
}


def experiment(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> running.Outcome:
    """Run `PLAN` with a pipeline that `change` was made to."""
    load = pipelines.load_pipeline
    monkeypatch.setattr(pipelines, "load_pipeline", lambda *given, **options: change(load(*given, **options)))
    plan = parse_plan(PLAN, "the plan")
    outcome = running.run(plan, folder, lambda: executors.InProcess(plan, "cpu", 1), silent)
    monkeypatch.undo()
    return outcome


@pixels
def test_an_experiment_keeps_the_failure_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = experiment(tmp_path / "run", monkeypatch, lambda pipe: decoding(pipe, some(torch.nan)))
    total = outcome.drawn + len(outcome.failures)
    assert outcome.drawn and outcome.failures and all(name == IMAGE for name, _, _ in outcome.failures)
    assert all("the digit" in error and "seed" in error and "NaN" in error for _, _, error in outcome.failures)
    assert outcome.scored == 2 * outcome.drawn
    with Store(tmp_path / "run", write=False) as store:
        assert len(store.drawn()) == outcome.drawn == len(list((tmp_path / "run" / "images").rglob("*.png")))
        plan = parse_plan(store.fact("plan"), "the plan")
        assert not set(store.drawn()) & {item for _, item, _ in outcome.failures}
        write(plan, store, tmp_path / "table", "csv")
        with pytest.raises(ValueError, match=naming("'few'", "'the digit one'", "NaN")):
            sources.located(_study(plan), tmp_path)
    rows = list(csv.DictReader((tmp_path / "table" / "images.csv").open(encoding="utf-8")))
    assert {row["image"] for row in rows if row["absent"]} == {item for _, item, _ in outcome.failures}
    assert all(not row["digits"] and not row["file"] for row in rows if row["absent"])
    again = running.run(plan, tmp_path / "run", lambda: executors.InProcess(plan, "cpu", 1), silent)
    assert again.drawn == 0 and len(again.failures) == len(outcome.failures)
    retried = running.run(plan, tmp_path / "run", lambda: executors.InProcess(plan, "cpu", 1), silent, again=True)
    assert retried.drawn == total - outcome.drawn and not retried.failures


def _study(plan: Any) -> Any:
    answer = {
        "name": "few",
        "experiment": "run",
        "sampling": "ancestral",
        "prompt_set": "few",
        "seeds": list(range(9)),
        "methods": {arm.name: arm.name for arm in plan.arms()[:2]},
        "prompts": list(plan.prompts["few"].prompts),
    }
    return parse_study(
        {"name": "s", "pairs_per_participant": 1, "attention_checks": 0, "configurations": [answer]}, "the study"
    )


@pixels
def test_a_prediction_that_is_not_finite_fails_its_own_image_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = UNet2DConditionModel.forward

    def failing(self: Any, sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        output = forward(self, sample, *arguments, **options)
        wrong = sample[:, 0, 0, 0] > 0.5
        output[0][wrong] = torch.nan
        return output

    monkeypatch.setattr(UNet2DConditionModel, "forward", failing)  # of every model, as hooks have to be
    outcome = experiment(tmp_path / "run", monkeypatch, lambda pipe: pipe)
    assert outcome.drawn and outcome.failures


@pixels
def test_the_command_ends_with_an_error_and_the_report_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = pipelines.load_pipeline
    monkeypatch.setattr(
        pipelines, "load_pipeline", lambda *given, **options: decoding(load(*given, **options), some(torch.inf))
    )
    (tmp_path / "plan.yaml").write_text(json.dumps(PLAN))
    words = ["experiment", "run", tmp_path / "plan.yaml", "--out", tmp_path / "run", "--workers", "1"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 1 and "infinite" in result.output
    said = CliRunner().invoke(app, ["experiment", "status", str(tmp_path / "run")])
    assert said.exit_code == 0 and "infinite" in said.output
    assert "could not be drawn" in reported(tmp_path / "run")


# -- safety checkers ---------------------------------------------------------------------------------------------------


def checked(pipe: Any, blacks_out: bool = True) -> Any:
    pipe.register_modules(safety_checker=safety_checker(blacks_out), feature_extractor=feature_extractor())
    return pipe


def half_hidden(pipe: Any) -> Any:
    """With a checker that takes every second image of a batch."""

    def check(image: torch.Tensor, device: Any, dtype: Any) -> tuple[torch.Tensor, list[bool]]:
        image[1::2] = 0  # diffusers then takes it for [0, 1]
        return image, [row % 2 == 1 for row in range(len(image))]

    pipe.run_safety_checker = check
    return pipe


@hidden
def test_generate_records_and_counts_them(tmp_path: Path) -> None:
    for blacks_out in (True, False):
        pipe, anchor, _ = tiny.make("sd")
        folder = tmp_path / str(blacks_out)
        checked(pipe, blacks_out).save_pretrained(folder / "reference")
        anchor.save_pretrained(folder / "anchor")  # type: ignore[operator]
        words = ["generate", folder / "reference", "-a", folder / "anchor", "-p", "a red fox", "--lam", "0,1"]
        result = CliRunner().invoke(app, list(map(str, [*words, "--steps", "2", "--out", folder / "out"])))
        assert result.exit_code == 0, result.output
        record = json.loads((folder / "out" / "record.json").read_text(encoding="utf-8"))
        assert [image.get("blacked_out", False) for image in record["images"]] == [blacks_out] * 2
        assert [verdict.get("blacked_out", 0) for verdict in record["verdicts"]] == [int(blacks_out)] * 2
        assert all(("1 of 1 images blacked out" in verdict["words"]) == blacks_out for verdict in record["verdicts"])
        assert ("blacked" in result.output) == blacks_out
        with Image.open(folder / "out" / record["images"][0]["file"]) as image:
            assert (np.asarray(image).max() == 0) == blacks_out


@hidden
def test_an_experiment_has_no_pictures_and_no_scores_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = experiment(tmp_path / "run", monkeypatch, half_hidden)
    assert outcome.blacked_out and outcome.drawn and not outcome.failures
    assert outcome.scored == 2 * outcome.drawn == 2 * len(list((tmp_path / "run" / "images").rglob("*.png")))
    with Store(tmp_path / "run", write=False) as store:
        results = Results(parse_plan(store.fact("plan"), "the plan"), store)
        assert len(results.blacked_out) == outcome.blacked_out
        assert not results.blacked_out & (store.scores("digits").keys() | store.features("digits").keys())
    said = CliRunner().invoke(app, ["experiment", "status", str(tmp_path / "run")])
    assert re.search(rf"\b{outcome.blacked_out}\b.*blacked", said.output)
    assert "Blacked out by" in reported(tmp_path / "run")


@hidden
def test_particles_and_the_studio_know_them() -> None:
    pipe, anchor, _ = tiny.make("sd")
    half_hidden(checked(pipe))
    with deradiff.realign(pipe, anchor, 0.5) as dial:
        pipe.scheduler = pipelines.scheduler_like(pipe.scheduler, "euler-a")
        swarm = sample_particles(
            pipe, "a red fox", 6, num_inference_steps=2, generator=torch.Generator().manual_seed(0), ess_threshold=0
        )
        black = [np.asarray(image).max() == 0 for image in swarm.images]
        assert swarm.blacked_out.tolist() == black and any(black) and not all(black)
        settings = Settings(
            reference="r",
            anchors={"anchor": "a"},
            prompts=("a red fox",),
            seeds=(0,),
            steps=2,
            device="cpu",
            columns=tuple(Column(lam=lam) for lam in np.linspace(0, 1, 6).tolist()),
        )
        shown = drawing.scored(drawing.draw(settings, pipe, dial, PageJob(), lambda _: None), [Brightness()])
    assert {drawn.blacked_out for drawn in shown} == {np.asarray(drawn.image).max() == 0 for drawn in shown}
    assert any(drawn.blacked_out for drawn in shown)
    assert all(isinstance(drawn.scores["brightness"], str) == drawn.blacked_out for drawn in shown)
    assert all(any("blacked" in word for word in drawn.warned) == drawn.blacked_out for drawn in shown)


class Brightness:
    """A reward that would score a black picture."""

    name = "brightness"

    def __call__(self, images: Any, prompts: Any) -> torch.Tensor:
        return torch.tensor([float(np.asarray(image).mean()) for image in images])
