"""The command line, from its words to its files, on a tiny random Stable Diffusion."""

import inspect
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner, Result

import deradiff
import tiny
from deradiff.algorithm.schedules import Power
from deradiff.cli import app, demo, terminal
from deradiff.files.folders import RunFolder
from deradiff.files.records import read_png
from deradiff.files.writing import atomic_file
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.shared_settings import UnmirroredState
from deradiff.sweep import drawing
from deradiff.sweep.alignment_records import known_beta
from deradiff.sweep.pipelines import anchor_source
from deradiff.worlds import digits
from messages import naming
from studies.digits.__main__ import app as studies

STEPS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a reference pipeline and of an anchor for it."""
    folder = tmp_path_factory.mktemp("models")
    pipe, anchor, _ = tiny.make("sd")
    pipe.save_pretrained(folder / "reference")
    anchor.save_pretrained(folder / "anchor")  # type: ignore[operator]
    return folder / "reference", folder / "anchor"


Run = Callable[..., Result]


@pytest.fixture
def generate(models: tuple[Path, Path], tmp_path: Path) -> Run:
    """`deradiff generate` on the tiny models, into `tmp_path / "out"`."""

    def run(*words: str, anchor: bool = True) -> Result:
        reference, aligned = map(str, models)
        chosen = ["--anchor", aligned] if anchor else []
        fixed = ["generate", reference, *chosen, "--steps", str(STEPS), "--out", str(tmp_path / "out")]
        return CliRunner().invoke(app, [*fixed, *words])

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@cache
def pipeline(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_hand(models: tuple[Path, Path], prompt: str, seed: int, lam: Any) -> np.ndarray:
    """One image by itself, through the library's own front door."""
    pipe = pipeline(models[0])
    with deradiff.realign(pipe, models[1], lam):
        image = pipe(prompt, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed)).images[0]
    return np.asarray(image).astype(int)


# -- what a run writes -------------------------------------------------------------------------------------------------


def test_every_image_is_what_the_library_draws_from_its_seed_and_lam(
    generate: Run, models: tuple[Path, Path], tmp_path: Path
) -> None:
    result = generate("-p", "a red fox", "-p", "two owls", "--lam", "0,0.5,1", "-s", "0:1", "--batch-size", "5")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert len(record["images"]) == 2 * 2 * 3
    for listed in record["images"]:
        drawn = pixels(tmp_path / "out" / listed["file"])
        expected = by_hand(models, listed["prompt"], listed["seed"], listed["lam"])
        assert np.abs(drawn - expected).max() <= 1, listed
    at_zero, at_one = (pixels(tmp_path / "out" / record["images"][i]["file"]) for i in (0, 2))
    assert np.abs(at_zero - at_one).max() > 10


def test_images_and_record_carry_every_setting(generate: Run, tmp_path: Path) -> None:
    words = ["--lam", "0.5,1", "--anchor-beta", "2000", "--guidance-scale", "3", "--scheduler", "euler-a"]
    result = generate("-p", "Ein Fuchs, Überall Schnee", *words, "--negative-prompt", "blurry")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8"))
    first = read_png(tmp_path / "out" / record["images"][0]["file"])
    assert first["prompt"] == "Ein Fuchs, Überall Schnee"
    assert (first["seed"], first["lam"], first["beta"]) == (0, 0.5, 4000)
    assert first["scheduler"] == "EulerAncestralDiscreteScheduler"
    own = {"prompts": ["Ein Fuchs, Überall Schnee"], "seeds": [0], "columns": [{"lam": 0.5, "schedule": None}]}
    assert first["settings"] == record["settings"] | own
    assert len(record["settings"]["columns"]) == 2
    assert first["settings"]["negative_prompt"] == "blurry"
    assert (first["guidance_scale"], first["dtype"], first["mixed"]) == (3, "float32", "prediction")
    assert set(first["versions"]) >= {"deradiff", "torch", "diffusers"}
    assert drawing.Settings(**first["settings"]).model_dump(mode="json") == first["settings"]
    assert read_png(tmp_path / "out" / "sheet.png")["images"] == record["images"]


def test_the_result_paths_are_printed(generate: Run, tmp_path: Path) -> None:
    printed = generate("-p", "a", "--lam", "1").stdout.splitlines()
    assert printed[-3:-1] == [str(tmp_path / "out" / name) for name in ("sheet.png", "record.json")]


