"""Draws docs/images/digits-truth-*.png from docs/data/digits-truth.json (`python -m studies.digits truth`)."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from studies.digits import truth_report

HERE = Path(__file__).parent


def main() -> None:
    """Draw both and print the tables of docs/tasks/digits-truth.md."""
    told = json.loads((HERE / "data" / "digits-truth.json").read_text())
    cases = told["cases"]
    with TemporaryDirectory() as folder:
        for path in truth_report.draw(cases, Path(folder)):
            (HERE / "images" / f"digits-truth-{path.name}").write_bytes(path.read_bytes())
    for table in (truth_report.table, truth_report.shares, truth_report.anchors_table, truth_report.inks_table):
        print(table(cases))
    # These models were trained by later code, of other bits, with their own anchors and control.
    for part in ("training", "training of both and of guidance 1.5"):
        print(truth_report.training_table(told[part]))


if __name__ == "__main__":
    main()
