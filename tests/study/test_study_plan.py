"""A study's plan: what it refuses, how it is drafted from an experiment, and that every image it needs is there."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deradiff.experiments.store import StoreError
from deradiff.study.plan import ANSWERS, StudyCell, parse_plan, read_plan, write_plan
from deradiff.study.sources import arms_named, drafted, located, opened
from messages import naming
from small_study import PROMPTS, data, experiment, planned


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small experiment in it."""
    folder = tmp_path_factory.mktemp("study")
    experiment(
        folder / "experiment",
        methods=[{"method": "model"}, {"method": "anneal", "anchors": ["weak"], "schedules": ["power:2"]}],
        prompts={"few": {"prompts": PROMPTS, "seeds": "0:9"}, "single": {"prompts": PROMPTS, "seeds": "0:1"}},
    )
    return folder


def refused(**changes: Any) -> str:
    with pytest.raises(ValueError) as error:
        planned(**changes)
    return str(error.value)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(write_plan(planned()), encoding="utf-8")
    assert read_plan(file) == planned()
    assert yaml.safe_load(file.read_text())["configurations"][0]["seeds"] == "0:9"


def test_what_is_compared() -> None:
    three = planned(configuration={"methods": {"a": "strong", "b": "weak", "c": "reference"}})
    assert three.cells == (StudyCell(0, "a", "b"), StudyCell(0, "a", "c"), StudyCell(0, "b", "c"))
    assert (three.different_pairs, three.shown) == (9, 4)
    other = data()["configurations"][0] | {"name": "other", "methods": {"weak": "w", "strong": "s"}}
    two = planned(configurations=[data()["configurations"][0], other])
    # One order for both, so that their votes can be pooled.
    assert two.cells == (StudyCell(0, "strong", "weak"), StudyCell(1, "strong", "weak"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"configuration": {"methods": {"strong": "strong"}}}, "configurations.0.methods"),
        ({"configuration": {"methods": {"a": "strong", "b": "strong"}}}, "'a' and 'b'"),
        ({"configuration": {"seeds": "0:7"}}, "9 seeds"),
        ({"configuration": {"seeds": "zero"}}, "'zero'"),
        ({"configuration": {"prompts": ["one", "one"]}}, "listed twice"),
        ({"configuration": {"prompts": []}}, "configurations.0.prompts"),
        ({"configuration": {"colour": "red"}}, "configurations.0.colour"),
        ({"pairs_per_participant": 4}, "3 pairs"),
        ({"attention_checks": 4}, "4 attention_checks"),
        ({"questions": [{"key": "taste", "text": "Which?"}]}, "`checked: true`"),
        ({"questions": [{"key": "pair of", "text": "Which?"}]}, "questions.0.key"),
        ({"questions": [{"key": "pair", "text": "Which?", "checked": True}]}, "'pair'"),
        ({"questions": [{"key": "a", "text": "A?", "checked": True}] * 2}, "'a'"),
        ({"configurations": data()["configurations"] * 2}, "'few'"),
        ({"configurations": []}, "configurations"),
        ({"name": "../there"}, "name"),
        ({"pairs": 3}, "pairs: "),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    assert words in refused(**changes)


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "none.yaml", "deradiff study plan")):
        read_plan(tmp_path / "none.yaml")
    for text, words in (("a: [", "YAML"), ("- 1", "plan"), ("a: !!python/object:os.system", "YAML")):
        (tmp_path / "some.yaml").write_text(text)
        with pytest.raises(ValueError, match=naming(tmp_path / "some.yaml", words)):
            read_plan(tmp_path / "some.yaml")


def test_arms_are_named_with_commas_between_and_inside() -> None:
    known = ["weak", "weak, power:2", "strong, λ = 0.5"]
    assert arms_named(["weak, power:2,weak"], known) == ["weak, power:2", "weak"]
    assert arms_named(["weak", "strong, λ = 0.5"], known) == ["weak", "strong, λ = 0.5"]
    assert arms_named(["weak,weak"], known) == ["weak"]
    with pytest.raises(ValueError, match=naming("'power:2'", "'weak', 'weak, power:2'")):
        arms_named(["strong, λ = 0.5, power:2"], known)


def test_a_drafted_plan(drawn: Path) -> None:
    plan = drafted(drawn / "experiment", ["weak, power:2,strong"], drawn)
    assert plan.methods == ("weak, power:2", "strong")
    (one,) = plan.configurations  # the other prompts have two seeds
    assert (one.experiment, one.prompt_set, one.prompts) == ("experiment", "few", tuple(PROMPTS))
    assert one.seeds == tuple(range(10))
    assert plan.pairs_per_participant == 3
    assert parse_plan(yaml.safe_load(write_plan(plan)), "it") == plan
    assert len(located(plan, drawn)) == 2 * 3 * 10
    assert ANSWERS == ("left", "equal", "right")


def test_what_cannot_be_drafted(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("--methods", 1)):
        drafted(drawn / "experiment", ["weak"], drawn)
    with pytest.raises(ValueError, match=naming("'beta'")):
        drafted(drawn / "experiment", ["weak,beta"], drawn)
    with pytest.raises(StoreError, match=naming(drawn, "`deradiff experiment run`")):
        drafted(drawn, ["weak,strong"], drawn)
    experiment(tmp_path / "experiment", prompts={"single": {"prompts": PROMPTS, "seeds": "0:7"}})
    with pytest.raises(ValueError, match=naming("single", 8, '`seeds: "0:8"`')):
        drafted(tmp_path / "experiment", ["weak,strong"], tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": {"a": "weak", "b": "gone"}}, naming("'gone'", "few")),
        ({"sampling": "paper"}, naming("'paper'", "'ancestral'")),
        ({"prompt_set": "many"}, naming("'many'", "'few', 'single'")),
        ({"prompts": ["the digit nine"]}, "'the digit nine'"),
        ({"seeds": "0:12"}, "10, 11, 12"),
    ],
)
def test_what_an_experiment_does_not_have(drawn: Path, changes: dict[str, Any], words: str) -> None:
    plan = planned(configuration=changes, pairs_per_participant=1)
    with pytest.raises(ValueError, match=words):
        located(plan, drawn)


def test_missing_images_are_named(tmp_path: Path) -> None:
    experiment(tmp_path / "experiment")
    gone = next(iter(located(planned(), tmp_path).values()))
    gone.path.unlink()
    with pytest.raises(ValueError, match=naming("1 of 60", "'strong'", "'the digit one'", "seed 0")):
        located(planned(), tmp_path)
    with opened(tmp_path / "experiment") as (_, store):
        assert gone.id in store.drawn()