def test_a_schedule_is_multiplied_with_lam(generate: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    result = generate("-p", "a red fox", "--lam", "0.5,1.5", "--schedule", "power:2", "--over", "time")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    expected = by_hand(models, "a red fox", 0, Power(2, lam=1.5, over="time"))
    assert np.abs(pixels(tmp_path / "out" / record["images"][1]["file"]) - expected).max() <= 1
    assert record["images"][1]["beta"] is None


def test_several_anchors_each_with_a_lam(generate: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    anchors = ["-a", f"style={models[1]}", "-a", f"text={models[0]}"]
    result = generate("-p", "a red fox", *anchors, "--lam", "style=0.5", "--lam", "style=0.2,text=0.4", anchor=False)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [listed["lam"] for listed in record["images"]] == [{"style": 0.5, "text": 0}, {"style": 0.2, "text": 0.4}]
    for listed in record["images"]:  # the anchor called text is the reference once more
        expected = by_hand(models, "a red fox", 0, listed["lam"]["style"])
        assert np.abs(pixels(tmp_path / "out" / listed["file"]) - expected).max() <= 1


def test_interpolated_weights_run_a_lam_at_a_time(generate: Run, tmp_path: Path) -> None:
    result = generate("-p", "a", "-p", "b", "--lam", "0:1:0.5", "--method", "interpolate")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["mixed"] == "weights"
    assert len({pixels(tmp_path / "out" / listed["file"]).tobytes() for listed in record["images"]}) == 6


def test_offloading_draws_the_same(generate: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    result = generate("-p", "a red fox", "--lam", "0.5", "--offload", "--device", "cpu")
    assert result.exit_code == 0, result.output
    image = next((tmp_path / "out" / "images").iterdir())
    assert np.abs(pixels(image) - by_hand(models, "a red fox", 0, 0.5)).max() <= 1


# -- folders that hold something ---------------------------------------------------------------------------------------


def test_a_folder_that_holds_files_is_refused_and_a_run_replaced_only_with_force(generate: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert generate("-p", "a", "--lam", "0,1").exit_code == 0
    before = (out / "record.json").read_bytes()
    refused = generate("-p", "b", "--lam", "1")
    assert refused.exit_code == 2
    assert str(out) in refused.stderr and "--force" in refused.stderr
    assert (out / "record.json").read_bytes() == before
    assert generate("-p", "b", "--lam", "1", "--force").exit_code == 0
    assert [file.name for file in (out / "images").iterdir()] == ["000-b-seed0-00-lam1.png"]


def test_force_keeps_its_hands_off_other_peoples_files(generate: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    result = generate("-p", "a", "--force")
    assert result.exit_code == 2
    assert "thesis.txt" in result.stderr
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["record.json", "sheet.png", "images/mine.png", "deep/.x.png.7.partial", "a.partial"])
def test_force_tells_a_run_from_its_content_and_not_by_name(generate: Run, tmp_path: Path, name: str) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"mine": 1}')
    result = generate("-p", "a", "--force")
    assert result.exit_code == 2
    assert f"{mine.name} was not written by a run" in " ".join(result.stderr.split())
    assert mine.read_text() == '{"mine": 1}'


def test_a_demo_replaces_demos_only(generate: Run, tmp_path: Path) -> None:
    assert generate("-p", "a", "--lam", "1").exit_code == 0
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.*")}
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "holds another run" in " ".join(result.stderr.split())
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.*")} == before
    record = tmp_path / "out" / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"measured": []}))
    with RunFolder(tmp_path / "out", force=True, kind="measured"):
        pass


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "out", Path("/proc/nope/out"), tmp_path / ("long" * 100)):
        with pytest.raises(OSError, match=naming(folder)), RunFolder(folder):
            pass
    with RunFolder(tmp_path / "new" / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failing_run_leaves_the_older_one_alone(generate: Run, tmp_path: Path) -> None:
    assert generate("-p", "a", "--lam", "1").exit_code == 0
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.*")}
    assert generate("-p", "b", "--lam", "1", "--force", "--scheduler", "flow-euler").exit_code == 2
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.*")} == before


def test_an_interrupted_run_leaves_whole_images_and_no_record(
    generate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, calls = StableDiffusionPipeline.__call__, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    interrupted.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", interrupted)
    result = generate("-p", "a", "--lam", "0,0.5,1", "--batch-size", "2")
    assert result.exit_code != 0
    left = sorted((tmp_path / "out" / "images").iterdir())
    assert not (tmp_path / "out" / "record.json").exists()
    assert [read_png(file)["lam"] for file in left] == [0, 0.5]


def test_a_file_that_cannot_be_written_whole_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(file) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ([], ["--prompt", "--prompts"]),
        (["-p", "  "], ["empty"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt"]),
        (["-p", "a", "--lam", "nan"], ["--lam", "'nan'"]),
        (["-p", "a", "--lam", "0:1:0"], ["--lam", "'0:1:0'"]),
        (["-p", "a", "--lam", "0:1e999999:1e-999999"], ["--lam", "'1e999999'"]),
        (["-p", "a", "--lam", "0:1e300:1e-300"], ["'0:1e300:1e-300'", 1000]),
        (["-p", "a", "--lam", "1e400"], ["--lam", "'1e400'"]),
        (["-p", "a", "--lam", "half"], ["--lam", "'half'"]),
        (["-p", "a", "--lam", "style=1"], ["--lam", "'style'", "anchor"]),
        (["-p", "a", "--seed", "1.5"], ["seed", 1.5]),
        (["-p", "a", "--seed", "-1"], ["seed", -1]),
        (["-p", "a", "--seed", "0:1500"], ["'0:1500'", 1000]),
        (["-p", "a", "--schedule", "linear"], ["'linear'", "constant"]),
        (["-p", "a", "--schedule", "power:-1"], ["p", -1.0]),
        (["-p", "a", "--anchor", "again"], ["NAME=SOURCE"]),
        (["-p", "a", "--scheduler", "nope"], ["'nope'"]),
        (["-p", "a", "--scheduler", "edm"], ["EDMEulerScheduler"]),
        (["-p", "a", "--anchor-beta", "-5"], ["anchor_beta", -5.0]),
        (["-p", "a", "--device", "abacus"], ["'abacus'"]),
        (["-p", "a", "--device", "meta"], ["meta"]),
        (["-p", "a", "--device", "vulkan"], ["vulkan"]),
        (["-p", "a", "--device", "xpu"], ["xpu"]),
        (["-p", "a", "--path", "posterior", "--scheduler", "unipc"], ["UniPCMultistepScheduler"]),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    generate: Run, tmp_path: Path, words: list[str], values: list[object]
) -> None:
    result = generate(*words)
    assert result.exit_code == 2, result.output
    assert re.search(naming(*values), " ".join(result.stderr.split())), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["quality", "--json", "/nowhere/x.json"], ["--json", "/nowhere/x.json"]),
        (["quality", "--guidance-scale", "inf"], ["--guidance-scale", "inf"]),
        (["build", "--out", __file__], [__file__]),
    ],
)
def test_wrong_input_of_the_digits_is_refused_before_they_are_loaded(
    words: list[str], values: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "load_pipeline", None)
    result = CliRunner().invoke(studies, words)
    assert result.exit_code == 2, result.output
    assert re.search(naming(*values), " ".join(result.stderr.split())), result.stderr


