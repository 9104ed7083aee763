"""The studio in a browser, as a person uses it."""

import json
import re
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import torch
from PIL import Image

import deradiff
import tiny
from browsing import CONTRAST, UNNAMED, command, page, settled, shot
from deradiff.algorithm.schedules import Schedule, Spline
from deradiff.files.records import read_png
from deradiff.worlds import digits

STEPS = 8
QUICK = f"prompt=a%20blue%20eight%20on%20white%20paper&reference=digits&anchor=digits:100&lam=0.5&steps={STEPS}"
"""The settings that the studio opens with, but for fewer steps: what is tested here is no image's quality."""

SLIDER, NUMBER = "#lam-0 input[type=range]", "#lam-0 input[type=number]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studio").resolve()
    shutil.copytree(digits.anchor_path(30), folder / "models" / "strong")
    (folder / "models" / "strong" / "alignment.json").write_text(json.dumps({"made_of": {"beta": 30.0}}))
    tiny.denoiser(tiny.make("sdxl")[0]).save_pretrained(folder / "models" / "misfit")
    return folder


@pytest.fixture(scope="module")
def address(place: Path, chromium: Any) -> Iterator[str]:
    with command("studio", "--port", "0", "--device", "cpu", "--models", "models", folder=place) as link:
        yield link


def exact(opened: Any) -> None:
    """Wait for the exact image."""
    opened.wait_for_function("document.querySelector('#status')?.textContent.includes('Exact')")
    opened.wait_for_function("document.querySelector('#facts')?.textContent.includes('legible')")


def pixels(opened: Any) -> np.ndarray:
    """The image that is shown."""
    source = opened.get_attribute("#picture img", "src")
    return np.asarray(Image.open(BytesIO(opened.request.get(source).body())).convert("RGB"), dtype=int)


def text(opened: Any, selector: str) -> str:
    """What an input of the page holds."""
    return opened.locator(f"{selector} textarea, {selector} input").first.input_value()


def code(opened: Any, selector: str) -> str:
    """What a block of code on the page holds, however it is wrapped."""
    lines = "(nodes) => nodes.map((line) => line.textContent).join('\\n')"
    return opened.locator(f"{selector} .cm-line").evaluate_all(lines)


def set_number(opened: Any, selector: str, value: str) -> None:
    opened.fill(selector, value)
    opened.press(selector, "Enter")


def restart(opened: Any) -> None:
    """So that `exact` waits for what comes next."""
    opened.evaluate("document.querySelector('#status p') && (document.querySelector('#status p').textContent = '…')")


@pytest.fixture
def studio(address: str, chromium: Any) -> Iterator[Any]:
    with page(chromium, f"{address}?{QUICK}") as opened:
        exact(opened)
        yield opened


def test_turning_the_dial_changes_the_image_to_what_the_library_draws(studio: Any) -> None:
    before = pixels(studio)
    restart(studio)
    studio.focus(SLIDER)
    for _ in range(10):
        studio.keyboard.press("ArrowRight")
    assert studio.input_value(SLIDER) == "0.6"
    exact(studio)
    assert "strength β/λ = 166.7" in studio.inner_text("#meaning")
    pipe = digits.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with deradiff.realign(pipe, digits.anchor_path(100), lam=0.6):
        expected = pipe(
            ["a blue eight on white paper"],
            num_inference_steps=STEPS,
            guidance_scale=1.5,
            generator=[torch.Generator("cpu").manual_seed(0)],
        ).images[0]
    after = pixels(studio)
    assert np.abs(after - np.asarray(expected, dtype=int)).max() <= 1
    assert np.abs(after - before).mean() > 0.1
    shot(studio, "studio-dial")


