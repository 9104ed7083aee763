"""The votes: each once, none lost, and pairs that are shown fairly."""

import multiprocessing
import os
import signal
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from PIL import Image

from deradiff.study import ballots, tiles, votes
from deradiff.study.votes import AlreadyAnswered, NotShown, StudyError, StudyFull, Votes
from messages import naming
from small_study import answers, begun, experiment, planned


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    experiment(folder / "experiment")
    return folder


def study(drawn: Path, tmp_path: Path, **changes: Any) -> Votes:
    return tiles.ready(tmp_path / "study", planned(**changes), drawn, lambda *_: None)


def all_answered(found: Votes, key: str, answer: str = "left") -> list[votes.Shown]:
    """Answer every pair; returns them."""
    seen = []
    while (shown := found.current(key)) is not None:
        found.vote(key, shown.id, answers(answer)).result()
        seen.append(shown)
    return seen


def test_a_participant_sees_every_pair_once(drawn: Path, tmp_path: Path) -> None:
    with study(drawn, tmp_path) as found:
        seen = all_answered(found, found.begin().result())
    assert [shown.position for shown in seen] == [0, 1, 2, 3]
    noise = [shown for shown in seen if len({*shown.left}) == 1 or len({*shown.right}) == 1]
    assert len(noise) == 1
    real = [shown for shown in seen if shown not in noise]
    assert len({shown.prompt for shown in real}) == 3
    assert all(len({*shown.left}) == len({*shown.right}) == 9 for shown in real)
    assert all((tmp_path / "study" / "images" / file).is_file() for shown in seen for file in shown.left + shown.right)


def test_both_sides_show_the_same_seeds_and_change_at_random(drawn: Path, tmp_path: Path) -> None:
    with study(drawn, tmp_path) as found:
        places = {file: place for place, file in found.entered().items()}
        for _ in range(12):
            for shown in all_answered(found, found.begin().result()):
                left, right = ([places[file] for file in side] for side in (shown.left, shown.right))
                if "" not in (left[0].method, right[0].method):
                    assert [place.seed for place in left] == [place.seed for place in right]
                    assert {place.prompt for place in left + right} == {left[0].prompt}
        found_ballots = ballots.read(found.folder, found.plan)
    sides = Counter((one.left, one.right) for one in found_ballots if one.real and one.question == "diversity")
    assert sides.keys() == {("strong", "weak"), ("weak", "strong")} and sides.total() == 36
    assert len({one.seeds for one in found_ballots}) > 20


def test_what_was_shown_least_comes_next() -> None:
    plan = planned(configuration={"methods": {"a": "strong", "b": "weak", "c": "reference"}})
    assert {votes.next_pair(plan, set(), {0: 3, 1: 2, 2: 3})[0] for _ in range(20)} == {1}
    assert {votes.next_pair(plan, {(1, 0), (1, 1), (1, 2)}, {0: 3})[0] for _ in range(40)} == {2}
    assert {votes.next_pair(plan, {(0, 0), (0, 2)}, {1: 1, 2: 1}) for _ in range(20)} == {(0, 1)}


def test_checks_stand_apart_at_random() -> None:
    plan = planned(pairs_per_participant=3, attention_checks=2)
    found = {tuple(votes.check_positions(plan)) for _ in range(200)}
    assert found == {(first, second) for first in (0, 1) for second in (2, 3, 4)}
    assert votes.check_positions(planned(attention_checks=0)) == []


def test_the_same_answer_again_changes_nothing_and_another_is_refused(drawn: Path, tmp_path: Path) -> None:
    with study(drawn, tmp_path) as found:
        key = found.begin().result()
        shown = found.current(key)
        assert shown is not None
        found.vote(key, shown.id, answers("left")).result()
        following = found.current(key)
        found.vote(key, shown.id, answers("left")).result()
        assert found.current(key) == following
        with pytest.raises(AlreadyAnswered):
            found.vote(key, shown.id, answers("left", diversity="right")).result()
        assert {one.answer for one in ballots.read(found.folder, found.plan)} == {"left"}


def test_votes_for_what_was_not_shown(drawn: Path, tmp_path: Path) -> None:
    with study(drawn, tmp_path) as found:
        mine, other = found.begin().result(), found.begin().result()
        shown = found.current(other)
        assert shown is not None
        for key, pair in ((mine, shown.id), (mine, "made up"), ("nobody", shown.id), ("", "")):
            with pytest.raises(NotShown):
                found.vote(key, pair, answers()).result()
        with pytest.raises(NotShown):
            found.current("nobody")
        assert ballots.read(found.folder, found.plan) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"diversity": "left"}, "aesthetics, agreement"),
        (answers("up"), "=up'"),
        (answers(taste="left"), "'taste=left'"),
    ],
)
def test_answers_that_are_none(drawn: Path, tmp_path: Path, given: Any, words: str) -> None:
    with study(drawn, tmp_path) as found:
        key = found.begin().result()
        shown = found.current(key)
        assert shown is not None
        with pytest.raises(ValueError, match=words):
            found.vote(key, shown.id, given).result()
        assert found.current(key) == shown


