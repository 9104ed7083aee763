"""The preference study in a browser: from the first page to the analysis."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from browsing import CONTRAST, UNNAMED, command, page, shot
from deradiff.cli import app
from deradiff.study.plan import write_plan
from small_study import experiment, planned

PAIRS = 4
"""Three pairs and an attention check."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    experiment(folder / "experiment")
    (folder / "study.yaml").write_text(write_plan(planned()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def address(place: Path, chromium: Any) -> Iterator[str]:
    with command("study", "serve", "study.yaml", "--out", "study", "--port", "0", folder=place) as link:
        yield link


def answered(opened: Any, choice: str) -> None:
    """Answer the pair that is shown, the same to every question; nobody is fooled by a set that is noise."""
    sets = [
        {image.get_attribute("src") for image in grid.locator("img").all()} for grid in opened.locator(".grid").all()
    ]
    if 1 in map(len, sets):
        choice = "B" if len(sets[0]) == 1 else "A"
    for fieldset in opened.locator("fieldset").all():
        fieldset.get_by_text(choice, exact=True).click()
    opened.get_by_role("button", name="Submit").click()


def test_a_study_from_the_first_page_to_the_analysis(place: Path, address: str, chromium: Any) -> None:
    for participant, choice in enumerate(("A", "B", "Equal")):
        with page(chromium, address, java_script_enabled=False) as opened:  # the pages need no script
            opened.get_by_role("button", name="I agree: begin").click()
            for pair in range(PAIRS):
                assert f"Pair {pair + 1} of {PAIRS}" in opened.inner_text("header")
                assert opened.locator(".grid img").count() == 18
                if participant == pair == 0:
                    shot(opened, "study-pair")
                    opened.get_by_role("button", name="Submit").click()  # nothing is answered: the page stays
                    assert f"Pair 1 of {PAIRS}" in opened.inner_text("header")
                answered(opened, choice)
            assert "Thank" in opened.inner_text("main")
            opened.goto(f"{address}pair")
            assert "Thank" in opened.inner_text("main")
    exported = CliRunner().invoke(app, ["study", "export", str(place / "study")])
    assert exported.exit_code == 0, exported.output
    with (place / "study" / "votes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * PAIRS * 3
    analysed = CliRunner().invoke(app, ["study", "analyse", str(place / "study"), "--out", str(place / "analysis")])
    assert analysed.exit_code == 0, analysed.output
    assert "3 participants, 9 pairs, 3 questions about each" in analysed.output
    assert (place / "analysis" / "overall.png").stat().st_size > 0


def test_a_pair_that_was_left_open_waits(address: str, chromium: Any) -> None:
    with page(chromium, address) as opened:
        opened.get_by_role("button", name="I agree: begin").click()
        answered(opened, "A")
        pair = opened.get_attribute("input[name=pair]", "value")
        opened.goto(address)
        opened.get_by_role("button", name="Go on").click()
        assert opened.get_attribute("input[name=pair]", "value") == pair
        opened.go_back()
        opened.reload()
        assert opened.locator("main").inner_text()


def test_the_keyboard_alone_is_enough(address: str, chromium: Any) -> None:
    with page(chromium, address) as opened:
        opened.keyboard.press("Tab")
        assert opened.evaluate("document.activeElement.textContent") == "I agree: begin"
        opened.keyboard.press("Enter")
        opened.wait_for_selector("fieldset")
        for question in range(3):
            for _ in range(6):
                opened.keyboard.press("Tab")
                if opened.evaluate("document.activeElement.type === 'radio'"):
                    break
            opened.keyboard.press("ArrowRight")
            focused = opened.evaluate("getComputedStyle(document.activeElement.closest('label')).outlineStyle")
            assert focused == "solid"
            assert opened.locator("fieldset").nth(question).locator("input:checked").count() == 1
        opened.keyboard.press("Tab")
        opened.keyboard.press("Enter")
        opened.get_by_text(f"Pair 2 of {PAIRS}").wait_for()


def test_without_cookies_the_page_says_what_to_do(address: str, chromium: Any) -> None:
    with page(chromium, address) as opened:
        opened.route("**/begin", lambda route: route.fulfill(status=303, headers={"location": "/pair"}))
        opened.get_by_role("button", name="I agree: begin").click()
        opened.get_by_text("did not send the cookie").wait_for()


def test_on_a_phone_the_sets_stand_one_above_the_other(address: str, chromium: Any) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with page(chromium, address, **phone) as opened:
        opened.get_by_role("button", name="I agree: begin").tap()
        opened.wait_for_selector(".set")
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390
        above, below = (opened.locator(".set").nth(i).bounding_box() for i in (0, 1))
        assert above["y"] + above["height"] <= below["y"] and above["width"] > 300
        sizes = [label.bounding_box() for label in opened.locator(".choices label").all()]
        assert all(size["height"] >= 44 for size in sizes)  # of a fingertip
        shot(opened, "study-phone")


def test_everything_has_a_name_and_stands_out(address: str, chromium: Any) -> None:
    with page(chromium, address) as opened:
        assert opened.evaluate(UNNAMED) == [] and opened.evaluate(CONTRAST) == []
        shot(opened, "study-first")
        opened.get_by_role("button", name="I agree: begin").click()
        opened.wait_for_selector("fieldset")
        assert opened.evaluate(UNNAMED) == [] and opened.evaluate(CONTRAST) == []
        opened.goto(f"{address}nowhere")
        assert "There is no such page" in opened.inner_text("main")
        assert opened.evaluate(CONTRAST) == []
