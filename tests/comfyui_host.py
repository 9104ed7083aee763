"""A checkout of ComfyUI on the path, and nothing of it without one: COMFYUI names its folder.

Its packages have to be there (`make test-comfyui` says which). torchvision alone has a stand-in, for transforms that
only Cosmos' models want: a build of it for the CPU is hard to come by.
"""

import os
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PATH = os.environ.get("COMFYUI")

WITHOUT = "no checkout of ComfyUI was given: make test-comfyui COMFYUI=path"

PACKAGES = ("einops", "torchsde", "aiohttp", "yarl", "av", "spandrel", "kornia", "alembic", "sqlalchemy", "psutil")


@cache
def require_comfyui() -> Path:
    """Make `import comfy` work, on the CPU; returns the checkout. Raises `RuntimeError` for what is missing."""
    if PATH is None:
        raise RuntimeError(WITHOUT)
    root = Path(PATH).resolve()
    if not (root / "comfy" / "samplers.py").is_file():
        raise RuntimeError(f"{root} is no checkout of ComfyUI: it has no comfy/samplers.py")
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise RuntimeError(f"ComfyUI needs {', '.join(missing)}: install them, or name their folder in PYTHONPATH")
    if find_spec("torchvision") is None:
        sys.path.append(torchvision_stand_in())
    sys.path.append(str(root))
    from comfy.cli_args import args

    args.cpu = True
    return root


def torchvision_stand_in() -> str:
    """A folder that has a `torchvision` which imports, and does nothing."""
    folder = Path(tempfile.mkdtemp(prefix="torchvision-stand-in-"))
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import transforms\n")
    transforms = package / "transforms"
    transforms.mkdir()
    (transforms / "__init__.py").write_text("")
    # What spandrel imports: without its nodes the page does not know which node loads which kind of model.
    (transforms / "functional.py").write_text("InterpolationMode = rotate = normalize = None\n")
    return str(folder)
