"""Every file that a command reads back may be anything: what comes of it is its content, or a sentence."""

import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import written_files
from damaging import damage, is_sentence
from deradiff.cli import app
from deradiff.experiments.reporting import exhibits
from deradiff.files import reading, tensors
from deradiff.files.plans import PlanPart
from deradiff.files.plans import read as read_plan
from deradiff.files.records import read_png
from messages import naming
from restorable import Written

pytestmark = pytest.mark.attack("files read back")

QUICK = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SLOW = settings(QUICK, max_examples=8)

ROOMS = [make.__name__ for make in written_files.MAKERS]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Written]]:
    """The files of one maker, each in a folder that is made once."""
    made: dict[str, list[Written]] = {}

    def of(name: str) -> list[Written]:
        if name not in made:
            maker = next(make for make in written_files.MAKERS if make.__name__ == name)
            made[name] = written_files.written(tmp_path_factory.mktemp(name), (maker,))
        return made[name]

    return of


def said(file: Written, choices: random.Random) -> None:
    """Damage a file and read it. Raises what is not a sentence."""
    damage(file, choices)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.read()
    except Exception as error:
        if not is_sentence(error):
            raise
    finally:
        file.restore()


@pytest.mark.parametrize("name", ROOMS)
def test_what_was_written_is_read(room: Any, name: str) -> None:
    for file in room(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.read()
        file.restore()


@pytest.mark.parametrize("name", ROOMS)
def test_a_damaged_file_is_a_sentence(room: Any, name: str) -> None:
    files = room(name)
    light = [file for file in files if file.weight >= 5]
    heavy = [file for file in files if file.weight < 5]

    for some, bounds in ((light, QUICK), (heavy, SLOW)):
        if some:

            @bounds
            @given(file=st.sampled_from(some), choices=st.randoms(use_true_random=False))
            def try_it(file: Written, choices: random.Random) -> None:
                said(file, choices)

            try_it()


# -- one reader --------------------------------------------------------------------------------------------------------


class Small(reading.Record):
    count: int
    names: dict[str, float]


GOOD = '{"count": 3, "names": {"a": 1, "b": 0.5}, "later": []}'


def parsed(text: object) -> Small:
    return reading.parse(Small, text, "the file", "record", "delete it")


def test_a_record_is_read_and_what_a_later_version_added_is_passed_over() -> None:
    assert parsed(GOOD) == Small(count=3, names={"a": 1.0, "b": 0.5})


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[]", ["values"]),
        ("{}", ["count", "names"]),
        ("null", ["values", None]),
        ("", ["JSON"]),
        ('{"count": true, "names": {}}', ["count", True]),
        ('{"count": "3", "names": {}}', ["count", "'3'"]),
        ('{"count": 1%s, "names": {}}' % ("0" * 400), [401]),
        ("1" * 5000, [5000]),
        ('{"count": 99999999999999999999, "names": {}}', [99999999999999999999, 64]),
        ("[" * 100_000, [64]),
        ('{"a":' * 100_000, [64]),
        ("[" * 70 + "]" * 70, [64]),
        ('{"count": 1, "count": 2}', ["'count'"]),
        ('{"count": 1, "names": {"\\ud800": 1}}', [r"'\ud800'"]),
        ('{"count": NaN, "names": {}}', ["count", "nan"]),
        (None, [None]),
        (b"{}", [b"{}"]),
        (GOOD[:-1], ["JSON"]),
    ],
)
def test_json_that_is_none_of_ours_is_named(text: object, values: list[object]) -> None:
    with pytest.raises(ValueError, match=naming("the file", "record", "delete it", *values)):
        parsed(text)


class Wanted(PlanPart):
    steps: int = 1
    names: list[str] = []  # noqa: RUF012


