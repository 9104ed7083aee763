"""What kinds of anchors are those that ship? python benchmarks/characters.py --out characters [ANCHOR REWARD ...]

Examines the digits' anchors, or with `--world digits-flow` those of the flow digits, and pairs of an anchor's folder
and a reward that are named besides, each into a file of its own under OUT; those that are there are not examined again.
The thresholds of `algorithm.tilts` and `algorithm.pair_terms` were chosen with the digits' anchors of β = 30, 250 and
1000 by their reward: all others judge them. The table goes to benchmarks/characters.json, that of the flow digits to
characters-digits-flow.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deradiff.cli import terminal
from deradiff.examination import examine
from deradiff.files.records import slug
from deradiff.files.writing import write_json
from deradiff.worlds import digits, digits_flow

ANCHORS = {
    "digits": [f"digits:{beta:g}" for beta in digits.BETAS],
    "digits-flow": [*(f"digits-flow:{beta:g}" for beta in digits_flow.BETAS), "digits-flow:lora", "digits-flow:grpo"],
}
"""The anchors of each world that ships."""

CHOSEN_WITH = ("digits:30", "digits:250", "digits:1000")


def examined(world: str, anchor: str, reward: str | None, out: Path) -> dict[str, Any]:
    """The record of one anchor, from its file where that is there."""
    file = out / f"{slug(anchor, 120)}-{reward or 'own'}.json"
    if not file.exists():
        with terminal.progress(anchor) as on_progress:
            found = examine(world, anchor, reward=reward, on_progress=on_progress)
        found.plot(file.with_suffix(".png"))
        found.save(file)
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def shown(estimate: list[float | None] | None) -> str:
    """An estimate as words."""
    if estimate is None or None in estimate:
        return ""
    return f"{estimate[0]:.2f} ± {estimate[1]:.2f}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--world", choices=ANCHORS, default="digits")
    options.add_argument("--json", type=Path, help="in place of the file beside this one")
    options.add_argument("more", nargs="*", help="anchors' folders, each followed by its reward")
    given = options.parse_args()
    if len(given.more) % 2:
        options.error("name a reward behind every anchor")
    given.out.mkdir(parents=True, exist_ok=True)
    named: list[tuple[str, str | None]] = [(anchor, None) for anchor in ANCHORS[given.world]]
    named += list(zip(given.more[::2], given.more[1::2], strict=True))
    table = Table(
        "anchor", "reward", "kind", "tilt", "weighted at ½", "a tilt's", "slope at 0", "at 1", "pairs", "ratio at ¼"
    )
    rows: list[dict[str, Any]] = []
    for anchor, reward in named:
        record = examined(given.world, anchor, reward, given.out)
        tilt, pairs = record["tilt"], record["pairs"] or {"answer": "", "proportions": {}}
        half = next(row for row in tilt["at"] if row["lam"] == 0.5)
        name = anchor if anchor in ANCHORS[given.world] else Path(anchor).parent.name
        rows.append(record | {"anchor": name, "chosen with": anchor in CHOSEN_WITH})
        table.add_row(
            name,
            record["reward"],
            record["kind"],
            tilt["answer"],
            shown(half["weighted"]),
            f"{half['expected']:.2f}",
            shown(tilt["at"][0]["slope"]),
            shown(tilt["at"][-1]["slope"]),
            pairs["answer"],
            shown(pairs["proportions"].get("0.25")),
        )
    Console().print(table)
    other = "" if given.world == "digits" else f"-{given.world}"
    write_json(
        given.json or Path(__file__).with_name(f"characters{other}.json"),
        {"chosen with": list(CHOSEN_WITH), "anchors": rows},
    )


if __name__ == "__main__":
    main()
