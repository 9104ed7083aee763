"""The notebooks run from top to bottom, and what is stored of them is what their sources say."""

import base64
import importlib
import io
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from hub_server import serving
from tiny import make

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in (EXAMPLES / "notebooks").glob("*.py"))
writer: Any = importlib.import_module("examples.write_notebooks")


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook: Any) -> list[Image.Image]:
    """All pictures that the cells have drawn, decoded."""
    encoded = [output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    decoded: list[Image.Image] = [Image.open(io.BytesIO(base64.b64decode(data))) for data in encoded]
    for picture in decoded:
        picture.load()
    return decoded


def printed(notebook: Any) -> str:
    return "".join(output["text"] for output in outputs(notebook) if output["output_type"] == "stream")


def shows(cell: Any) -> bool:
    return "\nshow(" in f"\n{cell.source}" or "\n    show(" in cell.source


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_the_source(name: str) -> None:
    path = EXAMPLES / f"{name}.ipynb"
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    fields = ("id", "cell_type", "source")
    cells = [
        [{field: cell[field] for field in fields} for cell in made.cells] for made in (stored, writer.notebook(name))
    ]
    assert cells[0] == cells[1], "python examples/write_notebooks.py"
    assert path.stat().st_size < 1.5e6


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_was_run_whole_or_not_at_all(name: str) -> None:
    stored = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    if name not in writer.RUN:
        assert all(cell.execution_count is None and not cell.outputs for cell in code)
        return
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs(stored)} <= {"stream", "display_data"}
    assert all(any("data" in output for output in cell.outputs) for cell in code if shows(cell))
    assert all(min(picture.size) > 50 for picture in pictures(stored))


def test_digits_run(tmp_path: Path) -> None:
    stored = nbformat.read(EXAMPLES / "digits.ipynb", as_version=4)
    run = writer.executed(writer.notebook("digits"), tmp_path)
    assert [picture.size for picture in pictures(run)] == [picture.size for picture in pictures(stored)]
    assert len(printed(run).splitlines()) == len(printed(stored).splitlines())
    assert (tmp_path / "digits-half" / "model_index.json").is_file()


def test_sdxl_runs_on_a_tiny_stand_in(tmp_path: Path) -> None:
    """The cells as they are but for the steps: the hub they talk to has tiny models under the published names."""
    parts: tuple[Any, ...] = make("sdxl")
    pipe, aligned, _ = parts
    pipe.save_pretrained(tmp_path / "reference", variant="fp16")
    aligned.save_pretrained(tmp_path / "aligned" / "unet")
    made = writer.notebook("sdxl")
    sampling = next(cell for cell in made.cells if "\nsteps = 30\n" in cell.source)
    sampling.source = sampling.source.replace("\nsteps = 30\n", "\nsteps = 4\n")
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with serving() as hub:
        hub.add("stabilityai/stable-diffusion-xl-base-1.0", tmp_path / "reference")
        hub.add("mhdang/dpo-sdxl-text2image-v1", tmp_path / "aligned")
        env = own | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        run = writer.executed(made, tmp_path, env | {"CUDA_VISIBLE_DEVICES": ""})
        assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.downloads()
    assert len(pictures(run)) == sum("\nshow(" in f"\n{cell.source}" for cell in run.cells) + 2
    assert "evaluations a step" in printed(run) and "baked images differ" in printed(run)
    half = StableDiffusionXLPipeline.from_pretrained(tmp_path / "sdxl-half")
    mean = (pipe.unet.conv_in.weight + aligned.conv_in.weight) / 2
    assert half.unet.conv_in.weight.allclose(mean, atol=1e-6)