def test_the_image_follows_while_the_dial_moves(studio: Any) -> None:
    box = studio.locator(SLIDER).bounding_box()
    y = box["y"] + box["height"] / 2
    source = studio.get_attribute("#picture img", "src")
    studio.mouse.move(box["x"] + box["width"] * 0.25, y)
    studio.mouse.down()
    for i in range(12):
        studio.mouse.move(box["x"] + box["width"] * (0.25 + 0.04 * i), y)
        studio.wait_for_timeout(40)
    settled(studio, lambda: "Preview" in studio.inner_text("#status"))
    assert studio.get_attribute("#picture img", "src") != source  # and the button is still down
    assert "extrapolation" in settled(studio, lambda: "λ = 1." in (said := studio.inner_text("#meaning")) and said)
    studio.mouse.up()
    exact(studio)
    assert float(studio.input_value(SLIDER)) > 1


def test_dragging_a_point_changes_the_schedule_that_the_server_receives(studio: Any) -> None:
    plot = studio.locator("#curve svg")
    restart(studio)
    plot.click(position={"x": 200, "y": 150})
    exact(studio)
    first = Schedule.from_dict(_schedule(studio))
    assert isinstance(first, Spline) and len(first.points) == 3
    assert first.points[0] == (0, 0) and first.points[-1] == (1, 1)
    box = studio.locator("#curve .point:not(.pinned)").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    restart(studio)
    studio.mouse.move(x, y)
    studio.mouse.down()
    for i in range(1, 9):
        studio.mouse.move(x + 8 * i, y + 5 * i)
        studio.wait_for_timeout(30)
    studio.mouse.up()
    exact(studio)
    second = Schedule.from_dict(_schedule(studio))
    assert isinstance(second, Spline)
    assert second.points[1][0] > first.points[1][0] + 0.05 and second.points[1][1] < first.points[1][1]
    assert code(studio, "#curve-export") == f"schedules.{second!r}"
    average = sum(second(i / STEPS) for i in range(STEPS)) / STEPS
    assert f"average λ over {STEPS} steps: {average:.3f}" in studio.inner_text("#curve .readout")
    shot(studio, "studio-curve")
    studio.get_by_role("tab", name="Keep and share").click()
    settled(studio, lambda: repr(second) in code(studio, "#python"))
    assert text(studio, "#family").startswith("Drawn")
    # Undo and redo go through the same schedules.
    studio.click("#curve [data-do=undo]")
    settled(studio, lambda: code(studio, "#curve-export") == f"schedules.{first!r}")
    studio.click("#curve [data-do=redo]")
    settled(studio, lambda: code(studio, "#curve-export") == f"schedules.{second!r}")


def _schedule(opened: Any) -> Any:
    """The schedule in the PNG file that the page offers: what the server drew with."""
    with opened.expect_download() as download:
        opened.click("#download")
    return read_png(download.value.path())["schedule"]


def test_a_double_click_removes_a_point_and_one_beside_it_adds_none(studio: Any) -> None:
    plot, points = studio.locator("#curve svg"), studio.locator("#curve .point:not(.pinned)")
    plot.click(position={"x": 200, "y": 150})
    settled(studio, lambda: points.count() == 1)
    studio.wait_for_timeout(600)
    box = points.bounding_box()
    studio.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    settled(studio, lambda: points.count() == 0)


def test_curves_start_from_families_and_are_kept_by_name(studio: Any) -> None:
    restart(studio)
    _choose(studio, "#family", "Power")
    exact(studio)
    assert code(studio, "#curve-export") == "schedules.Power(p=2.0)"
    assert studio.locator("#curve .point").count() == 7
    restart(studio)
    set_number(studio, "#parameter input", "3")
    exact(studio)
    assert code(studio, "#curve-export") == "schedules.Power(p=3.0)"
    assert "power, p = 3" in studio.inner_text("#curve .readout")
    set_number(studio, "#parameter input", "99")
    studio.get_by_text("power's p goes from 0.05 to 20 here, got 99").wait_for()
    studio.fill("#curve-name input, #curve-name textarea", "late <b>")
    studio.click("#keep-curve")
    studio.get_by_text("a curve needs a name of 1 to 60 letters").wait_for()
    studio.fill("#curve-name input, #curve-name textarea", "late rise")
    studio.click("#keep-curve")
    settled(studio, lambda: "Kept the curve as late rise" in studio.inner_text("#status"))
    restart(studio)
    _choose(studio, "#family", "None")
    exact(studio)
    assert code(studio, "#curve-export") == "# no schedule: λ stays the same"
    restart(studio)
    _choose(studio, "#kept-curves", "late rise")
    exact(studio)
    assert code(studio, "#curve-export") == "schedules.Power(p=3.0)"
    # A family becomes points as soon as one is moved.
    restart(studio)
    studio.locator("#curve .point:not(.pinned)").nth(2).focus()
    studio.keyboard.press("ArrowUp")
    exact(studio)
    assert code(studio, "#curve-export").startswith("schedules.Spline(points=((0.0, 0.0), ")
    assert text(studio, "#family").startswith("Drawn")
    studio.click("#delete-curve")
    settled(studio, lambda: "Deleted" in studio.inner_text("#status"))


