"""The studio's models: what a page may load, and that it is loaded once, shared, and let go."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from deradiff.anchors import AnchorError
from deradiff.studio import models as shelf
from deradiff.studio import scenes
from deradiff.studio.models import LoadedModels, MachineSettings
from deradiff.studio.sources import Sources
from deradiff.sweep.settings import Settings
from deradiff.worlds import digits
from messages import naming


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: a pipeline, its anchors one level further, one that fits no other, and a secret beside it."""
    top = tmp_path_factory.mktemp("outside").resolve()
    inside = top / "models"
    shutil.copytree(digits.reference_path(), inside / "small")
    for beta in (100, 30):
        shutil.copytree(digits.anchor_path(beta), inside / "aligned" / f"beta-{beta}")
    shutil.copytree(digits.lora_path(), inside / "lora")
    pipe, module, _ = tiny.make("sdxl")
    del pipe
    module.save_pretrained(inside / "misfit")  # type: ignore[operator]
    (inside / ".hidden").mkdir()
    (inside / "notes.txt").write_text("nothing")
    shutil.copytree(digits.anchor_path(30), top / "secret")
    (inside / "link").symlink_to(top / "secret")
    return inside


def named(*anchors: str | Path, reference: str | Path = "digits", **changes: Any) -> Settings:
    return scenes.scene(str(reference), [str(a) for a in anchors], "a red seven", [0.5] * len(anchors), **changes)


def on_the_cpu(sources: Sources, free: Callable[[], float] = lambda: 1.0) -> LoadedModels:
    return LoadedModels(sources, MachineSettings(device="cpu"), free)


# -- what may be loaded -----------------------------------------------------------------------------------------------


def test_the_lists_hold_what_lies_in_the_folders(folder: Path) -> None:
    sources = Sources([folder], ["org/model"])
    assert sources.references() == ["digits", "digits-flow", "org/model", str(folder / "small")]
    found = sources.anchors()
    for name in ("aligned/beta-100", "aligned/beta-30", "lora", "misfit", "small"):
        assert str(folder / name) in found
    assert {"digits:30", "digits-flow:grpo"} <= {*found}
    assert not any("hidden" in name or "link" in name or "secret" in name for name in found)
    for name in (*sources.references(), *found):
        assert sources.require(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "{}/../secret",
        "{}/link",
        "/etc",
        "/etc/passwd",
        "~/models",
        "./models",
        "..",
        "a/../../b",
        "{}/aligned/..",
        "file:///etc",
        "http://example.org/x",
        "org/model/../../etc.safetensors",
        "org/model/weights.bin",
        "",
        "small",
        "{}/small\x00",
        "org//model",
        "{}",
    ],
)
def test_a_page_names_no_other_path(folder: Path, name: str) -> None:
    sources = Sources([folder / "aligned", folder / "small"])
    with pytest.raises(ValueError, match=f"{re.escape(repr(name.format(folder)[:200]))}|null"):
        sources.require(name.format(folder))


def test_a_folder_is_not_taken_for_a_model_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ValueError, match=naming("models/small", "--models models")):
        Sources().require("models/small")
    assert Sources().require("models/elsewhere") == "models/elsewhere"


def test_without_the_hub_nothing_is_downloaded() -> None:
    with pytest.raises(ValueError, match=naming("hub", "org/model")):
        Sources(hub=False).require("org/model")
    assert Sources(allowed=["org/model"], hub=False).require("org/model") == "org/model"