BOMB = "\n".join(["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[" * 100_000, [64]),
        ("- " * 100_000, [64]),
        ("steps: " + "9" * 5000, [5000]),
        (BOMB, ["500,000"]),
        ("a: &a [*a]", ["*a"]),
        ("steps: 1\nsteps: 2", ["'steps'"]),
        ("steps: 2001-99-99", ["month"]),
        ("steps: !!bool x", ["!!"]),
        ("steps: !!timestamp x", ["!!"]),
        ('names: ["\\ud800"]', [r"'\ud800'"]),
        ('names: ["\\U00110000"]', ["0x110000"]),
        ("\x00", ["#x0000"]),
        ("steps: [1]", ["steps"]),
        ("stops: 1", ["stops"]),
        ("- 1", ["values"]),
        ("", ["values", None]),
    ],
)
def test_yaml_that_is_no_plan_is_named(tmp_path: Path, text: str, values: list[object]) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=naming(file, *values)):
        read_plan(Wanted, file, "plan", "deradiff plan")


def test_an_alias_stands_for_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("names: [&one a, *one, b]\nsteps: 3\n")
    assert read_plan(Wanted, file, "plan", "deradiff plan").names == ["a", "a", "b"]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    readers: list[Callable[[Path], object]] = [
        lambda path: reading.read(Small, path, "record", ""),
        read_png,
        lambda path: tensors.handle(path, "tensors", ""),
    ]
    for path, error in ((tmp_path / "pipe", OSError), (tmp_path, IsADirectoryError), (Path("/dev/zero"), OSError)):
        for read in readers:
            with pytest.raises(error, match=str(path)):
                read(path)
    with pytest.raises(FileNotFoundError, match="gone"):
        reading.read(Small, tmp_path / "gone", "record", "")
    with pytest.raises(FileNotFoundError, match="x00"):
        reading.read(Small, Path("a\x00b"), "record", "")


def test_denied_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "record.json"
    file.write_text(GOOD)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root may read everything
    with pytest.raises(PermissionError, match=naming(file)) as caught:
        reading.read(Small, file, "record", "delete it")
    assert "damaged" not in str(caught.value) and "delete" not in str(caught.value)


def test_a_file_has_a_bound(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b" " * (reading.LARGEST + 1))
    with pytest.raises(ValueError, match=naming(tmp_path / "long", "33,554,432")):
        reading.read(Small, tmp_path / "long", "record", "")
    (tmp_path / "bytes").write_bytes(b'{"count": "\xff"}')
    with pytest.raises(ValueError, match=naming(tmp_path / "bytes", "UTF-8", "0xff", 11)):
        reading.read(Small, tmp_path / "bytes", "record", "")


# -- through the commands ----------------------------------------------------------------------------------------------


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert done.exit_code in (0, 2), (done.output, done.exception)
    return " ".join(done.output.split())


def test_commands_say_what_is_wrong_with_a_store_and_a_study(room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhibits, "rendered", lambda *_: b"")  # figures would take most of the time, and read no file
    files = room("databases")
    for file in files:
        name = file.folder.name
        verbs = {"experiment": ("status", file.folder), "study": ("analyse", file.folder, "--out", file.folder / "new")}
        for seed in range(6):
            damage(file, random.Random(seed))
            try:
                command(name, *verbs[name])
            finally:
                shutil.rmtree(file.folder / "new", ignore_errors=True)
                file.restore()


def test_commands_say_what_is_wrong_with_a_plan(room: Any, tmp_path: Path) -> None:
    [file] = [file for file in room("plans") if file.kind == "plan of an experiment"]
    for text in ("[" * 100_000, "[]", "", "name: 1" + "0" * 400, BOMB, '"\\ud800"'):
        file.path.write_text(text)
        said = command("experiment", "run", file.path, "--out", tmp_path / "out")
        assert f"error: {file.path}" in said
    file.restore()


def test_weights_of_a_checkpoint_are_those_of_its_parameters(room: Any) -> None:
    file = next(file for file in room("checkpoints") if "state" in file.kind)
    held = load_file(file.path)
    for wrong in ({**held, "parameters.0": held["parameters.0"][:0]}, {"a": held["parameters.0"]}, {}):
        save_file({name: value.clone() for name, value in wrong.items()}, file.path)
        with pytest.raises(ValueError, match=naming(file.path, "parameters.0")):
            file.read()
        file.restore()
    pickled = file.path.with_name("state.pt")
    file.path.rename(pickled)
    with pytest.raises(ValueError, match=naming("0.1", "state.pt")):
        file.read()
    file.restore()