def test_many_at_once_lose_and_double_nothing(drawn: Path, tmp_path: Path) -> None:
    with study(drawn, tmp_path) as found:
        keys = [found.begin().result() for _ in range(12)]

        def everything(key: str) -> None:
            while (shown := found.current(key)) is not None:
                twice = [found.vote(key, shown.id, answers("right")) for _ in range(2)]
                assert [one.result() for one in twice] == [None, None]

        # One after the other reads, as the server's loop does; what is written meets in the writer.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(everything, keys))
        counts = Counter((one.participant, one.position) for one in ballots.read(found.folder, found.plan))
    assert len(counts) == 12 * 4 and set(counts.values()) == {3}


def test_who_has_voted_sees_the_next_pair_whoever_else_reads(drawn: Path, tmp_path: Path) -> None:
    """Reads that overlap on one connection would all see what the first of them saw."""
    with study(drawn, tmp_path) as found, ThreadPoolExecutor(4) as pool:
        bystander, ended = found.begin().result(), Event()

        def read() -> None:
            while not ended.is_set():
                found.current(bystander)

        readers = [pool.submit(read) for _ in range(4)]
        try:
            for _ in range(10):
                key, answered = found.begin().result(), set()
                while (shown := found.current(key)) is not None:
                    assert shown.id not in answered
                    found.vote(key, shown.id, answers()).result()
                    answered.add(shown.id)
                assert len(answered) == found.plan.shown
        finally:
            ended.set()
        for reader in readers:
            reader.result()


def test_no_one_beyond_the_last(drawn: Path, tmp_path: Path) -> None:
    with study(drawn, tmp_path, most_participants=1) as found:
        all_answered(found, found.begin().result())
        with pytest.raises(StudyFull):
            found.begin().result()


PLACES = pytest.mark.attack("a study closed by beginning")


def vote(found: Votes, key: str) -> None:
    shown = found.current(key)
    assert shown is not None
    found.vote(key, shown.id, answers()).result()


@PLACES
def test_who_has_not_voted_takes_no_place(drawn: Path, tmp_path: Path) -> None:
    with study(drawn, tmp_path, most_participants=2) as found:
        silent = []
        for _ in range(5):  # a thousand, as many at a time as are taken
            silent += [begun.result() for begun in [found.begin() for _ in range(200)]]
        vote(found, silent[0])
        vote(found, found.begin().result())
        with pytest.raises(StudyFull):  # two have voted
            found.begin().result()
        with pytest.raises(StudyFull):
            vote(found, silent[1])
        vote(found, silent[0])  # who has a place goes on
    assert len({one.participant for one in ballots.read(found.folder, found.plan)}) == 2


@PLACES
def test_a_place_is_given_back_and_one_that_was_earned_is_not(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(votes, "monotonic", lambda: now[0])
    with study(drawn, tmp_path, most_participants=2) as found:
        left, late = found.begin().result(), found.begin().result()
        vote(found, left)
        all_answered(found, late)
        with pytest.raises(StudyFull):
            found.begin().result()
    now[0] += votes.PLACE_SECONDS - 1
    with study(drawn, tmp_path, most_participants=2) as found:  # times are not kept: they count from the opening
        with pytest.raises(StudyFull):
            found.begin().result()
        now[0] += votes.PLACE_SECONDS + 1
        third = found.begin().result()
        vote(found, third)
        with pytest.raises(StudyFull):  # a place that was given back is gone, and no vote with it
            vote(found, left)
        now[0] += votes.PLACE_SECONDS + 1
        vote(found, left)
        with pytest.raises(StudyFull):
            vote(found, third)
    assert Counter(one.participant for one in ballots.read(found.folder, found.plan)) == {1: 2 * 3, 2: 4 * 3, 3: 3}


@PLACES
def test_the_first_of_those_who_never_vote_are_forgotten(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(votes, "MOST_SILENT", 5)
    with study(drawn, tmp_path) as found:
        voted = found.begin().result()
        vote(found, voted)
        silent = [found.begin().result() for _ in range(9)]
        assert [found.knows(key) for key in silent] == [False] * 4 + [True] * 5
        assert len(all_answered(found, voted)) == 3 and len(all_answered(found, silent[-1])) == 4
    numbers = [one.participant for one in ballots.read(found.folder, found.plan)]
    assert {*numbers} == {1, 10}


@PLACES
def test_a_study_of_the_first_release_goes_on(drawn: Path, tmp_path: Path) -> None:
    with study(drawn, tmp_path) as found:
        key = found.begin().result()
        vote(found, key)
    with sqlite3.connect(tmp_path / "study" / "study.sqlite") as db:
        db.execute("DELETE FROM facts WHERE name = 'secret'")
        db.execute("DROP INDEX positions")
    with study(drawn, tmp_path) as found:
        assert found.knows(key) and len(found.secret) == 64
        assert len(all_answered(found, key)) == 3


def test_keys_are_not_in_the_database(drawn: Path, tmp_path: Path) -> None:
    with study(drawn, tmp_path) as found:
        key = found.begin().result()
        all_answered(found, key)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "study").glob("study.sqlite*"))
    assert len(key) == 32 and key.encode() not in stored
    with sqlite3.connect(tmp_path / "study" / "study.sqlite") as db:
        columns = [row[1] for row in db.execute("PRAGMA table_info(participants)")]
    assert columns == ["number", "key", "checks"]


