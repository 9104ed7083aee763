"""The store: what is in it is whole, once, and found again."""

import json
import multiprocessing
import os
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deradiff.experiments import running, store
from deradiff.experiments.drawings import planned_images
from deradiff.experiments.store import Missing, Store, StoreError
from deradiff.files.locks import FolderInUse
from holding import another_process
from messages import naming
from small_experiment import Fake, fake_png, files, silent, small


def run(folder: Path, executor: Fake, plan: Any = None, **options: Any) -> running.Outcome:
    return running.run(plan or small(), folder, lambda: executor, silent, **options)


def test_a_repeated_run_does_nothing(tmp_path: Path) -> None:
    first, second = Fake(), Fake()
    assert run(tmp_path / "x", first).drawn == 20
    before = files(tmp_path / "x")
    outcome = run(tmp_path / "x", second)
    assert (outcome.drawn, outcome.scored, second.draws, second.scores) == (0, 0, [], [])
    assert files(tmp_path / "x") == before and len(before) == 20


def test_a_new_score_needs_no_new_image(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake())
    executor = Fake()
    outcome = run(tmp_path / "x", executor, small(scores=["digits", "bold"]))
    assert (outcome.drawn, outcome.scored) == (0, 20)
    assert {task.name for task in executor.scores} == {"bold"}


def test_a_changed_plan_adds_only_what_is_new(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake())
    before, executor = files(tmp_path / "x"), Fake()
    methods = [{"method": "realign", "targets": "all"}, {"method": "realign", "anchors": ["weak"], "lam": [0.5]}]
    outcome = run(tmp_path / "x", executor, small(methods=methods))
    assert outcome.drawn == 4
    assert {drawing.anchors for task in executor.draws for drawing in task.drawings} == {(("weak", 0.5),)}
    assert before.items() <= files(tmp_path / "x").items()


def test_weights_that_changed_make_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "x", Fake())
    own = running.fingerprints

    def changed(plan: Any, known: Any) -> Any:
        prints = own(plan, known)
        return prints | {"weak": {"sha256": "0" * 64, "files": {}}}

    monkeypatch.setattr(running, "fingerprints", changed)
    executor = Fake()
    run(tmp_path / "x", executor)
    assert executor.draws
    assert all("weak" in dict(drawing.anchors) for task in executor.draws for drawing in task.drawings)


def test_an_image_that_is_gone_or_altered_is_made_again_with_its_batch(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake())
    before = files(tmp_path / "x")
    gone, altered = list(before)[3], list(before)[11]
    (tmp_path / "x" / gone).unlink()
    (tmp_path / "x" / altered).write_bytes(b"something else")
    executor = Fake()
    outcome = run(tmp_path / "x", executor)
    assert (outcome.lost, outcome.drawn) == (2, 2)
    assert files(tmp_path / "x") == before
    assert all(len(task.drawings) == 4 for task in executor.draws)
    assert sum(len(task.wanted) for task in executor.draws) == 2


