"""The example workflows in ComfyUI's own page: docs/images/comfyui-*.png.

    COMFYUI=path python docs/draw_comfyui.py

Starts the checkout's server on this machine alone, on the CPU, with the nodes installed in a temporary folder and empty
files for the models that the workflows name, and looks at each with Chromium (the system's, or the one that CHROMIUM
names). Needs what `make test-comfyui` needs, and comfyui-frontend-package.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from comfyui_host import torchvision_stand_in
from deradiff.integrations.comfyui.installing import SOURCE, install

IMAGES = Path(__file__).parent / "images"
MODELS = (
    "checkpoints/sd_xl_base_1.0.safetensors",
    "checkpoints/dpo-sdxl.safetensors",
    "checkpoints/sd3.5_medium.safetensors",
    "checkpoints/sd3.5_medium_flow_grpo.safetensors",
    "loras/dpo-sdxl-lora.safetensors",
)
FIT = """async (workflow) => {
    await app.loadGraphData(workflow);
    const nodes = app.graph._nodes;
    const right = Math.max(...nodes.map((node) => node.pos[0] + node.size[0]));
    const low = Math.max(...nodes.map((node) => node.pos[1] + node.size[1]));
    const scale = Math.min((innerWidth - 90) / (right + 40), (innerHeight - 130) / (low + 70));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [75 / scale + 10, 85 / scale + 40];
    app.canvas.setDirty(true, true);
}"""


def main() -> None:
    """Start ComfyUI, look at the workflows, keep the pictures."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or "COMFYUI" not in os.environ:
        sys.exit("name a checkout of ComfyUI with COMFYUI=..., and Chromium with CHROMIUM=...")
    root = Path(os.environ["COMFYUI"]).resolve()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        base = Path(folder)
        for name in ("comfy", "custom_nodes"):
            (base / name).mkdir()
        (base / "comfy" / "samplers.py").touch()
        (base / "nodes.py").touch()
        install(base)
        name_models(base / "models")
        for name in MODELS:  # a page does not know nodes that have no file to choose
            (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
            (base / "models" / name).touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", folder]
        words += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--dont-print-server"]
        path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), torchvision_stand_in()])
        with (base / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=root, env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=log
            )
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        try:
            wait_for(f"http://127.0.0.1:{port}/object_info/RealignModel", process, base / "log")
            browser = playwright.chromium.launch(executable_path=chromium, args=options)
            page = browser.new_page(viewport={"width": 1440, "height": 820})
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_function("window.app?.extensionManager", timeout=120_000)
            page.wait_for_timeout(4000)
            for file in sorted((SOURCE / "example_workflows").glob("*.json")):
                look(page, file, base)
            browser.close()
        finally:
            process.terminate()
            process.wait(30)


def name_models(folder: Path) -> None:
    """Empty files under the names that the workflows have, or the page marks their loaders as wrong."""
    for kind in ("checkpoints", "loras"):
        (folder / kind).mkdir(parents=True)
        for file in (SOURCE / "example_workflows").glob("*.json"):
            for name in re.findall(r'"([^"]+\.safetensors)"', file.read_text(encoding="utf-8")):
                (folder / kind / name).touch()


def wait_for(address: str, process: Any, log: Path) -> None:
    """Until the server answers with our node."""
    for _ in range(240):
        try:
            if b"lam" in urllib.request.urlopen(address, timeout=5).read():
                return
        except OSError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.5)
    sys.exit(f"ComfyUI did not start: {log.read_text()[-3000:]}")


def look(page: Any, file: Path, folder: Path) -> None:
    """Open a workflow, and keep what the page shows."""
    page.evaluate(FIT, json.loads(file.read_text()))
    page.wait_for_timeout(1500)
    page.keyboard.press("Escape")
    page.wait_for_timeout(1000)
    page.screenshot(path=folder / "page.png")
    out = IMAGES / f"comfyui-{file.stem}.png"
    with Image.open(folder / "page.png") as image:
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(out, optimize=True)
    print(out)


if __name__ == "__main__":
    main()
