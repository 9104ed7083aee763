"""What lies in a folder."""

from pathlib import Path


def file_names(folder: Path) -> list[str]:
    """The files below a folder, by their paths in it."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder and what they hold."""
    return {name: (folder / name).read_bytes() for name in file_names(folder)}
