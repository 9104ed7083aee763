"""`deradiff comfyui`: put the nodes where ComfyUI loads them."""

from pathlib import Path
from typing import Annotated

import typer

from deradiff.cli import terminal


def comfyui(
    path: Annotated[Path, typer.Argument(help="The folder of ComfyUI, with main.py in it.", show_default=False)],
) -> None:
    """Install the ComfyUI nodes: a folder in its custom_nodes. Run it with the Python that runs ComfyUI."""
    with terminal.refusing_wrong_input():
        from deradiff.integrations.comfyui.installing import install

        terminal.echo(str(install(path)))
