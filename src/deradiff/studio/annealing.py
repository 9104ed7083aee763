"""The annealing curve on the page: started from a family, drawn by hand, kept by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradio as gr

from deradiff.algorithm.schedules import Schedule
from deradiff.studio import curves, html
from deradiff.studio.library import Library
from deradiff.studio.session import record_of, refusal, refusing

Changed = tuple[Any, ...]
"""Of the curve (where it is not what was changed), its family, the family's parameter, and the curve in Python."""


NONE = "# no schedule: λ stays the same"


class Annealing:
    """What happens to the page's curve."""

    def __init__(self, kept: Library) -> None:
        self.kept = kept

    def restep(self, curve: Any, steps: float) -> Any:
        """The number of steps changed, and with it where the curve is read."""
        return _shown(_read(curve), {"steps": steps})

    def drawn(self, curve: Any) -> Changed:
        """The curve was changed by hand: what stands beside it follows."""
        return self._beside(_read(curve))

    def family(self, name: str, curve: Any) -> Changed:
        """Start from a family, at its usual parameter; "spline" makes points of what is there."""
        with refusing():
            if name == "spline":
                present = _read(curve)
                points = [(0.0, 0.0), (1.0, 1.0)] if present is None else curves.points_of(present)
                return self._changed(curves.through(points), curve)
            usual = curves.FAMILIES[name][1] if name in curves.FAMILIES else 0.0
            return self._changed(curves.of_family(name, usual), curve)

    def parameter(self, name: str, parameter: float, curve: Any) -> Changed:
        """The family's parameter was set."""
        if name not in curves.FAMILIES:
            raise refusal("only power, step and sigmoid have a parameter: choose one first")
        with refusing():
            return self._changed(curves.of_family(name, parameter), curve)

    def use(self, name: str, curve: Any) -> Changed:
        """Take a curve that was kept."""
        try:
            kept = curves.read(self.kept.load(name))
            return _shown(kept, curve), *self._beside(kept)
        except (ValueError, TypeError) as error:
            raise refusal(error) from None

    def keep(self, name: str, curve: Any) -> tuple[Any, ...]:
        """Keep the curve by name."""
        with refusing():
            schedule = _read(curve)
            if schedule is None:
                raise ValueError("λ stays the same: there is no curve to keep")
            kept = self.kept.save(name or "", schedule.to_dict())
        return gr.update(choices=self.kept.names(), value=kept), "", html.status(f"Kept the curve as {kept}")

    def delete(self, name: str | None) -> tuple[Any, ...]:
        """Forget a curve that was kept."""
        with refusing():
            self.kept.delete(name or "")
        return gr.update(choices=self.kept.names(), value=None), gr.skip(), html.status(f"Deleted the curve {name}")

    def _changed(self, schedule: Schedule | None, curve: Any) -> Changed:
        present = _read(curve)
        if schedule is not None and present is not None:
            schedule = replace(schedule, over=present.over)
        return _shown(schedule, curve), *self._beside(schedule)

    def _beside(self, schedule: Schedule | None) -> Changed:
        """The family, its parameter, and the curve in Python."""
        family, value = curves.family_of(schedule)
        parameter = gr.skip()
        if family in curves.FAMILIES:
            letter, _, least, most = curves.FAMILIES[family]
            parameter = gr.update(value=value, label=f"Its {letter}, {least:g} to {most:g}")
        return family, parameter, exported(schedule)


def exported(schedule: Schedule | None) -> str:
    """The curve as it is written in Python."""
    return NONE if schedule is None else f"schedules.{schedule!r}"


def _read(curve: Any) -> Schedule | None:
    """The curve that a page sent; raises `gr.Error` for what is none."""
    try:
        return curves.read(record_of(curve))
    except (ValueError, TypeError) as error:
        raise refusal(error) from None


def _shown(schedule: Schedule | None, curve: Any) -> dict[str, Any]:
    """A curve for the page, with the sampling steps that stand in `curve`."""
    steps = curve.get("steps") if isinstance(curve, dict) else None
    if not isinstance(steps, int | float) or not 1 <= steps <= curves.MOST_STEPS:
        raise refusal(f"steps go from 1 to {curves.MOST_STEPS}")
    return {"schedule": None if schedule is None else schedule.to_dict(), "steps": int(steps)}
