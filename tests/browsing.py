"""A real browser on real servers: for the tests of the studio's and the study's pages."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARTIFACTS = Path(os.environ.get("DERADIFF_ARTIFACTS", Path(__file__).parent.parent / "test-artifacts"))
"""Where the screenshots of a run go."""

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

PATIENCE = 120_000
"""Milliseconds that a page may take on a busy machine."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Chromium from the system, without a window."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no Chromium was found: install it (apt-get install chromium), or name it with CHROMIUM=..."
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, as in containers, Chromium has no sandbox; it opens nothing but this machine's own pages.
        options = ["--no-sandbox", "--disable-dev-shm-usage"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@contextmanager
def page(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """A page in a browser of its own; errors of its scripts, and requests to other machines, fail the test."""
    context = browser.new_context(**({"viewport": {"width": 1360, "height": 1000}} | options))
    context.set_default_timeout(PATIENCE)
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(f"a script failed: {error}"))
    opened.on("request", lambda request: errors.extend(_elsewhere(request.url)))
    try:
        opened.goto(address)
        yield opened
        assert errors == []
    finally:
        context.close()


def _elsewhere(url: str) -> list[str]:
    return [] if re.match(r"(http://127\.0\.0\.1[:/]|data:|blob:)", url) else [f"{url} was asked for"]


@contextmanager
def command(*words: str, folder: Path) -> Iterator[str]:
    """`deradiff WORDS` as a process, until the end of the block; yields the address that it prints."""
    log = folder / "server.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "deradiff", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode().strip()
        assert line.startswith("http://"), log.read_text()
        yield line
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def shot(opened: Any, name: str, full_page: bool = True) -> None:
    """Keep what the page looks like, to be looked at."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    opened.screenshot(path=ARTIFACTS / f"{name}.png", full_page=full_page)


def settled(opened: Any, look: Any, seconds: float = 120) -> Any:
    """Wait until `look()` is true, and return what it is."""
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, "what was waited for did not come"
        opened.wait_for_timeout(50)
    return found


CONTRAST = (Path(__file__).parent / "data" / "contrast.js").read_text(encoding="utf-8")
"""Texts whose contrast with what is behind them is below WCAG 2.2's 4.5 (3 for large ones), as a page's script."""

UNNAMED = (Path(__file__).parent / "data" / "unnamed.js").read_text(encoding="utf-8")
"""Controls without a name for a screen reader, as a page's script."""
