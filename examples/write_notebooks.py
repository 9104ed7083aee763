"""Writes the notebooks from `notebooks/*.py`: `python examples/write_notebooks.py`.

A source is a Python file whose cells begin with `# %%`, or `# %% [markdown]` for text. `digits` needs no GPU: it is
run, and stored with what it printed and drew. What libraries print to stderr, progress bars and notices, is left out.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent
RUN = ("digits",)
"""The notebooks that are stored with their outputs."""

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook(name: str) -> nbformat.NotebookNode:
    """The notebook without outputs, from its source."""
    source = (EXAMPLES / "notebooks" / f"{name}.py").read_text(encoding="utf-8")
    parts = re.split(r"^# %%(?: \[(\w+)\])?\n", source, flags=re.MULTILINE)[1:]
    cells = []
    for number, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if kind == "markdown":
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        new = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        cells.append(new(text.strip(), id=f"{name}-{number}"))
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL, "language_info": {"name": "python"}})


def executed(made: nbformat.NotebookNode, folder: Path, env: Mapping[str, str] | None = None) -> nbformat.NotebookNode:
    """The notebook with its outputs, run top to bottom in `folder`. Raises `CellExecutionError` where a cell fails.

    `env` is the environment of the kernel, this process's own by default.
    """
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(made, timeout=600, kernel_name="python3", resources=resources, record_timing=False)
    client.execute(**({} if env is None else {"env": dict(env)}))
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_stderr(output)]
            cell.metadata = {}
    made.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return made


def _is_stderr(output: Mapping[str, Any]) -> bool:
    return output["output_type"] == "stream" and output["name"] == "stderr"


def main() -> None:
    """Write all of them."""
    for source in sorted((EXAMPLES / "notebooks").glob("*.py")):
        made = notebook(source.stem)
        if source.stem in RUN:
            with tempfile.TemporaryDirectory() as folder:
                made = executed(made, Path(folder))
        nbformat.write(made, EXAMPLES / f"{source.stem}.ipynb")
        print(f"wrote {source.stem}.ipynb")


if __name__ == "__main__":
    main()
