"""Devices by the names that people write."""

import torch


def device_called(name: str) -> str:
    """The device of that name; for `auto` the accelerator that torch sees, else the CPU.

    Raises `ValueError` for a name torch does not know, for a device that this machine does not have, and for one that
    holds no numbers (meta).
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError:
        raise ValueError(f"torch knows no device {name!r}; name one like cpu, cuda, cuda:1 or mps.") from None
    try:
        torch.empty(0, device=name).cpu()
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"there is no {name} to compute on here: torch {torch.__version__} sees no such device."
        ) from None
    return name


def device_name(device: str) -> str:
    """What a record calls a device: an NVIDIA GPU by its model."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
