"""A run's images, scores and provenance as one table, for other tools."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from deradiff.experiments.plan import Plan
from deradiff.experiments.running import contents
from deradiff.experiments.store import Store
from deradiff.files.outputs import replaced
from deradiff.files.writing import write_json


def write(plan: Plan, store: Store, out: Path, form: Literal["csv", "parquet"]) -> list[Path]:
    """Write `images.csv` or `images.parquet`, a row for every cell that was drawn, and `runs.json` into `out`.

    They take the places of an earlier export. Raises as `replaced` does, `ImportError` for Parquet without pyarrow.
    """
    save = _parquet if form == "parquet" else _csv
    if form == "parquet":
        _require_pyarrow()
    names = [f"images.{form}", "runs.json"]
    with replaced(out, "export", names) as folder:
        save(folder / names[0], list(rows(plan, store)))
        facts = {"plan": plan.model_dump(mode="json"), "weights": store.fact("fingerprints")}
        runs = {str(number): record for number, record in store.runs().items()}
        write_json(folder / names[1], facts | {"runs": runs})
    return [out / name for name in names]


def rows(plan: Plan, store: Store) -> Iterator[dict[str, Any]]:
    """Every cell that was drawn: where it stands in the experiment, what decided it, its file and its scores.

    `absent` says why there is no file: the safety checker blacked the image out, or why it failed.
    """
    images, diagnostics, unmade = store.drawn(), store.diagnostics(), store.unmade()
    scores = {name: store.scores(name) for name in plan.scores}
    for cell, item in contents(plan, store, fresh=False).cells.items():
        if item not in images and item not in unmade:
            continue
        about, seconds, run = diagnostics[item] if item in images else (unmade[item], None, None)
        drawing = cell.drawing
        yield {
            "image": item,
            "file": images[item].path.relative_to(store.folder).as_posix() if item in images else None,
            "sha256": images[item].sha256 if item in images else None,
            "arm": cell.arm.name,
            "method": cell.arm.method,
            "target": cell.arm.target,
            "lam": json.dumps(dict(cell.arm.anchors)),
            "schedule": cell.arm.schedule if drawing.schedule is not None else "",
            "particles": drawing.particles,
            "sampling": cell.arm.sampling,
            "prompt_set": cell.prompts,
            "prompt": drawing.prompt,
            "seed": drawing.seed,
            "seconds": seconds,
            "run": run,
            "log_weight": about.get("log_weight"),
            "path_kl": about.get("path_kl"),
            "cut_prompts": json.dumps(about["cut_prompts"], ensure_ascii=False) if "cut_prompts" in about else None,
            "absent": "blacked out" if about.get("blacked_out") else about.get("failed"),
            **{name: known.get(item) for name, known in scores.items()},
        }


def _csv(file: Path, table: list[dict[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(table[0]) if table else [])
        writer.writeheader()
        writer.writerows(table)


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'deradiff[align]', or export to csv") from None


def _parquet(file: Path, table: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), file)
