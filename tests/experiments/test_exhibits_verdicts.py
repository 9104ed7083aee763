"""Verdicts of an experiment beside the true error."""

from itertools import product
from typing import Any

import pytest

from agreement_results import Scored, column, differences, plan_of, results_of
from deradiff.algorithm.comparisons import Comparison
from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.verdict import Verdict
from deradiff.experiments.plan import Arm
from deradiff.experiments.reporting import agreement_exhibits
from deradiff.experiments.reporting.agreement_pairs import ComparedPair, studies
from deradiff.experiments.reporting.agreement_verdicts import Judged, counts, judged
from deradiff.experiments.results import Pair
from studies.digits import truth_report


@pytest.fixture(scope="module")
def results() -> Scored:
    return results_of(plan_of())


def verdict_of(kind: Any, weighted: float, error: Estimate | None) -> Verdict:
    nothing = Estimate(0.0, 0.0)
    compared = Comparison(nothing, Estimate(weighted, 0.0), nothing, nothing, 0.0, 0.0, 0.1, 0.5, 30.0, 60, 6)
    return Verdict(kind, f"{kind} it is", "pickscore", compared, error, None)


def test_judgements_are_those_of_the_digits() -> None:
    kinds, shift, seen = ("exact", "trust", "off", "unclear", "uneven", "few", "no target"), -0.7, set()
    for kind, error, deviation, weighted in product(
        kinds, (0.0, 0.03, -0.03, 0.2), (0.001, 0.02, 0.2), (0.0, -0.15, 0.5)
    ):
        errors = {"algorithm 1": Estimate(error * 0.7, deviation * 0.7), "weighted": Estimate(weighted * 0.7, 0.0)}
        truth = truth_report.Row("f", "t", 1.0, "r", Estimate(shift, 0.0), errors, kind, "")
        claim = Judged(some_pair(), "r", kind, "", 0.5, None, Estimate(error, deviation), weighted)
        assert claim.judgement == truth.judgement, (kind, error, deviation, weighted)
        seen.add(claim.judgement)
    assert seen == {"right", "miss", "false alarm", "open"}


def some_pair() -> ComparedPair:
    arm = Arm("a", "realign")
    return ComparedPair(Pair("a", "b", 0.5, arm, arm), 0, 0, Estimate(0, 0), (0, 0), 2, 2, 2)


def test_verdicts_stand_beside_the_true_error(results: Scored) -> None:
    said = Scored(results.plan, results.known)
    retrained = float(results.known["b1000", "main", "pickscore"].mean())
    shift = retrained - float(results.known["reference", "main", "pickscore"].mean())
    away = float(differences(results)[500, 1000].mean())
    said.verdicts = {
        "b500 → b1000": verdict_of("off", retrained + away / 4, Estimate(-0.25, 0.1)),
        "b500 → b500": verdict_of("exact", 0.0, Estimate(0, 0)),
        "b500 → b1000, 4 particles": verdict_of("trust", 0.0, None),
    }
    (study,) = studies(said)
    (claim,) = judged(said, study)  # neither the anchor itself nor particles are judged
    assert claim.estimated == Estimate(0.25, 0.1) and claim.true is not None and claim.weighted is not None
    assert claim.true.value == pytest.approx(away / abs(shift)) and claim.weighted == pytest.approx(
        claim.true.value / 4
    )
    assert claim.evenness == 0.5
    made = {exhibit.key: exhibit for exhibit in agreement_exhibits.exhibits(said)}
    errors = made["agreement-verdict-errors-dpo-main"]
    assert column(errors, "true error, %") == pytest.approx([100 * away / abs(shift)])
    assert column(errors, "estimated error, %") == [25.0] and errors.figure is not None
    expected = "right" if abs(claim.true.value) > 2 * claim.true.error else "false alarm"
    assert column(errors, "which is") == [expected]
    tally = (1, 1, 0, 0, 0) if expected == "right" else (1, 0, 1, 0, 0)
    assert made["agreement-verdicts-dpo-main"].rows == (("pickscore", "off", *tally), ("all", "", *tally))


def test_without_a_reference_verdicts_are_open(results: Scored) -> None:
    known = {key: table for key, table in results.known.items() if key[0] != "reference"}
    said = Scored(results.plan, known)
    said.verdicts = {"b500 → b1000": verdict_of("trust", 0.2, Estimate(0.0, 0.0))}
    exhibits = {exhibit.key: exhibit for exhibit in agreement_exhibits.exhibits(said)}
    assert column(exhibits["agreement-verdict-errors-dpo-main"], "which is") == ["open"]
    assert exhibits["agreement-verdict-errors-dpo-main"].figure is None


def test_counts_are_by_score_and_kind() -> None:
    def judged_as(score: str, kind: str, true: float) -> Judged:
        return Judged(some_pair(), score, kind, "", 0.5, None, Estimate(true, 0.001), 0.0)

    rows = counts(
        [
            judged_as("a", "trust", 0.0),
            judged_as("a", "trust", 0.5),
            judged_as("b", "off", 0.5),
            judged_as("a", "few", 0.5),
        ]
    )
    assert rows == [
        ("a", "trust", 2, 1, 0, 1, 0),
        ("b", "off", 1, 1, 0, 0, 0),
        ("a", "few", 1, 0, 0, 0, 1),
        ("all", "", 4, 2, 0, 1, 1),
    ]
