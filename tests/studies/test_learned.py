"""The study of learned families: one small cell as a whole, its comparisons, and tables of what is there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deradiff.algorithm.estimates import normalized
from deradiff.worlds.digits import load_pipeline
from messages import naming
from studies.digits import learned, learned_models, learned_report
from studies.digits.learned import cells, contrast, half, load, quick, run
from studies.digits.learned_models import Cell


class Interrupted(Exception):
    """Stands for a machine that went away."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> learned.Plan:
    """One λ of two anchors, a target of which is the other, and three captions."""
    monkeypatch.setattr(learned, "LAMS", (0.5,))
    monkeypatch.setattr(learned_models, "STRENGTHS", learned.STRENGTHS)
    monkeypatch.setitem(learned.STRENGTHS, "weighted", {"ink": (1.0, 2.0)})
    for module in (learned, learned_models):
        monkeypatch.setattr(module, "PROMPTS", learned.PROMPTS[:3])
    return quick()


@pytest.mark.cases(0)
def test_an_interrupted_cell_goes_on_where_it_was_and_holds_what_it_claims(tmp_path: Path, small: learned.Plan) -> None:
    cell = Cell("weighted", "ink", 1)

    def interrupt(stage: str, done: int, planned: int, line: str) -> None:
        if "as they are" in stage:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path, [cell], small, interrupt)
    models = tmp_path / "models" / cell.name
    assert {path.name for path in models.iterdir()} == {"control", "1", "2", "4"}
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*.safetensors")}
    assert len(before) == 4

    (file,) = run(tmp_path, [cell], small, lambda *_: None)
    assert before == {path: path.stat().st_mtime_ns for path in models.rglob("*.safetensors")}
    found = load(tmp_path / "cells")
    assert list(found) == ["weighted-ink-1"] and file == tmp_path / "cells" / "weighted-ink-1.json"
    record = found["weighted-ink-1"]
    assert record["half"] == "tuned" and record["cell"] == {"family": "weighted", "reward": "ink", "seed": 1}
    assert [(case["anchor"], case["lam"]) for case in record["cases"]] == [(1.0, 0.5), (2.0, 0.5)]
    assert all(0 < share <= 1 for share in record["effective shares of the samples"].values())
    assert record["means"].keys() == {"reference", "1.0", "2.0", "4.0"}
    for case in record["cases"]:
        means = record["means"]
        assert case["shift"][0] == pytest.approx(means[str(case["anchor"] / 0.5)][0] - means["reference"][0])
        assert case["verdict"]["images"] == 3 * small.images and case["algorithm 1"][1] > 0
        assert case["verdict by kind"]["images"] == 3 * small.images
    assert record["kinds"].keys() == {"1.0", "2.0"} and all(record["kinds"].values())
    # What weighted models are compared with is their control, and no model that ships.
    control, shipped = learned.base_of(tmp_path / "models", cell).state_dict(), load_pipeline().unet.state_dict()
    assert any(not torch.equal(weight, shipped[name]) for name, weight in control.items())
    with pytest.raises(ValueError, match=naming(tmp_path, "images", small.images + 1)):
        run(tmp_path, [cell], replace(small, images=small.images + 1), lambda *_: None)


def test_every_family_and_reward_is_tuned_on_and_judged_by() -> None:
    assert len(cells()) == 16 and cells("dpo", "ink", 1) == [Cell("dpo", "ink", 1)]
    for of in ({c.family for c in cells()}, {c.reward for c in cells()}):
        assert all({half(c) for c in cells() if name in (c.family, c.reward)} == {"tuned", "judged"} for name in of)
    with pytest.raises(ValueError, match=naming("rlhf", "dpo, weighted")):
        cells("rlhf")


# -- comparisons ------------------------------------------------------------------------------------------------------


