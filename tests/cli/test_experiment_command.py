"""The whole of an experiment from the command line, in miniature: plan, run, status, export, report."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from deradiff.cli import app
from deradiff.experiments.plan import read_plan
from deradiff.experiments.reporting import exhibits
from small_experiment import SMALL, files

PLAN = SMALL | {
    "models": SMALL["models"] | {"middle": {"source": "digits:250", "beta": 250, "family": "dpo"}},
    "prompts": {
        "few": {"source": "digits", "count": 5, "seeds": "0:1"},
        "coverage": {"source": "digits", "count": 2, "draw_seed": 1, "seeds": "0:5", "substitute_for": "<b>others</b>"},
    },
    "methods": [
        {"method": "reference"},
        {"method": "model"},
        {"method": "realign", "targets": "all"},
        {"method": "realign", "anchors": ["strong"], "lam": "0:1:0.5"},
        {"method": "realign", "anchors": ["strong"], "targets": ["weak"], "particles": 2, "prompts": ["few"]},
        {"method": "combine", "lams": [{"strong": 0.3, "weak": 0.3}]},
        {"method": "anneal", "anchors": ["strong"], "schedules": ["power:2"]},
        {"method": "interpolate", "anchors": ["strong"], "lam": [0.5]},
        {"method": "optimize-noise", "reward": "digits", "iterations": 1, "prompts": ["few"]},
    ],
    "scores": ["digits", "legible"],
    "features": ["digits"],
    "batch_size": 32,
    "report": {"diversity_on": "coverage", "healthy": "weak", "hacked": ["strong"], "unregularised": "strong"},
}


def deradiff(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["experiment", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment that was run."""
    folder = tmp_path_factory.mktemp("experiment")
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump(PLAN))
    said = deradiff("run", plan, "--out", folder / "run", "--workers", 1)
    assert "images drawn" in said
    return folder


def test_a_second_run_does_nothing(done: Path) -> None:
    before = files(done / "run")
    said = deradiff("run", done / "plan.yaml", "--out", done / "run", "--workers", 1)
    assert "0 images drawn, 0 scores and features computed" in said
    assert files(done / "run") == before


def test_status_counts_what_is_there(done: Path) -> None:
    said = deradiff("status", done / "run")
    assert "strong → weak, 2 particles" in said
    assert "coverage: a substitute for" in said


def test_the_export_has_a_row_for_every_cell(done: Path) -> None:
    deradiff("export", done / "run", "--out", done / "tables")
    rows = list(csv.DictReader((done / "tables" / "images.csv").open()))
    arms = {row["arm"] for row in rows}
    # 2 particles and optimised noise are for one of both prompt sets; each has 10 images of one and 12 of the other.
    assert len(rows) == 22 * (len(arms) - 2) + 2 * 10
    assert all(float(row["digits"]) == float(row["digits"]) and (done / "run" / row["file"]).exists() for row in rows)
    same = {row["image"] for row in rows if row["arm"] in ("strong", "strong → strong", "strong, λ = 1")}
    assert len(same) == 22
    record = json.loads((done / "tables" / "runs.json").read_text())
    assert record["plan"]["name"] == "small" and "sha256" in record["weights"]["strong"]
    deradiff("export", done / "run", "--out", done / "tables")
    assert list(csv.DictReader((done / "tables" / "images.csv").open())) == rows


def test_the_report_has_all_of_it(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhibits, "DPI", 30)  # nobody looks at them here
    said = deradiff("report", done / "run")
    page = (done / "run" / "report" / "report.html").read_text()
    assert "report.html" in said
    assert "&lt;b&gt;others&lt;/b&gt;" in page and "<b>others</b>" not in page
    assert 'src="http' not in page and 'href="http' not in page
    written = {path.stem for path in (done / "run" / "report").glob("*.csv")}
    for begins in (
        "agreement-heat",
        "agreement-lines",
        "agreement-errors",
        "agreement-scatter",
        "agreement-bland-altman",
        "agreement-statistics",
        "agreement-table-1",
        "agreement-table-2",
        "agreement-verdicts",
        "agreement-particles",
        "front-digits",
        "front-legible",
        "front-path-kl",
        "diversity",
        "spectra",
        "spectral-distance",
        "equal-cost",
        "compute-saved",
        "attributes-by-lambda",
        "strip",
        "pairs",
        "grid",
        "methods",
        "annealed",
        "combined",
        "hacking",
    ):
        assert any(name.startswith(begins) for name in written), begins


def test_plans_are_written_once(tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    deradiff("plan", "--preset", "aig-sd14", "--models", "mine", "--out", out)
    assert read_plan(out).models["ReFL"].source == "mine/refl/beta-0"
    assert f"{out} exists" in deradiff("plan", "--preset", "digits", "--out", out, status=2)
    assert yaml.safe_load(deradiff("plan", "--preset", "digits"))["reference"] == "digits"
    assert "'mine'" in deradiff("plan", "--preset", "mine", status=2)


def test_what_cannot_be_run(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    assert str(plan) in deradiff("run", plan, "--out", tmp_path / "x", status=2)
    plan.write_text(yaml.safe_dump(SMALL | {"colour": "red"}))
    assert "colour: " in deradiff("run", plan, "--out", tmp_path / "x", status=2)
    assert str(tmp_path / "nothing") in deradiff("status", tmp_path / "nothing", status=2)
    assert not (tmp_path / "x").exists() and not (tmp_path / "nothing").exists()
    gone = SMALL["models"] | {"gone": {"source": str(tmp_path / "nowhere")}}
    plan.write_text(yaml.safe_dump(SMALL | {"models": gone}))
    assert str(tmp_path / "nowhere") in deradiff("run", plan, "--out", tmp_path / "x", status=2)
