"""`deradiff generate` tells how far each λ can be trusted, and draws from particles where asked to."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deradiff.cli import app
from deradiff.files.records import read_png


def generate(out: Path, *options: str) -> Result:
    fixed = ["generate", "digits", "-a", "digits:500", "-p", "a red seven", "--steps", "4", "--out", str(out)]
    return CliRunner().invoke(app, [*fixed, *options], env={"COLUMNS": "200"})


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "record.json").read_text())


def test_every_lam_has_a_verdict_in_print_and_in_the_record(tmp_path):
    memoryless = ["--scheduler", "ddpm", "--guidance-scale", "1", "--lam", "0,0.5,1", "-s", "0:9"]
    result = generate(tmp_path / "out", *memoryless)
    assert result.exit_code == 0, result.output
    verdicts = record(tmp_path / "out")["verdicts"]
    assert [judged["lam"] for judged in verdicts] == [0.0, 0.5, 1.0]
    assert [judged["kind"] for judged in verdicts][::2] == ["exact", "exact"]
    middle = verdicts[1]
    assert middle["score"] == "implicit reward" and middle["images"] == 10 and middle["prompts"] == 1
    assert 1 <= middle["effective"] <= 10 and middle["path_kl"][0] > 0
    assert middle["weighted"][0] - middle["plain"][0] == pytest.approx(middle["bias"][0])
    assert middle["words"][:20] in result.output and f"{middle['effective']:.3g} of 10" in result.output
    images = record(tmp_path / "out")["images"]
    assert {bool(image["log_weight"]) for image in images if image["lam"] == 0.5} == {True}
    assert read_png(tmp_path / "out" / images[1]["file"])["log_weight"] == images[1]["log_weight"]


def test_guided_runs_say_once_why_they_have_no_exact_target(tmp_path):
    result = generate(tmp_path / "out", "--lam", "1.25,1.5", "--guidance-scale", "3")
    assert result.exit_code == 0, result.output
    assert result.output.count("guided predictions are no model's own") == 1
    assert {judged["kind"] for judged in record(tmp_path / "out")["verdicts"]} == {"no target"}


def test_one_image_a_prompt_cannot_be_judged(tmp_path):
    result = generate(tmp_path / "out", "--lam", "0.5", "--guidance-scale", "1")
    assert "1 image of a prompt" in result.output


def test_particles_draw_every_image_from_k(tmp_path):
    options = ["--lam", "0.5", "--particles", "3", "--scheduler", "ddpm", "--guidance-scale", "1", "-s", "0:1"]
    result = generate(tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    judged = record(tmp_path / "out")["verdicts"][0]
    assert judged["kind"] in ("particles", "collapsed") and judged["particles"] == 3 and judged["images"] == 2
    images = record(tmp_path / "out")["images"]
    assert len(images) == 2 and all(1 <= image["effective"] <= 3 for image in images)
    again = generate(tmp_path / "again", *options)
    assert again.exit_code == 0
    for image in images:
        assert (tmp_path / "out" / image["file"]).read_bytes() == (tmp_path / "again" / image["file"]).read_bytes()


def test_interpolated_weights_have_no_verdict_and_no_particles(tmp_path):
    result = generate(tmp_path / "out", "--lam", "0.5", "--method", "interpolate")
    assert result.exit_code == 0 and "approximation" in result.output
    result = generate(tmp_path / "other", "--lam", "0.5", "--method", "interpolate", "--particles", "2")
    assert result.exit_code == 2 and "particles" in result.output
    assert not (tmp_path / "other").exists()


def test_particles_below_one_are_refused(tmp_path):
    assert generate(tmp_path / "out", "--particles", "0").exit_code == 2