# -- going on ---------------------------------------------------------------------------------------------------------


def test_a_study_goes_on_without_its_experiment(tmp_path: Path) -> None:
    with begun(tmp_path) as found:
        key = found.begin().result()
        shown = found.current(key)
        images = found.entered()
    (tmp_path / "experiment").rename(tmp_path / "moved")
    with tiles.ready(tmp_path / "study", planned(), tmp_path, lambda *_: None) as found:
        assert (found.current(key), found.entered()) == (shown, images)


def test_images_that_were_not_all_made(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tiles.kept
    made: list[str] = []

    def stopped(image: Image.Image, folder: Path) -> str:
        if len(made) == 40:
            raise KeyboardInterrupt
        made.append(own(image, folder))
        return made[-1]

    monkeypatch.setattr(tiles, "TOGETHER", 8)
    monkeypatch.setattr(tiles, "kept", stopped)
    with pytest.raises(KeyboardInterrupt):
        study(drawn, tmp_path)
    monkeypatch.setattr(tiles, "kept", own)
    with study(drawn, tmp_path) as found:
        entered = found.entered()
    assert len(entered) == 61 and {*made} <= {*entered.values()}


def test_other_folders_and_plans_are_refused(drawn: Path, tmp_path: Path) -> None:
    with study(drawn, tmp_path):
        pass
    with pytest.raises(StudyError, match=naming(tmp_path / "study", "'small'")):
        study(drawn, tmp_path, title="Another")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(StudyError, match=naming(tmp_path / "full", "other files")):
        Votes(tmp_path / "full", planned())
    with pytest.raises(StudyError, match=naming(tmp_path / "none", "`deradiff study serve PLAN --out")):
        votes.plan_of(tmp_path / "none")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StudyError, match=naming(tmp_path / "broken" / "study.sqlite", "damaged")):
        Votes(tmp_path / "broken", planned())
    with sqlite3.connect(tmp_path / "study" / "study.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StudyError, match=naming("study.sqlite", "version 99")):
        study(drawn, tmp_path)


def test_nothing_is_begun_that_cannot_be_shown(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("seed 10")):
        study(drawn, tmp_path, configuration={"seeds": "0:10"})
    assert not (tmp_path / "study").exists()


def _vote_on(folder: str, acknowledged: Any) -> None:
    found = Votes(Path(folder), planned())
    while True:
        key = found.begin().result()
        while (shown := found.current(key)) is not None:
            found.vote(key, shown.id, answers("equal")).result()
            acknowledged.send(shown.id)


def test_a_killed_process_loses_no_acknowledged_vote(drawn: Path, tmp_path: Path) -> None:
    with study(drawn, tmp_path):
        pass
    known: set[str] = set()
    for count in (1, 4, 9):
        ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_vote_on, args=(tmp_path / "study", theirs))
        process.start()
        theirs.close()
        known.update(ours.recv() for _ in range(count))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            while True:
                known.add(ours.recv())
        except EOFError:
            ours.close()
    with sqlite3.connect(tmp_path / "study" / "study.sqlite") as db:
        stored = [row[0] for row in db.execute("SELECT pair FROM votes GROUP BY pair HAVING COUNT(*) = 3")]
        assert db.execute("SELECT COUNT(*) FROM votes").fetchone()[0] == 3 * len(stored)
    assert len(known) > 3 and known <= {*stored}


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tiled", "suffix"),
    [
        ((3, 3), (162, 162), ".png"),
        ((64, 32), (192, 96), ".png"),
        ((384, 200), (384, 200), ".png"),
        ((1024, 512), (384, 192), ".jpg"),
    ],
)
def test_tiles_have_a_size_for_grids_and_say_nothing(
    tmp_path: Path, size: tuple[int, int], tiled: tuple[int, int], suffix: str
) -> None:
    (tmp_path / "images").mkdir()
    image = Image.new("RGBA", size, (200, 10, 10, 255))
    image.info["deradiff"] = "the method"
    name = tiles.kept(image, tmp_path)
    file = tmp_path / "images" / name
    with Image.open(file) as opened:
        assert (opened.size, opened.mode, file.suffix) == (tiled, "RGB", suffix)
        assert opened.info.get("deradiff") is None
    assert b"the method" not in file.read_bytes()


def test_an_image_that_was_altered_is_not_shown(tmp_path: Path) -> None:
    from deradiff.experiments.store import Missing
    from deradiff.study.sources import located

    experiment(tmp_path / "experiment")
    path = next(iter(located(planned(), tmp_path).values())).path
    path.write_bytes(b"something else")
    with pytest.raises(Missing, match=naming(path)):
        tiles.ready(tmp_path / "study", planned(), tmp_path, lambda *_: None)
