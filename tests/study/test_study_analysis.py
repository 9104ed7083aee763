"""The analysis against numbers worked out by hand, and what becomes of participants who fail their checks."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from deradiff.study import analysis, ballots, preferences, report, tiles
from deradiff.study.ballots import Ballot
from messages import naming
from small_study import answers, begun, data, planned

# Who answered what, as (first, Equal, second) of every participant.
COUNTS = np.array([[6, 1, 1], [0, 1, 1], [2, 0, 0]])


def ballot(participant: int, position: int, answer: Any, **changes: Any) -> Ballot:
    about: dict[str, Any] = {
        "configuration": "few",
        "prompt_set": "few",
        "prompt": "the digit one",
        "left": "strong",
        "right": "weak",
        "seeds": tuple(range(9)),
        "question": "diversity",
        "checked": False,
    }
    return Ballot(participant=participant, position=position, answer=answer, **about | changes)


def by_hand() -> list[Ballot]:
    """The votes of `COUNTS`, every other one with the sides changed."""
    found = []
    for person, row in enumerate(COUNTS):
        kinds = [kind for kind, count in enumerate(row) for _ in range(count)]
        for position, kind in enumerate(kinds):
            changed = position % 2 == 1
            side = ("right", "equal", "left") if changed else ("left", "equal", "right")
            sides = {"left": "weak", "right": "strong"} if changed else {}
            found.append(ballot(person, position, side[kind], **sides))
    return found


def test_shares_by_hand() -> None:
    found = preferences.preference_of(COUNTS)
    assert found.participants == 3 and found.votes == (8, 2, 2)
    assert [rate.value for rate in found.shares] == pytest.approx([8 / 12, 2 / 12, 2 / 12])
    # Each participant's own shares: (6, 1, 1)/8, (0, 1, 1)/2, (2, 0, 0)/2.
    expected = [(6 / 8 + 0 + 1) / 3, (1 / 8 + 1 / 2 + 0) / 3, (1 / 8 + 1 / 2 + 0) / 3]
    assert [rate.value for rate in found.normalised] == pytest.approx(expected)
    assert found.wins.value == 8 / 10
    # Ten votes are not Equal, 8 to 2: twice the tail of ten tosses of a coin.
    assert found.p_votes == pytest.approx(2 * (1 + 10 + 45) / 1024)
    # Of the three people two prefer the first and one the second.
    assert found.p_participants == 1


def test_intervals_are_of_resampled_people() -> None:
    found = preferences.preference_of(COUNTS, resamples=40_000)
    # All 27 ways to draw three people of three.
    every = [COUNTS[[i, j, k]] for i in range(3) for j in range(3) for k in range(3)]
    shares = np.array([some.sum(0) / some.sum() for some in every])
    means = np.array([(some / some.sum(1, keepdims=True)).mean(0) for some in every])
    for rates, exact in ((found.shares, shares), (found.normalised, means)):
        for answer, rate in enumerate(rates):
            low, high = (np.quantile(exact[:, answer], q, method="inverted_cdf") for q in (0.025, 0.975))
            assert (rate.low, rate.high) == pytest.approx((low, high), abs=1e-9)
    assert preferences.preference_of(COUNTS) == preferences.preference_of(COUNTS)


def test_intervals_hold_what_they_should() -> None:
    """Of 200 studies with people who differ, about 95% of the intervals hold the true share."""
    chance = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        own = chance.beta(3, 2, size=30)
        first = chance.binomial(10, own)
        counts = np.stack([first, np.zeros(30, int), 10 - first], axis=1)
        rate = preferences.preference_of(counts, resamples=500).normalised[0]
        held += rate.low <= 0.6 <= rate.high
    assert 0.89 <= held / 200 <= 0.99


def test_one_person_and_nothing_but_ties() -> None:
    found = preferences.preference_of(np.array([[0, 4, 0]]))
    assert [rate.value for rate in found.shares] == [0, 1, 0]
    assert math.isnan(found.shares[1].low) and math.isnan(found.wins.value)
    assert (found.p_votes, found.p_participants) == (1, 1)
    for counts in (np.zeros((0, 3), int), np.array([[1, 0, 0], [0, 0, 0]]), np.ones((2, 2), int)):
        with pytest.raises(ValueError, match=naming("(first, Equal, second)")):
            preferences.preference_of(counts)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (9, 1), (0, 6), (40, 60)])
def test_the_sign_test(first: int, second: int) -> None:
    tails = sum(math.comb(first + second, n) for n in range(min(first, second) + 1)) / 2 ** (first + second)
    assert preferences.sign_test(first, second) == pytest.approx(min(1.0, 2 * tails))


def test_sides_do_not_matter() -> None:
    counts = preferences.counted(by_hand(), "strong", "weak")
    assert counts.tolist() == COUNTS.tolist()
    assert preferences.counted(by_hand(), "weak", "strong").tolist() == COUNTS[:, ::-1].tolist()
    assert preferences.counted(by_hand(), "strong", "reference").shape == (0, 3)


def test_votes_are_counted_by_configuration_and_together() -> None:
    other = data()["configurations"][0] | {"name": "other", "prompt_set": "many"}
    plan = planned(configurations=[data()["configurations"][0], other])
    moved = ballot(5, 0, "left", configuration="other", prompt_set="many")
    found = analysis.analysed(plan, [*by_hand(), moved, ballot(5, 1, "equal", question="agreement")])
    assert [(line.question, line.preference.votes) for line in found.overall] == [
        ("diversity", (9, 2, 2)),
        ("agreement", (0, 1, 0)),
    ]
    rows = [(*list(report.row(line).values())[2:5], line.preference.votes) for line in found.by_configuration]
    assert rows == [
        ("few", "few", "diversity", (8, 2, 2)),
        ("few", "few", "agreement", (0, 1, 0)),
        ("other", "many", "diversity", (1, 0, 0)),
    ]
    assert found.participants == 4 and sorted(found.pairs) == [2, 2, 2, 8]
    assert sum(found.left_side) == 11


def checks(participant: int, aesthetics: Any, agreement: Any, position: int = 9) -> list[Ballot]:
    """A check whose noise is on the left; diversity does not count there."""
    noise: dict[str, Any] = {"left": "", "right": "weak"}
    return [
        ballot(participant, position, "left", **noise),
        ballot(participant, position, aesthetics, question="aesthetics", checked=True, **noise),
        ballot(participant, position, agreement, question="agreement", checked=True, **noise),
    ]


def test_who_fails_the_checks_is_left_out() -> None:
    votes = [
        *by_hand(),
        *checks(0, "right", "right"),
        *checks(1, "right", "equal"),
        *checks(1, "left", "left", 10),
        *checks(2, "right", "right"),
        *checks(2, "right", "left", 10),
    ]
    assert ballots.mistakes(votes) == {0: (0, 1), 1: (2, 2), 2: (1, 2)}
    strict = analysis.analysed(planned(), votes)
    assert (strict.participants, strict.failed, strict.unchecked) == (1, 2, 0)
    assert strict.overall[0].preference.votes == (6, 1, 1)
    lenient = analysis.analysed(planned(mistakes_allowed=1), votes)
    assert (lenient.participants, lenient.failed) == (2, 1)
    unchecked = analysis.analysed(planned(), [*by_hand(), *checks(0, "right", "right")])
    assert (unchecked.participants, unchecked.failed, unchecked.unchecked) == (3, 0, 2)
    assert "Left out: 2 participants who got any of the attention checks wrong." in report.summary_of(strict)
    assert "Counted unchecked: 2 participants" in report.summary_of(unchecked)


def test_nothing_to_analyse() -> None:
    with pytest.raises(ValueError, match="voted"):
        analysis.analysed(planned(), [])
    with pytest.raises(ValueError, match=naming("2 participants", 1)):
        analysis.analysed(planned(), [*checks(0, "left", "left"), *checks(1, "right", "right")])


def test_what_is_written(tmp_path: Path) -> None:
    methods = {"strong": "strong", "weak": "weak", "a " * 60 + "long name": "reference"}
    plan = planned(configuration={"methods": methods})
    found = analysis.analysed(plan, [*by_hand(), ballot(7, 0, "right", right=[*methods][2])])
    files = report.write(found, tmp_path / "out")
    names = ("overall", "overall-normalised", "configurations", "configurations-normalised", "participants")
    assert {file.name for file in files} == {"summary.txt"} | {f"{n}.{s}" for n in names for s in ("png", "svg", "csv")}
    assert all(file.stat().st_size for file in files)
    with (tmp_path / "out" / "configurations.csv").open(newline="") as opened:
        first, *_ = csv.DictReader(opened)
    assert (first["first"], first["second"], first["configuration"], first["question"]) == (
        "strong",
        "weak",
        "few",
        "diversity",
    )
    assert float(first["share_first"]) == 8 / 12 and float(first["wins_first"]) == 0.8
    assert float(first["p_votes"]) == stats.binomtest(8, 10).pvalue
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "strong (first) against weak (second)" in summary and "66.7% [" in summary and "Equal out" in summary


def test_votes_are_read_as_they_were_cast(tmp_path: Path) -> None:
    with begun(tmp_path) as found:
        for answer in ("left", "equal"):
            key = found.begin().result()
            while (shown := found.current(key)) is not None:
                found.vote(key, shown.id, answers(answer)).result()
        read = ballots.read(found.folder, found.plan)  # while the study is open
    assert len(read) == 2 * 4 * 3
    assert [one.question for one in read[:3]] == ["diversity", "aesthetics", "agreement"]
    assert {one.participant for one in read} == {1, 2}
    assert sum(one.real for one in read) == 2 * 3 * 3 and sum(one.checked for one in read) == 2 * 2
    assert all(one.chosen == (one.left if one.participant == 1 else None) for one in read)
    ballots.write_csv(read, tmp_path / "votes.csv")
    with (tmp_path / "votes.csv").open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == 24 and rows[0]["prompt"] == read[0].prompt and rows[0]["chosen"] == read[0].left
    assert "key" not in rows[0]
    with tiles.ready(tmp_path / "study", planned(), tmp_path, lambda *_: None) as again:
        assert ballots.read(again.folder, again.plan) == read