def test_errors_of_deradiff_are_one_sentence_and_bugs_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (DialError("turn it back"), UnmirroredState("unfuse it")):
        with pytest.raises(typer.Exit), terminal.refusing_wrong_input():
            raise error
        assert capsys.readouterr().err == f"error: {error}\n"
    for bug in (RuntimeError("shapes"), TypeError("none"), AssertionError()):
        with pytest.raises(type(bug)), terminal.refusing_wrong_input():
            raise bug


def test_running_out_of_memory_says_what_to_do(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    monkeypatch.setattr(drawing, "load_pipeline", too_much)
    result = generate("-p", "a")
    assert result.exit_code == 1
    assert "--batch-size" in result.stderr


@pytest.mark.parametrize("missing", ["reference", "anchor"])
def test_a_model_that_is_not_there(models: tuple[Path, Path], tmp_path: Path, missing: str) -> None:
    names = {"reference": str(models[0]), "anchor": str(models[1])} | {missing: str(tmp_path / "nowhere")}
    words = ["generate", names["reference"], "-a", names["anchor"], "-p", "a", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_anchor_equal_to_the_reference_is_warned_about(models: tuple[Path, Path], tmp_path: Path) -> None:
    reference = str(models[0])
    words = ["generate", reference, "-a", reference, "-p", "a", "--lam", "1", "--steps", "1"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "warning:" in result.stderr


# -- the digits --------------------------------------------------------------------------------------------------------


def test_the_demo_draws_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, smaller in {"LAMS": (0.0, 1.0), "PROMPTS": ("a red seven",), "MEASURED": 10}.items():
        monkeypatch.setattr(demo, name, smaller)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "demo" / "record.json").read_text())
    reference, anchor, annealed = record["measured"]
    assert reference["reward"] < annealed["reward"] < anchor["reward"]
    assert (reference["beta"], anchor["beta"], annealed["beta"]) == (None, digits.BETAS[-2], None)
    assert len(record["images"]) == 3
    assert result.stdout.rstrip().splitlines()[-1] == str(tmp_path / "demo" / "record.json")
    assert all(f"{row['reward']:.3f}" in result.stdout for row in record["measured"])


def test_anchors_of_the_digits_go_by_their_beta(tmp_path: Path) -> None:
    assert anchor_source("digits:lora") == digits.lora_path()
    assert anchor_source(f"digits:{digits.BETAS[0]:g}") == digits.anchor_path(digits.BETAS[0])
    assert known_beta("digits:lora") == digits.LORA_BETA
    assert known_beta("somebody/something") is None
    (tmp_path / "alignment.json").write_text(json.dumps({"made_of": {"beta": 250.0}}))
    assert known_beta(str(tmp_path)) == 250
    for nonsense in ("{", "[]", '{"made_of": {"beta": -1}}', '{"made_of": {"beta": "much"}}'):
        (tmp_path / "alignment.json").write_text(nonsense)
        assert known_beta(str(tmp_path)) is None
    for unknown in ("digits:7", "digits:abc"):
        for asked in (anchor_source, known_beta):
            with pytest.raises(ValueError, match=naming(f"'{unknown}'")):
                asked(unknown)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == deradiff.__version__