def test_contrast_counts_what_two_samples_share_and_what_weights_cost() -> None:
    groups = torch.arange(4).repeat_interleave(50)
    x = torch.randn(150, 200, generator=torch.Generator().manual_seed(3)) + groups
    noise = 0.1 * torch.randn(150, 200, generator=torch.Generator().manual_seed(4))
    logs = 0.5 * x
    values, plain, weighted = [], [], []
    for row, other, log in zip(x, x + noise, logs, strict=True):
        plain.append(contrast(row, None, other, None, groups))
        weighted.append(contrast(row, log, other, None, groups))
        w = normalized(log, groups)
        values.append((w @ row.double() / 4 - other.double().mean()).item())
    assert [e.value for e in weighted] == pytest.approx(values, abs=1e-6)
    for found in (plain, weighted):
        spread = torch.tensor([e.value for e in found]).std().item()
        assert torch.tensor([e.error for e in found]).mean().item() == pytest.approx(spread, rel=0.2)
    assert plain[0].error < 0.02 < weighted[0].error  # the noise that two arms share is no noise of their difference


# -- tables -----------------------------------------------------------------------------------------------------------


def made(cell: Cell, *cases: dict[str, Any]) -> dict[str, Any]:
    return {"cell": {}, "half": half(cell), "cases": [{"slope": 1.0} | case for case in cases]}


def a_case(kind: str, plain: float, weighted: float, error: float = 0.01) -> dict[str, Any]:
    verdicts = {"verdict": {"kind": kind}, "verdict by kind": {"kind": "no target"}}
    told = {"anchor": 1.0, "lam": 0.5, "shift": [1.0, 0.0], **verdicts}
    return told | {"algorithm 1": [plain, error], "weighted": [weighted, error]}


@pytest.mark.parametrize(
    ("kind", "plain", "weighted", "judged"),
    [
        ("trust", 0.03, 0.5, "right"),
        ("trust", 0.05, 0.5, "miss"),
        ("off", -0.2, 0.01, "right"),
        ("off", 0.01, 0.5, "false alarm"),
        ("off", 0.2, -0.3, "false alarm"),
        ("unclear", 0.3, 0.3, "open"),
        ("no target", 0.3, 0.3, "open"),
    ],
)
def test_verdicts_are_judged_by_the_retrained_model(kind: str, plain: float, weighted: float, judged: str) -> None:
    cell = Cell("dpo", "ink", 0)
    (row,) = learned_report.rows({cell.name: made(cell, a_case(kind, plain, weighted))})
    assert (row.judgement(kind), row.half, row.seeds) == (judged, "judged", 1)


def test_the_noise_of_training_is_what_seeds_differ_by_beyond_that_of_sampling() -> None:
    first, second = Cell("dpo", "bold", 0), Cell("dpo", "bold", 1)
    found = {
        first.name: made(first, a_case("off", 0.1, 0.5), a_case("off", 0.2, 0.5)),
        second.name: made(second, a_case("off", 0.3, 0.5), a_case("trust", 0.4, 0.5)),
    }
    noise = learned_report.training_noise(found)["dpo", "algorithm 1"]
    assert noise == pytest.approx(((0.2**2 - 2 * 0.01**2) / 2) ** 0.5)
    row = learned_report.rows(found)[1]
    assert row.kinds == ("off", "trust") and row.informed == ("no target",) * 2 and row.seeds == 2
    assert row.errors["algorithm 1"].value == pytest.approx(0.3)
    assert row.errors["algorithm 1"].error == pytest.approx(((0.01**2 + noise**2) / 2) ** 0.5)
    told = learned_report.report(found)
    assert "| tuned | dpo | bold | presuming a tilt | 0 | 3 | 1 | 0 |" in told
    assert "| tuned | dpo | bold | by kind | 0 | 0 | 0 | 4 |" in told
    assert "missing, 14 of 16: dpo-ink-0" in told and " dpo-bold-" not in told.split("missing")[1]


def test_a_file_that_is_no_cell_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dpo-ink-0.json").write_text(json.dumps({"cell": {}, "cases": 3}))
    with pytest.raises(ValueError, match=naming("dpo-ink-0.json", "cases")):
        load(tmp_path)
