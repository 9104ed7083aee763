"""The build of the digits world, from scikit-learn's digits to seven aligned models, stage by stage.

Each stage writes its result under the build folder once it is complete and is skipped when the result is there; long
stages checkpoint on the way. The same settings, machine and thread count give the same bits, interrupted or not.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from deradiff.files.folders import begin_or_resume
from deradiff.files.locks import taken
from deradiff.sweep.jobs import Report, reproducible, run_jobs
from studies.digits.anchors import draw_pairs, train_anchor, train_lora
from studies.digits.export import export
from studies.digits.reference import train_autoencoder, train_reference
from studies.digits.settings import Settings


def build(folder: Path, settings: Settings, report: Report) -> Path:
    """Make everything under `folder` and return `folder/files`: what ships, its loss curves and its measurements.

    Raises `ValueError` if `folder` holds a build with other settings.
    """
    begin_or_resume(folder, asdict(settings), "build")
    with taken(folder, "a build"):
        return _build(folder, settings, report)


def _build(folder: Path, settings: Settings, report: Report) -> Path:
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with reproducible(settings.threads):
        vae = train_autoencoder(folder, settings, report)
        train_reference(folder, settings, vae, report)
    run_jobs(
        [partial(draw_pairs, folder, settings, number) for number in range(settings.chunks)], settings.workers, report
    )
    anchors = [partial(train_anchor, folder, settings, beta) for beta in settings.betas]
    run_jobs([*anchors, partial(train_lora, folder, settings)], settings.workers, report)
    with reproducible(settings.threads):
        return export(folder, settings, partial(report, "export"))
