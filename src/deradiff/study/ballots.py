"""The votes of a study as plain records: read from its database, told from attention checks, written as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from deradiff.files import databases
from deradiff.study.plan import ANSWERS, Answer, StudyPlan
from deradiff.study.rows import CURE, StudyError, pair_of
from deradiff.study.votes import connected, file_of


@dataclass(frozen=True)
class Ballot:
    """One answer to one question about one pair."""

    participant: int
    """A number in the order of arrival; the key in the participant's cookie cannot be found from it."""
    position: int
    """The pair's place among the participant's, from 0."""
    configuration: str
    prompt_set: str
    prompt: str
    left: str
    """The method on the left; empty for the noise of an attention check."""
    right: str
    seeds: tuple[int, ...]
    question: str
    answer: Answer
    checked: bool
    """Whether the answer belongs to an attention check and tells whether it was passed."""

    @property
    def real(self) -> bool:
        """Whether two methods were compared, not one with noise."""
        return bool(self.left and self.right)

    @property
    def chosen(self) -> str | None:
        """The method that was preferred; None for neither."""
        return {"left": self.left, "equal": None, "right": self.right}[self.answer]


def read(folder: Path, plan: StudyPlan) -> list[Ballot]:
    """Every vote of the study in `folder`, in the order of participants and their pairs.

    The study may go on meanwhile. Raises `StudyError` where there is none, and names a row that is damaged.
    """
    file = file_of(folder)
    with closing(connected(file, write=False)) as db, databases.explained(file, StudyError):
        rows = db.execute(
            "SELECT participant, position, cell, prompt, left, right, seeds, id, question, answer "
            "FROM votes JOIN pairs ON pairs.id = pair ORDER BY participant, position"
        ).fetchall()
    keys = [question.key for question in plan.questions]
    checked = {question.key for question in plan.questions if question.checked}
    ballots = []
    for *values, pair, question, answer in rows:
        row = pair_of(plan, values, f"the pair {pair!r} in {file}")
        if question not in keys or answer not in ANSWERS:
            raise StudyError(f"the vote {question!r}: {answer!r} on the pair {pair!r} in {file} is none: {CURE}")
        configuration = plan.configurations[plan.cells[row.cell].configuration]
        what = configuration.name, configuration.prompt_set, configuration.prompts[row.prompt]
        shown = row.left, row.right, tuple(row.seeds)
        is_check = not (row.left and row.right) and question in checked
        ballots.append(Ballot(row.participant, row.position, *what, *shown, question, answer, is_check))
    return sorted(ballots, key=lambda ballot: (ballot.participant, ballot.position, keys.index(ballot.question)))


def mistakes(ballots: Iterable[Ballot]) -> dict[int, tuple[int, int]]:
    """Of every participant who voted: attention checks answered wrongly, and answered at all.

    A check is answered wrongly where any of its checked questions was not answered by the set of real images.
    """
    checks: dict[int, dict[int, bool]] = {}
    for ballot in ballots:
        of_participant = checks.setdefault(ballot.participant, {})
        if ballot.checked:
            of_participant[ballot.position] = of_participant.get(ballot.position, False) or not ballot.chosen
    return {number: (sum(answered.values()), len(answered)) for number, answered in checks.items()}


def write_csv(ballots: Iterable[Ballot], file: Path) -> None:
    """Write a row for every vote into `file`; `chosen` names the method."""
    names = [field.name for field in fields(Ballot)]
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, [*names, "chosen"])
        writer.writeheader()
        for ballot in ballots:
            seeds = " ".join(map(str, ballot.seeds))
            writer.writerow(asdict(ballot) | {"seeds": seeds, "chosen": ballot.chosen or ""})