def _choose(opened: Any, selector: str, option: str) -> None:
    opened.click(f"{selector} input")
    opened.locator("[role=option]", has_text=option).first.click()


def test_cancel_stops_this_page_and_no_other(studio: Any, address: str, chromium: Any) -> None:
    with page(chromium, address) as other:
        exact(other)
        last = pixels(studio)
        studio.click("#sampling-panel > button")
        restart(other)
        # On a busy machine the steps may be over before the cancel comes: then it is tried again.
        for steps in ("200", "199", "198", "197", "196"):
            restart(studio)
            set_number(studio, "#steps input[type=number]", steps)
            settled(studio, lambda: re.search(r"Step \d+ of \d{3}", studio.inner_text("#status")))
            if steps == "200":
                set_number(other, NUMBER, "1")
            studio.click("#cancel")
            settled(studio, lambda: re.search("Cancelled|Exact: ", studio.inner_text("#status")))
            if "Cancelled" in studio.inner_text("#status"):
                break
            last = pixels(studio)
        assert "Cancelled" in studio.inner_text("#status")
        settled(studio, lambda: np.array_equal(pixels(studio), last))
        # A cancel during the preview, or the rest after it, is for the exact image too.
        for moment in ("preview", "rest"):
            restart(studio)
            studio.click("#draw")
            if moment == "preview":
                studio.wait_for_timeout(500)
            else:
                settled(studio, lambda: "Preview;" in studio.inner_text("#status"))
            studio.click("#cancel")
            settled(studio, lambda: "Cancelled" in studio.inner_text("#status"))
            studio.wait_for_timeout(700)
            assert "Cancelled" in studio.inner_text("#status")
        exact(other)
        assert "the anchor itself" in other.inner_text("#meaning")


def test_the_keyboard_alone_is_enough(studio: Any) -> None:
    studio.focus("#prompt textarea")
    studio.keyboard.press("Control+A")
    studio.keyboard.type("a red seven on white paper")
    restart(studio)
    studio.keyboard.press("Tab")
    assert studio.evaluate("document.activeElement.id") == "draw"
    studio.keyboard.press("Enter")
    exact(studio)
    assert "a red seven on white paper" in studio.inner_text("#facts")
    _tab_to(studio, SLIDER)
    restart(studio)
    studio.keyboard.press("ArrowLeft")
    exact(studio)
    assert "λ = 0.49" in studio.inner_text("#meaning")
    _tab_to(studio, "#curve [data-do=add]")
    _add_point(studio)
    _focused(studio, "#curve .point")
    assert studio.evaluate("document.activeElement.getAttribute('aria-label')") == "Point 1 of 1"
    before = code(studio, "#curve-export")
    studio.keyboard.press("Shift+ArrowDown")
    lower = settled(studio, lambda: (now := code(studio, "#curve-export")) != before and now)
    assert studio.evaluate("document.activeElement.getAttribute('aria-valuetext')").endswith("λ 0.450")
    studio.keyboard.press("Enter")  # a point after it
    settled(studio, lambda: studio.locator("#curve .point:not(.pinned)").count() == 2)
    studio.keyboard.press("Delete")
    settled(studio, lambda: code(studio, "#curve-export") == lower)
    studio.keyboard.press("Control+z")
    settled(studio, lambda: studio.locator("#curve .point:not(.pinned)").count() == 2)
    studio.keyboard.press("Control+y")
    settled(studio, lambda: code(studio, "#curve-export") == lower)


