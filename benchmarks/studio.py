"""How long a person waits for the studio, on the digits, with a real browser on the same machine.

    python benchmarks/studio.py [opening] [turning]

Needs Chromium (`apt-get install chromium`, or its path in CHROMIUM). Each part writes its numbers into
`benchmarks/studio.json`, in seconds.

- opening: the studio is opened five times. "start-up" ends where it prints its address; "first page" runs from the
  browser's request until the dial can be seen, right after start-up; "first image" until the first exact one stands
  there with its scores, everything having been loaded meanwhile.
- turning: the dial is turned twenty times by the keyboard and twenty times by the mouse, at rest before each. Times
  count from the key or from the button's release: until another image is shown ("preview"), and until the exact image
  of 25 steps is ("exact").
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from playwright.sync_api import sync_playwright
from recording import keep_parts

OUT = Path(__file__).with_suffix(".json")
OPENINGS, TURNS = 5, 20
SLIDER = "#lam-0 input[type=range]"
EXACT = "document.querySelector('#status')?.textContent.includes('Exact')"
SCORED = "document.querySelector('#facts')?.textContent.includes('legible')"
OTHER = "(source) => { const img = document.querySelector('#picture img'); return img && img.src !== source; }"


@contextmanager
def studio(folder: str) -> Iterator[tuple[str, float]]:
    """A studio of its own; yields its address, and how long it took to print it."""
    begun = time.perf_counter()
    words = [sys.executable, "-m", "deradiff", "studio", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        yield address, time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def browser() -> Iterator[Any]:
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        sys.exit("no Chromium was found: install it, or name it with CHROMIUM=...")
    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=found, args=options)
        yield opened
        opened.close()


def opening() -> dict[str, Any]:
    times: dict[str, list[float]] = {"start-up": [], "first page": [], "first image": []}
    for _ in range(OPENINGS):
        with tempfile.TemporaryDirectory() as folder, browser() as chromium, studio(folder) as (address, started):
            times["start-up"].append(started)
            page = chromium.new_page(viewport={"width": 1360, "height": 1000})
            begun = time.perf_counter()
            page.goto(address)
            page.locator(SLIDER).wait_for()
            times["first page"].append(time.perf_counter() - begun)
            page.wait_for_function(EXACT, timeout=120_000)
            page.wait_for_function(SCORED, timeout=120_000)
            times["first image"].append(time.perf_counter() - begun)
    return summary(times)


def turning() -> dict[str, Any]:
    times: dict[str, list[float]] = {"preview": [], "exact": []}
    with tempfile.TemporaryDirectory() as folder, browser() as chromium, studio(folder) as (address, _):
        page = chromium.new_page(viewport={"width": 1360, "height": 1000})
        page.goto(address)
        page.wait_for_function(EXACT, timeout=120_000)
        page.wait_for_function(SCORED, timeout=120_000)
        time.sleep(5)  # the warm-up has ended, whatever was left of it
        for turn in range(TURNS):
            page.locator(SLIDER).focus()
            measured(page, lambda: page.keyboard.press("ArrowRight"), times)
            box = page.locator(SLIDER).bounding_box()
            page.mouse.move(box["x"] + box["width"] * (0.2 + 0.03 * turn), box["y"] + box["height"] / 2)
            page.mouse.down()
            page.wait_for_timeout(1500)  # the press moved it already; what is timed is the last move and the release
            page.wait_for_function(EXACT, timeout=60_000)
            page.mouse.move(box["x"] + box["width"] * (0.22 + 0.03 * turn), box["y"] + box["height"] / 2)
            measured(page, page.mouse.up, times)
    return summary(times)


def measured(page: Any, act: Callable[[], Any], times: dict[str, list[float]]) -> None:
    source = page.get_attribute("#picture img", "src")
    begun = time.perf_counter()
    act()
    page.wait_for_function(OTHER, arg=source)
    times["preview"].append(time.perf_counter() - begun)
    page.wait_for_function(EXACT)
    times["exact"].append(time.perf_counter() - begun)
    page.wait_for_timeout(400)


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        what: {"median": round(median(its), 2), "worst": round(max(its), 2), "times": len(its)}
        for what, its in times.items()
    } | {"cores": os.cpu_count()}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"opening": opening, "turning": turning}

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        sys.exit(f"there is no part {unknown[0]}: choose among {', '.join(PARTS)}")
    keep_parts(((name, PARTS[name]()) for name in chosen), OUT)
