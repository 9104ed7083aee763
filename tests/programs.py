"""What people run, in this process: the command, and the studies."""

from collections.abc import Sequence
from typing import Any

from typer.testing import CliRunner, Result

import studies.closed_forms.__main__
import studies.digits.__main__
from deradiff.cli import app

STUDIES = {"studies.closed_forms": studies.closed_forms.__main__.app, "studies.digits": studies.digits.__main__.app}


def invoked(words: Sequence[str], **how: Any) -> Result:
    """`deradiff WORDS`, or `python -m STUDY WORDS` where the first word is that of a study."""
    if words and words[0] in STUDIES:
        return CliRunner().invoke(STUDIES[words[0]], list(words[1:]), **how)
    return CliRunner().invoke(app, list(words), **how)