def _add_point(opened: Any) -> None:
    """As a person does: once more where no point comes, for the page may still be drawing what was asked before."""
    for _ in range(4):
        restart(opened)
        opened.keyboard.press("Enter")
        exact(opened)
        if opened.locator("#curve .point:not(.pinned)").count():
            return
    pytest.fail(f"Enter adds no point; {opened.inner_text('#curve')!r}")


def _focused(opened: Any, selector: str) -> None:
    try:
        opened.wait_for_function("(selector) => document.activeElement.matches(selector)", arg=selector)
    except Exception as error:
        element = opened.evaluate("document.activeElement.outerHTML.slice(0, 200)")
        pytest.fail(f"not {selector} has the focus but {element}; {opened.inner_text('#curve')!r}: {error}")


def _tab_to(opened: Any, selector: str) -> None:
    for _ in range(40):
        opened.keyboard.press("Tab")
        if opened.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            outline = opened.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"{selector} does not show that it has the focus"
            return
    pytest.fail(f"no Tab leads to {selector}")


def test_a_strip_turns_the_dial_and_two_images_lie_under_a_divider(studio: Any) -> None:
    studio.click("#keep-a")
    settled(studio, lambda: "Kept as A" in studio.inner_text("#status"))
    studio.get_by_role("tab", name="Strip over λ").click()
    studio.fill("#strip-lams input, #strip-lams textarea", "0,5")
    studio.click("#draw-strip")
    settled(studio, lambda: "1 to 25 λ from 0 to 2" in studio.inner_text("#strip-status"))
    studio.fill("#strip-lams input, #strip-lams textarea", "0:1.5:0.5")
    studio.click("#draw-strip")
    settled(studio, lambda: "4 images in" in studio.inner_text("#strip-status"))
    rows = studio.locator("#strip-table tbody tr").all_inner_texts()
    assert [row.split("\t")[:2] for row in rows] == [["0", "∞"], ["0.5", "200"], ["1", "100"], ["1.5", "66.67"]]
    with studio.expect_download() as download:
        studio.click("#strip-download")
    assert len(read_png(download.value.path())["images"]) == 4
    shot(studio, "studio-strip")
    restart(studio)
    studio.locator("#strip .thumbnail-item, #strip button.gallery-item").nth(3).click()
    settled(studio, lambda: studio.input_value(NUMBER) == "1.5")
    exact(studio)
    studio.get_by_role("tab", name="Image").click()
    studio.click("#keep-b")
    settled(studio, lambda: "Kept as B" in studio.inner_text("#status"))
    studio.get_by_role("tab", name="Compare").click()
    settled(studio, lambda: "λ 1.5" in studio.inner_text("#sides") and "λ 0.5" in studio.inner_text("#sides"))
    settled(studio, lambda: studio.locator("#comparison img").count() == 2)
    clip = studio.locator("#comparison img").nth(1).get_attribute("style")
    box = studio.locator("#comparison [role=none]").last.bounding_box()
    studio.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    studio.mouse.down()
    studio.mouse.move(box["x"] + box["width"] / 2 - 120, box["y"] + box["height"] / 2, steps=5)
    studio.mouse.up()
    settled(studio, lambda: studio.locator("#comparison img").nth(1).get_attribute("style") != clip)
    shot(studio, "studio-compare")


