"""How `deradiff generate` reads its words, which schedulers they name, and how its sheet is laid out."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import tiny
from deradiff.algorithm.schedules import Constant, Power, Schedule, Sigmoid, Spline, Step
from deradiff.cli import arguments
from deradiff.sweep import notation
from deradiff.sweep.pipelines import SCHEDULERS, scheduler_like
from deradiff.sweep.settings import Column
from deradiff.sweep.sheets import contact_sheet
from messages import naming

# -- words into values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.5", [0.5]),
        ("0, 0.5,1", [0, 0.5, 1]),
        ("0:1.5:0.25", [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]),
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("1:0:-0.5", [1, 0.5, 0]),
        ("0:1:0.4", [0, 0.4, 0.8]),
        ("-0.5,0,0:1:1", [-0.5, 0, 1]),
    ],
)
def test_lists_and_inclusive_ranges(text: str, values: list[float]) -> None:
    assert notation.numbers(text, "--lam") == values


def test_seeds() -> None:
    assert notation.seeds(["7", "1,2", "0:2", "10:14:2"]) == (7, 1, 2, 0, 10, 12, 14)
    assert notation.seeds(["9007199254740993", "9007199254740992"]) == (9007199254740993, 9007199254740992)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("constant", None),
        ("power:2", Power(2)),
        ("step:0.5", Step(0.5)),
        ("sigmoid:10", Sigmoid(10)),
        ("spline:0/0,0.5/0.3,1/1", Spline([(0, 0), (0.5, 0.3), (1, 1)])),
    ],
)
def test_schedules(text: str, schedule: Schedule | None) -> None:
    assert notation.schedule(text, "steps") == schedule


@pytest.mark.parametrize(
    "shape", [None, Power(1.25), Step(0.3), Sigmoid(8), Spline([(0, 0), (1 / 3, 0.1), (1, 1)])], ids=str
)
def test_a_schedule_is_written_as_it_is_read(shape: Schedule | None) -> None:
    assert notation.schedule(notation.written(shape), "steps") == shape


def test_a_schedule_without_a_short_form_is_not_written() -> None:
    for shape in (Power(2, lam=0.5), Constant(0.5)):
        with pytest.raises(ValueError, match=naming(repr(shape))):
            notation.written(shape)


def test_a_spline_is_multiplied_with_lam_too() -> None:
    column = Column(lam=2.0, schedule=Spline([(0, 0), (1, 0.5)]).to_dict())
    assert column.dial() == Spline([(0, 0), (1, 1)])


def test_prompt_files(tmp_path: Path) -> None:
    text, listed, keyed, json_list = (tmp_path / name for name in ("a.txt", "b.yaml", "c.yml", "d.json"))
    text.write_text("a red fox\n\n  two owls \r\na red fox\n", encoding="utf-8-sig")
    listed.write_text("- a red fox\n- 'two owls: asleep'\n")
    keyed.write_text("prompts:\n  - a red fox\n")
    json_list.write_text(json.dumps(["a red fox", "two owls \N{OWL}"], indent=1))
    assert arguments.prompts([], text) == ("a red fox", "two owls")
    assert arguments.prompts(["first"], listed) == ("first", "a red fox", "two owls: asleep")
    assert arguments.prompts([], keyed) == ("a red fox",)
    assert arguments.prompts([], json_list) == ("a red fox", "two owls \N{OWL}")


@pytest.mark.parametrize(
    ("name", "content", "values"),
    [
        ("empty.txt", b"", ["no prompt"]),
        ("blank.txt", b"\n \n", ["no prompt"]),
        ("empty.yaml", b"", ["no prompt"]),
        ("numbers.yaml", b"[1, 2]", ["entry 1", 1]),
        ("broken.yaml", b"prompts: [", ["YAML"]),
        ("broken.json", b"[", ["JSON"]),
        ("object.yaml", b"!!python/object/apply:os.getcwd []", ["YAML"]),
        ("binary.txt", b"\xff\xfe\x00", ["UTF-8", "0xff"]),
    ],
)
def test_prompt_files_that_hold_none(tmp_path: Path, name: str, content: bytes, values: list[object]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=naming(tmp_path / name, *values)):
        arguments.prompts([], tmp_path / name)


# -- schedulers --------------------------------------------------------------------------------------------------------


def test_every_scheduler_name_fits_its_kind_of_model() -> None:
    present = tiny.make("sd")[0].scheduler
    made = {}
    for name in SCHEDULERS:
        try:
            made[name] = scheduler_like(present, name)
        except ValueError as error:
            assert type(present).__name__ in str(error)
    assert set(SCHEDULERS) - set(made) == {"edm", "flow-euler", "flow-sde", "flow-euler-sde"}
    for name, scheduler in made.items():
        assert type(scheduler).__name__ == SCHEDULERS[name][0]
        assert scheduler.config.beta_schedule == present.config.beta_schedule
        assert not getattr(scheduler.config, "clip_sample", False)
    stochastic = scheduler_like(FlowMatchEulerDiscreteScheduler(shift=3.0), "flow-euler-sde")
    assert stochastic.config.stochastic_sampling
    assert stochastic.config.shift == 3.0
    ours = scheduler_like(stochastic, "flow-sde")
    assert type(ours).__name__ == "FlowMatchSDEScheduler" and ours.config.shift == 3.0 and ours.config.eta == 1.0


# -- contact sheets ----------------------------------------------------------------------------------------------------


def block(size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_small_images_are_enlarged_by_whole_pixels_and_labels_keep_off_them() -> None:
    checks = Image.fromarray(np.indices((32, 32)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    long = "a prompt that goes on " * 30
    sheet = np.asarray(contact_sheet([[checks, checks]] * 2, ["λ = 0\nreference", "λ = 1 " * 9], [long, "b\nseed 3"]))
    enlarged = np.kron(np.asarray(checks), np.ones((4, 4, 1), dtype=np.uint8))
    places = [
        (y, x)
        for y in range(sheet.shape[0] - 127)
        for x in (210, 210 + 128 + 6)
        if (sheet[y : y + 128, x : x + 128] == enlarged).all()
    ]
    assert len(places) == 4


def test_large_images_are_reduced_in_proportion() -> None:
    wide = contact_sheet([[block((1024, 512), (200, 0, 0))]], ["λ = 0"], ["a"])
    red = (np.asarray(wide) == (200, 0, 0)).all(-1)
    assert red.any(0).sum() == 320
    assert red.any(1).sum() == 160


def test_a_grid_that_does_not_match_its_labels() -> None:
    with pytest.raises(ValueError, match=naming(2, 1, [1])):
        contact_sheet([[block((8, 8), (0, 0, 0))]], ["a", "b"], ["c"])
