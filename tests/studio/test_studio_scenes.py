"""A page's settings: their bounds, as a link and back, as a program and a command that draw the same image."""

import shlex
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from deradiff.algorithm.schedules import Power, Sigmoid, Spline, Step
from deradiff.cli import app
from deradiff.files.records import read_png, write_png
from deradiff.studio import curves, drawing, presets, scenes, snippets
from deradiff.studio.jobs import PageJob
from deradiff.studio.models import LoadedModels, MachineSettings
from deradiff.studio.sources import Sources
from deradiff.sweep.settings import Settings
from messages import naming

SPLINE = Spline([(0, 0), (0.311, 0.2), (0.8, 0.75), (1, 1)])

SCENES: dict[str, Settings] = {
    "plain": scenes.scene("digits", ["digits:100"], "a red seven", [0.5], seed=7),
    "annealed": scenes.scene(
        "digits", ["digits:100"], "a 'five' & a \"six\"", [0.8], schedule=SPLINE.to_dict(), scheduler="euler-a", steps=9
    ),
    "several": scenes.scene(
        "digits",
        ["digits:1000", "digits:lora"],
        "the digit two",
        [0.3, 0.25],
        schedule=Power(1.5).to_dict(),
        guidance_scale=2.0,
        negative_prompt="green",
        steps=6,
        scheduler="ddpm",
    ),
    "family over time": scenes.scene(
        "digits", ["digits:30"], "a blue eight", [1.0], schedule=Sigmoid(8, over="time").to_dict(), steps=5
    ),
    "step": scenes.scene("digits", ["digits:30"], "a four", [1.5], schedule=Step(0.4).to_dict(), steps=5),
}


@pytest.fixture(scope="module")
def models() -> LoadedModels:
    return LoadedModels(Sources(), MachineSettings(device="cpu"))


def drawn(models: LoadedModels, settings: Settings) -> drawing.DrawnImage:
    pipe, dial = models.realigned(settings)
    [found] = drawing.draw(settings, pipe, dial, PageJob(), lambda _: None)
    return found


@pytest.mark.parametrize("name", SCENES)
def test_a_link_holds_all_of_the_settings(name: str) -> None:
    settings = SCENES[name]
    query = scenes.written(settings)
    assert scenes.read(query) == settings
    assert scenes.read(f"http://127.0.0.1:7860/?token=abcdefghijklmnop&{query}\n") == settings


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.cases(2)
def test_the_program_draws_the_same_image(name: str, models: LoadedModels) -> None:
    found: dict[str, Any] = {}
    exec(snippets.program(SCENES[name], "cpu", "float32"), found)
    mine = np.asarray(drawn(models, SCENES[name]).image, dtype=int)
    assert np.abs(mine - np.asarray(found["image"], dtype=int)).max() <= 1  # a pair's batch may round otherwise


@pytest.mark.parametrize("name", ["annealed", "several"])
def test_the_command_draws_the_same_image(name: str, models: LoadedModels, tmp_path: Path) -> None:
    words = shlex.split(snippets.command(SCENES[name], device="cpu"))
    assert words[0] == "deradiff" and words[-2:] == ["--out", "image"]
    result = CliRunner().invoke(app, [*words[1:-1], str(tmp_path / "image")])
    assert result.exit_code == 0, result.output
    [file] = (tmp_path / "image" / "images").iterdir()
    found = drawn(models, SCENES[name])
    assert file.name == found.name
    write_png(tmp_path / "mine.png", found.image, found.record)
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(found.image))
    theirs, mine = read_png(file), read_png(tmp_path / "mine.png")
    assert mine.keys() == theirs.keys()
    assert {k: v for k, v in mine.items() if k != "settings"} == {k: v for k, v in theirs.items() if k != "settings"}


def test_an_image_brings_its_settings_back(models: LoadedModels) -> None:
    for settings in SCENES.values():
        if settings.steps < 20:
            assert scenes.of_record(drawn(models, settings).record) == settings
    assert scenes.of_record(SCENES["several"].model_dump()) == SCENES["several"]  # a preset


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "settings"),
        ({"settings": 3}, "settings"),
        (SCENES["plain"].model_dump() | {"method": "interpolate"}, "interpolated"),
        (SCENES["plain"].model_dump() | {"particles": 4}, "particles"),
        (SCENES["plain"].model_dump() | {"tolerance": 0.1}, "exactly"),
        (SCENES["plain"].model_dump() | {"anchor_revision": "main"}, "revision"),
        (SCENES["plain"].model_dump() | {"steps": 1000}, naming("steps", 1, 200, 1000)),
        ({"settings": SCENES["plain"].model_dump(), "lam": 7.0}, naming("λ", 0, 2, 7)),
        ({"settings": SCENES["plain"].model_dump(), "prompt": "x" * 9000}, "9,000"),
    ],
)
def test_a_record_that_the_studio_has_no_dial_for_is_refused(record: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scenes.of_record(record)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("hello", "'hello'"),
        ("", "prompt, reference, anchor, lam"),
        ("prompt=a&reference=digits&anchor=digits:100", naming("lam")),
        ("prompt=a&prompt=b&reference=digits&anchor=digits:100&lam=1", naming("prompt", "twice")),
        ("prompt=a&reference=digits&anchor=digits:100&lam=1&sudo=1", "'sudo'"),
        ("prompt=a&reference=digits&anchor=digits:100&lam=much", "'much'"),
        ("prompt=a&reference=digits&anchor=digits:100&lam=nan", naming("lam", "'nan'")),
        ("prompt=a&reference=digits&anchor=digits:100&lam=2.5", naming("λ", 0, 2, 2.5)),
        ("prompt=a&reference=digits&anchor=digits:100&lam=1&steps=2.5", naming("steps", 2.5)),
        ("prompt=a&reference=digits&anchor=digits:100&lam=1&seed=-1", naming("seed", 0, -1)),
        ("prompt=a&reference=digits&anchor=digits:100&lam=1&scheduler=fast", "'fast'"),
        ("prompt=a&reference=digits&anchor=digits:100&lam=1&schedule=cubic:1", "'cubic:1'"),
        ("prompt=a&reference=digits&anchor=digits:100&lam=1&schedule=spline:0/1,1/0", naming((0, 0), (1, 1))),
        ("prompt=a&reference=digits&anchor=digits:100&lam=1&over=tea", "over='tea'"),
        ("prompt=a&reference=digits&anchor=digits:100&lam=1&lam=0.5", naming("1 anchors", "λ", 2)),
        ("prompt=a&reference=digits&anchor=digits:1&anchor=digits:1&lam=1&lam=1", naming("anchors", 1, 3, 2)),
        ("prompt=%20&reference=digits&anchor=digits:100&lam=1", "prompt first"),
        ("prompt=" + "x" * 20_000, "16,000"),
    ],
)
def test_a_link_that_cannot_be_followed_says_why(query: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scenes.read(query)


def test_a_prompt_of_ten_thousand_characters_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=naming("10,000", "2,000")):
        scenes.scene("digits", ["digits:100"], "x" * 10_000, [0.5])
    with pytest.raises(ValueError, match=naming("negative prompt", "10,000")):
        scenes.scene("digits", ["digits:100"], "x", [0.5], negative_prompt="x" * 10_000)