def test_a_link_an_image_and_a_preset_bring_settings_back(
    studio: Any, address: str, chromium: Any, tmp_path: Path
) -> None:
    restart(studio)
    studio.fill("#prompt textarea", "a green three on pink paper")
    set_number(studio, NUMBER, "0.8")
    exact(studio)
    restart(studio)
    _choose(studio, "#family", "Sigmoid")
    exact(studio)
    with studio.expect_download() as download:
        studio.click("#download")
    file, drawn = tmp_path / "image.png", pixels(studio)
    download.value.save_as(file)
    studio.get_by_role("tab", name="Keep and share").click()
    link = code(studio, "#link")
    assert parse_qs(urlparse(link).query)["schedule"] == ["sigmoid:10.0"]
    studio.fill("#preset-name input, #preset-name textarea", "green three")
    studio.click("#keep-preset")
    settled(studio, lambda: "Kept the settings as green three" in studio.inner_text("#share-status"))
    assert "deradiff generate digits" in studio.inner_text("#shell")
    shot(studio, "studio-share")
    with page(chromium, link) as other:
        exact(other)
        assert np.array_equal(pixels(other), drawn)
        assert text(other, "#prompt") == "a green three on pink paper" and other.input_value(NUMBER) == "0.8"
    with page(chromium, address) as other:
        exact(other)
        assert not np.array_equal(pixels(other), drawn)
        other.get_by_role("tab", name="Keep and share").click()
        restart(other)
        other.set_input_files("#upload input[type=file]", file)
        exact(other)
        assert np.array_equal(pixels(other), drawn)
        restart(other)
        _choose(other, "#presets", "Digits: annealed")
        exact(other)
        assert code(other, "#curve-export") == "schedules.Power(p=2.0)"
        restart(other)
        _choose(other, "#presets", "green three")
        exact(other)
        assert np.array_equal(pixels(other), drawn)
        other.click("#delete-preset")
        settled(other, lambda: "Deleted the preset green three" in other.inner_text("#share-status"))


