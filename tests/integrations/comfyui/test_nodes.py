"""The nodes without ComfyUI: what they say, what they read, the workflows that come with them, and the folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deradiff.algorithm.schedules import Constant, Power, Progress, Sigmoid
from deradiff.integrations.comfyui import checks, installing
from deradiff.integrations.comfyui.nodes import NODES, dial_of, realign_curve, realign_strip
from deradiff.integrations.comfyui.options import additions, with_additions
from deradiff.integrations.comfyui.predictions import MixedRun
from deradiff.integrations.comfyui.runs import DialSettings, RunClock, mixture, noise_in, without_noise
from deradiff.sampling.reuse import INTERPOLATE, Reuse

WORKFLOWS = sorted((installing.SOURCE / "example_workflows").glob("*.json"))


def clock(*sigmas: float, most: float = 10.0) -> RunClock:
    return RunClock(sigmas, lambda sigma: 1 - sigma / most)


def test_progress_is_told_by_the_noise_level() -> None:
    whole = clock(10.0, 5.0, 2.0, 1.0, 0.0)
    assert [whole.progress(i).steps for i in range(4)] == [0.0, 0.25, 0.5, 0.75]
    assert [whole.step(sigma) for sigma in (10.0, 9.9999, 7.0, 5.0, 4.999, 0.5, 0.0)] == [0, 0, 0, 1, 1, 3, 3]
    assert whole.progress(2, 1.5) == Progress(0.5, 0.85)
    assert whole.begins(1, 5.0002) and not whole.begins(1, 4.9)
    rising = clock(0.0, 1.0, 5.0, 10.0)
    assert [rising.step(sigma) for sigma in (0.0, 1.0, 3.0, 5.0)] == [0, 1, 1, 2]


def test_a_run_that_begins_in_between_begins_at_the_models_time() -> None:
    half = clock(5.0, 4.0, 2.0, 1.0, 0.0)
    assert [half.progress(i).steps for i in range(4)] == [0.5, 0.625, 0.75, 0.875]
    assert clock(10.0, 7.0, 6.0, 5.0).progress(1).steps == pytest.approx(0.5 / 3)
    assert clock(9.0, 5.0, 3.0, 1.0, 0.0).progress(0).steps == 0.0  # less than a step from pure noise


def test_the_mixture_is_exact_at_the_ends_and_the_same_in_noise() -> None:
    both = torch.randn(2, 3, 4, 5)
    assert torch.equal(mixture(both, 0.0), both[0]) and torch.equal(mixture(both, 1.0), both[1])
    x, sigma = torch.randn(3, 4, 5), 2.5
    noise = torch.stack([noise_in(x, clean, sigma) for clean in both])
    torch.testing.assert_close(without_noise(x, mixture(noise, 0.3), sigma), mixture(both, 0.3))
    torch.testing.assert_close(mixture(both, -0.5), 1.5 * both[0] - 0.5 * both[1])


def asked_of(run: MixedRun, sigmas: list[float]) -> list[list[str]]:
    """Which models a run evaluates at each of these noise levels."""
    asked: list[list[str]] = []
    for sigma in sigmas:
        asked.append([])

        def evaluate(name: str) -> torch.Tensor:
            asked[-1].append(name)
            return torch.full((1, 2), float(len(name)))

        run.denoised(torch.ones(1, 2), sigma, evaluate)
    return asked


def test_models_without_weight_are_not_evaluated() -> None:
    sigmas = clock(10.0, 5.0, 2.0, 0.0)
    for lam, models in ((0.0, ["reference"]), (1.0, ["aligned"]), (0.5, ["reference", "aligned"])):
        run = MixedRun(DialSettings((Constant(lam),)), Constant(lam), sigmas, False, False)
        assert asked_of(run, [10.0, 5.0]) == [models, models]
    power = MixedRun(DialSettings((Power(2),)), Power(2), sigmas, False, False)
    assert asked_of(power, [10.0, 5.0]) == [["reference"], ["reference", "aligned"]]
    blended = DialSettings((Constant(0.5),), "interpolate")
    assert asked_of(MixedRun(blended, Constant(0.5), sigmas, False, True), [10.0]) == [[INTERPOLATE]]


def test_reuse_evaluates_the_carrier_alone_in_between() -> None:
    sigmas = [10.0, 8.0, 6.0, 4.0, 2.0]
    run = MixedRun(
        DialSettings((Constant(0.25),), reuse=Reuse(every=2, carrier="reference")),
        Constant(0.25),
        clock(*sigmas, 0.0),
        False,
        False,
    )
    both = ["reference", "aligned"]
    assert asked_of(run, [10.0, 8.0, 7.0, 6.0, 6.0]) == [both, ["reference"], both, both, both]
    assert run.end() is not None and run.end().steps == (0, 2)  # type: ignore[union-attr]


def test_the_dial_reads_what_the_nodes_have() -> None:
    assert dial_of(0.5) == DialSettings((Constant(0.5),))
    assert dial_of(0.5, "power", 3.0).schedules == (Power(3, 0.5),)
    assert dial_of(0.5, tolerance=0.1).reuse == Reuse(tolerance=0.1)
    assert dial_of(0.5, "power", strip=(0.0, 1.5)).schedules == (Power(2, 0.0), Power(2, 1.5))
    (curve,) = realign_curve('{"schedule": "Sigmoid", "kappa": 8, "lam": 1.0, "over": "time"}')
    assert dial_of(0.5, curve=curve).schedules == (Sigmoid(8, 0.5, over="time"),)
    (listed,) = dial_of(2.0, values=[0.0, 0.1, 0.4, 0.2]).schedules
    assert [listed(i / 4) for i in range(4)] == pytest.approx([0.0, 0.2, 0.8, 0.4])
    assert realign_strip("0:1:0.5,2") == ((0.0, 0.5, 1.0, 2.0),)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lam": float("nan")}, "nan"),
        ({"lam": 0.5, "schedule": "spiral"}, "spiral"),
        ({"lam": 0.5, "schedule": "step", "parameter": 2.0}, "2.0"),
        ({"lam": 0.5, "values": []}, "list"),
        ({"lam": 0.5, "values": [0.1], "curve": Power(2)}, "curve"),
        ({"lam": 0.5, "tolerance": 0.1, "method": "interpolate"}, "tolerance"),
        ({"lam": 0.5, "strip": ()}, "strip"),
    ],
)
def test_what_is_outside_its_range_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dial_of(**wrong)


@pytest.mark.parametrize("text", ["", "[1]", '{"schedule": "Spiral"}', '{"schedule": "Power", "q": 1}'])
def test_a_text_that_is_no_curve_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        realign_curve(text)


def test_what_was_added_to_options() -> None:
    def patch() -> None:
        pass

    before = {"post": [1], "transformer_options": {"patches": {"a": [patch]}, "wrappers": {}}, "same": object()}
    now = {
        "post": [1, 2],
        "transformer_options": {"patches": {"a": [patch], "b": [3]}, "wrappers": {"x": 1}},
        "same": object(),  # cloned
        "new": patch,
    }
    more = additions(now, before)
    assert more == {"post": [2], "transformer_options": {"patches": {"b": [3]}}, "new": patch}
    other = {"post": [7], "transformer_options": {"patches": {"b": [8]}}}
    assert with_additions(other, more)["post"] == [7, 2]
    assert with_additions(other, more)["transformer_options"]["patches"]["b"] == [8, 3]
    assert other == {"post": [7], "transformer_options": {"patches": {"b": [8]}}}


def test_every_input_says_what_it_is() -> None:
    assert len({node.id for node in NODES}) == len(NODES)
    for node in NODES:
        assert node.outputs and len({field.name for field in node.inputs}) == len(node.inputs)
        for field in node.inputs:
            assert field.tooltip
            if field.type == "COMBO":
                assert field.files or field.options["default"] in field.options["options"]
            elif field.widget:
                assert "default" in field.options


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_the_workflows_fit_the_nodes(file: Path) -> None:
    workflow = json.loads(file.read_text())
    ours = {node.id: node for node in NODES}
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert any(node["type"] in ours for node in nodes.values())
    for node in nodes.values():
        if (description := ours.get(node["type"])) is None:
            continue
        sockets = [field for field in description.inputs if not field.widget]
        assert [(i["name"], i["type"]) for i in node["inputs"]] == [(field.name, field.type) for field in sockets]
        assert all(i["link"] for i, field in zip(node["inputs"], sockets, strict=True) if field.required)
        assert [(o["name"], o["type"]) for o in node["outputs"]] == [(o.name, o.type) for o in description.outputs]
        widgets = [field for field in description.inputs if field.widget]
        for field, value in zip(widgets, node["widgets_values"], strict=True):
            if field.type == "FLOAT":
                assert field.options["min"] <= value <= field.options["max"]
            elif field.type == "COMBO" and not field.files:
                assert value in field.options["options"]
    for number, source, slot, target, socket, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][slot]["links"] and nodes[source]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][socket]["link"] == number and nodes[target]["inputs"][socket]["type"] == kind


def comfyui(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "samplers.py").touch()
    (folder / "nodes.py").touch()
    return folder


def test_the_folder_is_installed_and_brought_up_to_date(tmp_path: Path) -> None:
    folder = installing.install(comfyui(tmp_path / "ComfyUI"))
    assert folder == tmp_path / "ComfyUI" / "custom_nodes" / "deradiff"
    assert {path.name for path in folder.iterdir()} == {"__init__.py", "pyproject.toml", "example_workflows"}
    (folder / "example_workflows" / "old.json").touch()
    installing.install(tmp_path / "ComfyUI")
    assert len(list((folder / "example_workflows").iterdir())) == len(WORKFLOWS) == 3
    assert [path.name for path in folder.parent.iterdir()] == ["deradiff"]


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        installing.install(tmp_path)
    theirs = comfyui(tmp_path / "ComfyUI") / "custom_nodes" / "deradiff"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    with pytest.raises(FileExistsError, match="custom_nodes"):
        installing.install(tmp_path / "ComfyUI")
    assert (theirs / "__init__.py").read_text() == "NODE_CLASS_MAPPINGS = {}\n"


def test_a_host_that_lacks_something_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "NEEDED", {"json": ("dumps", "JSONDecoder.of_another_version"), "no_such_host": ("x",)})
    with pytest.raises(checks.HostError, match=r"0\.3\.64.*json\.JSONDecoder\.of_another_version.*no_such_host"):
        checks.require_host()
