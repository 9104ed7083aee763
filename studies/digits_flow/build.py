"""The build of the digits' flow, stage by stage.

Each stage writes its result under the build folder once it is complete and is skipped when the result is there; long
stages checkpoint on the way. The same settings, machine and thread count give the same bits, interrupted or not.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from deradiff.files.folders import begin_or_resume
from deradiff.files.locks import taken
from deradiff.sweep.jobs import Job, Report, reproducible, run_jobs
from studies.digits_flow.anchors import draw_pairs, train_anchor, train_grpo, train_lora
from studies.digits_flow.export import export
from studies.digits_flow.reference import train_reference
from studies.digits_flow.settings import FlowSettings


def build(folder: Path, settings: FlowSettings, report: Report) -> Path:
    """Make everything under `folder` and return `folder/files`: what ships, its loss curves and its measurements.

    Raises `ValueError` if `folder` holds a build with other settings.
    """
    begin_or_resume(folder, asdict(settings), "build")
    with taken(folder, "a build"):
        run_jobs([partial(train_reference, folder, settings)], 1, report)
        run_jobs([partial(draw_pairs, folder, settings)], 1, report)
        anchors: list[Job] = [partial(train_anchor, folder, settings, beta) for beta in settings.betas]
        others: list[Job] = [partial(train, folder, settings) for train in (train_lora, train_grpo)]
        run_jobs([*anchors, *others], settings.workers, report)
        with reproducible(1):
            return export(folder, settings, partial(report, "export"))