def test_markup_and_quotes_travel_unharmed() -> None:
    prompt = "<script>alert('1')</script> & \"$(rm -rf .)\" `x` %41 +?\nü\\"
    settings = scenes.scene("digits", ["digits:100"], prompt, [0.5])
    shown = prompt.replace("\n", " ")
    assert scenes.read(scenes.written(settings)).prompts == (shown,)
    assert "<" not in scenes.written(settings)
    words = shlex.split(snippets.command(settings))
    assert words[words.index("--prompt") + 1] == shown
    assert repr(shown) in snippets.program(settings, "cpu", "float32")
    assert quote(shown) in scenes.written(settings)


def test_a_prompt_is_no_option_and_no_command(tmp_path: Path) -> None:
    prompt = "--a; touch PWNED #"
    settings = scenes.scene("digits", ["digits:100"], prompt, [0.5], negative_prompt="-n $(touch PWNED)")
    words = shlex.split(snippets.command(settings))
    assert f"--prompt={prompt}" in words and "--negative-prompt=-n $(touch PWNED)" in words
    shown = subprocess.run(
        ["sh", "-c", snippets.command(settings).replace("deradiff", "printf '%s\\n'", 1)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"--prompt={prompt}" in shown.stdout.splitlines() and not list(tmp_path.iterdir())


def test_numbers_keep_all_their_digits() -> None:
    settings = scenes.scene("digits", ["digits:100"], "a", [0.1 + 0.2], guidance_scale=7.12345678)
    assert scenes.read(scenes.written(settings)) == settings
    assert "0.30000000000000004" in snippets.command(settings)
    assert "0.30000000000000004" in snippets.program(settings, "cpu", "float32")


def test_a_width_needs_a_height() -> None:
    with pytest.raises(ValueError, match=naming("width", "height")):
        scenes.scene("digits", ["digits:100"], "a", [0.5], width=64)


def test_anchors_are_named_after_their_sources() -> None:
    assert scenes.anchor_names(["mhdang/dpo-sdxl"]) == ["anchor"]
    several = ["/models/a/beta-250", "org/beta-250", "/x/style.safetensors", "digits:lora", "org/weights"]
    names = scenes.anchor_names(several)
    assert names == ["beta-250", "beta-250-2", "style", "digits-lora", "weights-2"]


def test_every_preset_is_within_the_studio(models: LoadedModels) -> None:
    shipped = presets.shipped(hub=True)
    assert {name for name in shipped if name.startswith("SDXL")} == {*shipped} - {*presets.shipped(hub=False)}
    for settings in shipped.values():
        assert scenes.read(scenes.written(settings)) == settings
        for source in (settings.reference, *settings.anchors.values()):
            models.sources.require(source)


def test_a_preview_is_cheaper_and_of_the_same_image() -> None:
    settings = SCENES["plain"]
    assert drawing.preview_of(settings, "steps").steps == 8
    assert drawing.preview_of(settings.model_copy(update={"steps": 3}), "steps").steps == 3
    assert drawing.preview_of(settings, "carry").tolerance == drawing.PREVIEW_TOLERANCE
    kept = {"prompts", "seeds", "columns", "anchors", "reference", "scheduler"}
    for how in ("steps", "carry"):
        assert drawing.preview_of(settings, how).model_dump(include=kept) == settings.model_dump(include=kept)


def test_a_strip_multiplies_the_lam_of_several_anchors() -> None:
    strip = drawing.strip_of(SCENES["several"], [0.0, 1.0, 2.0])
    assert [column.lam for column in strip.columns] == [
        {"digits-1000": 0.0, "digits-lora": 0.0},
        {"digits-1000": 0.3, "digits-lora": 0.25},
        {"digits-1000": 0.6, "digits-lora": 0.5},
    ]
    assert all(curves.read(column.schedule) == Power(1.5) for column in strip.columns)
