"""The studio as it looks: docs/images/studio.png.

    python docs/draw_studio.py

Opens `deradiff studio` on the digits, with a curve drawn by its points, in Chromium (the system's, or the one that
CHROMIUM names), and keeps what it shows.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

OUT = Path(__file__).parent / "images" / "studio.png"
SETTINGS = (
    "prompt=a%20blue%20eight%20on%20white%20paper&reference=digits&anchor=digits:100&lam=1"
    "&schedule=spline:0/0,0.35/0.12,0.7/0.75,1/1&scheduler=euler-a"
)
EXACT = "document.querySelector('#status')?.textContent.includes('Exact')"
SCORED = "document.querySelector('#facts')?.textContent.includes('legible')"


def main() -> None:
    """Open the studio, look at it, keep the picture."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        sys.exit("no Chromium was found: install it, or name it with CHROMIUM=...")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        words = [sys.executable, "-m", "deradiff", "studio", "--port", "0", "--device", "cpu"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=folder)
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=options)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().decode().strip()
            page = browser.new_page(viewport={"width": 1280, "height": 1010}, device_scale_factor=1.25)
            page.goto(f"{address}?{SETTINGS}")
            page.wait_for_function(EXACT, timeout=120_000)
            page.wait_for_function(SCORED, timeout=120_000)
            page.evaluate("document.activeElement.blur()")
            page.screenshot(path=Path(folder) / "studio.png")
            Image.open(Path(folder) / "studio.png").convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
                OUT, optimize=True
            )
        finally:
            browser.close()
            process.terminate()
            process.wait(30)
    print(OUT)


if __name__ == "__main__":
    main()
