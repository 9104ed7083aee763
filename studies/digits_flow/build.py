"""The build of the digits' flow, stage by stage.

Each stage writes its result under the build folder once it is complete and is skipped when the result is there; long
stages checkpoint on the way. The same settings, machine and thread count give the same bits, interrupted or not.
"""

from dataclasses import asdict
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from deradiff.files.folders import begin_or_resume
from deradiff.files.locks import taken
from deradiff.sweep.jobs import Report, reproducible
from studies.digits_flow.reference import train_reference
from studies.digits_flow.settings import FlowSettings


def build(folder: Path, settings: FlowSettings, report: Report) -> Path:
    """Train the reference under `folder`, and return its folder.

    Raises `ValueError` if `folder` holds a build with other settings.
    """
    begin_or_resume(folder, asdict(settings), "build")
    with taken(folder, "a build"), reproducible(settings.threads):
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        train_reference(folder, settings, report)
    return folder / "reference"