def test_files_that_hold_no_settings(address: str, chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    for name, said in (
        ("notes.txt", "Only .png allowed"),
        ("plain.png", "carries no deradiff settings"),
        ("broken.png", "cannot identify image file"),
    ):
        with page(chromium, address) as opened:
            exact(opened)
            drawn = pixels(opened)
            opened.get_by_role("tab", name="Keep and share").click()
            opened.set_input_files("#upload input[type=file]", tmp_path / name)
            opened.get_by_text(said).first.wait_for()
            assert np.array_equal(pixels(opened), drawn)


def test_models_are_changed_and_one_that_does_not_fit_leaves_the_last(studio: Any, place: Path) -> None:
    studio.click("#models-panel > button")
    restart(studio)
    _anchors(studio, str(place / "models" / "strong"))
    exact(studio)
    assert studio.locator("#lam-1").is_visible() and "λ of strong" in studio.inner_text("#lam-1")
    restart(studio)
    set_number(studio, "#lam-1 input[type=number]", "0.5")
    exact(studio)
    assert "strong: λ = 0.5 · strength β/λ = 60 (the anchor's β is 30)" in studio.inner_text("#meaning")
    drawn = pixels(studio)
    _anchors(studio, str(place / "models" / "misfit"))
    settled(studio, lambda: studio.locator("#models-status .wrong").count())
    assert "misfit" in studio.inner_text("#models-status")
    shot(studio, "studio-misfit")
    assert "misfit" not in studio.inner_text("#anchors")  # what is chosen is what is in force
    assert np.array_equal(pixels(studio), drawn)
    restart(studio)
    studio.click("#draw")
    exact(studio)
    assert np.array_equal(pixels(studio), drawn)


def _anchors(opened: Any, added: str) -> None:
    opened.click("#anchors input")
    opened.fill("#anchors input", added)
    opened.press("#anchors input", "Enter")
    opened.press("#anchors input", "Tab")
    opened.click("#load")


def test_models_that_a_page_may_not_name(studio: Any) -> None:
    studio.click("#models-panel > button")
    for source in ("/etc", "../secret", "digits:7"):
        _anchors(studio, source)
        settled(studio, lambda source=source: source in studio.inner_text("#models-status"))
        assert studio.locator("#models-status .wrong").count()
        settled(studio, lambda source=source: source not in studio.inner_text("#anchors"))


def test_markup_and_ten_thousand_characters(studio: Any) -> None:
    restart(studio)
    studio.fill("#prompt textarea", '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> a red seven')
    studio.click("#draw")
    exact(studio)
    assert "<img src=x" in studio.inner_text("#facts")
    studio.click("#keep-a")
    settled(studio, lambda: "Kept as A: on the tab" in (now := studio.inner_text("#status")) or "Kept as A" in now)
    assert studio.evaluate("window.hacked") is None
    drawn = pixels(studio)
    too_long = """() => {
        const area = document.querySelector('#prompt textarea');
        area.removeAttribute('maxlength');
        area.value = 'x'.repeat(10000);
        area.dispatchEvent(new Event('input', {bubbles: true}));
    }"""
    studio.evaluate(too_long)
    studio.click("#draw")
    settled(studio, lambda: "10,000 characters" in studio.inner_text("#status"))
    assert np.array_equal(pixels(studio), drawn)
    studio.fill("#prompt textarea", " ")
    studio.click("#draw")
    settled(studio, lambda: "write a prompt first" in studio.inner_text("#status"))


def test_a_bad_link_opens_the_studio_all_the_same(address: str, chromium: Any) -> None:
    with page(chromium, f"{address}?prompt=a&reference=evil/model&anchor=digits:100&lam=1") as opened:
        opened.get_by_text("which this studio does not list").wait_for()
        exact(opened)
        assert opened.input_value(NUMBER) == "0.5"


def test_a_link_to_a_model_that_does_not_fit_opens_the_studio_as_usual(
    address: str, chromium: Any, place: Path
) -> None:
    link = f"{address}?prompt=a&reference=digits&anchor={place / 'models' / 'misfit'}&lam=0.7"
    with page(chromium, link) as opened:
        opened.get_by_text("is another architecture").first.wait_for()
        exact(opened)
        assert opened.input_value(NUMBER) == "0.5" and text(opened, "#prompt") == "a blue eight on white paper"


def test_clearing_a_number_on_the_way_to_another_says_nothing(studio: Any) -> None:
    studio.focus(NUMBER)
    restart(studio)
    studio.keyboard.press("Control+A")
    studio.keyboard.press("Backspace")
    studio.wait_for_timeout(700)
    assert studio.locator(".toast-body").count() == 0
    studio.keyboard.type("0.7")
    studio.keyboard.press("Enter")
    exact(studio)
    assert "λ = 0.7" in studio.inner_text("#meaning")


def test_a_verdict_is_judged_by_many_seeds(studio: Any) -> None:
    studio.click("#judge")
    settled(studio, lambda: "Judged from 16 images of seeds 0 to 15" in studio.inner_text("#judgement"))
    assert "cannot tell: weights too uneven" in studio.inner_text("#judgement")


def test_on_a_phone_everything_is_in_reach(address: str, chromium: Any) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with page(chromium, address, **phone) as opened:
        exact(opened)
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390
        picture, dial = (opened.locator(name).bounding_box() for name in ("#picture", "#lam-0"))
        assert dial["y"] < picture["y"] < 844 - 200 and picture["width"] > 300
        restart(opened)
        box = opened.locator("#curve svg").bounding_box()
        opened.locator("#curve svg").scroll_into_view_if_needed()
        opened.locator("#curve svg").tap(position={"x": box["width"] / 2, "y": box["height"] / 2})
        exact(opened)
        assert opened.locator("#curve .point:not(.pinned)").count() == 1
        shot(opened, "studio-phone")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_stands_out(address: str, chromium: Any, scheme: str) -> None:
    with page(chromium, address, color_scheme=scheme) as opened:
        exact(opened)
        for panel in ("#sampling-panel", "#models-panel"):
            opened.click(f"{panel} > button")
        for name in ("Image", "Strip over λ", "Compare", "Keep and share"):
            opened.get_by_role("tab", name=name).click()
            opened.wait_for_timeout(400)
            assert opened.evaluate(UNNAMED) == []
            assert opened.evaluate(CONTRAST) == []
        assert opened.evaluate("document.documentElement.lang || document.title")
        shot(opened, f"studio-{scheme}")