def test_an_image_altered_without_a_trace_is_found_when_it_is_read(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake())
    before = files(tmp_path / "x")
    path = tmp_path / "x" / list(before)[5]
    state = path.stat()
    path.write_bytes(bytes(state.st_size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert run(tmp_path / "x", Fake()).lost == 0
    assert run(tmp_path / "x", Fake(), small(scores=["digits", "bold"])).lost == 1
    assert files(tmp_path / "x") == before
    path.write_bytes(bytes(state.st_size))
    recorded = path.stat().st_mtime_ns
    with Store(tmp_path / "x") as opened:
        opened._db.execute("UPDATE items SET mtime = ? WHERE id = ?", (recorded, path.stem))
    assert run(tmp_path / "x", Fake()).lost == 0
    assert run(tmp_path / "x", Fake(), thoroughly=True).lost == 1
    assert files(tmp_path / "x") == before


def test_a_scorer_that_fails_on_one_image(tmp_path: Path) -> None:
    plan = small()
    drawing = next(planned_images(plan, {"few": plan.prompts["few"].prompts})).drawing
    outcome = run(tmp_path / "x", Fake(fail_on=(fake_png(drawing),)))
    assert [(name, error) for name, _, error in outcome.failures] == [("digits", "ValueError: no")]
    with Store(tmp_path / "x", write=False) as opened:
        assert len(opened.scores("digits")) == 19
    # It stays as it is, until somebody asks for it to be tried again.
    assert len(run(tmp_path / "x", Fake()).failures) == 1
    outcome = run(tmp_path / "x", Fake(), again=True)
    assert (outcome.scored, outcome.failures) == (1, [])


def test_a_score_belongs_to_the_image_that_was_scored(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake())
    with Store(tmp_path / "x") as opened:
        item = next(iter(opened.drawn()))
        opened.put([(item, b"another picture", {})], 1.0)
        assert item not in opened.scores("digits")
        assert opened.unscored("scores", "digits", [item]) == [item]


def test_features_come_back_as_they_were(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake())
    with Store(tmp_path / "x") as opened:
        images = list(opened.drawn().values())
        vectors = [np.random.default_rng(i).normal(size=5).astype(np.float32) for i in range(len(images))]
        found = [(image, vector, None) for image, vector in zip(images, vectors, strict=True)]
        opened.put_scores("features", "digits", found)
        back = opened.features("digits")
    assert all((back[image.id] == vector).all() for image, vector in zip(images, vectors, strict=True))


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_the_columns_are_those_of_version_0_1(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake())
    with sqlite3.connect(tmp_path / "x" / "store.sqlite") as db:
        (diagnostics,) = db.execute("SELECT told FROM items WHERE sha256 IS NOT NULL LIMIT 1").fetchone()
    assert isinstance(json.loads(diagnostics), dict)


def test_a_store_of_a_later_version(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake())
    with sqlite3.connect(tmp_path / "x" / "store.sqlite") as db:
        db.execute(f"PRAGMA user_version = {store.SCHEMA + 1}")
    with pytest.raises(StoreError, match=naming("store.sqlite", f"version {store.SCHEMA + 1}", store.SCHEMA)):
        run(tmp_path / "x", Fake())


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=naming(tmp_path, "other files")):
        run(tmp_path, Fake())
    with pytest.raises(StoreError, match=naming(tmp_path, "`deradiff experiment run`")):
        Store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_store(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake())
    (tmp_path / "x" / "store.sqlite").write_bytes(b"no database at all" * 500)
    with pytest.raises(StoreError, match=naming(tmp_path / "x" / "store.sqlite", "damaged")):
        run(tmp_path / "x", Fake())


def test_two_runs_at_once(tmp_path: Path) -> None:
    with another_process(tmp_path / "x") as process, pytest.raises(FolderInUse, match=str(process.pid)):
        run(tmp_path / "x", Fake())


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0
    own = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        nonlocal written
        written += 1
        if written == 7:
            own(path, content[:10])
            raise OSError(28, "No space left on device")
        return own(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match=naming(tmp_path / "x", "free", "96 bytes")):
        run(tmp_path / "x", Fake())
    assert len(files(tmp_path / "x")) >= 4
    assert run(tmp_path / "x", Fake()).drawn > 0
    run(tmp_path / "y", Fake())
    assert files(tmp_path / "x") == files(tmp_path / "y")


def test_a_full_database(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake(), small(methods=[{"method": "reference"}]))
    with Store(tmp_path / "x") as opened:
        pages = opened._db.execute("PRAGMA page_count").fetchone()[0]
        opened._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match=naming(tmp_path / "x", "full")):
            opened.remember("much", "x" * 10_000_000)


def test_an_image_that_was_altered_is_not_read(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake())
    with Store(tmp_path / "x", write=False) as opened:
        image = next(iter(opened.drawn().values()))
        image.path.write_bytes(b"else")
        with pytest.raises(Missing, match=naming(image.path)):
            image.read()


# -- killed ------------------------------------------------------------------------------------------------------------


def _slowly(folder: str) -> None:
    class Slow(Fake):
        def result(self, ticket: int) -> Any:
            time.sleep(0.003)
            return super().result(ticket)

    run(Path(folder), Slow())


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """What the workers do is stubbed here; `benchmarks/attack.py` kills the real thing."""
    run(tmp_path / "whole", Fake())
    whole = files(tmp_path / "whole")
    chance, context, killed = random.Random(0), multiprocessing.get_context("fork"), 0
    for attempt in range(8):
        folder = tmp_path / f"killed{attempt}"
        for _ in range(4):
            process = context.Process(target=_slowly, args=(str(folder),))
            process.start()
            time.sleep(chance.uniform(0.005, 0.09))
            killed += process.is_alive()
            process.kill()
            process.join()
        run(folder, Fake())
        assert files(folder) == whole
        with Store(folder, write=False) as opened:
            ids = [row[0] for row in opened._rows("SELECT id FROM items")]
            assert len(ids) == len({*ids}) == len(whole)
            assert len(opened.scores("digits")) == len(whole)
    assert killed >= 8


def test_the_record_of_an_image_is_plain_data(tmp_path: Path) -> None:
    run(tmp_path / "x", Fake())
    with Store(tmp_path / "x", write=False) as opened:
        record = json.loads(next(opened._rows("SELECT drawing FROM items ORDER BY batch, place"))[0])
        provenance = opened.runs()
    assert record["prompt"] == "the digit one"
    assert record["settings"]["scheduler"] == "euler-a"
    assert {"torch", "diffusers"} <= provenance[1]["versions"].keys()