def test_digits_that_there_are_not_and_folders_that_are_gone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="digits:7"):
        Sources().require("digits:7")
    with pytest.raises(FileNotFoundError, match=naming("--models", tmp_path / "nowhere")):
        Sources([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=naming(folder / "gone")):
        Sources([folder]).require(str(folder / "gone"))


# -- what is in memory ------------------------------------------------------------------------------------------------


def test_a_reference_is_loaded_once_whatever_anchors_are_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    real = shelf.loaded

    def counted(settings: Settings) -> Any:
        loads.append(settings.reference)
        return real(settings)

    monkeypatch.setattr(shelf, "loaded", counted)
    models = on_the_cpu(Sources())
    first, dial = models.realigned(named("digits:100"))
    module = dial.modules["anchor"]
    for anchors in (["digits:lora"], ["digits:30", "digits:100"], ["digits:100"]):
        pipe, dial = models.realigned(named(*anchors))
        assert pipe is first and len(dial.anchors) == len(anchors)
    assert loads == ["digits"]
    assert dial.modules["anchor"] is module  # and its weights were read once as well
    again, same = models.realigned(named("digits:100", seed=4))
    assert (again, same) == (pipe, dial)


def test_each_scheduler_is_made_once_and_the_models_own_comes_back() -> None:
    models = on_the_cpu(Sources())
    pipe, _ = models.realigned(named("digits:100"))
    own = pipe.scheduler
    assert models.usual("digits") == "DDIM"
    models.realigned(named("digits:100", scheduler="euler-a"))
    other = pipe.scheduler
    assert type(other).__name__ == "EulerAncestralDiscreteScheduler"
    models.realigned(named("digits:100"))
    assert pipe.scheduler is own
    models.realigned(named("digits:100", scheduler="euler-a"))
    assert pipe.scheduler is other
    assert {"ddim", "euler-a"} <= {*models.schedulers("digits")} and "flow-euler" not in models.schedulers("digits")


def test_an_anchor_that_does_not_fit_leaves_the_last_ones_in_force(folder: Path) -> None:
    models = on_the_cpu(Sources([folder]))
    pipe, before = models.realigned(named("digits:100", "digits:lora"))
    with pytest.raises(AnchorError):
        models.realigned(named(folder / "misfit"))
    _, after = models.realigned(named("digits:100", "digits:lora"))
    assert after.anchors == before.anchors and after.modules.keys() == {"digits-100"}
    with pytest.raises(ValueError, match="FlowMatch"):
        models.realigned(named("digits:100", scheduler="flow-euler"))
    assert models.realigned(named("digits:100"))[0] is pipe


def test_what_a_page_may_not_load_is_not_touched(folder: Path) -> None:
    models = on_the_cpu(Sources())
    with pytest.raises(ValueError, match=naming(folder / "lora")):
        models.realigned(named(folder / "lora"))
    assert models.references == []


def test_under_memory_pressure_the_one_used_longest_ago_goes(folder: Path) -> None:
    room = [0.5]
    models = on_the_cpu(Sources([folder]), lambda: room[0])
    models.realigned(named("digits:100"))
    models.realigned(named(folder / "aligned" / "beta-30", reference=folder / "small"))
    assert models.references == ["digits", str(folder / "small")]
    models.realigned(named("digits:100"))
    room[0] = 0.01
    pipe, dial = models.realigned(named("digits:100"))
    assert models.references == ["digits"]  # what is in use stays, however little memory there is
    dial.lam = 0.5
    assert pipe("a red seven", num_inference_steps=1, output_type="latent").images.shape[0] == 1


def test_unused_anchors_are_let_go_where_nothing_else_can_be() -> None:
    free = [1.0]
    models = on_the_cpu(Sources(), lambda: free[0])
    first = models.realigned(named("digits:100"))[1].modules["anchor"]
    free[0] = 0.01
    models.realigned(named("digits:30"))
    free[0] = 1.0
    assert models.realigned(named("digits:100"))[1].modules["anchor"] is not first


def test_running_out_of_memory_frees_the_rest_and_tries_once_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = on_the_cpu(Sources([folder]))
    models.realigned(named("digits:100"))
    real, tries = shelf.loaded, []

    def short(settings: Settings) -> Any:
        tries.append(models.references)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(settings)

    monkeypatch.setattr(shelf, "loaded", short)
    models.realigned(named(folder / "lora", reference=folder / "small"))
    assert tries == [["digits"], []]
    monkeypatch.setattr(shelf, "loaded", lambda settings: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        models.realigned(named("digits:100"))


def test_pickled_weights_are_refused_unless_allowed(folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(folder / "aligned" / "beta-30", pickled)
    weights = next(pickled.glob("*.safetensors"))
    from safetensors.torch import load_file

    torch.save(load_file(weights), pickled / "diffusion_pytorch_model.bin")
    os.unlink(weights)
    with pytest.raises(AnchorError, match="pickle"):
        on_the_cpu(Sources([tmp_path])).realigned(named(pickled.resolve()))
    allowed = LoadedModels(Sources([tmp_path]), MachineSettings(device="cpu", allow_pickle=True), lambda: 1.0)
    assert allowed.realigned(named(pickled.resolve()))[1].anchors == ("anchor",)
