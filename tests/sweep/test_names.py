"""Names are for people: what things are is told by their content, and names that would be mixed up are refused."""

import math
from pathlib import Path
from typing import Any

import pytest

from deradiff.alignment.runs import anchor_name
from deradiff.experiments import running
from deradiff.experiments.drawings import drawing_of, group_of
from deradiff.experiments.plan import Plan
from deradiff.experiments.results import Results
from deradiff.experiments.store import Store
from deradiff.search import spaces
from deradiff.studio.library import Library
from deradiff.sweep import notation
from deradiff.sweep.description import metadata
from deradiff.sweep.settings import Column, Settings, file_name
from messages import naming
from small_experiment import SMALL, Fake, silent, small

pytestmark = pytest.mark.attack("names as identity")


def named(*methods: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {arm.name: arm for arm in small(methods=methods, **changes).arms()}


# -- arms --------------------------------------------------------------------------------------------------------------

CLOSE = [0.1234567, 0.1234568, 0.12345675]


@pytest.mark.parametrize("method", ["realign", "interpolate", "anneal"])
def test_lams_that_differ_are_different_arms(method: str) -> None:
    more = {"schedules": ["power:2"]} if method == "anneal" else {}
    arms = named({"method": method, "anchors": ["strong"], "lam": CLOSE, **more})
    assert [arm.lam for arm in arms.values()] == CLOSE and len(arms) == 3


def test_combinations_that_differ_are_different_arms() -> None:
    lams = [{"strong": 0.3, "weak": lam} for lam in CLOSE]
    assert len(named({"method": "combine", "lams": [*lams, dict(reversed(lams[0].items()))]})) == 3


def test_optimised_noises_that_differ_are_different_arms() -> None:
    usual = {"method": "optimize-noise", "reward": "digits"}
    differing: list[dict[str, Any]] = [
        {},
        {"learning_rate": 4.0},
        {"norm_weight": 0.0},
        {"steps": 1},
        {"iterations": 3},
    ]
    arms = named(*(usual | changes for changes in differing), usual)
    assert len(arms) == 5 and "noise for digits, 50 iterations" in arms


def test_what_is_asked_for_twice_in_other_words_is_one_arm() -> None:
    arms = named(
        {"method": "anneal", "anchors": ["strong"], "schedules": ["power:2", "power:2.0", "power: 2"]},
        {"method": "realign", "anchors": ["strong"], "lam": [0.5, 0.5]},
        {"method": "realign", "anchors": ["strong"], "lam": "0.5"},
    )
    assert list(arms) == ["strong, power:2", "strong, λ = 0.5"]


@pytest.mark.parametrize(
    ("models", "methods"),
    [
        (["a", "a, λ = 0.5"], [{"method": "model"}, {"method": "realign", "anchors": ["a"], "lam": [0.5]}]),
        (["reference"], [{"method": "reference"}, {"method": "model"}]),
        (["a", "a, power:2"], [{"method": "model"}, {"method": "anneal", "anchors": ["a"], "schedules": ["power:2"]}]),
    ],
)
def test_two_arms_of_one_name_are_refused(models: list[str], methods: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=naming(f"'{models[-1]}'")):
        small(models={name: {"source": "digits:30"} for name in models}, methods=methods)


def test_a_pipeline_and_a_model_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'turbo'"):
        small(
            models={"turbo": {"source": "digits:30"}},
            methods=[{"method": "optimize-noise", "reward": "digits", "pipeline": "turbo"}],
        )


# -- images ------------------------------------------------------------------------------------------------------------


def test_every_lam_of_a_plan_is_drawn(tmp_path: Path) -> None:
    plan = small(methods=[{"method": "realign", "anchors": ["strong"], "lam": CLOSE}])
    running.run(plan, tmp_path / "e", Fake, silent)
    with Store(tmp_path / "e", write=False) as store:
        results = Results(plan, store)
        assert [results.done(arm) for arm in results.arms] == [(4, 4)] * 3
        assert len(store.drawn()) == 12


TWICE = {name: {"source": "digits:30", "beta": 30} for name in ("one", "two", "three")}


def test_the_same_weights_under_two_names_are_drawn_once(tmp_path: Path) -> None:
    plan = small(
        models=TWICE,
        methods=[
            {"method": "model"},
            {"method": "realign", "lam": [0.5]},
            {"method": "combine", "lams": [{"one": 0.2, "two": 0.3}, {"three": 0.2, "one": 0.3}]},
        ],
    )
    executor = Fake()
    running.run(plan, tmp_path / "e", lambda: executor, silent)
    assert {len({*group_of(drawing)[1]}) for task in executor.draws for drawing in task.drawings} == {1, 2}
    for task in executor.draws:
        assert len({group_of(drawing) for drawing in task.drawings}) == 1
    with Store(tmp_path / "e", write=False) as store:
        results = Results(plan, store)
        assert {results.done(arm) for arm in results.arms} == {(4, 4)}
        assert len(store.drawn()) == 3 * 4
        first, second = (results.contents.cells[cell] for cell in list(results.contents.cells)[:8:4])
        assert first == second


def test_a_model_gets_a_second_name_in_a_store_that_knows_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    methods = [{"method": "realign", "lam": [0.3, 0.5]}]
    running.run(small(models={"two": TWICE["two"]}, methods=methods), folder, Fake, silent)
    with Store(folder) as store:
        before = {item: image.path.read_bytes() for item, image in store.drawn().items()}
        gone = next(iter(before))
        store.path(gone).unlink()
    executor = Fake()
    outcome = running.run(small(models=TWICE, methods=methods), folder, lambda: executor, silent)
    assert outcome.drawn == outcome.lost == 1
    assert {drawing.anchors[0][0] for task in executor.draws for drawing in task.drawings} == {"one"}
    with Store(folder, write=False) as store:
        assert store.drawn().keys() == before.keys()


def test_the_identity_of_an_image_is_what_it_was() -> None:
    plan = small(methods=[{"method": "realign", "anchors": ["strong"], "lam": [0.5]}])
    prints = {"": {"sha256": "r"}, "strong": {"sha256": "s"}, "weak": {"sha256": "w"}}
    (arm,) = plan.arms()
    drawing = running.by_weights(drawing_of(plan, arm, "a", 7), plan, prints)
    assert running.identity(drawing, "", plan, prints) == "65f826443ca4d1fddf95e200dbd4a0ec"  # computed by version 0.1


def test_what_0_1_stored_of_interpolated_weights_is_what_is_asked_for_now() -> None:
    methods = [
        {"method": "realign", "anchors": ["strong"], "lam": [0.5]},
        {"method": "interpolate", "anchors": ["strong"], "lam": [0.5, 1.0]},
    ]
    plan = small(methods=methods)
    prints = {name: {"sha256": name or "base"} for name in ("", *plan.models)}
    drawings = [drawing_of(plan, arm, "the digit one", 3) for arm in plan.arms()]
    assert [running.identity(drawing, "", plan, prints) for drawing in drawings] == [
        "1013547d9441dda87b92801fd9b890fc",
        "4e6ca1540131acb0c341a1184a1644f9",
        "f4007d307d785a405b56bc3202387bf5",
    ]
    methods_now = [metadata(drawing)["settings"]["method"] for drawing in drawings]
    assert methods_now == ["mixture", "interpolate", "mixture"]  # the last one's weights are the anchor's own


def test_a_record_of_0_1_is_read() -> None:
    known = {"reference": "digits", "anchors": {"anchor": "digits:30"}, "prompts": ["a"], "seeds": [0]}
    settings = Settings.model_validate(known | {"columns": [{"lam": 0.5}], "method": "weights"})
    assert settings.method == "interpolate" == settings.model_dump()["method"]
    with pytest.raises(ValueError, match=naming("method", "'mixture'", "'interpolate'", "'magic'")):
        Settings.model_validate(known | {"columns": [{"lam": 0.5}], "method": "magic"})


def test_points_of_a_search_are_found_by_what_they_are() -> None:
    space = spaces.power("strong")
    point = (2.0,)
    plan = Plan.model_validate(
        SMALL
        | {
            "methods": [
                {"method": "interpolate", "anchors": ["strong"], "lam": [0.5]},
                {"method": "realign", "anchors": ["strong"], "lam": [0.5], "particles": 4},
                {"method": "anneal", "anchors": ["strong"], "schedules": ["power:2.0"]},
                {"method": "realign", "anchors": ["strong"], "lam": [0.5]},
                space.method(point),
            ]
        }
    )
    assert space.arm(plan, point).name == "strong, power:2.0"
    found = spaces.lam("strong").arm(plan, (0.5,))
    assert (found.method, found.particles) == ("realign", 0)


def test_points_of_a_search_that_differ_look_different() -> None:
    space = spaces.lam("strong", 0.0, 0.12345678)
    assert space.text((0.12345678,)) != space.text((0.12345679,))
    assert spaces.power("strong", 0.5, 1234567.25).schedule((1234567.25,)) == "power:1234567.25"


# -- files and labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0.1234567, 1e-7, 1234567.0, 1e300, 0.1 + 0.2, 5e-324, 0.0, -0.5, 1 / 3])
def test_a_number_is_written_so_that_it_can_be_read_again(number: float) -> None:
    assert float(notation.plain(number)) == number
    assert notation.plain(math.nextafter(number, 2)) != notation.plain(number)


def settings(**changes: Any) -> Settings:
    usual: dict[str, Any] = {
        "reference": "digits",
        "anchors": {"anchor": "digits:100"},
        "prompts": ("a",),
        "seeds": (0,),
        "columns": tuple(Column(lam=lam) for lam in CLOSE),
    }
    return Settings(**usual | changes)


def test_columns_that_differ_are_labelled_so() -> None:
    for columns in (
        settings().columns,
        [Column(lam={"a": lam, "b": 0.5}) for lam in CLOSE],
        [Column(lam=lam, schedule=notation.schedule("power:2", "steps").to_dict()) for lam in CLOSE],  # type: ignore[union-attr]
    ):
        assert len({column.label(None) for column in columns}) == len({column.slug() for column in columns}) == 3


def test_every_image_has_a_file_of_its_own() -> None:
    long = "猫" * 300
    prompts = ("A cat!", "a cat", "a-cat", long, long + "!", ":smile:", "", "../..")
    several = settings(
        prompts=prompts,
        seeds=(0, 2**63 - 1),
        anchors={"猫" * 60: "x", "犬" * 60: "y"},
        columns=tuple(Column(lam={"猫" * 60: lam, "犬" * 60: 0.5}) for lam in CLOSE),
    )
    names = [file_name(several, place) for place in range(len(several.drawings))]
    assert len({name.casefold() for name in names}) == len(names) == 8 * 2 * 3
    assert all(len(name.encode()) < 200 and "/" not in name for name in names)


def test_strengths_that_differ_have_folders_of_their_own() -> None:
    strengths = [500.0, 0.1, 1e-5, 10_000.0, 0.1234567890123, 0.1234567890124, 0.12345678901234]
    assert [anchor_name(beta) for beta in strengths[:4]] == ["beta-500", "beta-0.1", "beta-1e-05", "beta-10000"]
    assert len({anchor_name(beta) for beta in strengths}) == len(strengths)


def test_names_that_some_file_systems_fold_are_not_kept_side_by_side(tmp_path: Path) -> None:
    kept = Library(tmp_path / "presets", "preset")
    kept.save("Sunset", {"a": 1})
    with pytest.raises(ValueError, match=naming("'Sunset'", "'sunset'")):
        kept.save("sunset", {"a": 2})
    kept.save("Sunset", {"a": 3})
    assert kept.load("Sunset") == {"a": 3} and kept.names() == ["Sunset"]
    for name in ("con", "NUL", "Com1"):
        with pytest.raises(ValueError, match=naming("Windows", f"'{name}'")):
            kept.save(name, {})
